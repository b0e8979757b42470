"""The examples in docstrings run: on a tiny model, without a network, in an empty folder.

An example that shows an output promises it. One that shows none only has to run.
"""

import copy
import doctest
import functools
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import TINY_MODELS
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvsplice_hf
from kvsplice_hf import folders
from kvsplice_hf.text import load_texts


MODULES = (
    "kvsplice_hf",
    "kvsplice_hf.convert",
    "kvsplice_hf.training",
    "kvsplice_hf.evaluation",
    "kvsplice_hf.text",
    "kvsplice_hf.gpt2_mla",
    "kvsplice_hf.hub",
)
# Calls that a reader makes on a model that is patched already. `convert_to_mla` is made on an ordinary one.
ON_A_PATCHED_MODEL = {"explain", "prune_kvsplice", "pruning_candidates", "splice_disabled", "unpatch_model"}
ON_A_PATCHED_MODEL |= {"save_kvsplice", "cache_nbytes", "get_kv_cache_size", "KVSpliceCache", "score_windows"}
ON_A_PATCHED_MODEL |= {"materialised_nbytes"}


def examples() -> Iterator[doctest.DocTest]:
    """The docstrings of public names that have examples, methods included, each once."""
    finder, seen = doctest.DocTestFinder(exclude_empty=True), set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", sorted(vars(module))):
            member = getattr(module, name)
            if not str(getattr(member, "__module__", "")).startswith("kvsplice_hf"):
                continue
            for test in finder.find(member, name, module=False, globs={}):
                if test.examples and test.docstring not in seen:
                    seen.add(test.docstring)
                    yield test


EXAMPLES = list(examples())


class Checker(doctest.OutputChecker):
    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return want == "" or super().check_output(want, got, optionflags)


@functools.cache
def tiny_mla_model() -> PreTrainedModel:
    """Do not change it: copy it."""
    torch.manual_seed(0)
    sizes = TINY_MODELS["deepseek_v3"].kwargs | {"vocab_size": 256, "kv_lora_rank": 64, "qk_rope_head_dim": 32}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**copy.deepcopy(sizes))).eval()


def ordinary_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=32, **sizes)).eval()


@functools.cache
def patched_model() -> PreTrainedModel:
    """Do not change it: copy it."""
    model = copy.deepcopy(tiny_mla_model())
    return kvsplice_hf.patch_model_with_kvsplice(model, compression_ratio=0.5)


def namespace(name: str) -> dict[str, Any]:
    """What a reader of the example has: the public names, and a model with its tokenizer and some text."""
    model = ordinary_model() if name == "convert_to_mla" else copy.deepcopy(tiny_mla_model())
    texts = [text[:2000] for text in load_texts("pydoc", "calibration", samples=4)]
    inputs = byte_tokenizer()("Multi-head Latent Attention", return_tensors="pt")
    ids = inputs["input_ids"]
    names: dict[str, Any] = {"torch": torch, "tokenizer": byte_tokenizer(), "texts": texts, "text": " ".join(texts)}
    names |= {"model": copy.deepcopy(patched_model()) if name in ON_A_PATCHED_MODEL else model}
    names |= {"inputs": inputs, "input_ids": ids, "ids": ids, "dataset": [{"input_ids": ids[0], "labels": ids[0]}] * 2}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names |= {public: getattr(module, public) for public in getattr(module, "__all__", vars(module))}
    return names


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    """The C++ code, from the cache of the machine: below, the folder of caches is another one."""
    with torch.no_grad():
        kvsplice_hf.explain(patched_model())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty current folder but for a saved splice, and statistics kept for all examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(folders.CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "statistics"))
    kvsplice_hf.save_kvsplice(patched_model(), "my-splice")
    return tmp_path


def test_the_public_calls_that_matter_most_have_an_example() -> None:
    shown = {test.name for test in EXAMPLES}
    assert {"patch_model_with_kvsplice", "calibrate", "explain", "convert_to_mla", "KVSpliceTrainer"} <= shown


@pytest.mark.parametrize("test", EXAMPLES, ids=[test.name for test in EXAMPLES])
def test_the_example_runs(test: doctest.DocTest, folder: Path) -> None:
    test = copy.copy(test)
    test.globs = namespace(test.name.partition(".")[0])
    report: list[str] = []
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
