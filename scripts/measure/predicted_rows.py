#!/usr/bin/env python
"""How much smaller do the packed rows of a prompt get in a file, when they are predicted from those of earlier layers?

One line for rows as they are, and one for each way to predict them: from no layer before (which is entropy coding with
what is usual of each number), from one or more, and from the tokens as well. All ways are lossless, which is checked:
the loss is that of the running rows, and measured once. The last line of stdout is one JSON object.

    python scripts/measure/predicted_rows.py --model smollm2 --bytes_per_token 193 --statistics smollm2.safetensors
    python scripts/measure/predicted_rows.py --model demo --bytes_per_token 193 --statistics demo.safetensors
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from transformers import DynamicCache

from kvsplice_hf import fit_row_prediction, get_kv_cache_size
from kvsplice_hf.bench.command_line import (
    DEMO,
    BudgetOrSplice,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
    splice,
)
from kvsplice_hf.bench.rounds import timed
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.evaluation.reference import score_against, score_reference
from kvsplice_hf.patch.state import splice_disabled
from kvsplice_hf.rest.row_prediction import RowPrediction, packed_splices, tokens_of
from kvsplice_hf.upstream import cache_argument


@dataclass
class Arguments(BudgetOrSplice):
    """Bytes and times of predicted rows."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    text: str = field(default="pydoc", metadata={"help": "where the prompt comes from"})
    tokens: int = field(default=4096, metadata={"help": "of the prompt"})
    fit: list[str] = field(
        default_factory=lambda: ["varied"], metadata={"help": "texts that predictions are fitted to"}
    )
    fit_tokens: int = field(default=32768, metadata={"help": "tokens of all of them together"})
    depths: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "layers that predict; the last one with tokens as well"}
    )
    loss_tokens: int = field(default=8192, metadata={"help": "tokens of the text to measure loss on; 0: no loss"})
    window: int = field(default=1024, metadata={"help": "tokens of a sequence, in fitting and for the loss"})
    repeats: int = field(default=3, metadata={"help": "of writing and reading, of which the median counts"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def check(args: Arguments) -> None:
    """Raises ConfigError for settings that nothing could be measured with."""
    for name, least in (("tokens", 1), ("repeats", 1), ("loss_tokens", 0), ("window", 8)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least {least}.")
    if not args.fit or not args.depths:
        raise ConfigError("--fit and --depths must name a text and a number of layers each.")


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    return statistics.median(timed(call, "cpu") for _ in range(repeats))


@torch.no_grad()
def computed(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The packed rows of all spliced layers, uint8 [T, bytes]."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(cache))
    layers: list[Any] = [cache.layers[index] for index in packed_splices(model)]
    return [layer.keys.flatten(0, 2).cpu() for layer in layers]


def line(
    name: str, model: Any, prediction: RowPrediction, rows: list[torch.Tensor], ids: torch.Tensor, repeats: int
) -> dict[str, Any]:
    """One way to predict.

    Raises:
        ConfigError: rows did not come back as they were, which nothing should make happen.
    """
    splices = list(packed_splices(model).values())
    tokens = tokens_of(model, ids.numel(), ids.flatten(), prediction.uses_tokens)
    streams = prediction.compress(splices, rows, tokens)
    read = prediction.restore(splices, streams.__getitem__, tokens, "these rows")
    if not all(map(torch.equal, read, rows)):
        raise ConfigError("Rows did not come back as they were.")
    return {
        "name": name,
        "bytes": sum(stream.nbytes for stream in streams.values()) / ids.numel() / len(rows),
        "prediction_bytes": sum(
            array.nbytes for layer in prediction.layers for part in layer.parts.values() for array in part
        ),
        "write_s": median_seconds(lambda: prediction.compress(splices, rows, tokens), repeats),
        "read_s": median_seconds(
            lambda: prediction.restore(splices, streams.__getitem__, tokens, "these rows"), repeats
        ),
    }


def loss_of(model: Any, tokenizer: Any, args: Arguments) -> dict[str, Any] | None:
    if not args.loss_tokens:
        return None
    windows = spread_windows(tokenizer, args.text, "evaluation", args.window, args.loss_tokens)

    def forward(window: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(window[None].to(model.device), use_cache=False).logits[0]
        return logits

    with splice_disabled(model):
        stock = score_reference(forward, windows, "stock")
    return score_against(forward, stock, "packed")


def run(args: Arguments) -> dict[str, Any]:
    check(args)
    model, tokenizer = load_model(args.model, args.dtype)
    stock = get_kv_cache_size(model, seq_len=args.tokens).original_bytes
    splice(model, tokenizer, args)
    ids = spread_windows(tokenizer, args.text, "evaluation", args.tokens, args.tokens)
    rows = computed(model, ids)
    compute_s = median_seconds(lambda: computed(model, ids), args.repeats)
    plain = sum(own.shape[1] for own in rows) / len(rows)
    found: list[dict[str, Any]] = [{"name": "packed rows as they are", "bytes": plain}]
    share = args.fit_tokens // len(args.fit)
    text = torch.cat([spread_windows(tokenizer, name, "calibration", args.window, share) for name in args.fit])
    ways = [(depth, False) for depth in args.depths] + [(args.depths[-1], True)]
    for depth, uses_tokens in ways:
        fit = {"max_tokens": text.numel(), "window": args.window, "depth": depth, "uses_tokens": uses_tokens}
        prediction = fit_row_prediction(model, text, **fit)
        name = f"predicted from {depth} layers" + (" and tokens" if uses_tokens else "")
        found.append(line(name, model, prediction, rows, ids, args.repeats))
    bf16 = stock / args.tokens / len(rows) * torch.bfloat16.itemsize / getattr(torch, args.dtype).itemsize
    return {
        "results": found,
        "stock_bf16_bytes": bf16,
        "compute_s": compute_s,
        "fitted_to_tokens": text.numel(),
        "loss": loss_of(model, tokenizer, args),
    }


def table_of(report: dict[str, Any]) -> Table:
    table = Table("rows", "B per token and layer", "stock in bf16 over it", "write", "read", "prediction (MB)")
    for row in report["results"]:
        sizes = [f"{row['bytes']:.1f}", f"{report['stock_bf16_bytes'] / row['bytes']:.2f}x"]
        times = [f"{row[name]:.2f} s" if name in row else "-" for name in ("write_s", "read_s")]
        fitted = f"{row['prediction_bytes'] / 1e6:.1f}" if "prediction_bytes" in row else "-"
        table.add_row(row["name"], *sizes, *times, fitted)
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args)
    folder = results_folder(args.output, "predicted_rows")
    console().print(table_of(report))
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
