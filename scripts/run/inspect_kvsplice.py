#!/usr/bin/env python
"""What is in a saved splice, layer by layer: ranks, row bytes, widths, the transform, and coordinates worth pruning.

Which coordinates hardly reach the heads takes the model's kv_b_proj to say; without --model their size in the decoded
latent stands in. Numbers that are not finite are counted and left out. The last line of stdout is one JSON object.

    python scripts/run/inspect_kvsplice.py --splice my-splice
    python scripts/run/inspect_kvsplice.py --splice my-splice --model demo
    python scripts/run/inspect_kvsplice.py --splice my-splice --model demo --prune 0.1 --output my-smaller-splice
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import PreTrainedModel

from kvsplice_hf import ConfigError, LearnedKVSplice, load_kvsplice, save_kvsplice
from kvsplice_hf.bench.command_line import ProgramParser, console, environment, load_model, readable_errors
from kvsplice_hf.bench.tables import NOT_FINITE, number
from kvsplice_hf.code.files import CONFIG_NAME
from kvsplice_hf.manage.loading import read_splices
from kvsplice_hf.manage.pruning import LayerPruning, effective_scales, plan_pruning, prune_kvsplice, pruning_candidates
from kvsplice_hf.training.parameters import statistics_of


# How large a coordinate is: C_j is its row of `compress`, D_j its column of the decoding matrix, W is kv_b_proj.
WITH_MODEL = "||W D_j|| ||C_j||"
WITHOUT_MODEL = "||D_j|| ||C_j|| (--model was not given: what the heads read does not count)"


@dataclass
class Arguments:
    """What is in a saved splice, layer by layer."""

    splice: str = field(metadata={"help": "folder of save_kvsplice"})
    model: str | None = field(
        default=None, metadata={"help": 'folder or hub name of its base model ("demo": SmolLM2-135M as MLA), or none'}
    )
    threshold: float = field(
        default=0.1, metadata={"help": "pruning candidates: effective scale below this part of their layer's median"}
    )
    prune: float | None = field(
        default=None, metadata={"help": "remove the candidates at this threshold; needs --model"}
    )
    output: str | None = field(default=None, metadata={"help": "folder for the pruned splice"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})


def check(args: Arguments) -> None:
    """Refuse arguments that do not go together.

    Raises:
        ConfigError: --prune without what it needs, or an output that is taken.
    """
    if args.prune is None:
        return
    if args.model is None or args.output is None:
        raise ConfigError("--prune needs --model, whose heads tell what can go, and --output, a folder for the result.")
    if Path(args.output, CONFIG_NAME).exists():
        raise ConfigError(f"--output {args.output} holds a splice already; name another folder.")


def describe(layer_idx: int, splice: LearnedKVSplice, pruning: LayerPruning | None) -> dict[str, Any]:
    """What a layer is made of, and what could go."""
    scale = F.softplus(splice.transform_scale.detach().float())
    numbers = torch.cat([tensor.detach().float().flatten() for tensor in splice.state_dict().values()])
    error = math.nan if pruning is None else pruning.relative_error
    return {
        "layer": layer_idx,
        "kv_lora_rank": splice.latent_dim,
        "rank": splice.rank,
        "row_bytes": None if splice.codec is None else splice.codec.row_bytes,
        "widths": None if splice.codec is None else widths_of(splice.codec.widths, splice.rank),
        "scale": finite_statistics(scale),
        "shift": finite_statistics(splice.transform_shift),
        "not_finite": int((~torch.isfinite(numbers)).sum()),
        "candidates": None if pruning is None else list(pruning.coordinates),
        "relative_error": error if math.isfinite(error) else None,
    }


def widths_of(widths: torch.Tensor, rank: int) -> dict[str, dict[str, int]]:
    """How many coordinates of the code and of k_rot have each width."""
    parts = {"code": widths[:rank], "k_rot": widths[rank:]}
    return {
        name: {str(width): count for width, count in sorted(Counter(part.tolist()).items())}
        for name, part in parts.items()
    }


def finite_statistics(values: torch.Tensor) -> dict[str, float] | None:
    """Of the finite values; None where there are none."""
    values = values[torch.isfinite(values)]
    return statistics_of(values) if len(values) else None


def find_candidates(
    splices: dict[int, LearnedKVSplice], model: PreTrainedModel | None, threshold: float
) -> tuple[str, list[LayerPruning]]:
    """How large a coordinate is taken to be, and the candidates of each layer."""
    if any(splice.code_norm is not None for splice in splices.values()):
        return "none, as codes with a LayerNorm cannot be pruned", []
    if model is not None:
        return WITH_MODEL, pruning_candidates(model, threshold)
    scales = {layer_idx: effective_scales(splice) for layer_idx, splice in splices.items()}
    return WITHOUT_MODEL, [plan_pruning(layer_idx, of_layer, threshold) for layer_idx, of_layer in scales.items()]


def table_of(rows: list[dict[str, Any]], measure: str) -> Table:
    table = Table("layer", "rank", "row bytes", "code widths", "k_rot widths", "scale", "shift", "candidates")
    table.caption = f"scale and shift: mean ± std [min, max]. Effective scale of a coordinate: {measure}."
    for row in rows:
        widths = row["widths"] or {"code": {}, "k_rot": {}}
        table.add_row(
            f"{row['layer']}" + (f" ({row['not_finite']} not finite)" if row["not_finite"] else ""),
            f"{row['rank']} of {row['kv_lora_rank']}",
            "-" if row["row_bytes"] is None else str(row["row_bytes"]),
            *(" ".join(f"{count}x{width}" for width, count in widths[part].items()) or "-" for part in widths),
            *(spread(row[name]) for name in ("scale", "shift")),
            "-" if row["candidates"] is None else f"{len(row['candidates'])} (error {error_of(row)})",
        )
    return table


def error_of(row: dict[str, Any]) -> str:
    """Of pruning the candidates; a layer with numbers that are not finite has none."""
    return NOT_FINITE if row["relative_error"] is None else number(row["relative_error"], ".2%")


def spread(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return "{mean:.3g} ± {std:.2g} [{min:.3g}, {max:.3g}]".format(**found)


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        check(args)
        splices = read_splices(args.splice)
        model = None if args.model is None else load_kvsplice(load_model(args.model, args.dtype).model, args.splice)
        if args.prune is None:
            measure, reports = find_candidates(splices, model, args.threshold)
        else:
            measure, reports = WITH_MODEL, prune_kvsplice(model, args.prune)
            save_kvsplice(model, args.output)
    by_layer = {report.layer_idx: report for report in reports}
    rows = [describe(layer_idx, splice, by_layer.get(layer_idx)) for layer_idx, splice in splices.items()]
    console().print(table_of(rows, measure))
    pruned = None if args.prune is None else [asdict(report) | {"rank_after": report.rank_after} for report in reports]
    print(json.dumps({"layers": rows, "measure": measure, "pruned": pruned, "folder": args.output} | environment(args)))


if __name__ == "__main__":
    main()
