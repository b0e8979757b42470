"""An engine of vLLM on spliced rows: rows in its pages, what is refused at the start, and the tokens that come out.

What needs vLLM is skipped where it is not installed; `make test-vllm` runs it in an environment of its own.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_packed import SINKS, calibrated
from tiny_models import FIRST_ORDINARY_TOKEN, WEIGHT_STD, build
from transformers import AutoModelForCausalLM, DynamicCache

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.attend.native.calls import kernels_available
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.heads import exact_states
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.cache.turns import Turns
from kvsplice_hf.errors import CheckpointError, ConfigError, UnsupportedError
from kvsplice_hf.patch.absorbed import absorbed_attention
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.vllm import plugin, start
from kvsplice_hf.vllm.batches import batch_of
from kvsplice_hf.vllm.pages import ServedLayer, attend_pages, pages_of, store
from kvsplice_hf.vllm.splices import order_of_keys, served_layer


MODELS = ("deepseek_v2", "deepseek_v3")
ROWS: dict[str, dict[str, Any]] = {
    "numbers": {"rank": 12, "sink_tokens": 0},
    "numbers, exact tokens": {"rank": 12, "sink_tokens": SINKS},
    "bytes": {"bits": 4.0, "sink_tokens": 0},
    "bytes, exact tokens": {"bits": 4.0, "sink_tokens": SINKS},
    "bytes, rotated keys, exact tokens": {"bits": 4.0, "keys": "rotated", "sink_tokens": SINKS},
}
# Tokens of each sequence, and in how many pieces they come.
LENGTHS = (19, 3, 30)
PIECES = {"whole": 30, "in pieces": 7, "one by one": 1}
PAGE = 8
LONGEST = 64


def save_spliced(folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """A patched tiny model, whose splice is saved in a folder."""
    model = build(name, torch.float32)
    config = KVSpliceConfig(**settings)
    patch_model_with_kvsplice(model, config, calibration=calibrated(model) if config.is_packed else None)
    save_kvsplice(model, folder)
    return model


# --------------------------------------------------------------------------------------------------- rows in pages


class Sequence:
    """Tokens of one sequence: latents [S, R], rotated keys as the engine has them [S, P], queries [S, H, N + P]."""

    def __init__(self, site: Any, length: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        rope = site.qk_rope_head_dim
        self.latent = torch.randn(length, site.kv_lora_rank, generator=random)
        self.k_rot = torch.randn(length, rope, generator=random)
        self.query = torch.randn(length, site.num_heads, site.qk_nope_head_dim + rope, generator=random)

    def expected(self, layer: ServedLayer, weight: torch.Tensor, v_dim: int) -> torch.Tensor:
        """Attention on rows side by side, [S, H, V]."""
        count, sinks = len(self.latent), layer.geometry.sink_tokens
        latents, keys = self.latent[None, None], self.k_rot[None, None][..., layer.order]
        turns = None if layer.turns is None else layer.turns[:count]
        rows = layer.splice.rows(latents, keys, None if turns is None else turns[None, None])
        exact = None
        if sinks:
            places = torch.arange(sinks)[None].where(torch.arange(sinks) < count, count + 1)
            kept = exact_states(layer.splice, latents, keys)[0, :, : min(sinks, count)]
            exact = ExactTokens(torch.nn.functional.pad(kept, (0, 0, 0, sinks - kept.shape[1])), places)
        stored = None if turns is None else Turns(turns.T.contiguous(), torch.arange(count, dtype=torch.int32)[None])
        states = CompressedLatent(rows, layer.splice, exact, count, 0, layer.dtype, turns=stored)
        split = self.query.shape[-1] - len(layer.order)
        query = torch.cat([self.query[..., :split], self.query[..., split:][..., layer.order]], dim=-1)
        output, _ = absorbed_attention(query.transpose(0, 1)[None], states, weight, v_dim, None, 0.3)
        return output[0]


@pytest.fixture(scope="module", params=[(name, rows) for name in MODELS for rows in ROWS], ids="-".join)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ServedLayer]:
    name, rows = request.param
    folder = tmp_path_factory.mktemp("splice")
    model = save_spliced(folder, name, ROWS[rows])
    return model, served_layer(folder, 1, model.config, LONGEST, torch.float32)


def cache_of_engine(layer: ServedLayer, pages: int) -> torch.Tensor:
    """The rows of a layer as an engine cuts them out of its memory, which holds other things before."""
    width, stride = layer.row_bytes, layer.page_bytes(PAGE)
    memory = torch.full((stride + pages * stride,), 255, dtype=torch.uint8)
    return memory.as_strided((pages, PAGE, width), (stride, width, 1), stride)


@pytest.mark.parametrize("pieces", PIECES)
@torch.no_grad()
def test_attention_on_scattered_pages_is_that_on_rows_side_by_side(
    served: tuple[Any, ServedLayer], pieces: str
) -> None:
    model, layer = served
    site, size = find_sites(model)[1], PIECES[pieces]
    weight, v_dim = site.module.kv_b_proj.weight, site.v_head_dim
    sequences = [Sequence(site, length, seed) for seed, length in enumerate(LENGTHS)]
    table = torch.randperm(12, generator=torch.Generator().manual_seed(9))[: 3 * 4].view(3, 4).int()
    pages = pages_of(cache_of_engine(layer, 12), layer)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    for begin in range(0, max(LENGTHS), size):
        running = [index for index, length in enumerate(LENGTHS) if begin < length]
        ends = [min(begin + size, LENGTHS[index]) for index in running]
        starts = [0]
        for end in ends:
            starts.append(starts[-1] + end - begin)
        batch = batch_of(starts, ends, table[running], PAGE)
        parts = [(sequences[index], slice(begin, end)) for index, end in zip(running, ends, strict=True)]
        latent, k_rot, query = (
            torch.cat([getattr(sequence, name)[part] for sequence, part in parts])
            for name in ("latent", "k_rot", "query")
        )
        rows = torch.cat([torch.full((e - begin,), i) for i, e in zip(running, ends, strict=True)])
        slots = table[rows, batch.positions // PAGE].long() * PAGE + batch.positions % PAGE
        store(pages, layer, latent, k_rot, slots, batch.positions)
        output = attend_pages(pages, layer, query, weight, v_dim, 0.3, batch.groups)
        for index, part in zip(running, output.split([end - begin for end in ends]), strict=True):
            found[index].append(part)
    for sequence, outputs in zip(sequences, found, strict=True):
        torch.testing.assert_close(torch.cat(outputs), sequence.expected(layer, weight, v_dim), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_without_a_place_are_not_stored(served: tuple[Any, ServedLayer]) -> None:
    model, layer = served
    site = find_sites(model)[1]
    cache = cache_of_engine(layer, 2)
    sequence, positions = Sequence(site, 3, 0), torch.arange(3)
    store(pages_of(cache, layer), layer, sequence.latent, sequence.k_rot, torch.tensor([-1, 1, -1]), positions)
    changed = (cache != 255).any(-1).flatten().nonzero().flatten().tolist()
    assert changed == [1]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_keys_of_the_engine_in_our_order_are_those_that_transformers_caches(name: str) -> None:
    model = build(name, torch.float32)
    config, attention = model.config, find_sites(model)[0].module
    ids = torch.arange(FIRST_ORDINARY_TOKEN, FIRST_ORDINARY_TOKEN + 9)[None]
    cache = DynamicCache(config=config)
    model(ids, None, None, cache)
    decoder = model.get_decoder()
    hidden = decoder.layers[0].input_layernorm(decoder.embed_tokens(ids))
    key = attention.kv_a_proj_with_mqa(hidden)[0, :, config.kv_lora_rank :]
    rope = config.qk_rope_head_dim
    theta = config.rope_parameters["rope_theta"]
    angles = torch.arange(9)[:, None] * theta ** (-torch.arange(0, rope, 2) / rope)
    turned = torch.view_as_real(torch.view_as_complex(key.view(9, -1, 2)) * torch.polar(torch.ones(()), angles))
    torch.testing.assert_close(turned.flatten(1)[:, order_of_keys(config)], cache.layers[0].values[0, 0])


def test_angles_are_the_same_after_vllm_has_renamed_the_kind_of_rotation(tmp_path: Path) -> None:
    model = save_spliced(tmp_path, "deepseek_v3", ROWS["bytes"])
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    turns = []
    for kind in ("default", "yarn", "deepseek_yarn"):
        model.config.rope_parameters = (yarn if kind != "default" else {"rope_theta": 10000.0}) | {"rope_type": kind}
        turns.append(served_layer(tmp_path, 0, model.config, LONGEST, torch.float32).turns)
    plain, ours, theirs = turns
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


# ----------------------------------------------------------------------------------------------------- at the start


def engine_config(model: Any, **settings: Any) -> Any:
    """What of `VllmConfig` is looked at, as it is where nothing special was asked for."""
    given = {"cache_dtype": "auto", "block_size": 16, "speculative": None, "connector": None, "lora": None}
    given |= {"decode_context": 1, "device": "cpu", "folder": "", "stages": 1, "mode": "NONE", "processes": 1}
    given |= {"model_impl": "auto", "whole": model.config, "dtype": torch.bfloat16, "two_batches": False}
    given |= {"longest": 8192, "use_mla": getattr(model.config, "kv_lora_rank", None) is not None}
    given |= settings
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=given["whole"],
            hf_text_config=model.config,
            use_mla=given["use_mla"],
            model=given["folder"],
            revision=None,
            max_model_len=given["longest"],
            model_impl=given["model_impl"],
            dtype=given["dtype"],
        ),
        cache_config=SimpleNamespace(cache_dtype=given["cache_dtype"], block_size=given["block_size"]),
        speculative_config=given["speculative"],
        kv_transfer_config=given["connector"],
        lora_config=given["lora"],
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=given["decode_context"],
            prefill_context_parallel_size=1,
            pipeline_parallel_size=given["stages"],
            tensor_parallel_size=given["processes"],
            use_ubatching=given["two_batches"],
        ),
        compilation_config=SimpleNamespace(mode=SimpleNamespace(name=given["mode"])),
        device_config=SimpleNamespace(device_type=given["device"]),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny model with its splice, and the folder of both: the model in `base`."""
    folder = tmp_path_factory.mktemp("saved")
    build("deepseek_v3", torch.float32).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    save_kvsplice(patch_model_with_kvsplice(model, KVSpliceConfig(rank=12, sink_tokens=SINKS)), folder)
    return build("deepseek_v3", torch.float32), folder


