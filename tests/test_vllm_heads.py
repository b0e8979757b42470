"""An engine of vLLM on spliced rows of ordinary attention: rows in its pages, what is refused, and what it writes.

What needs vLLM is skipped where it is not installed; `make test-vllm` runs it in an environment of its own.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ordinary_models import build_ordinary
from test_packed import SINKS, calibrated
from test_vllm import NEW_TOKENS, PAGE, PIECES, PROMPTS, REFUSED, continued, engine_config
from transformers import AutoModelForCausalLM

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.attend.native.calls import kernels_available
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.heads import CompressedHeads, encode_states, exact_states
from kvsplice_hf.cache.turns import Turns
from kvsplice_hf.errors import CheckpointError, UnsupportedError
from kvsplice_hf.vllm import start
from kvsplice_hf.vllm.batches import batch_of
from kvsplice_hf.vllm.heads import ServedHeads, attend_heads_in_pages, store_heads
from kvsplice_hf.vllm.ordinary import is_of_heads, served_heads
from kvsplice_hf.vllm.pages import attention_in_order, pages_of


MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Heads of a size that vLLM's own backend takes as well, and positions for its prompts.
SIZES = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "max_position_embeddings": 512}
ROWS: dict[str, dict[str, Any]] = {
    "bytes": {"bits": 4.0, "sink_tokens": 0},
    "bytes, exact tokens": {"bits": 4.0, "sink_tokens": SINKS},
    "bytes, rotated keys, exact tokens": {"bits": 4.0, "keys": "rotated", "sink_tokens": SINKS},
    "bytes of the other codec, exact tokens": {"bits": 4.0, "codec": "rows", "sink_tokens": SINKS},
    "exact keys": {"bits": 10.0, "keys": "exact", "sink_tokens": 0},
    "exact values, exact tokens": {"bits": 10.0, "values": "exact", "sink_tokens": SINKS},
    "numbers behind splines, exact tokens": {
        "rank": 12,
        "transform": "spline",
        "spline_epochs": 1,
        "sink_tokens": SINKS,
    },
}
LENGTHS = (19, 3, 30)
AT_ONCE = "the last tokens at once, of sequences of mixed lengths"
LONGEST = 64


def small(name: str, **changes: Any) -> Any:
    """A tiny model with grouped queries, without windows."""
    return build_ordinary(name, torch.float32, **(SIZES | {"sliding_window": None} | changes))


def save_spliced(model: Any, folder: Path, settings: dict[str, Any]) -> Any:
    """Patch a model and save its splice."""
    patch_model_with_kvsplice(model, KVSpliceConfig(**settings), calibration=calibrated(model))
    save_kvsplice(model, folder)
    return model


# --------------------------------------------------------------------------------------------------- rows in pages


class Sequence:
    """Tokens of one sequence: rotated keys [S, K, d], values [S, K, d], queries [S, H, d]."""

    def __init__(self, length: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        size = SIZES["head_dim"]
        self.key, self.value = (torch.randn(length, 2, size, generator=random) for _ in range(2))
        self.query = torch.randn(length, 4, size, generator=random)

    def expected(self, layer: ServedHeads) -> torch.Tensor:
        """Attention on what rows side by side decode to, [S, H, v]."""
        count, sinks = len(self.key), layer.geometry.sink_tokens
        values, keys = self.value.transpose(0, 1)[None], self.key.transpose(0, 1)[None]
        turns = None if layer.turns is None else layer.turns[:count]
        rows = encode_states(layer.splice, values, keys, None if turns is None else turns[None, None])
        exact = None
        if sinks:
            kept = exact_states(layer.splice, values, keys)[0, :, : min(sinks, count)]
            exact = ExactTokens(kept, torch.arange(kept.shape[1])[None])
        stored = None if turns is None else Turns(turns.T.contiguous(), torch.arange(count, dtype=torch.int32)[None])
        states = CompressedHeads(rows, layer.splice, exact, count, 0, layer.dtype, None, stored)
        key, value = (part.repeat_interleave(2, dim=1) for part in states.keys_and_values())
        return attention_in_order(self.query.transpose(0, 1)[None], key, value, None, 0.3)[0]


@pytest.fixture(scope="module", params=ROWS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServedHeads:
    folder = tmp_path_factory.mktemp("splice")
    model = save_spliced(small("llama"), folder, ROWS[request.param])
    return served_heads(folder, 1, model.config, LONGEST, torch.float32)


def cache_of_engine(layer: ServedHeads, pages: int) -> torch.Tensor:
    """The rows of a layer as an engine cuts them out of its memory, which holds other things before."""
    width, stride = layer.row_bytes, layer.page_bytes(PAGE)
    memory = torch.full((stride + pages * stride,), 255, dtype=torch.uint8)
    return memory.as_strided((pages, PAGE, width), (stride, width, 1), stride)


def cuts(pieces: str, length: int) -> list[int]:
    """Where the pieces of a sequence end in which its tokens come."""
    size = PIECES.get(pieces, 1)
    ends = [*range(size, length, size), length]
    return [length - 2, length - 1, length] if pieces == AT_ONCE else ends


@pytest.mark.parametrize("pieces", [*PIECES, AT_ONCE])
@torch.no_grad()
def test_attention_on_scattered_pages_is_that_on_what_rows_side_by_side_decode_to(
    served: ServedHeads, pieces: str
) -> None:
    sequences = [Sequence(length, seed) for seed, length in enumerate(LENGTHS)]
    table = torch.randperm(12, generator=torch.Generator().manual_seed(9))[: 3 * 4].view(3, 4).int()
    pages = pages_of(cache_of_engine(served, 12), served)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    steps = itertools.zip_longest(*(itertools.pairwise([0, *cuts(pieces, length)]) for length in LENGTHS))
    for step in steps:
        running = [(index, *piece) for index, piece in enumerate(step) if piece is not None]
        counts = [end - begin for _, begin, end in running]
        starts, ends = [0, *itertools.accumulate(counts)], [end for _, _, end in running]
        batch = batch_of(starts, ends, table[[index for index, _, _ in running]], PAGE)
        key, value, query = (
            torch.cat([getattr(sequences[index], name)[begin:end] for index, begin, end in running])
            for name in ("key", "value", "query")
        )
        rows = torch.tensor([index for index, _, _ in running]).repeat_interleave(torch.tensor(counts))
        slots = table[rows, batch.positions // PAGE].long() * PAGE + batch.positions % PAGE
        store_heads(pages, served, key, value, slots, batch.positions)
        output = attend_heads_in_pages(pages, served, query, 0.3, batch.groups)
        for (index, _, _), part in zip(running, output.split(counts), strict=True):
            found[index].append(part)
    for sequence, outputs in zip(sequences, found, strict=True):
        torch.testing.assert_close(torch.cat(outputs), sequence.expected(served), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_without_a_place_are_not_stored(served: ServedHeads) -> None:
    cache, sequence = cache_of_engine(served, 2), Sequence(3, 0)
    slots, positions = torch.tensor([-1, 1, -1]), torch.arange(3)
    store_heads(pages_of(cache, served), served, sequence.key, sequence.value, slots, positions)
    assert (cache != 255).any(-1).flatten().nonzero().flatten().tolist() == [1]


# ----------------------------------------------------------------------------------------------------- at the start


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny model, and the folder of its splice; the model lies in `base` there."""
    folder = tmp_path_factory.mktemp("saved")
    small("llama").save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    save_spliced(model, folder, ROWS["bytes, exact tokens"])
    return small("llama"), folder


