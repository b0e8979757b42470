#!/usr/bin/env python
"""Serve a model with its splice: the OpenAI-compatible API of vLLM, on packed rows.

A thin program around `vllm serve`, which it becomes. Without --model it writes a small random DeepSeek-V3 with a
splice of a quarter of the bytes, to see that serving works where nothing can be downloaded. It runs where vLLM is
installed (`make test-vllm` makes such an environment).

    python scripts/run/serve.py
    python scripts/run/serve.py --model my-deepseek --splice my-splice --engine "--dtype bfloat16 --max-model-len 8192"
"""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.api_server import LOOPBACK, environment_of, vllm_command
from kvsplice_hf.bench.command_line import ProgramParser, console, readable_errors, require_folder, results_folder
from kvsplice_hf.bench.small_model import STOCK_ROW_BYTES, save_small_model, save_small_splice


@dataclass
class Arguments:
    """Serve a model with its splice."""

    model: str | None = field(
        default=None, metadata={"help": "folder or hub name of a model of docs/serving.md; none: a small random one"}
    )
    splice: str | None = field(default=None, metadata={"help": "folder of save_kvsplice for that model"})
    host: str = field(default=LOOPBACK, metadata={"help": "address to listen on; the default is this machine alone"})
    port: int = field(default=8000, metadata={"help": "port to listen on"})
    engine: str = field(default="", metadata={"help": "further options of `vllm serve`, in one string"})
    output: str = field(default="results", metadata={"help": "folder for the small random model"})


def check(args: Arguments) -> None:
    """Refuse a model without a splice, or the other way round.

    Raises:
        ConfigError: one of them is missing, or no folder.
    """
    if (args.model is None) != (args.splice is None):
        given, missing = ("--model", "--splice") if args.splice is None else ("--splice", "--model")
        raise ConfigError(f"{given} was given without {missing}. Give both, or none for a small random model.")
    for option in ("model", "splice"):
        if getattr(args, option) is not None:
            require_folder(option, getattr(args, option))


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        check(args)
        if args.model is None:
            folder = results_folder(args.output, "serve")
            save_small_model(folder / "model", layers=3, positions=2048)
            save_small_splice(folder / "model", folder / "splice", STOCK_ROW_BYTES / 4, sink_tokens=4)
            args.model, args.splice = str(folder / "model"), str(folder / "splice")
    options = ["serve", args.model, "--host", args.host, "--port", str(args.port), *shlex.split(args.engine)]
    command = vllm_command(*options)
    console().print(f"KVSPLICE_VLLM={args.splice} vllm {shlex.join(options)}", markup=False)
    os.execve(command[0], command, environment_of(Path(args.splice)))


if __name__ == "__main__":
    main()
