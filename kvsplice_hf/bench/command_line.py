"""What the scripts share: loading a model, where results go, and what is noted beside every figure."""

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
import yaml
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel
from transformers.hf_argparser import DataClassType

import kvsplice_hf.gpt2_mla  # noqa: F401  makes its checkpoints known to AutoModelForCausalLM
from kvsplice_hf import (
    ConfigError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    KVSpliceError,
    load_kvsplice,
    patch_model_with_kvsplice,
)
from kvsplice_hf.demo import load_demo_model, load_original_demo_model


# The model of scripts that were given none.
DEMO = "demo"
# The same model before it was turned into MLA: with ordinary attention.
ORDINARY_DEMO = "smollm2"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Calibration:
    """Arguments of scripts that calibrate."""

    calibration: str = field(
        default="varied",
        metadata={"help": 'text to calibrate on ("varied" comes along), "auto" (kept for later runs), or "none"'},
    )
    calibration_tokens: int = field(default=8192, metadata={"help": "how many tokens of it"})
    statistics: str | None = field(
        default=None, metadata={"help": "file of calibration statistics: read if it is there, otherwise written"}
    )


@dataclass
class Budget(Calibration):
    """Arguments of scripts that splice a model."""

    compression_ratio: float | None = field(default=None, metadata={"help": "r / R, codes as numbers"})
    bytes_per_token: float | None = field(
        default=None, metadata={"help": "bytes per token and layer in packed codes; no budget: a quarter of stock"}
    )
    bits: float | None = field(default=None, metadata={"help": "the same as bits per number of the stock row"})
    compression: float | None = field(default=None, metadata={"help": "the same as times less than stock in bf16"})


@dataclass
class BudgetOrSplice(Budget):
    """Arguments of scripts that splice a model, or take a splice that was saved."""

    splice: str | None = field(
        default=None, metadata={"help": "folder of a saved splice (save_kvsplice), in place of calibration and budget"}
    )


class LoadedModel(NamedTuple):
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any


class ProgramParser(HfArgumentParser):
    """`HfArgumentParser`, which says what an unknown option may have been meant to be, instead of a traceback."""

    def parse_args_into_dataclasses(  # type: ignore[override]
        self, args: Sequence[str] | None = None
    ) -> tuple[Any, ...]:
        """The dataclasses; the program ends with a message where an option is unknown."""
        *found, rest = super().parse_args_into_dataclasses(args, return_remaining_strings=True)
        unknown = [word for word in rest if word.startswith("-")] or rest
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            close = [option for word in unknown for option in get_close_matches(word, known, n=1, cutoff=0.75)]
            meant = f" Did you mean {', '.join(close)}?" if close else ""
            sys.exit(f"{self.prog}: unknown {', '.join(unknown)}.{meant} --help lists the options.")
        return tuple(found)


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ConfigError: it is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ConfigError(f"--dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_model(name: str, dtype: str) -> LoadedModel:
    """The model and tokenizer of a folder or hub name, or an embedded one, on the GPU if there is one.

    Raises:
        ConfigError: the dtype is unknown, or the name is the path of a folder that is not there.
        UnsupportedError: the packages of the embedded default are missing.
        OSError: there is no such model.
    """
    torch_dtype = parse_dtype(dtype)
    require_folder("model", name)
    has_gpu = torch.cuda.is_available()
    if name in (DEMO, ORDINARY_DEMO):
        model, tokenizer = (load_demo_model if name == DEMO else load_original_demo_model)(torch_dtype)
        return LoadedModel(nn.Module.to(model, "cuda") if has_gpu else model, tokenizer)
    device_map = "auto" if has_gpu else None
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype, device_map=device_map).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(name))


def require_folder(option: str, name: str) -> None:
    """Refuse the path of a folder that is not there, which the Hub would be asked for.

    A path begins with ".", "/" or "~", has more parts than a name on the Hub, or begins with a folder that is there.

    Raises:
        ConfigError: there is no such folder.
    """
    parts = Path(name).parts
    is_path = name.startswith((".", "~", os.sep)) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())
    if is_path and not Path(name).is_dir():
        found = "is no folder" if Path(name).exists() else "is not there"
        raise ConfigError(
            f"--{option} {name} {found} (seen from {Path.cwd()}). Give a folder that `save_pretrained` wrote, or a "
            "name on the Hub."
        )


