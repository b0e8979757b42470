"""A saved splice gives the same logits in another process's model, and a damaged one leaves the model alone."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import TINY_MODELS, build, tiny_batch
from torch import nn

from kvsplice_hf.code.files import CONFIG_NAME, WEIGHTS_NAME
from kvsplice_hf.config import SCHEMA_VERSION, KVSpliceConfig
from kvsplice_hf.errors import CheckpointError, NotMLAError, PatchStateError, UnsupportedError
from kvsplice_hf.manage.loading import load_kvsplice
from kvsplice_hf.patch.saving import save_kvsplice
from kvsplice_hf.patch.state import find_patch, is_patched
from kvsplice_hf.patching import patch_model_with_kvsplice
from kvsplice_hf.upstream import cache_argument, cache_of


NAME = "deepseek_v3"
R = 32  # kv_lora_rank of the tiny deepseek_v3
RANK = 12


def patched(
    name: str = NAME, config: KVSpliceConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """A patched model whose splice is no longer as it was initialised."""
    model = patch_model_with_kvsplice(build(name, dtype), config or KVSpliceConfig(rank=RANK, sink_tokens=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in splice_state(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def splice_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".kvsplice." in name}


@torch.no_grad()
def outputs(model: nn.Module, name: str = NAME) -> torch.Tensor:
    """Logits (of a bare model: hidden states) at the real positions; the last token is decoded from the cache."""
    ids, mask = tiny_batch(name)
    first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    last = model(ids[:, -1:], attention_mask=mask, **cache_argument(cache_of(first)))
    return torch.cat([first[0], last[0]], dim=1)[mask.bool()]


def read_json(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG_NAME).read_text())


def write_json(directory: Path, content: Any) -> None:
    (directory / CONFIG_NAME).write_text(json.dumps(content))


def write_weights(directory: Path, content: bytes) -> None:
    """With a matching hash, as a tool that rewrites both files would."""
    (directory / WEIGHTS_NAME).write_bytes(content)
    write_json(directory, read_json(directory) | {"weights_sha256": hashlib.sha256(content).hexdigest()})


ROUND_TRIPS = {
    "defaults": (NAME, KVSpliceConfig(compression_ratio=0.5), torch.float32),
    "bf16": (NAME, KVSpliceConfig(compression_ratio=0.5), torch.bfloat16),
    "layernorm": (NAME, KVSpliceConfig(rank=RANK, use_layernorm=True, sink_tokens=0), torch.float32),
    "one_layer": (NAME, KVSpliceConfig(rank=9, layers=[1], init="orthogonal", attention="expanded"), torch.float32),
    "mixed_ranks": ("dots3_note", KVSpliceConfig(compression_ratio=0.25), torch.float32),
    "last_two_of_mixed_ranks": ("dots3_note", KVSpliceConfig(compression_ratio=0.5, layers="last:2"), torch.float32),
    "reused_latents": ("mistral_large4", KVSpliceConfig(compression_ratio=0.5), torch.float32),
}


@pytest.mark.parametrize(("name", "config", "dtype"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_saved_splice_gives_bit_identical_logits_in_a_fresh_model(
    name: str, config: KVSpliceConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    if not TINY_MODELS[name].available:
        pytest.skip(f"the installed transformers has no {name}")
    model = patched(name, config, dtype=dtype)
    save_kvsplice(model, tmp_path / "first")
    fresh = build(name, dtype)
    assert load_kvsplice(fresh, tmp_path / "first") is fresh
    assert torch.equal(outputs(fresh, name), outputs(model, name))
    assert find_patch(fresh)[1].config == config
    # Nothing is lost on the way: what is saved again is the same file.
    save_kvsplice(fresh, tmp_path / "second")
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_loading_into_a_patched_model_replaces_its_parameters_and_keeps_its_settings(tmp_path: Path) -> None:
    saved = patched(seed=1)
    save_kvsplice(saved, str(tmp_path))
    settings = KVSpliceConfig(rank=RANK, sink_tokens=0, attention="expanded", init="identity")
    model = patched(config=settings, seed=2)
    load_kvsplice(model, str(tmp_path))
    for name, tensor in splice_state(saved).items():
        assert torch.equal(splice_state(model)[name], tensor)
    assert find_patch(model)[1].config == settings
    # A splice replaces another one's numbers only: the model behaves as one that had them from the start.
    expected = patched(config=settings)
    expected.load_state_dict(saved.state_dict())
    assert torch.equal(outputs(model), outputs(expected))


def test_loading_casts_the_splice_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    save_kvsplice(patched(), tmp_path)
    model = load_kvsplice(build(NAME, torch.bfloat16), tmp_path)
    for name, tensor in splice_state(patched()).items():
        assert torch.equal(splice_state(model)[name], tensor.bfloat16())


def test_a_splice_of_a_causal_lm_fits_the_bare_model_and_the_other_way_round(tmp_path: Path) -> None:
    model = patched()
    save_kvsplice(model, tmp_path / "lm")
    bare = load_kvsplice(build(NAME).model, tmp_path / "lm")
    assert torch.equal(outputs(bare), outputs(model.model))
    save_kvsplice(bare, tmp_path / "bare")
    again = load_kvsplice(build(NAME), tmp_path / "bare")
    assert torch.equal(outputs(again), outputs(model))


def test_a_layer_pattern_of_the_bare_model_fits_the_causal_lm(tmp_path: Path) -> None:
    bare = patch_model_with_kvsplice(build(NAME).model, rank=RANK, layer_pattern="layers")
    save_kvsplice(bare, tmp_path)
    model = load_kvsplice(build(NAME), tmp_path)
    assert torch.equal(outputs(model.model), outputs(bare))


def test_a_layer_pattern_of_the_causal_lm_fits_the_bare_model(tmp_path: Path) -> None:
    model = patched(config=KVSpliceConfig(rank=RANK, layer_pattern="model.layers"))
    save_kvsplice(model, tmp_path)
    bare = load_kvsplice(build(NAME).model, tmp_path)
    assert torch.equal(outputs(bare), outputs(model.model))


def test_only_the_splice_is_written(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "on the way"
    model = patched()
    assert save_kvsplice(model, directory) == directory
    assert sorted(path.name for path in directory.iterdir()) == sorted([CONFIG_NAME, WEIGHTS_NAME])
    tensors = safetensors.torch.load_file(directory / WEIGHTS_NAME)
    names = ("compress.weight", "expand.weight", "transform_scale", "transform_shift")
    assert sorted(tensors) == [f"layers.{layer}.kvsplice.{name}" for layer in (0, 1) for name in names]
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers == 2 * (2 * R * RANK + 2 * R)
    assert sum(path.stat().st_size for path in directory.iterdir()) < 4 * numbers + 4096


def test_the_description_is_sorted_and_says_what_wrote_it(tmp_path: Path) -> None:
    model = patched("dots3_note", KVSpliceConfig(compression_ratio=0.25))
    save_kvsplice(model, tmp_path)
    text = (tmp_path / CONFIG_NAME).read_text()
    description = json.loads(text)
    assert text == json.dumps(description, indent=2, sort_keys=True) + "\n"
    assert description["schema_version"] == description["config"]["schema_version"] == SCHEMA_VERSION
    assert description["transformers_version"] == transformers.__version__
    assert (description["format"], description["model_type"]) == ("kvsplice", model.config.model_type)
    assert description["weights_sha256"] == hashlib.sha256((tmp_path / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert description["layers"] == {
        "0": {"kv_lora_rank": 32, "rank": 8},
        "1": {"kv_lora_rank": 48, "rank": 12},
        "2": {"kv_lora_rank": 32, "rank": 8},
        "3": {"kv_lora_rank": 48, "rank": 12},
    }


def test_saving_overwrites_an_earlier_save(tmp_path: Path) -> None:
    save_kvsplice(patched(seed=1), tmp_path)
    save_kvsplice(patched(seed=2), tmp_path)
    assert torch.equal(outputs(load_kvsplice(build(NAME), tmp_path)), outputs(patched(seed=2)))


def test_an_unpatched_model_cannot_be_saved_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PatchStateError, match="not patched"):
        save_kvsplice(build(NAME), tmp_path / "never")
    assert not (tmp_path / "never").exists()


Damage = Callable[[Path], object]


def described_as(**changes: Any) -> Damage:
    return lambda directory: write_json(directory, read_json(directory) | changes)


def without(key: str) -> Damage:
    return lambda directory: write_json(directory, {k: v for k, v in read_json(directory).items() if k != key})


def configured_as(**changes: Any) -> Damage:
    return lambda directory: write_json(
        directory, read_json(directory) | {"config": read_json(directory)["config"] | changes}
    )


def description_of_bytes(content: bytes) -> Damage:
    return lambda directory: (directory / CONFIG_NAME).write_bytes(content)


def flipped_byte(position: int) -> Damage:
    def damage(directory: Path) -> None:
        content = bytearray((directory / WEIGHTS_NAME).read_bytes())
        content[position] ^= 1
        (directory / WEIGHTS_NAME).write_bytes(content)

    return damage


def truncated(directory: Path) -> None:
    (directory / WEIGHTS_NAME).write_bytes((directory / WEIGHTS_NAME).read_bytes()[:-100])


def truncated_with_matching_hash(directory: Path) -> None:
    write_weights(directory, (directory / WEIGHTS_NAME).read_bytes()[:-100])


def with_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(directory: Path) -> None:
        tensors = safetensors.torch.load_file(directory / WEIGHTS_NAME)
        write_weights(directory, safetensors.torch.save(change(tensors)))

    return damage


def saved_anew(config: KVSpliceConfig, name: str = NAME) -> Damage:
    return lambda directory: save_kvsplice(patched(name, config), directory)


SHIFT = "layers.1.kvsplice.transform_shift"

# What is wrong with the files for any model, patched or not.
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no_directory": (shutil.rmtree, "No saved splice at .*No such file"),
    "no_description": (lambda directory: (directory / CONFIG_NAME).unlink(), "No saved splice at"),
    "no_weights": (lambda directory: (directory / WEIGHTS_NAME).unlink(), "weights of the splice cannot be read"),
    "weights_truncated": (truncated, "is truncated or was changed: .*Copy both files again"),
    "weights_truncated_and_hashed": (truncated_with_matching_hash, f"{WEIGHTS_NAME} is damaged"),
    "weights_empty_and_hashed": (lambda directory: write_weights(directory, b""), f"{WEIGHTS_NAME} is damaged"),
    "first_byte_flipped": (flipped_byte(0), "is truncated or was changed"),
    "byte_in_the_middle_flipped": (flipped_byte(3000), "is truncated or was changed"),
    "last_byte_flipped": (flipped_byte(-1), "is truncated or was changed"),
    "hash_of_other_weights": (described_as(weights_sha256="0" * 64), "is truncated or was changed"),
    "hash_not_text": (described_as(weights_sha256=None), "is truncated or was changed"),
    "description_not_json": (description_of_bytes(b'{"format": '), "is damaged: it is not JSON"),
    "description_not_text": (description_of_bytes(b"\xff\xfe"), "is damaged: it is not JSON"),
    "description_a_list": (description_of_bytes(b"[]"), 'is not a saved splice: "format" should be "kvsplice"'),
    "description_of_another_format": (described_as(format="lora"), "is not a saved splice"),
    "description_of_no_format": (without("format"), "is not a saved splice"),
    "newer_schema": (described_as(schema_version=4), "schema version 4; .* up to 3. Upgrade"),
    "schema_version_text": (described_as(schema_version="1"), "schema version '1'"),
    "no_schema_version": (without("schema_version"), "schema version None"),
    "no_config": (without("config"), r"lacks \['config'\]"),
    "no_layers": (without("layers"), r"lacks \['layers'\]"),
    "no_model_type": (without("model_type"), r"lacks \['model_type'\]"),
    "no_hash": (without("weights_sha256"), r"lacks \['weights_sha256'\]"),
    "config_not_an_object": (described_as(config=[1]), "settings that cannot be used"),
    "config_of_a_newer_schema": (configured_as(schema_version=2), "settings that cannot be used: .*Upgrade"),
    "config_with_an_unknown_field": (configured_as(ranks=3), r"settings that cannot be used: .*\['ranks'\]"),
    "config_out_of_range": (configured_as(sink_tokens=-1), "settings that cannot be used: `sink_tokens` is -1"),
    "tensor_missing": (
        with_tensors(lambda tensors: {k: v for k, v in tensors.items() if k != SHIFT}),
        rf"{SHIFT}: saved nothing, the model needs \({R},\)",
    ),
    "tensor_too_many": (
        with_tensors(lambda tensors: tensors | {"layers.7.kvsplice.extra": torch.zeros(3)}),
        r"layers\.7\.kvsplice\.extra: saved \(3,\), the model needs nothing",
    ),
    "tensor_of_another_shape": (
        with_tensors(lambda tensors: tensors | {SHIFT: torch.zeros(R + 1)}),
        rf"{SHIFT}: saved \({R + 1},\), the model needs \({R},\)",
    ),
    "tensors_of_a_larger_model": (saved_anew(KVSpliceConfig(rank=RANK), "dots3_note"), r"saved .* \(and \d+ more\)"),
}
# Settings and shapes that contradict each other, seen where the settings are used: on an unpatched model.
UNFIT_FOR_UNPATCHED: dict[str, tuple[Damage, str]] = {
    "rank_changed": (
        configured_as(rank=RANK + 1),
        rf"compress\.weight: saved \({RANK}, {R}\), the model needs \({RANK + 1}, {R}\)",
    ),
    "layernorm_changed": (configured_as(use_layernorm=True), r"code_norm\.bias: saved nothing"),
    "layers_changed": (configured_as(layers=[1]), "layers.0.* the model needs nothing"),
    "rank_above_the_latent": (configured_as(rank=R + 1), rf"does not fit .*`rank` is {R + 1}, but .* {R}"),
    "layers_that_do_not_exist": (configured_as(layers=[0, 5]), r"does not fit .*`layers` names \[5\]"),
    "too_many_last_layers": (configured_as(layers="last:3"), "does not fit .*only 2 layers"),
}
# Good files of another splice than that of the patched model.
UNFIT_FOR_PATCHED: dict[str, tuple[Damage, str]] = {
    "other_rank": (
        saved_anew(KVSpliceConfig(rank=RANK + 1)),
        rf"compress\.weight: saved \({RANK + 1}, {R}\), the model needs \({RANK}, {R}\)",
    ),
    "other_layers": (saved_anew(KVSpliceConfig(rank=RANK, layers=[1])), "layers.0.*: saved nothing"),
    "with_layernorm": (saved_anew(KVSpliceConfig(rank=RANK, use_layernorm=True)), "code_norm.* needs nothing"),
}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """What shows of a model: its outputs, its tensors, and what hangs on its modules."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {path: sorted([*vars(module), *module._modules]) for path, module in model.named_modules()}
    return outputs(model), state, attributes, find_patch(model)[1].config if is_patched(model) else None


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    logits, state, *rest = before
    now_logits, now_state, *now_rest = snapshot(model)
    assert torch.equal(now_logits, logits)
    assert list(now_state) == list(state)
    assert all(torch.equal(now_state[name], tensor) for name, tensor in state.items())
    assert now_rest == rest


