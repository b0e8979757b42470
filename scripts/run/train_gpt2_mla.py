#!/usr/bin/env python
"""Train a GPT-2, or a GPT-2 with Multi-head Latent Attention and perhaps a splice built in, from scratch.

Settings come from a YAML file, from the command line, or from both (the command line wins). A run that was cut off goes
on from its last checkpoint when it is started again with the same settings. The last line of stdout is one JSON object.

    python scripts/run/train_gpt2_mla.py --config configs/gpt2_mla/nano.yaml --data pydoc --max_tokens 1000000
    python scripts/run/train_gpt2_mla.py --architecture gpt2 --data results/text --vocab_size 2048 --max_hours 0.5 \
        --kvsplice-enable --kvsplice-k 64
    python scripts/run/train_gpt2_mla.py --config configs/gpt2_mla/mini.yaml --kvsplice '{"compression_ratio": 0.5}'
    accelerate launch scripts/run/train_gpt2_mla.py --config configs/gpt2_mla/124m.yaml
"""

import sys
from typing import Any

from rich.table import Table

from kvsplice_hf.bench.command_line import console, environment, finish, readable_errors
from kvsplice_hf.bench.pretraining.run import parse, train


def geometry_table(report: dict[str, Any]) -> Table:
    """What the model loses when it reads its values, or latents, through a geometry."""
    table = Table("geometry", "squared error, held out", "validation loss")
    for title, name in (("components alone", "pca"), ("splines, components", "spline")):
        table.add_row(title, f"{report[f'kvsplice_{name}_mse']:.6g}", f"{report[f'kvsplice_{name}_loss']:.4f}")
    return table


def main() -> None:
    with readable_errors():
        args, training = parse(sys.argv[1:])
        report = train(args, training)
    if training.process_index:
        return
    table = Table("validation loss", "perplexity", "tokens", "tokens/s", "parameters", "cache bytes/token")
    exact = (f"{report[name]:.4f}" for name in ("validation_loss", "validation_perplexity"))
    rounded = ("tokens", "tokens_per_second", "parameters", "cache_bytes_per_token")
    table.add_row(*exact, *(f"{report[name]:,.0f}" for name in rounded))
    console().print(table)
    if args.kvsplice_enable:
        console().print(geometry_table(report))
    finish({**report, **environment(args)}, training.folder)


if __name__ == "__main__":
    main()