def calibrate(model: PreTrainedModel, tokenizer: Any, args: Calibration) -> Any:
    """What `patch_model_with_kvsplice` takes as `calibration`; statistics serve any number of budgets.

    Raises:
        CalibrationError: the file of statistics is damaged, or of another model.
        ConfigError: there is no such text.
    """
    if args.statistics is not None and Path(args.statistics).exists():
        return KVSpliceCalibrator.load(args.statistics, model)
    if args.calibration in ("none", "auto"):
        return None if args.calibration == "none" else "auto"
    calibrator = KVSpliceCalibrator(model)
    calibrator.collect(args.calibration, tokenizer=tokenizer, max_tokens=args.calibration_tokens)
    if args.statistics is not None:
        Path(args.statistics).parent.mkdir(parents=True, exist_ok=True)
        calibrator.save(args.statistics)
    return calibrator


def splice(model: PreTrainedModel, tokenizer: Any, args: Budget) -> None:
    """Calibrate and patch, or load a saved splice where the arguments name one.

    Raises:
        CheckpointError: the saved splice cannot be read, or is of another model.
        KVSpliceError: the model cannot be patched, the budget cannot be met, or the text cannot be had.
    """
    if isinstance(args, BudgetOrSplice) and args.splice is not None:
        load_kvsplice(model, args.splice)
        return
    calibration = calibrate(model, tokenizer, args)
    names = ("compression_ratio", "bytes_per_token", "bits", "compression")
    config = KVSpliceConfig(**{name: getattr(args, name) for name in names})
    patch_model_with_kvsplice(model, config, calibration=calibration, tokenizer=tokenizer)


def require_known(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that an option does not take.

    Raises:
        ConfigError: one of `names` is not among `known`.
    """
    known = list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"--{option} has {', '.join(unknown)}; it takes {', '.join(known)}.")


def parse_with_config(kinds: Sequence[type], argv: list[str], **defaults: Any) -> tuple[Any, ...]:
    """Dataclasses from the command line, over the YAML file of `--config`, over `defaults`.

    Raises:
        ConfigError: the file cannot be read, or holds a setting that nobody takes.
    """
    parser = ProgramParser([DataClassType(kind) for kind in kinds])
    parser.set_defaults(**defaults)
    if "--config" in argv:
        at = argv.index("--config")
        path, argv = Path(argv[at + 1] if at + 1 < len(argv) else ""), argv[:at] + argv[at + 2 :]
        parser.set_defaults(**read_settings(path, kinds))
    return parser.parse_args_into_dataclasses(args=argv)


def parse_with_positional(kind: type, name: str, description: str) -> Any:
    """A dataclass from the command line, on which the first option may be given without its name: a list of files."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = [f"--{name}", *argv]
    (args,) = ProgramParser(DataClassType(kind), description=description).parse_args_into_dataclasses(args=argv)
    return args


def names_of_settings(kinds: Iterable[type]) -> set[str]:
    """What the dataclasses take."""
    return {item.name for kind in kinds for item in fields(kind)}


def read_settings(path: Path, kinds: Iterable[type]) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds a setting that none of the dataclasses has.
    """
    values = {_current_name(name, kinds): value for name, value in read_yaml(path).items()}
    unknown = sorted(map(str, set(values) - names_of_settings(kinds)))
    if unknown:
        raise ConfigError(f"--config {path} holds {', '.join(unknown)}, which no setting of this script is called.")
    return values


# Names that transformers has given up, in releases that know the new one.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def _current_name(name: str, kinds: Iterable[type]) -> str:
    new = _RENAMED.get(name, name)
    return new if new in names_of_settings(kinds) else name


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds no mapping of settings to values.")
    return values


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the script with the message alone where a user's input is at fault: a wrong model, setting or file."""
    try:
        yield
    except (KVSpliceError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def console() -> Console:
    """Tables go to stderr; where that is no terminal, wide enough that they do not wrap."""
    terminal = Console(stderr=True)
    return terminal if terminal.is_terminal else Console(stderr=True, width=140)


def results_folder(output: str, script: str) -> Path:
    """A new folder `output/script-date-time`; a number is added where it exists, so nothing is overwritten."""
    stem = f"{script}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1000):
        folder = Path(output) / (stem if attempt == 0 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{output} holds a thousand folders {stem}-*")


def environment(arguments: object) -> dict[str, Any]:
    """The command, the machine and the versions behind a figure."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "arguments": vars(arguments),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": gpu or f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def finish(report: dict[str, Any], folder: Path) -> None:
    """Write the report beside its figures and print it as the last line of stdout."""
    report["folder"] = os.fspath(folder)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))
