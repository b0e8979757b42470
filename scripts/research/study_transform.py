#!/usr/bin/env python
"""Does the transform (scale and shift) matter? Tuning with it frozen, at the common rate, and at a rate of its own.

Each row starts from the same weights and sees the same batches. How far the transform has moved is a median over
dimensions: of the relative change of the scale, and of the change of the shift (in standard deviations of the latent,
where calibration has set the scale). The last line of stdout is one JSON object.

    python scripts/research/study_transform.py --dataset pydoc varied --evaluation speeches.txt
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from rich.table import Table
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvsplice_hf import KVSpliceConfig, load_kvsplice, patch_model_with_kvsplice, save_kvsplice, unpatch_model
from kvsplice_hf.bench.command_line import (
    DEMO,
    Calibration,
    ProgramParser,
    calibrate,
    console,
    environment,
    finish,
    load_model,
    readable_errors,
    results_folder,
)
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.text import load_texts, spread_evenly, token_windows
from kvsplice_hf.training import KVSpliceTrainer, KVSpliceTrainingArguments, freeze_all_but_kvsplice
from kvsplice_hf.training.parameters import splices_of


# Name, whether it starts from calibration, LayerNorm on the code.
STARTS = {
    "calibrated": (True, False),
    "calibrated, LayerNorm": (True, True),
    "weights alone": (False, False),
    "weights alone, LayerNorm": (False, True),
}


@dataclass
class Arguments(Calibration):
    """Does the transform matter?"""

    model: str = field(default=DEMO, metadata={"help": 'folder or hub name; "demo": SmolLM2-135M as MLA'})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model"})
    compression_ratio: float = field(default=0.5, metadata={"help": "r / R"})
    dataset: list[str] = field(default_factory=lambda: ["pydoc"], metadata={"help": "texts to tune on"})
    evaluation: list[str] = field(default_factory=lambda: ["pydoc"], metadata={"help": "texts to measure on"})
    block_size: int = field(default=256, metadata={"help": "tokens per window, in tuning and measuring"})
    evaluation_windows: int = field(default=4, metadata={"help": "windows of each text to measure on"})
    steps: int = field(default=24, metadata={"help": "steps of each row"})
    learning_rate: float = field(default=1e-4, metadata={"help": "of the projections"})
    transform_learning_rates: list[float] = field(
        default_factory=lambda: [0.0, 1e-4, 1e-2], metadata={"help": "of scale and shift, one row each"}
    )
    starts: list[str] = field(default_factory=lambda: list(STARTS), metadata={"help": "where to start from"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


@torch.no_grad()
def transforms(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Scale in use and shift of all layers, [layers * R]."""
    splices = splices_of(model).values()
    return {
        "scale": torch.cat([F.softplus(splice.transform_scale.float()) for splice in splices]),
        "shift": torch.cat([splice.transform_shift.float().clone() for splice in splices]),
    }


def measure(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
    model.eval()
    return score_windows(model, windows, chunk=None, progress=False).summary()


def tune(model: PreTrainedModel, dataset: Dataset, rate: float, args: Arguments, folder: str) -> None:
    arguments = KVSpliceTrainingArguments(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=1,
        learning_rate=args.learning_rate,
        transform_learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_strategy="no",
        report_to="none",
    )
    KVSpliceTrainer(model, arguments, train_dataset=dataset).train()


def rows(model: PreTrainedModel, tokenizer: Any, args: Arguments) -> Iterator[dict[str, Any]]:
    parts = [token_windows(tokenizer, load_texts(name, "calibration"), args.block_size) for name in args.dataset]
    used = torch.cat(parts)
    used = used[torch.randperm(len(used), generator=torch.Generator().manual_seed(0))][: args.steps].tolist()
    dataset = Dataset.from_dict({"input_ids": used, "labels": used})
    held = [token_windows(tokenizer, load_texts(name, "evaluation"), args.block_size) for name in args.evaluation]
    windows = torch.cat([spread_evenly(part, args.evaluation_windows) for part in held])
    calibration = calibrate(model, tokenizer, args)
    for start in args.starts:
        from_calibration, layernorm = STARTS[start]
        config = KVSpliceConfig(compression_ratio=args.compression_ratio, use_layernorm=layernorm)
        patch_model_with_kvsplice(model, config, calibration=calibration if from_calibration else None)
        with tempfile.TemporaryDirectory() as folder:
            save_kvsplice(model, folder)
            before, first = measure(model, windows), transforms(model)
            for rate in args.transform_learning_rates:
                load_kvsplice(unpatch_model(model), folder)
                tune(freeze_all_but_kvsplice(model), dataset, rate, args, folder)
                last = transforms(model)
                moved = {
                    "scale": (last["scale"] / first["scale"] - 1).abs().median().item(),
                    "shift": (last["shift"] - first["shift"]).abs().median().item(),
                }
                yield {"start": start, "rate": rate, "before": before, "after": measure(model, windows), "moved": moved}
        unpatch_model(model)


def table_of(found: list[dict[str, Any]]) -> Table:
    table = Table("start", "rate of the transform", "KL before", "KL after", "loss before", "loss after", "moved")
    for row in found:
        before, after, moved = row["before"], row["after"], row["moved"]
        table.add_row(
            row["start"],
            f"{row['rate']:g}",
            f"{before['kl']:.4f}",
            f"{after['kl']:.4f}",
            f"{before['loss_percent']:+.2f} %",
            f"{after['loss_percent']:+.2f} %",
            f"scale {moved['scale']:.1e}, shift {moved['shift']:.1e}",
        )
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        found = list(rows(*load_model(args.model, args.dtype), args))
    console().print(table_of(found))
    finish({"results": found, **environment(args)}, results_folder(args.output, "transform"))


if __name__ == "__main__":
    main()
