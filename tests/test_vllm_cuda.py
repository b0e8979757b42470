"""The plug-in of vLLM on NVIDIA GPUs, as far as it goes without one: what is chosen, and an engine in the interpreter.

What needs vLLM is skipped where it is not installed; `make test-vllm` runs it. **Nothing here runs on a GPU.**
"""

import importlib
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_packed import calibrated
from test_vllm import ROWS, continued, dense_model, engine_config, save_spliced
from tiny_models import build
from transformers import AutoModelForCausalLM

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.vllm import plugin, start
from kvsplice_hf.vllm.splices import served_layer


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
# By kind of GPU: Ampere, Hopper, Blackwell of data centres and of desks. vLLM has another order of backends for each.
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
ONE_PROCESS = SimpleNamespace(prefill_context_parallel_size=1, decode_context_parallel_size=1)
PROMPTS = [list(range(20, 20 + length)) for length in (3, 9, 40)]
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny model and the folder of its splice, which has 2 exact tokens."""
    folder = tmp_path_factory.mktemp("saved")
    save_spliced(folder, "deepseek_v3", ROWS["bytes, exact tokens"])
    return build("deepseek_v3", torch.float32), folder


# At the start


def test_a_gpu_starts_with_a_warning_that_nothing_ran_there(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(start.BASE_VARIABLE, "any")
    caplog.set_level(logging.WARNING, "kvsplice_hf")
    start.require_servable(engine_config(saved[0]), saved[1])
    assert "have not run on a GPU yet" not in caplog.text
    start.require_servable(engine_config(saved[0], device="cuda"), saved[1])
    assert "Splices in vLLM have not run on a GPU yet" in caplog.text


@pytest.mark.parametrize("device", ["xpu", "tpu", "hpu"])
def test_other_devices_end_the_start(device: str, saved: tuple[Any, Path]) -> None:
    with pytest.raises(UnsupportedError, match=f"does not serve device '{device}'"):
        start.require_servable(engine_config(saved[0], device=device), saved[1])


def test_rocm_ends_the_start_though_pytorch_calls_it_cuda(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(UnsupportedError, match="does not serve device 'rocm'"):
        start.require_servable(engine_config(saved[0], device="cuda"), saved[1])


def test_stages_that_are_not_compiled_are_refused_on_cpus_alone(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(start.BASE_VARIABLE, "any")
    with pytest.raises(UnsupportedError, match="does not run layers in 2 stages"):
        start.require_servable(engine_config(saved[0], stages=2), saved[1])
    start.require_servable(engine_config(saved[0], stages=2, device="cuda"), saved[1])


def test_a_layer_lies_where_it_is_asked_for(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    layer = served_layer(folder, 1, model.config, 64, torch.bfloat16, torch.device("meta"))
    tensors = [*layer.splice.parameters(), *layer.splice.buffers(), layer.order]
    assert layer.turns is not None
    assert {tensor.device.type for tensor in (*tensors, layer.turns)} == {"meta"}
    assert served_layer(folder, 1, model.config, 64, torch.bfloat16).order.device.type == "cpu"


# What vLLM chooses


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, saved: tuple[Any, Path]) -> Iterator[Any]:
    """vLLM's platform of NVIDIA GPUs, in the place of the current one; its compiled library is not here."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    from vllm import platforms
    from vllm.platforms.cuda import CudaPlatformBase

    importlib.import_module("kvsplice_hf.vllm.cuda")  # now: modules of vLLM ask the platform when they are imported
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setenv(start.FOLDER_VARIABLE, str(saved[1]))
    monkeypatch.setattr(platforms, "_current_platform", CudaPlatformBase())
    yield platforms.current_platform
    plugin.unregister()
    torch.backends.cuda.enable_cudnn_sdp(before)