def test_an_engine_with_its_own_model_starts(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    start.require_servable(engine_config(model, folder=str(folder / "base")), folder)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "cache of 8 bits": ({"cache_dtype": "fp8"}, UnsupportedError, "does not serve kv_cache_dtype='fp8'"),
    "speculation": ({"speculative": object()}, UnsupportedError, "does not serve speculative decoding"),
    "connector": ({"connector": object()}, UnsupportedError, "does not serve a KV connector"),
    "adapters": ({"lora": object()}, UnsupportedError, "does not serve LoRA"),
    "context parallelism": ({"decode_context": 2}, UnsupportedError, "does not serve context parallelism"),
    "stages that are not compiled": ({"stages": 2}, UnsupportedError, "does not run layers in 2 stages without"),
    "another device": ({"device": "xpu"}, UnsupportedError, "does not serve device 'xpu'"),
    "float32 on a GPU": ({"device": "cuda", "dtype": torch.float32}, UnsupportedError, "not serve float32 on a GPU"),
    "two batches at once": ({"two_batches": True}, UnsupportedError, "does not serve two batches at once"),
    "no MLA": ({"use_mla": False}, UnsupportedError, "does not serve VLLM_MLA_DISABLE"),
    "pages that are too small": ({"block_size": 1}, ConfigError, "Blocks of 1 tokens cannot hold"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_cannot_do_with_rows_ends_its_start(case: str, saved: tuple[Any, Path]) -> None:
    settings, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        start.require_servable(engine_config(saved[0], **settings), saved[1])


# Exact tokens, the longest sequence, and tokens of a page: the longer sequences may be, the larger.
PAGES = [(4, 256, 128), (4, 2048, 256), (4, 8192, 512), (1, 8192, 256), (1, 64, 128), (64, 1 << 17, 512)]


@pytest.mark.parametrize(("sinks", "longest", "tokens"), PAGES)
def test_pages_grow_with_sequences_and_with_what_is_exact(sinks: int, longest: int, tokens: int) -> None:
    assert plugin.tokens_of_page(sinks, longest) == tokens


def test_a_quarter_of_the_bytes_holds_at_least_3_8_times_the_tokens_by_itself() -> None:
    stock = 2 * (512 + 64)
    assert stock / (stock / 4 + 4 * stock / plugin.tokens_of_page(4, 8192)) > 3.8


@pytest.mark.parametrize("name", ["minicpm3", "longcat_flash"])
def test_another_kind_of_model_ends_the_start(name: str, saved: tuple[Any, Path]) -> None:
    with pytest.raises(UnsupportedError, match=f"this one is '{name}'"):
        start.require_servable(engine_config(build(name, torch.float32)), saved[1])


def test_a_model_of_other_shapes_ends_the_start(saved: tuple[Any, Path]) -> None:
    model = build("deepseek_v3", torch.float32)
    model.config.kv_lora_rank = 24
    with pytest.raises(CheckpointError, match="was made for other shapes"):
        start.require_servable(engine_config(model), saved[1])


UNREAD = {
    "rope_interleave=False": {"rope_interleave": False},
    "tie_word_embeddings=True": {"tie_word_embeddings": True},
    "attention_bias=True": {"attention_bias": True},
    "rope_type='linear'": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "attention_factor=1.0": {"rope_parameters": {"rope_type": "yarn", "attention_factor": 1.0, "mscale_all_dim": 1.0}},
}


@pytest.mark.parametrize("setting", UNREAD)
def test_settings_that_the_engine_does_not_read_end_the_start(setting: str, saved: tuple[Any, Path]) -> None:
    model = build("deepseek_v3", torch.float32)
    for name, value in UNREAD[setting].items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedError, match=setting):
        start.require_servable(engine_config(model), saved[1])


def test_other_weights_end_the_start_unless_any_are_asked_for(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    with torch.no_grad():
        model = build("deepseek_v3", torch.float32)
        model.lm_head.weight.mul_(1)
        model.model.layers[1].mlp.gate.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="was made for other weights"):
        start.require_servable(engine_config(model, folder=str(tmp_path)), folder)
    monkeypatch.setenv(start.BASE_VARIABLE, "any")
    start.require_servable(engine_config(model, folder=str(tmp_path)), folder)
    monkeypatch.setenv(start.BASE_VARIABLE, "some")
    with pytest.raises(ConfigError, match="must be one of same, any"):
        start.require_servable(engine_config(model, folder=str(tmp_path)), folder)


def test_a_splice_of_some_layers_ends_the_start(tmp_path: Path) -> None:
    save_spliced(tmp_path, "deepseek_v3", {"rank": 12, "layers": (1,)})
    with pytest.raises(UnsupportedError, match=r"leaves layers \[0\] as they are"):
        start.require_servable(engine_config(build("deepseek_v3", torch.float32)), tmp_path)
    with pytest.raises(CheckpointError, match="has no layer 0"):
        served_layer(tmp_path, 0, build("deepseek_v3", torch.float32).config, LONGEST, torch.float32)


def test_a_damaged_folder_ends_the_start(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in saved[1].glob("kvsplice_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-5] if path.suffix != ".json" else path.read_bytes())
    for folder, words in ((tmp_path, "is truncated or was changed"), (tmp_path / "none", "No saved splice at")):
        monkeypatch.setenv(start.FOLDER_VARIABLE, str(folder))
        with pytest.raises(CheckpointError, match=words):
            plugin.register()


def test_without_a_splice_nothing_is_imported() -> None:
    program = (
        "import sys, kvsplice_hf; from kvsplice_hf.vllm import plugin; plugin.register(); print('vllm' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.split() == ["False"], found.stderr


# ---------------------------------------------------------------------------------------------------- real engines


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
PROMPTS = [list(range(20, 20 + length)) for length in (3, 45, 17, 45, 70, 9)]
NEW_TOKENS = 10
PAGES_OF_ENGINE = 16
MODES: dict[str, dict[str, Any]] = {
    "prefix caching, prompts in pieces": {"enable_prefix_caching": True, "max_num_batched_tokens": 32},
    "no prefix caching": {"enable_prefix_caching": False},
    "a cache of few pages": {"enable_prefix_caching": False, "num_gpu_blocks_override": 11},
}
SPLICES = ("numbers", "bytes, exact tokens")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By splice and mode what an engine writes, in a process of its own; and what the patched model writes."""
    folder = tmp_path_factory.mktemp("engine")
    dense_model().save_pretrained(folder / "base")
    found: dict[str, Any] = {}
    for splice in SPLICES:
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
        config = KVSpliceConfig(**ROWS[splice])
        patch_model_with_kvsplice(model, config, calibration=calibrated(model) if config.is_packed else None)
        save_kvsplice(model, folder / splice)
        found[splice, "transformers"] = [continued(model, prompt) for prompt in PROMPTS]
    program = Path(__file__).parent / "engines.py"
    asked = {"base": str(folder / "base"), "splices": {name: str(folder / name) for name in SPLICES}, "modes": MODES}
    asked |= {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "block_size": PAGES_OF_ENGINE}
    ended = subprocess.run(
        [sys.executable, str(program), json.dumps(asked)], capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return found | {tuple(key.split("|")): value for key, value in json.loads(ended.stdout.splitlines()[-1]).items()}


def dense_model() -> Any:
    """A tiny model without experts, of which vLLM wants to know more than a tiny config says."""
    tiny = build("deepseek_v3", torch.float32)
    tiny.config.first_k_dense_replace = tiny.config.num_hidden_layers
    model = type(tiny)(tiny.config).float().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_STD)
    return model


@torch.no_grad()
def continued(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@needs_vllm
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("splice", SPLICES)
def test_an_engine_writes_what_the_patched_model_writes(splice: str, mode: str, written: dict[str, Any]) -> None:
    expected, found = written[splice, "transformers"], written[splice, mode]
    assert found["first"] == expected
    assert found["again"] == expected
    assert (found["num_preemptions"] > 0) == (mode == "a cache of few pages")
    assert (found["prefix_cache_hits"] > 0) == MODES[mode]["enable_prefix_caching"]


@needs_vllm
@pytest.mark.parametrize("mode", MODES)
def test_the_rows_of_an_engine_are_coded_by_kernels_and_read_in_their_pages(mode: str, written: dict[str, Any]) -> None:
    """vLLM hands over weights of classes of its own, which kernels refuse: that costs time, and no test of tokens."""
    if not kernels_available("cpu"):
        pytest.skip("the C++ code could not be compiled here")
    kernels = written["bytes, exact tokens", mode]["kernels"]
    assert all(kernels.get(name, 0) >= NEW_TOKENS for name in ("encode", "decode")), kernels


@needs_vllm
def test_the_engine_counts_as_many_tokens_as_rows_are_smaller(written: dict[str, Any]) -> None:
    stock, rows = written["sizes", "stock"], written["sizes", "bytes, exact tokens"]
    assert rows["tokens"] * rows["page_bytes"] == pytest.approx(stock["tokens"] * stock["page_bytes"], rel=0.01)