@pytest.mark.parametrize(
    ("damage", "phrase"),
    [pytest.param(*case, id=name) for name, case in (DAMAGED | UNFIT_FOR_UNPATCHED).items()],
)
def test_a_splice_that_cannot_be_used_leaves_an_unpatched_model_alone(
    damage: Damage, phrase: str, tmp_path: Path
) -> None:
    save_kvsplice(patched(), tmp_path)
    damage(tmp_path)
    model = build(NAME)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=phrase):
        load_kvsplice(model, tmp_path)
    assert not is_patched(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("damage", "phrase"),
    [pytest.param(*case, id=name) for name, case in (DAMAGED | UNFIT_FOR_PATCHED).items()],
)
def test_a_splice_that_cannot_be_used_leaves_a_patched_model_alone(damage: Damage, phrase: str, tmp_path: Path) -> None:
    save_kvsplice(patched(seed=1), tmp_path)
    damage(tmp_path)
    model = patched(seed=2)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=phrase):
        load_kvsplice(model, tmp_path)
    assert_unchanged(model, before)


def test_settings_that_the_models_attention_cannot_serve_leave_it_alone(tmp_path: Path) -> None:
    save_kvsplice(patched(config=KVSpliceConfig(rank=RANK, attention="absorbed")), tmp_path)
    model = build(NAME)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="flex_attention"):
        load_kvsplice(model, tmp_path)
    model.config._attn_implementation = "sdpa"
    assert not is_patched(model)
    assert_unchanged(model, snapshot(build(NAME)))


def test_a_splice_cannot_be_loaded_into_a_model_without_latents(tmp_path: Path) -> None:
    save_kvsplice(patched(), tmp_path)
    with pytest.raises(NotMLAError, match="Linear has no attention layer that can be patched"):
        load_kvsplice(nn.Linear(2, 2), tmp_path)