def selected(platform: Any, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    from vllm.config import set_current_vllm_config
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    found = classmethod(lambda cls, device_id=0: DeviceCapability(*capability))
    monkeypatch.setattr(type(platform), "get_device_capability", found)
    given = {"head_size": 576, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 256, "use_mla": True}
    selected_backend = changes.pop("selected", None)
    config = AttentionSelectorConfig(**(given | changes))
    with set_current_vllm_config(SimpleNamespace(parallel_config=ONE_PROCESS, model_config=None)):
        return str(platform.get_attn_backend_cls(selected_backend, config, num_heads=16))


@needs_vllm
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_on_each_gpu_vllm_chooses_our_backend(
    capability: tuple[int, int], cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.register()
    assert selected(cuda, capability, monkeypatch) == plugin._CUDA[0]
    assert selected(cuda, capability, monkeypatch, head_size=40, block_size=None) == plugin._CUDA[0]


@needs_vllm
def test_whichever_backend_for_mla_is_asked_for_ours_is_chosen(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that vLLM has for rows of MLA without an indexer, by their names."""
    from vllm.platforms import cuda as cuda_module
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    every = set()
    for capability in CAPABILITIES:
        for backend in cuda_module._get_backend_priorities(True, DeviceCapability(*capability), 16):
            every.add(backend.name)
    dense = {name for name in every if "SPARSE" not in name}
    assert dense == set(plugin._CUDA[1])
    for name in dense:
        asked = AttentionBackendEnum[name]
        assert selected(cuda, (9, 0), monkeypatch, selected=asked) == plugin._CUDA[0]


WITHOUT: dict[str, tuple[tuple[int, int], dict[str, Any], str]] = {
    "a GPU before Ampere": ((7, 5), {}, "compute capability not supported"),
    "float32": ((9, 0), {"dtype": torch.float32}, "dtype not supported"),
    "a quantised cache": ((9, 0), {"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
}


@needs_vllm
@pytest.mark.parametrize("case", WITHOUT)
def test_what_our_backend_does_not_serve_vllm_refuses(case: str, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, changes, reason = WITHOUT[case]
    plugin.register()
    with pytest.raises(ValueError, match=reason):
        selected(cuda, capability, monkeypatch, **changes)


@needs_vllm
def test_after_unregister_the_choice_is_that_of_vllm(cuda: Any) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    assert all(AttentionBackendEnum[name].get_path() == plugin._CUDA[0] for name in plugin._CUDA[1])
    assert not any(AttentionBackendEnum[name].is_overridden() for name in plugin._CPU[1])
    plugin.unregister()
    assert not any(AttentionBackendEnum[name].is_overridden() for name in (*plugin._CUDA[1], *plugin._CPU[1]))


@needs_vllm
def test_the_backend_says_that_it_cannot_be_captured() -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    from kvsplice_hf.vllm.cuda import SplicedCudaMLABackend

    builder = SplicedCudaMLABackend.get_builder_cls()
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER
    assert SplicedCudaMLABackend.is_mla()
    assert not SplicedCudaMLABackend.get_impl_cls().__abstractmethods__


@needs_vllm
@pytest.mark.parametrize(("size", "expected"), [(None, 256), (32, 32)])
def test_no_graph_is_captured_and_pages_keep_their_size(
    size: int | None, expected: int, cuda: Any, saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import CUDAGraphMode

    monkeypatch.setenv(start.BASE_VARIABLE, "any")
    config = engine_config(saved[0], device="cuda", block_size=16 if size is None else size)
    config.cache_config.user_specified_block_size = size is not None
    config.cache_config.enable_prefix_caching = True
    config.scheduler_config = SimpleNamespace(enable_chunked_prefill=True, max_num_batched_tokens=64)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.custom_ops = []
    plugin.register()
    update = vars(cuda)[plugin._PATCHED]
    monkeypatch.setattr(update, "_update", lambda vllm_config: None)
    update(config)
    assert config.compilation_config.cudagraph_mode is CUDAGraphMode.NONE
    assert config.compilation_config.custom_ops == []
    # What workers take for asked for, they leave as it is.
    assert (config.cache_config.block_size, config.cache_config.user_specified_block_size) == (expected, True)


# An engine


@needs_vllm
def test_an_engine_on_the_backend_for_gpus_writes_what_the_patched_model_writes(tmp_path: Path) -> None:
    """On a CPU, its kernels in the interpreter."""
    dense_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    patch_model_with_kvsplice(model, KVSpliceConfig(**ROWS["bytes, exact tokens"]), calibration=calibrated(model))
    save_kvsplice(model, tmp_path / "splice")
    expected = [continued(model, prompt)[:NEW_TOKENS] for prompt in PROMPTS]
    asked = {"base": str(tmp_path / "base"), "splice": str(tmp_path / "splice"), "block_size": 16}
    asked |= {"prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    program = Path(__file__).parent / "engines_interpreted.py"
    ended = subprocess.run(
        [sys.executable, str(program), json.dumps(asked)], capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["layers"] == ["SplicedCudaMLAImpl"] * 2
    assert found["steps"]["decode Triton"]
    assert found["first"] == found["again"] == expected
