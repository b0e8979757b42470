"""`KVSpliceConfig` refuses every setting that cannot work, picks ranks and layers, and survives a trip through JSON."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvsplice_hf.config import SCHEMA_VERSION, KVSpliceConfig
from kvsplice_hf.errors import ConfigError


# Every field away from its default (the budget in one of its forms), and the other form of each field that has two.
EVERY_FIELD = KVSpliceConfig(
    compression_ratio=0.25,
    layers=[3, 1],
    layer_pattern="transformer.h",
    use_layernorm=True,
    attention="expanded",
    materialise_weights=False,
    init="orthogonal",
    sink_tokens=0,
)
ROUND_TRIPS = {
    "defaults": KVSpliceConfig(),
    "every_field": EVERY_FIELD,
    "rank_and_last": KVSpliceConfig(rank=7, layers="last:2"),
    "times_and_exact_keys": KVSpliceConfig(compression=3, keys="exact"),
    "exact_values": KVSpliceConfig(values="exact"),
}

INVALID = {
    "ratio_of_zero": ({"compression_ratio": 0}, r"`compression_ratio` is 0; .* in \(0, 1\]"),
    "ratio_above_one": ({"compression_ratio": 1.5}, r"`compression_ratio` is 1\.5"),
    "ratio_below_zero": ({"compression_ratio": -1}, r"`compression_ratio` is -1"),
    "ratio_not_a_number": ({"compression_ratio": float("nan")}, r"`compression_ratio` is nan"),
    "materialise_weights_number": ({"materialise_weights": 1}, r"`materialise_weights` is 1; .* True or False"),
    "ratio_boolean": ({"compression_ratio": True}, r"`compression_ratio` is True"),
    "ratio_text": ({"compression_ratio": "x"}, r"`compression_ratio` is 'x'"),
    "rank_of_zero": ({"rank": 0}, r"`rank` is 0; .* from 1"),
    "rank_fractional": ({"rank": 1.5}, r"`rank` is 1\.5; it must be an integer"),
    "rank_boolean": ({"rank": True}, r"`rank` is True"),
    "ratio_and_rank": (
        {"compression_ratio": 0.5, "rank": 8},
        r"one budget, not `compression_ratio` \(0\.5\) and `rank` \(8\)",
    ),
    "ratio_and_bytes": ({"compression_ratio": 0.5, "bytes_per_token": 9}, r"one budget, not .*`bytes_per_token` \(9\)"),
    "bytes_of_zero": ({"bytes_per_token": 0}, r"`bytes_per_token` is 0; .* positive number of bytes"),
    "bytes_infinite": ({"bytes_per_token": float("inf")}, r"`bytes_per_token` is inf"),
    "bits_text": ({"bits": "4"}, r"`bits` is '4'; .* bits per number"),
    "times_below_one": ({"compression": 0.25}, r"`compression` is 0\.25; .* 1 or more: stock bytes in bf16 over"),
    "times_boolean": ({"compression": True}, r"`compression` is True"),
    "times_and_bits": ({"compression": 4, "bits": 4}, r"one budget, not `bits` \(4\) and `compression` \(4\)"),
    "keys": ({"keys": "raw"}, r"`keys` is 'raw'; .*'unrotated', 'rotated', 'exact'"),
    "values": ({"values": "raw"}, r"`values` is 'raw'; .*'coded', 'exact'"),
    "nothing_coded": ({"keys": "exact", "values": "exact"}, r"both \"exact\"; one of them has to be coded"),
    "exact_keys_of_a_rank": ({"keys": "exact", "rank": 4}, r"`keys` is \"exact\"; it is for packed rows"),
    "exact_keys_of_another_codec": (
        {"keys": "exact", "codec": "x"},
        r"`keys` is \"exact\"; the codec 'x' cannot leave",
    ),
    "allocation": ({"allocation": "best"}, r"`allocation` is 'best'; .*'auto', 'global', 'layer'"),
    "layernorm_on_packed_rows": (
        {"bits": 4, "use_layernorm": True},
        r"`use_layernorm` works on codes stored as numbers",
    ),
    "layers_last_none": ({"layers": "last:0"}, r"`layers` is 'last:0'; it must be \"all\", \"last:n\""),
    "layers_cheapest_none": ({"layers": "fisher:0"}, r"`layers` is 'fisher:0'; it must be .* \"fisher:n\""),
    "layers_first": ({"layers": "first:2"}, r"`layers` is 'first:2'"),
    "layers_empty": ({"layers": []}, r"`layers` is \[\]"),
    "layers_negative": ({"layers": [-1]}, r"`layers` is \[-1\]"),
    "layers_boolean": ({"layers": [True]}, r"`layers` is \[True\]"),
    "layers_number": ({"layers": 3}, r"`layers` is 3"),
    "attention": ({"attention": "fast"}, r"`attention` is 'fast'; .*'auto', 'absorbed', 'expanded'"),
    "init": ({"init": "x"}, r"`init` is 'x'; .*'svd', 'orthogonal', 'identity'"),
    "sinks_negative": ({"sink_tokens": -1}, r"`sink_tokens` is -1; .* 0 or more"),
    "sinks_fractional": ({"sink_tokens": 1.5}, r"`sink_tokens` is 1\.5"),
    "layernorm_text": ({"use_layernorm": "no"}, r"`use_layernorm` is 'no'; it must be True or False"),
    "pattern_empty": ({"layer_pattern": ""}, r"`layer_pattern` is ''"),
    "newer_schema": ({"schema_version": SCHEMA_VERSION + 1}, r"`schema_version` is 2; .* version 1\. Upgrade"),
}


@pytest.mark.parametrize(
    ("given", "ratio", "rank"),
    [
        ({}, None, None),
        ({"compression_ratio": 1}, 1, None),
        ({"rank": 3}, None, 3),
    ],
)
def test_a_budget_of_rank_is_kept_as_given(given: dict[str, Any], ratio: float | None, rank: int | None) -> None:
    config = KVSpliceConfig(**given)
    assert (config.compression_ratio, config.rank) == (ratio, rank)


@pytest.mark.parametrize(("settings", "phrase"), INVALID.values(), ids=INVALID)
def test_a_setting_that_cannot_work_is_named_in_the_error(settings: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        KVSpliceConfig(**settings)
    with pytest.raises(ConfigError, match=phrase):
        KVSpliceConfig.from_dict(settings)


def test_a_superscript_is_not_a_number_of_layers() -> None:
    with pytest.raises(ConfigError, match="`layers` is 'last:²'"):
        KVSpliceConfig(layers="last:²")


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_config_is_equal_after_a_trip_through_json(config: KVSpliceConfig, tmp_path: Path) -> None:
    assert KVSpliceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = tmp_path / "config.json"
    config.save_json(path)
    assert KVSpliceConfig.from_json(path) == config
    assert KVSpliceConfig.from_json(str(path)) == config


def test_json_names_every_field_in_order_and_lists_layers() -> None:
    values = EVERY_FIELD.to_dict()
    of_other_kinds = {"codec", "keys", "key_block", "values", "compression"}
    of_other_kinds |= {"transform", "key_rank", "knots", "spline_epochs", "spline_learning_rate"}
    assert list(values) == sorted({field.name for field in dataclasses.fields(KVSpliceConfig)} - of_other_kinds)
    assert values["layers"] == [3, 1]
    assert values["schema_version"] == SCHEMA_VERSION


def test_json_names_the_codec_of_packed_rows() -> None:
    assert "codec" not in KVSpliceConfig(rank=2).to_dict()
    for codec in ("trellis", "rows", "other"):
        config = KVSpliceConfig(codec=codec)
        assert config.to_dict()["codec"] == codec
        assert KVSpliceConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("values", "phrase"), [({"codec": ""}, "registered"), ({"codec": "x", "rank": 2}, "packs")])
def test_a_codec_is_a_name_and_for_packed_rows_only(values: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        KVSpliceConfig(**values)


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"Unknown .*\['ranks'\]; known: .*'rank'"):
        KVSpliceConfig.from_dict({"ranks": 3})


def test_a_newer_file_with_fields_of_its_own_is_refused_for_its_version() -> None:
    with pytest.raises(ConfigError, match=r"`schema_version` is 2; .* Upgrade"):
        KVSpliceConfig.from_dict({"schema_version": SCHEMA_VERSION + 1, "from_the_future": 1})


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (None, "No such file"),
        (b"{", "Cannot read a KVSpliceConfig"),
        (b"\xff\xfe{}", "Cannot read a KVSpliceConfig"),
        (b"[1]", "holds a JSON list; a KVSpliceConfig is a JSON object"),
        (b'{"rank": 0}', "`rank` is 0"),
    ],
    ids=["missing", "not_json", "not_text", "not_an_object", "invalid_value"],
)
def test_a_file_that_cannot_be_used_is_named_in_the_error(content: bytes | None, phrase: str, tmp_path: Path) -> None:
    path = tmp_path / "splice.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(phrase)) as caught:
        KVSpliceConfig.from_json(path)
    assert content == b'{"rank": 0}' or str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "kv_lora_rank", "rank"),
    [
        ({"compression_ratio": 0.5}, 512, 256),
        ({"compression_ratio": 0.5}, 7, 4),
        ({"compression_ratio": 0.3}, 11, 3),
        ({"compression_ratio": 0.001}, 48, 1),
        ({"compression_ratio": 1.0}, 33, 33),
        ({"compression_ratio": 1}, 33, 33),
        ({"rank": 5}, 48, 5),
        ({"rank": 48}, 48, 48),
    ],
)
def test_the_rank_follows_the_budget(settings: dict[str, Any], kv_lora_rank: int, rank: int) -> None:
    assert KVSpliceConfig(**settings).rank_for(kv_lora_rank, "layers.0") == rank


@pytest.mark.parametrize(
    ("settings", "row_dim", "budget"),
    [
        ({"sink_tokens": 0}, 576, 288.0),  # a quarter of the stock row in bf16
        ({"bytes_per_token": 193, "sink_tokens": 0}, 385, 193.0),
        ({"bits": 4, "sink_tokens": 0}, 576, 288.0),
        ({"compression": 4, "sink_tokens": 0}, 576, 288.0),
        ({"compression": 6, "sink_tokens": 0}, 576, 192.0),
        # Four exact tokens of 385 bf16 numbers and a position, spread over 4096 tokens.
        ({"bytes_per_token": 193}, 385, 193 - 4 * (770 + 8) / 4096),
    ],
)
def test_a_budget_of_bytes_leaves_room_for_the_exact_tokens(
    settings: dict[str, Any], row_dim: int, budget: float
) -> None:
    config = KVSpliceConfig(**settings)
    assert config.is_packed
    assert config.row_budget(row_dim) == pytest.approx(budget)
    with pytest.raises(ConfigError, match="follows from calibration"):
        config.rank_for(512, "layers.0")


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"bytes_per_token": 9}, r"Give `bytes_per_token` of at least 20\.01, or fewer"),
        ({"bits": 1}, r"Give `bytes_per_token` of at least 20\.01, or `bits` of 2\.51, or fewer"),
        (
            {"compression": 16},
            r"Give `bytes_per_token` of at least 20\.01, or `compression` of at most 6\.39, or fewer",
        ),
        ({"compression": 16, "keys": "exact"}, r"row with exact `keys`, .*or fewer `sink_tokens`, or code `keys`"),
    ],
)
def test_a_budget_below_the_smallest_row_names_it_in_the_form_of_the_budget(
    settings: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(ConfigError, match=phrase) as error:
        KVSpliceConfig(**settings, sink_tokens=0).row_budget(64, shared=0.001, smallest=20)
    assert "20.0 for the smallest row" in str(error.value)


def test_a_rank_above_the_latent_names_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"`rank` is 49, but model\.layers\.3\.self_attn has kv_lora_rank 48"):
        KVSpliceConfig(rank=49).rank_for(48, "model.layers.3.self_attn")


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", (1, 3, 5)),
        ("last:1", (5,)),
        ("last:3", (1, 3, 5)),
        ("fisher:2", (1, 3, 5)),  # among which calibration chooses
        ([5, 1], (1, 5)),
        ((3, 3), (3,)),
        (range(1, 2), (1,)),
    ],
)
def test_layers_are_chosen_among_those_that_hold_a_latent(layers: Any, chosen: tuple[int, ...]) -> None:
    assert KVSpliceConfig(layers=layers).select_layers((1, 3, 5)) == chosen


@pytest.mark.parametrize(
    ("layers", "phrase"),
    [
        ([1, 2, 9], r"`layers` names \[2, 9\], .*Layers that do: \[1, 3, 5\]"),
        ("last:4", r"`layers` is 'last:4', but only 3 layers hold a latent"),
        ("fisher:4", r"`layers` is 'fisher:4', but only 3 layers hold a latent"),
    ],
)
def test_layers_that_hold_no_latent_cannot_be_chosen(layers: Any, phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        KVSpliceConfig(layers=layers).select_layers((1, 3, 5))


def test_a_config_is_frozen_and_can_be_a_dictionary_key() -> None:
    config = KVSpliceConfig(layers=[0, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]
    assert {config: "found"}[KVSpliceConfig(layers=(0, 2))] == "found"
    assert config != KVSpliceConfig(layers=(0, 1))