def test_an_engine_with_its_own_model_starts(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    start.require_servable(engine_config(model, folder=str(folder / "base")), folder)


ALSO_REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another GPU": ({"device": "cuda"}, UnsupportedError, "ordinary attention on device 'cuda'"),
    "tensor parallelism": (
        {"processes": 2},
        UnsupportedError,
        "does not serve ordinary attention with tensor_parallel_size=2",
    ),
    "modules of transformers": (
        {"model_impl": "transformers"},
        UnsupportedError,
        "does not serve ordinary attention with model_impl='transformers'",
    ),
    "a model of images": (
        {"whole": SimpleNamespace(model_type="llava")},
        UnsupportedError,
        "this one is 'llava', of which 'llama' is a part",
    ),
}


@pytest.mark.parametrize("case", [*(case for case in REFUSED if case != "no MLA"), *ALSO_REFUSED])
def test_what_an_engine_cannot_do_with_rows_ends_its_start(case: str, saved: tuple[Any, Path]) -> None:
    settings, error, words = (REFUSED | ALSO_REFUSED)[case]
    with pytest.raises(error, match=words):
        start.require_servable(engine_config(saved[0], **settings), saved[1])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mixtral", "olmo2", "opt", "starcoder2"])
def test_another_kind_of_model_ends_the_start(name: str, saved: tuple[Any, Path]) -> None:
    with pytest.raises(UnsupportedError, match=f"of the types llama, mistral, qwen2, qwen3; this one is '{name}'"):
        start.require_servable(engine_config(build_ordinary(name)), saved[1])


