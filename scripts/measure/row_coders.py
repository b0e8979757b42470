#!/usr/bin/env python
"""How much smaller do packed rows become without loss, by which coder, and how long does that take?

The rows of one prompt, by each coder. "Columns" are the symbols of a coordinate side by side, see `code.symbols`.
"Bound" is what an ideal arithmetic coder would need: its tables are those of the same rows, of another text, or of the
tokens before. The last line of stdout is one JSON object.

zstandard and constriction are measured where they are installed: pip install zstandard constriction

    python scripts/measure/row_coders.py --model smollm2 --tokens 4096 --bytes_per_token 193
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import DynamicCache

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
from kvsplice_hf.bench.row_coders import CODERS, Coded, Layer, layer_of
from kvsplice_hf.bench.tables import number, ratio
from kvsplice_hf.bench.texts import spread_windows
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.rest.entropy import codecs_of
from kvsplice_hf.upstream import cache_argument


# Tokens of a prompt that are computed at once.
_AT_ONCE = 1024


@dataclass
class Arguments(BudgetOrSplice):
    """Coders of packed rows."""

    model: str = field(default=DEMO, metadata={"help": 'folder, hub name, "demo" (SmolLM2 as MLA) or "smollm2"'})
    text: str = field(default="pydoc", metadata={"help": "where the prompt comes from"})
    other_text: str = field(default="varied", metadata={"help": "where the tables of another text come from"})
    tokens: int = field(default=4096, metadata={"help": "of the prompt"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


@torch.no_grad()
def rows_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The packed rows of each layer, uint8 [S, bytes]."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for piece in ids.split(_AT_ONCE, dim=1):
        model(input_ids=piece, use_cache=True, logits_to_keep=1, **cache_argument(cache))
    layers: Any = cache.layers
    return [layers[site.layer_idx].keys[0, 0].cpu() for site, _ in patched_sites(model)]


def layers_of(args: Arguments) -> list[Layer]:
    """The rows of a prompt.

    Raises:
        ConfigError: there are no tokens, or rows are not packed.
    """
    if args.tokens < 1:
        raise ConfigError(f"--tokens is {args.tokens}; it must be at least 1.")
    model, tokenizer = load_model(args.model, args.dtype)
    splice(model, tokenizer, args)
    codecs = [codecs_of(patched.splice) for _, patched in patched_sites(model)]
    if not all(codecs):
        raise ConfigError("Rows are numbers with this budget. Give --bytes_per_token, --bits or --compression.")
    device = next(model.parameters()).device
    rows = []
    for text, split in ((args.text, "evaluation"), (args.other_text, "calibration")):
        ids = spread_windows(tokenizer, text, split, args.tokens, args.tokens)[:1]
        rows.append(rows_of(model, ids.to(device)))
    return [layer_of(*parts) for parts in zip(codecs, *rows, strict=True)]


def measure(layers: list[Layer]) -> list[dict[str, Any]]:
    """One line per coder."""
    rows = []
    tokens = layers[0].rows.shape[0]
    for name, coder in tqdm(CODERS.items(), desc="coders"):
        found = [coder(layer) for layer in layers]
        coded = [part for part in found if part is not None]
        per_token = sum(part.nbytes for part in coded) / tokens / len(layers) if coded else None
        times = {field: summed(coded, field) for field in ("encode_s", "decode_s")}
        rows.append({"coder": name, "bytes_per_token_and_layer": per_token, **times})
    return rows


def summed(coded: list[Coded], name: str) -> float | None:
    """Of all layers together; None where it was not measured."""
    times = [getattr(part, name) for part in coded]
    return sum(times) if times and None not in times else None


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("coder", "B per token and layer", "of packed rows", "to code", "to decode")
    packed = rows[0]["bytes_per_token_and_layer"]
    for row in rows:
        size = row["bytes_per_token_and_layer"]
        times = [row[name] for name in ("encode_s", "decode_s")]
        cells = ["-" if row["coder"].startswith("bound") else f"{number(time)} s" for time in times]
        if row["coder"] == "packed rows":
            cells = ["-", "-"]
        cells = [cell if cell != "not measured s" else "not measured" for cell in cells]
        table.add_row(row["coder"], number(size, ".1f"), ratio(size, packed, ".3f"), *cells)
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = {"results": measure(layers_of(args))}
    folder = results_folder(args.output, "row_coders")
    console().print(table_of(report["results"]))
    finish(report | environment(args), folder)


if __name__ == "__main__":
    main()
