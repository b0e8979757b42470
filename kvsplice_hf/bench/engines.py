"""Engines of vLLM in this process, for programs that compare them with transformers.

They keep to one process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so that what a layer stores can be looked at. vLLM is
imported when an engine is made, and not before.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kvsplice_hf.vllm import plugin
from kvsplice_hf.vllm.start import FOLDER_VARIABLE


# Relative, of a size that float32 makes of sums in another order.
NOISE = 1e-6


class Stored(NamedTuple):
    """What an engine stored of the tokens of one request in one layer.

    Attributes:
        rows: uint8 [T, w].
        latents: what they were made of, beside the keys, [T, R].
    """

    rows: torch.Tensor
    latents: torch.Tensor


@contextmanager
def disturbed_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Have embeddings be off by `NOISE`, always in the same way: what rounding does to the model itself."""
    random = torch.Generator("cpu").manual_seed(0)

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(output.shape, generator=random, dtype=torch.float32, device="cpu")
        return output * (1 + NOISE * drawn.to(output))

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def engine(model: Path, splice: Path | None, **settings: Any) -> Iterator[Any]:
    """An engine with the splice of a folder, or without one, and with settings of vLLM's `LLM`; closed at the end."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    plugin.unregister()
    os.environ[FOLDER_VARIABLE] = "" if splice is None else str(splice)
    plugin.register()
    common = {"skip_tokenizer_init": True, "enforce_eager": True, "disable_log_stats": False}
    made = LLM(str(model), **(common | settings))
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def counted(made: Any, name: str) -> int:
    """A counter of the engine."""
    return int(sum(metric.value for metric in made.get_metrics() if metric.name == f"vllm:{name}"))


def written(made: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The tokens that an engine writes greedily behind each prompt, all asked for at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in made.generate(given, sampling, use_tqdm=False)]


def log_probabilities(made: Any, prompts: list[list[int]]) -> list[list[float]]:
    """Of the tokens of each prompt, from the second one on, as an engine finds them."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        [place[token].logprob for token, place in zip(prompt[1:], out.prompt_logprobs[1:], strict=True)]
        for prompt, out in zip(prompts, made.generate(given, sampling, use_tqdm=False), strict=True)
    ]


def loss_on(made: Any, prompts: list[list[int]]) -> float:
    """Mean loss of an engine on prompts, nats per token."""
    found = [number for of_prompt in log_probabilities(made, prompts) for number in of_prompt]
    return -sum(found) / len(found)


def stored_of(made: Any, prompt: list[int]) -> list[Stored]:
    """What an engine with a splice of MLA stores of a prompt, by layer."""
    from kvsplice_hf.vllm.pages import pages_of

    layers = made.llm_engine.vllm_config.compilation_config.static_forward_context
    impls = [layer.impl for layer in layers.values() if hasattr(layer.impl, "do_kv_cache_update")]
    found: dict[Any, list[Stored]] = {impl: [] for impl in impls}

    def watched(impl: Any) -> Any:
        update = impl.do_kv_cache_update

        def stand_in(latents: torch.Tensor, keys: torch.Tensor, cache: Any, slots: Any, *rest: Any) -> None:
            update(latents, keys, cache, slots, *rest)
            if not cache.numel():
                return
            pages, size = pages_of(cache, impl._layer), cache.shape[1]
            kept = (slots.flatten() >= 0).nonzero().flatten()
            at = slots.flatten()[kept]
            rows = pages.rows[at // size, at % size].clone()
            found[impl].append(Stored(rows, latents[kept].clone()))

        return stand_in

    for impl in impls:
        impl.do_kv_cache_update = watched(impl)
    try:
        written(made, [prompt], 1)
    finally:
        for impl in impls:
            del impl.do_kv_cache_update
    return [
        Stored(*(torch.cat(parts)[: len(prompt)] for parts in zip(*pieces, strict=True))) for pieces in found.values()
    ]
