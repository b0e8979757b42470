"""Keys coded before their rotation: every kind of rotation is undone and redone, whatever is done to the cache.

That rows of this kind work on all architectures and in all modes of `generate` is the subject of `test_packed` and the
other contracts: they are the default there.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract_models import batch_for, cached_logits, no_cache_logits, rms
from test_packed import calibrated, packed
from tiny_models import TINY_MODELS, build
from transformers import DynamicCache, StaticCache

from kvsplice_hf import (
    CacheMismatchError,
    KVSpliceConfig,
    UpstreamChangedError,
    cache_nbytes,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    splice_disabled,
)
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.cache.turns import TurnTable
from kvsplice_hf.code.keys import (
    TURN_STEPS,
    KeyProjection,
    Pairs,
    angle_columns,
    half_pairs,
    neighbour_pairs,
    redo_turns,
    turns_of,
    undo_turns,
)
from kvsplice_hf.patch.hooks import enter_attention
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.upstream import cache_argument, cache_of


PAIRINGS = {"half": half_pairs, "neighbours": neighbour_pairs}
COLUMNS = torch.arange(4)
# Every number of a row in bf16, so that what is left of a difference is a wrong rotation and not the coding.
EXACT_BITS = 17.0
# Kinds of RoPE, as settings of the tiny DeepSeek-V3; in those marked so the frequencies depend on what was seen.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
}


def with_rope(rope: str, **settings: Any) -> Any:
    """The tiny DeepSeek-V3 with this RoPE, its rows in bf16."""
    model = build("deepseek_v3")
    model.config.rope_parameters = dict(ROPES[rope])
    model.config.max_position_embeddings = 64
    with torch.random.fork_rng():
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    config = KVSpliceConfig(bits=EXACT_BITS, sink_tokens=0, **settings)
    return patch_model_with_kvsplice(model, config, calibration=calibrated_without_sinks(model))


def calibrated_without_sinks(model: Any) -> Any:
    calibrator = calibrated(model)
    calibrator.sink_tokens = 0
    return calibrator


def tables_of(cache: Any) -> list[TurnTable]:
    found = [layer.table for layer in cache.layers if isinstance(layer, SplicedLayerMixin) and layer.table is not None]
    return list({id(table): table for table in found}.values())


# ------------------------------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_what_is_undone_is_redone_whatever_the_angles(pairing: str) -> None:
    pairs = Pairs(*PAIRINGS[pairing](COLUMNS))
    keys = torch.randn(3, 5, 8)
    turns = torch.randint(0, TURN_STEPS, (3, 5, 4), dtype=torch.uint8)
    torch.testing.assert_close(redo_turns(undo_turns(keys, turns, pairs), turns, pairs), keys, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_rotation_is_undone_up_to_half_a_step_of_the_circle(pairing: str) -> None:
    pairs = Pairs(*PAIRINGS[pairing](COLUMNS))
    key, angle = torch.randn(6, 8), 20 * torch.rand(6, 4)
    cos, sin = angle.cos(), angle.sin()
    rotated = torch.empty_like(key)
    first, second = key[:, pairs.first], key[:, pairs.second]
    rotated[:, pairs.first] = first * cos - second * sin
    rotated[:, pairs.second] = first * sin + second * cos
    undone = undo_turns(rotated, turns_of((cos, sin), COLUMNS), pairs)
    assert (undone - key).norm(dim=-1).le(1.01 * torch.pi / TURN_STEPS * key.norm(dim=-1)).all()


EMBEDDINGS = {
    "each angle once": lambda cos, sin: (cos, sin),
    "halves": lambda cos, sin: (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)),
    "twins": lambda cos, sin: (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)),
    "complex": lambda cos, sin: torch.complex(cos, sin),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_angles_are_read_from_every_form_in_which_models_hand_them_over(kind: str) -> None:
    steps = torch.randint(0, TURN_STEPS, (2, 3, 4))
    angle = steps * (2 * torch.pi / TURN_STEPS)
    embeddings = EMBEDDINGS[kind](angle.cos(), angle.sin())
    columns = angle_columns(embeddings, 8)
    assert columns is not None
    assert torch.equal(turns_of(embeddings, columns).long(), steps)


@pytest.mark.parametrize(
    "embeddings",
    [None, "angles", torch.zeros(1, 3, 4), (torch.zeros(1, 3, 4),), (torch.rand(1, 3, 8), torch.rand(1, 3, 8))],
    ids=["none", "text", "real numbers", "one of two", "angles of no known form"],
)
def test_what_is_no_rotation_is_not_taken_for_one(embeddings: Any) -> None:
    assert angle_columns(embeddings, 8) is None


@pytest.mark.parametrize("name", TINY_MODELS)
def test_calibration_finds_the_pairs_that_a_model_rotates(name: str) -> None:
    """With them undone, a key is what the projection gave before the rotation, its numbers in some order."""
    model = packed(name)
    before: dict[int, torch.Tensor] = {}
    hooks, sites = [], [(site, state.splice.keys) for site, state in patched_sites(model)]
    if all(keys is None for _, keys in sites):
        assert name in ("glm5_next", "kimi_linear"), "no rotation was seen"
        return
    stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(layer_idx: int, splice: Any) -> None:
        original = splice.round_trip

        def round_trip(latent: torch.Tensor, k_rot: torch.Tensor, turns: torch.Tensor) -> Any:
            stored[layer_idx] = k_rot, turns
            return original(latent, k_rot, turns)

        splice.round_trip = round_trip

    for site, keys in sites:
        if keys is not None:
            watch(site.layer_idx, site.module.kvsplice)
            projection = getattr(site.module, "kv_a_proj_with_mqa", None) or site.module.kv_a_proj
            keep = lambda _, __, output, index=site.layer_idx: before.__setitem__(index, output)  # noqa: E731
            hooks.append(projection.register_forward_hook(keep))
    no_cache_logits(model, *batch_for(name))
    for site, keys in sites:
        if keys is None:
            continue
        k_rot, turns = stored[site.layer_idx]
        undone = undo_turns(k_rot, turns, Pairs(*keys.pairs))[:, 0]
        plain = before[site.layer_idx][..., -site.qk_rope_head_dim :]
        scale = undone.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True).clamp(min=1e-9)  # of yarn
        difference = (undone / scale.clamp(min=1e-9)).sort().values - plain.sort().values
        assert rms(difference) < 0.1 * rms(plain)


# --------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("positions", ["from 0", "shifted", "with gaps", "apart"])
@pytest.mark.parametrize("rope", ROPES)
def test_keys_keep_the_rotation_that_they_were_stored_with(rope: str, positions: str) -> None:
    model = with_rope(rope)
    ids = torch.randint(8, 100, (2, 30), generator=torch.Generator().manual_seed(3))
    step = 2 if positions == "with gaps" else 1
    position_ids = (step * torch.arange(30)).expand(2, -1).clone()
    position_ids += {"shifted": torch.tensor([[7], [7]]), "apart": torch.tensor([[0], [3]])}.get(
        positions, torch.zeros(2, 1, dtype=torch.long)
    )

    def logits() -> torch.Tensor:
        found, cache = [], DynamicCache(config=model.config)
        for part in (slice(0, 12), slice(12, 13), slice(13, 20), *(slice(i, i + 1) for i in range(20, 30))):
            with torch.no_grad():
                found.append(model(ids[:, part], position_ids=position_ids[:, part], **cache_argument(cache)).logits)
        return torch.cat(found, dim=1)

    spliced = logits()
    with splice_disabled(model):
        expected = logits()
    assert rms(spliced - expected) < 0.02 * rms(expected)


def test_a_batch_shares_one_table_and_layers_share_their_slots() -> None:
    model, (ids, mask) = packed("deepseek_v3"), batch_for("deepseek_v3")
    _, cache = cached_logits(model, ids, mask)
    (table,) = tables_of(cache)
    assert table.used == ids.shape[1], "a slot per position, not one per token"
    layers = [layer for layer in cache.layers if isinstance(layer, SplicedLayerMixin)]
    assert len(layers) > 1
    assert len({layer.values.data_ptr() for layer in layers}) == 1


def test_layers_of_different_rotary_embeddings_have_tables_of_their_own() -> None:
    model, batch = packed("dots3_note"), batch_for("dots3_note")
    _, cache = cached_logits(model, *batch)
    assert len(tables_of(cache)) == len(model.config.get_text_config(decoder=True).rope_parameters) == 3


CHANGES = {
    "cropped": lambda cache: cache.crop(-3),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_cache_is_done_to_the_rotations(change: str, kind: str) -> None:
    model = with_rope("yarn")
    ids = torch.randint(8, 100, (2, 12), generator=torch.Generator().manual_seed(4))
    positions = torch.stack([torch.arange(12), torch.arange(12) + 5])

    def logits() -> torch.Tensor:
        cache: Any = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=24)
        with torch.no_grad():
            model(ids, position_ids=positions, **cache_argument(cache))
            CHANGES[change](cache)
            rows = {"cropped": [0, 1], "reordered": [1, 0], "repeated": [0, 0, 1, 1], "selected": [1]}[change]
            start = 9 if change == "cropped" else 12
            new = ids[rows, :4]
            where = positions[rows, :1] + start + torch.arange(4)
            return model(new, position_ids=where, **cache_argument(cache)).logits

    if kind == "static" and change in ("repeated", "selected"):
        pytest.skip("static caches have a batch of fixed size")
    spliced = logits()
    with splice_disabled(model):
        expected = logits()
    assert rms(spliced - expected) < 0.02 * rms(expected)


def test_rows_taken_out_by_hand_keep_their_positions() -> None:
    """As methods of eviction do; tokens that are equal have equal rows in the first layer, and other positions."""
    model = with_rope("default")
    ids = torch.full((1, 20), 11)
    kept = torch.tensor([0, 3, 7, 8, 15, 19])

    def logits() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, **cache_argument(cache))
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
            positions = torch.tensor([[20]])
            return model(ids[:, :1], position_ids=positions, **cache_argument(cache)).logits

    spliced = logits()
    with splice_disabled(model):
        expected = logits()
    assert rms(spliced - expected) < 0.02 * rms(expected)


def test_rows_taken_out_without_their_slots_are_refused() -> None:
    model = with_rope("default")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((1, 8), 11), **cache_argument(cache))
        cache.layers[0].keys = cache.layers[0].keys[:, :, ::2]
        with pytest.raises(CacheMismatchError, match=r"layer\.values = layer\.values\[:, :, kept\]"):
            model(torch.full((1, 1), 11), **cache_argument(cache))


def test_a_copied_cache_goes_on_by_itself() -> None:
    model, (ids, _) = packed("deepseek_v3"), batch_for("deepseek_v3")
    with torch.no_grad():
        first = cache_of(model(ids[:, :6], use_cache=True))
        second = copy.deepcopy(first)
        expected = model(ids[:, 6:], **cache_argument(first)).logits
        model(ids[:, :2], **cache_argument(first))
        found = model(ids[:, 6:], **cache_argument(second)).logits
    torch.testing.assert_close(found, expected)


def test_a_cache_made_in_inference_mode_can_be_continued_outside() -> None:
    model, (ids, _) = packed("deepseek_v3"), batch_for("deepseek_v3")
    with torch.inference_mode():
        cache = cache_of(model(ids[:, :6], use_cache=True))
    with torch.no_grad():
        model(ids[:, 6:], **cache_argument(cache))
    assert cache.get_seq_length() == ids.shape[1]


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_module_that_gets_no_angles_is_refused(use_cache: bool) -> None:
    model, (ids, mask) = packed("deepseek_v3"), batch_for("deepseek_v3")

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter_attention(module, args, {name: kwargs[name] for name in kwargs if name != "position_embeddings"})

    for site, state in patched_sites(model):
        state.hooks[0].remove()
        site.module.register_forward_pre_hook(enter, with_kwargs=True)
    with pytest.raises(UpstreamChangedError, match="position_embeddings"), torch.no_grad():
        model(ids, attention_mask=mask, use_cache=use_cache)


# ------------------------------------------------------------------------------------------------------------ files


def test_rotated_keys_are_saved_as_before_there_were_others(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    config = KVSpliceConfig(bits=5, keys="rotated", sink_tokens=2)
    patch_model_with_kvsplice(model, config, calibration=calibrated(model))
    folder = save_kvsplice(model, tmp_path / "splice")
    description = json.loads((folder / "kvsplice_config.json").read_text())
    assert description["schema_version"] == 1
    loaded = load_kvsplice(build("deepseek_v3"), folder)
    batch = batch_for("deepseek_v3")
    assert torch.equal(no_cache_logits(model, *batch), no_cache_logits(loaded, *batch))
    assert all(state.splice.keys is None for _, state in patched_sites(loaded))


def test_unrotated_keys_are_refused_by_releases_that_do_not_know_them(tmp_path: Path) -> None:
    folder = save_kvsplice(packed("deepseek_v3"), tmp_path / "splice")
    assert json.loads((folder / "kvsplice_config.json").read_text())["schema_version"] == 2


def test_casting_a_model_leaves_the_pairs_as_they_are() -> None:
    keys = KeyProjection(8, 3)
    assert keys.to(torch.bfloat16).pairs.dtype == torch.int64
    assert keys.mean.dtype == torch.bfloat16


def test_what_layers_share_is_counted_once() -> None:
    model, (ids, mask) = packed("deepseek_v3"), batch_for("deepseek_v3")
    _, cache = cached_logits(model, ids, mask)
    rows = sum(layer.keys.nbytes + sum(t.nbytes for t in layer.exact) for layer in cache.layers)
    tokens = ids.shape[0] * ids.shape[1]
    assert cache_nbytes(cache) - rows == 4 * tokens + ids.shape[1] * 4  # slots, and four angles per position