SETTINGS: dict[str, tuple[str, Any, str]] = {
    "rotation by length": (
        "rope_parameters",
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0},
        "rope_type='dynamic'",
    ),
    "rotation of a part": (
        "rope_parameters",
        {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5",
    ),
    "attention to both sides": ("is_causal", False, "is_causal=False"),
    "scores by position": ("llama_4_scaling", {"beta": 0.1}, "llama_4_scaling="),
    "chunks": ("dual_chunk_attention_config", {"chunk_size": 8}, "dual_chunk_attention_config="),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_vllm_and_transformers_read_in_different_ways_end_the_start(
    case: str, saved: tuple[Any, Path]
) -> None:
    name, value, words = SETTINGS[case]
    model = small("llama")
    setattr(model.config, name, value)
    with pytest.raises(UnsupportedError, match=words):
        start.require_servable(engine_config(model), saved[1])


def test_a_window_ends_the_start(tmp_path: Path) -> None:
    model = save_spliced(small("mistral", sliding_window=8), tmp_path, ROWS["bytes"])
    with pytest.raises(UnsupportedError, match=r"Layers \[0, 1\] of this model attend to a window"):
        start.require_servable(engine_config(model), tmp_path)


def test_a_model_of_other_shapes_ends_the_start(saved: tuple[Any, Path]) -> None:
    with pytest.raises(CheckpointError, match="was made for other shapes"):
        start.require_servable(engine_config(small("llama", num_key_value_heads=4)), saved[1])


def test_other_weights_end_the_start(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model = small("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="was made for other weights"):
        start.require_servable(engine_config(model, folder=str(tmp_path)), saved[1])


def test_a_splice_of_some_layers_ends_the_start(tmp_path: Path) -> None:
    save_spliced(small("llama"), tmp_path, ROWS["bytes"] | {"layers": (1,)})
    with pytest.raises(UnsupportedError, match=r"leaves layers \[0\] as they are"):
        start.require_servable(engine_config(small("llama")), tmp_path)


def test_a_splice_of_both_kinds_of_attention_is_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    assert is_of_heads(saved[1])
    for path in saved[1].glob("kvsplice_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    described = next(path for path in tmp_path.glob("*.json"))
    content = json.loads(described.read_text())
    content["layers"]["0"] |= {"kv_heads": 0}
    described.write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match=r"of ordinary attention in layers \[1\] and of MLA in layers \[0\]"):
        is_of_heads(tmp_path)


# ---------------------------------------------------------------------------------------------------- real engines


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
PIECEWISE: dict[str, Any] = {"enable_prefix_caching": True, "max_num_batched_tokens": 32}
WHOLE: dict[str, Any] = {"enable_prefix_caching": False}
FEW: dict[str, Any] = {"enable_prefix_caching": False, "num_gpu_blocks_override": 11}
EXACT = "bytes, exact tokens"
# By name the model, its rows, and settings of the engine.
ENGINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prefix caching, prompts in pieces": ("llama", EXACT, PIECEWISE),
    "no prefix caching": ("llama", EXACT, WHOLE),
    "a cache of few pages": ("llama", EXACT, FEW),
    "mistral, rotated keys": ("mistral", "bytes, rotated keys, exact tokens", WHOLE),
    "qwen2, splines": ("qwen2", "numbers behind splines, exact tokens", PIECEWISE),
    "qwen3": ("qwen3", "bytes", PIECEWISE),
    "llama, yarn": ("llama, yarn", "bytes", PIECEWISE),
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROTATIONS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN | {"original_max_position_embeddings": 64},
    "yarn, another factor": YARN | {"original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0},
}
# What a layer may ask of its backend besides attention to all that is before a token.
LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "ALiBi": ({"alibi_slopes": [0.5, 0.25]}, "asks vLLM for ALiBi"),
    "a window": ({"sliding_window": 8}, "asks vLLM for a sliding window of 8 tokens"),
    "a quantised cache": ({"kv_cache_dtype": "fp8"}, "asks vLLM for a cache of fp8"),
    "a soft cap": ({"logits_soft_cap": 30.0}, "asks vLLM for a soft cap of 30.0"),
    "an encoder": ({"attn_type": "encoder_only"}, "asks vLLM for attention of the type 'encoder_only'"),
    "keys of another layer": ({"kv_sharing_target_layer_name": "model.layers.0"}, "keys and values of another layer"),
    "learned sinks": ({"sinks": [0.0, 0.0]}, "asks vLLM for `sinks`"),
}
# A quarter of the bytes of the stock row in float32, with nothing beside the rows.
QUARTER: dict[str, Any] = {"compression": 2.0, "keys": "rotated", "sink_tokens": 0, "allocation": "layer"}
STOCK = ("stock before", "stock after")


def model_of(name: str) -> Any:
    return small("llama", rope_parameters=dict(YARN)) if name == "llama, yarn" else small(name)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name what engines write, in one process of their own; and what the models write."""
    folder, found = tmp_path_factory.mktemp("engine"), {}
    asked: dict[str, Any] = {}

    def ask(name: str, model: str, splice: str, settings: dict[str, Any], writes: bool) -> None:
        size = 16 if splice and writes else 32
        place = str(folder / splice) if splice else ""
        base = str(folder / model)
        asked[name] = {"model": base, "splice": place, "settings": settings, "block_size": size, "writes": writes}

    ask(STOCK[0], "llama", "", {}, False)
    for name, (model, rows, settings) in ENGINES.items():
        if not (folder / model).exists():
            model_of(model).save_pretrained(folder / model)
        spliced = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32).eval()
        if name == "prefix caching, prompts in pieces":
            found["scores"] = [scores(spliced, prompt) for prompt in PROMPTS]
        save_spliced(spliced, folder / f"{model} {rows}", ROWS[rows])
        found["transformers", name] = [continued(spliced, prompt) for prompt in PROMPTS]
        ask(name, model, f"{model} {rows}", settings, True)
    save_spliced(small("llama"), folder / "quarter", QUARTER)
    ask("quarter", "llama", "quarter", {}, False)
    ask(STOCK[1], "llama", "", {}, False)
    given = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "engines": asked, "rotations": ROTATIONS}
    given |= {"layers": {name: layer for name, (layer, _) in LAYERS.items()}}
    program = Path(__file__).parent / "engines_of_heads.py"
    ended = subprocess.run(
        [sys.executable, str(program), json.dumps(given)], capture_output=True, text=True, timeout=1200
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return found | json.loads(ended.stdout.splitlines()[-1])


@torch.no_grad()
def scores(model: Any, prompt: list[int]) -> list[float]:
    """Log-probabilities of the tokens of a prompt, from the second one on."""
    found = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    return found.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()


@needs_vllm
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_writes_what_the_patched_model_writes(name: str, written: dict[str, Any]) -> None:
    expected, found, settings = written["transformers", name], written[name], ENGINES[name][2]
    assert found["attention"] == ["SplicedHeadsImpl"]
    assert found["first"] == expected
    assert found["again"] == expected
    assert (found["num_preemptions"] > 0) == (settings is FEW)
    assert (found["prefix_cache_hits"] > 0) == settings["enable_prefix_caching"]


@needs_vllm
@pytest.mark.parametrize("name", [name for name, (_, rows, _) in ENGINES.items() if rows.startswith("bytes")])
def test_the_rows_of_an_engine_are_coded_and_read_by_kernels(name: str, written: dict[str, Any]) -> None:
    if not kernels_available("cpu"):
        pytest.skip("the C++ code could not be compiled here")
    kernels = written[name]["kernels"]
    assert all(kernels.get(f"{kind}_heads", 0) >= NEW_TOKENS for kind in ("encode", "decode")), kernels


@needs_vllm
def test_the_cache_has_as_many_more_pages_as_rows_are_smaller(written: dict[str, Any]) -> None:
    stock, rows = written[STOCK[0]], written["quarter"]
    assert stock["size"]["page_bytes"] == 4 * rows["size"]["page_bytes"]
    assert rows["blocks"] >= 3.8 * stock["blocks"]


@needs_vllm
@pytest.mark.parametrize("name", STOCK)
def test_without_a_splice_vllm_has_its_own_attention_and_computes_what_transformers_does(
    name: str, written: dict[str, Any]
) -> None:
    assert written[name]["attention"] == ["CPUAttentionBackendImpl"]
    for found, expected in zip(written[name]["scores"], written["scores"], strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-3)


@needs_vllm
@pytest.mark.parametrize("name", ROTATIONS)
def test_vllm_rotates_keys_as_transformers_does(name: str, written: dict[str, Any]) -> None:
    assert written["rotations"][name] < 1e-5


@needs_vllm
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_that_asks_for_more_than_rows_serve_is_refused_by_name(case: str, written: dict[str, Any]) -> None:
    assert LAYERS[case][1] in written["layers"][case]
