#!/usr/bin/env python
"""Train and measure a matrix of named arms and seeds, from a YAML file, into one folder of results.

Every arm of a seed sees the same text in the same order. Finished runs are skipped, a run that was cut off goes on from
its last checkpoint, and several processes on one folder share the work. scripts/research/report.py draws the result.
The last line of stdout is one JSON object.

    python scripts/research/ablate.py configs/ablations/nano.yaml
    python scripts/research/ablate.py configs/ablations/nano.yaml --output_dir results/try --seeds 0 --arms GPT-2 MLA-48
    python scripts/research/ablate.py configs/ablations/nano.yaml --set data=pydoc max_tokens=200000
"""

import json
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.ablation import Ablation, read_ablation
from kvsplice_hf.bench.command_line import console, environment, readable_errors, require_known
from kvsplice_hf.bench.pretraining.after_training import run_after
from kvsplice_hf.bench.pretraining.data import load_blocks
from kvsplice_hf.bench.pretraining.run import train
from kvsplice_hf.bench.records import RunKey, append_run, key_of, read_runs, write_experiment


# Between looks at what other processes on the same folder have finished.
_WAIT_SECONDS = 5.0


def select(ablation: Ablation, args: Namespace) -> list[RunKey]:
    """The runs that were asked for, with those that they start from.

    Raises:
        ConfigError: an arm or a seed is not part of the ablation.
    """
    require_known("arms", args.arms or [], ablation.arms)
    require_known("seeds", map(str, args.seeds or []), map(str, ablation.seeds))
    chosen = [
        key
        for key in ablation.runs()
        if (not args.arms or key.arm in args.arms) and (not args.seeds or key.seed in args.seeds)
    ]
    needed = {parent for key in chosen if (parent := ablation.parent(key))}
    return [key for key in ablation.runs() if key in needed or key in chosen]


def finished_runs(ablation: Ablation) -> set[RunKey]:
    """The runs that need not be done again.

    Raises:
        ConfigError: one was done with other settings.
    """
    finished = set()
    wanted = set(ablation.runs())
    for record in read_runs(ablation.folder):
        key = key_of(record)
        if key in wanted and record["fingerprint"] != ablation.fingerprint(key):
            raise ConfigError(
                f"{ablation.folder} holds a finished run of arm {key.arm!r}, seed {key.seed}, with other settings. "
                "Choose another --output_dir."
            )
        finished.add(key)
    return finished


class Worker:
    """Takes one run after the other, until all are finished, by itself or by other processes on the same folder.

    Under `accelerate launch` the main process decides, and all processes take part in every run.
    """

    def __init__(self, ablation: Ablation, keys: list[RunKey]) -> None:
        self.ablation, self.keys, self.processes = ablation, keys, PartialState()
        self._claim: FileLock | None = None

    def work(self) -> int:
        """Do what is to be done; how many runs this process did."""
        done = 0
        while (key := self._next()) is not None:
            record = self._execute(key)
            if self.processes.is_main_process:
                append_run(self.ablation.folder, record)
                self._tidy(key)
                assert self._claim is not None
                self._claim.release()
                console().print(f"{key.arm}, seed {key.seed}: validation loss {record['validation_loss']:.4f}")
            done += 1
        return done

    def _next(self) -> RunKey | None:
        choice = [self._choose() if self.processes.is_main_process else None]
        if self.processes.num_processes > 1:
            broadcast_object_list(choice)
        return choice[0]

    def _choose(self) -> RunKey | None:
        """A run that nobody has claimed and that has what it starts from; None when all are finished."""
        while True:
            finished = finished_runs(self.ablation)
            left = [key for key in self.keys if key not in finished]
            if not left:
                return None
            for key in left:
                parent = self.ablation.parent(key)
                if (parent is None or parent in finished) and self._take(key):
                    return key
            time.sleep(_WAIT_SECONDS)

    def _take(self, key: RunKey) -> bool:
        folder = self.ablation.folder_of(key)
        folder.mkdir(parents=True, exist_ok=True)
        claim = FileLock(folder / "claimed.lock")
        try:
            claim.acquire(timeout=0)
        except Timeout:
            return False
        if key in finished_runs(self.ablation):  # by another process, since we looked
            claim.release()
            return False
        self._claim = claim
        return True

    def _execute(self, key: RunKey) -> dict[str, Any]:
        args, training = self.ablation.arguments(key)
        plan, parent = self.ablation.arms[key.arm].plan, self.ablation.parent(key)
        if plan is None or parent is None:
            result = train(args, training)
            result.pop("settings")
        else:
            blocks = load_blocks(args, args.n_positions)
            result = run_after(plan, self.ablation.folder_of(parent), blocks, training)
        facts = environment(Namespace())
        return {
            "experiment": self.ablation.name,
            **key._asdict(),
            "after": None if plan is None else plan.after,
            "fingerprint": self.ablation.fingerprint(key),
            "finished": datetime.now().isoformat(timespec="seconds"),
            "processes": self.processes.num_processes,
            **{name: facts[name] for name in ("machine", "versions")},
            **result,
        }

    def _tidy(self, key: RunKey) -> None:
        """Checkpoints serve to resume, and the run is finished; the model stays."""
        for path in self.ablation.folder_of(key).glob("checkpoint-*"):
            shutil.rmtree(path)


def parse_arguments(argv: list[str]) -> Namespace:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="YAML file of the ablation")
    parser.add_argument("--output_dir", "--output-dir", help="folder of results, in place of the file's")
    parser.add_argument("--arms", nargs="+", help="these arms only, and those that they start from")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds only")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of every training, over those of the file"
    )
    return parser.parse_args(argv)


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """Settings of "name=value" pairs, values as in YAML.

    Raises:
        ConfigError: one is no such pair.
    """
    changes = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"--set has {pair!r}; it takes NAME=VALUE.")
        changes[name] = yaml.safe_load(value)
    return changes


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    with readable_errors():
        ablation = read_ablation(args.config, args.output_dir, parse_changes(args.set))
        keys = select(ablation, args)
        for key in keys:  # wrong settings are found before the first run
            ablation.fingerprint(key)
        ablation.folder.mkdir(parents=True, exist_ok=True)
        worker = Worker(ablation, keys)
        if worker.processes.is_main_process:
            write_experiment(ablation.folder, ablation.definition)
        skipped = len(finished_runs(ablation) & set(keys))
        done = worker.work()
    if dist.is_initialized():
        dist.destroy_process_group()
    if worker.processes.is_main_process:
        print(json.dumps({"folder": str(ablation.folder), "runs": len(keys), "skipped": skipped, "done": done}))


if __name__ == "__main__":
    main()
