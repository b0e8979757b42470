#!/usr/bin/env python
"""What holds on quantised weights of real models: a row per model and method, a column per thing that may not.

At full rank (MLA) the patched model attends on codes and must write the tokens of the same quantised model unpatched.
Models with ordinary attention have no full rank: their rows are given 16 bits per number. Then the model is calibrated
and patched at the bytes asked for, its splice is saved and loaded on weights that were quantised anew, and the patch is
undone. Where full rank writes another token, the two logits between which it had to choose are printed, beside how far
the same unpatched model moves its logits when its attention is computed in another order ("eager"). The last line of
stdout is one JSON object.

    python scripts/measure/quantised.py --methods bitsandbytes-4bit torchao-int8 quanto-int8
"""

import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel

from kvsplice_hf import (
    KVSpliceCalibrator,
    KVSpliceConfig,
    explain,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.bench.command_line import (
    DEMO,
    ORDINARY_DEMO,
    ProgramParser,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    require_folder,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.first_differences import Written, agreement, distance, first_differences, write
from kvsplice_hf.bench.quantisation import METHODS, UNQUANTISED, quantise
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.patch.sites import find_sites


@dataclass
class Arguments:
    """What holds on quantised weights."""

    models: list[str] = field(
        default_factory=lambda: [DEMO, ORDINARY_DEMO],
        metadata={"help": 'folders, hub names, "demo" (SmolLM2 as MLA) or "smollm2"'},
    )
    methods: list[str] = field(
        default_factory=lambda: [UNQUANTISED, "bitsandbytes-4bit", "torchao-int8"],
        metadata={"help": f"any of {', '.join((UNQUANTISED, *METHODS))}"},
    )
    bytes_per_token: float = field(default=193, metadata={"help": "of a row; 0: full rank alone, no calibration"})
    splice: str | None = field(
        default=None, metadata={"help": "a saved splice of one model, which is loaded; nothing is calibrated then"}
    )
    calibration_tokens: int = field(default=4096, metadata={"help": "tokens of varied text"})
    prompts: int = field(default=4, metadata={"help": "prompts, a batch"})
    prompt_tokens: int = field(default=128, metadata={"help": "tokens of each"})
    new_tokens: int = field(default=32, metadata={"help": "tokens that are written, greedily"})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def compared(stock: Written, exact: Written, dtype: torch.dtype) -> dict[str, Any]:
    """What a row says of full rank beside the unpatched model: tokens, distance of logits, and where they part."""
    parts = first_differences(stock, exact, dtype)
    return {"exact": agreement(stock, exact), "exact_apart": distance(stock, exact), "first_differences": parts}


def in_other_order(model: PreTrainedModel, stock: Written, prompts: torch.Tensor) -> dict[str, Any]:
    """The same of the unpatched model whose attention is computed in another order: what rounding alone does."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    written = write(model, prompts, stock.tokens.shape[1])
    model.set_attn_implementation(before)
    return {"tokens": agreement(stock, written), "apart": distance(stock, written)}


def check(name: str, method: str, args: Arguments) -> dict[str, Any]:
    """A row of the table."""
    base, tokenizer = load_model(name, args.dtype)
    window = args.prompt_tokens
    prompts = spread_windows(tokenizer, "pydoc", "evaluation", window, window * args.prompts)
    model, count = quantise(base, method), args.new_tokens
    stock = write(model, prompts, count)
    row: dict[str, Any] = {"model": name, "quantisation": method, "other_order": in_other_order(model, stock, prompts)}
    ordinary = any(site.kv_heads for site in find_sites(model))
    if not ordinary:
        patch_model_with_kvsplice(model, KVSpliceConfig(compression_ratio=1.0, init="identity"))
        row |= compared(stock, write(model, prompts, count), model.dtype) | {"decoded_by": _path(model)}
        unpatch_model(model)
        if not args.bytes_per_token:
            return row
    if args.splice is not None:
        return row | with_saved_splice(model, stock, prompts, args.splice)
    calibrator = KVSpliceCalibrator(model).collect(
        "varied", tokenizer=tokenizer, max_tokens=args.calibration_tokens, holdout=0
    )
    row["metric"] = calibrator.metric
    if ordinary:
        patch_model_with_kvsplice(model, KVSpliceConfig(bits=16), calibration=calibrator)
        row |= compared(stock, write(model, prompts, count), model.dtype)
        unpatch_model(model)
    patch_model_with_kvsplice(model, KVSpliceConfig(bytes_per_token=args.bytes_per_token), calibration=calibrator)
    packed = write(model, prompts, count)
    row["packed"], row["packed_decoded_by"] = agreement(stock, packed), _path(model)
    with tempfile.TemporaryDirectory() as folder:
        save_kvsplice(model, folder)
        other = load_kvsplice(quantise(load_model(name, args.dtype).model, method), folder)
    row["loaded"] = agreement(packed, write(other, prompts, count))
    row["undone"] = agreement(stock, write(unpatch_model(model), prompts, count))
    console().print(row)  # the next one may take long
    return row


def with_saved_splice(model: PreTrainedModel, stock: Written, prompts: torch.Tensor, folder: str) -> dict[str, Any]:
    """What a row says of a model on which a splice is loaded, and taken off again."""
    load_kvsplice(model, folder)
    count = stock.tokens.shape[1]
    row = {"packed": agreement(stock, write(model, prompts, count)), "packed_decoded_by": _path(model)}
    row["undone"] = agreement(stock, write(unpatch_model(model), prompts, count))
    console().print(row)
    return row


@torch.no_grad()
def _path(model: PreTrainedModel) -> str:
    return ", ".join(dict.fromkeys(layer.decode for layer in explain(model).layers))


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One line per model and method."""
    columns = ("exact", "decoded_by", "metric", "packed", "packed_decoded_by", "loaded", "undone")
    table = Table("model", "quantisation", *(column.replace("_", " ") for column in columns))
    for row in rows:
        table.add_row(row["model"], row["quantisation"], *(str(row.get(column, "not measured")) for column in columns))
    return table


def differences_of(rows: list[dict[str, Any]]) -> Table:
    """One line per first token that differs at full rank, in logits."""
    caption = (
        "gap: between the two tokens in the unpatched model. step: between neighbouring numbers of the dtype. moved: "
        "how far full rank moved the two against each other. apart: root of the mean square of the change of all "
        "logits, at full rank and of the unpatched model with eager attention."
    )
    columns = ("model", "quantisation", "sequence, token", "gap", "step", "moved", "apart", "apart, eager")
    table = Table(*columns, title="first tokens that differ at full rank", caption=caption, caption_justify="left")
    for row in rows:
        for one in row.get("first_differences", ()):
            numbers = (one["gap"], one["step"], one["moved"], row["exact_apart"], row["other_order"]["apart"])
            where = f"{one['sequence']}, {one['token']}"
            table.add_row(row["model"], row["quantisation"], where, *(f"{number:.4f}" for number in numbers))
    return table


def main() -> None:
    with readable_errors():
        (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
        require_known("methods", args.methods, [UNQUANTISED, *METHODS])
        if args.splice is not None:
            require_folder("splice", args.splice)
        settings = [(name, method) for name in args.models for method in args.methods]
        progress = tqdm(settings, desc="models and methods", file=sys.stderr)
        rows = [check(name, method, args) for name, method in progress]
    console().print(table_of(rows), differences_of(rows))
    finish({"rows": rows, **environment(args)}, results_folder(args.output, "quantised"))


if __name__ == "__main__":
    main()
