"""The matrix of an ablation: named arms, seeds and budgets, read from a YAML file and checked before anything runs."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.command_line import names_of_settings, read_settings, read_yaml
from kvsplice_hf.bench.pretraining.after_training import AfterTraining
from kvsplice_hf.bench.pretraining.run import KINDS, parse, settings_of
from kvsplice_hf.bench.records import RunKey


_KEYS = ("name", "control", "seeds", "config", "train", "budgets", "arms", "questions", "output_dir")


@dataclass(frozen=True)
class Arm:
    """One row of the table: settings of a training, or what is done after another arm's."""

    name: str
    settings: dict[str, Any]
    plan: AfterTraining | None
    budgets: tuple[str, ...]


@dataclass(frozen=True)
class Ablation:
    """A matrix of runs.

    Attributes:
        definition: what is kept beside the results.
        train: settings of every training; `budgets` and arms go over them.
        budgets: settings by name of the budget.
    """

    name: str
    folder: Path
    definition: dict[str, Any]
    train: dict[str, Any]
    budgets: dict[str, dict[str, Any]]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    _fingerprints: dict[RunKey, str] = field(default_factory=dict)

    def runs(self) -> Iterator[RunKey]:
        """Seed by seed, so that there is something to see of all arms early."""
        for seed in self.seeds:
            for budget in self.budgets:
                yield from (RunKey(budget, arm.name, seed) for arm in self.arms.values() if budget in arm.budgets)

    def parent(self, key: RunKey) -> RunKey | None:
        """The run that another one starts from."""
        plan = self.arms[key.arm].plan
        return None if plan is None else key._replace(arm=plan.after)

    def folder_of(self, key: RunKey) -> Path:
        """Where a run is kept."""
        safe = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in key.arm)
        return self.folder / key.budget / safe / f"seed-{key.seed}"

    def arguments(self, key: RunKey) -> Any:
        """Arguments of the training of a run, or of the one it starts from."""
        trained = self.parent(key) or key
        settings = self.train | self.budgets[key.budget] | self.arms[trained.arm].settings
        settings |= {"seed": key.seed, "data_seed": key.seed, "output_dir": str(self.folder_of(key))}
        return parse([], **settings)

    def fingerprint(self, key: RunKey) -> str:
        """Of all settings that decide how a run comes out."""
        if key not in self._fingerprints:
            plan = self.arms[key.arm].plan
            content = [settings_of(*self.arguments(key)), None if plan is None else vars(plan)]
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            self._fingerprints[key] = digest[:16]
        return self._fingerprints[key]


def read_ablation(path: Path, output_dir: str | None, changes: dict[str, Any]) -> Ablation:
    """The ablation of a YAML file.

    Args:
        path: the file.
        output_dir: in place of the file's.
        changes: settings of every training, over those of the file.

    Raises:
        ConfigError: the file cannot be read, or holds something that nobody takes.
    """
    values = read_yaml(path)
    _check_shape(path, values)
    base = read_settings(path.parent / values["config"], KINDS) if "config" in values else {}
    budgets = values.get("budgets") or {"tokens": {}}
    for where, settings in {"train": values.get("train", {}), **budgets, "--set": changes}.items():
        _require_settings(f"{path}: {where}", settings)
    arms = {name: _arm(path, name, settings, tuple(budgets)) for name, settings in values["arms"].items()}
    _check_names(path, values, arms)
    name = values.get("name", path.stem)
    return Ablation(
        name=name,
        folder=Path(output_dir or values.get("output_dir", f"results/ablation-{name}")),
        definition={
            "name": name,
            "control": values.get("control"),
            "arms": list(arms),
            "questions": values.get("questions", []),
        },
        train=base | values.get("train", {}) | changes,
        budgets={name: dict(settings or {}) for name, settings in budgets.items()},
        arms=arms,
        seeds=tuple(values.get("seeds", (0,))),
    )


def _check_shape(path: Path, values: dict[str, Any]) -> None:
    unknown = sorted(map(str, set(values) - set(_KEYS)))
    if unknown or not values.get("arms"):
        found = f"holds {', '.join(unknown)}" if unknown else "has no arms"
        raise ConfigError(f"{path} {found}; an ablation takes {', '.join(_KEYS)}.")
    for name in ("arms", "train", "budgets"):
        if not isinstance(values.get(name, {}), dict):
            raise ConfigError(f"{path}: {name} is a {type(values[name]).__name__}; it must be a mapping.")


def _require_settings(where: str, settings: dict[str, Any] | None) -> None:
    unknown = sorted(map(str, set(settings or {}) - names_of_settings(KINDS)))
    if unknown:
        raise ConfigError(
            f"{where} has {', '.join(unknown)}, which no setting of scripts/run/train_gpt2_mla.py is called."
        )


def _arm(path: Path, name: str, settings: dict[str, Any] | None, budgets: tuple[str, ...]) -> Arm:
    where = f"{path}: arm {name!r}"
    settings = dict(settings or {})
    chosen = tuple(settings.pop("budgets", budgets))
    if not set(chosen) <= set(budgets):
        raise ConfigError(f"{where} asks for the budgets {', '.join(chosen)}; there are {', '.join(budgets)}.")
    if "after" not in settings:
        _require_settings(where, settings)
        return Arm(name, settings, None, chosen)
    known = [item.name for item in fields(AfterTraining)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"{where} has {', '.join(unknown)}; an arm after training takes {', '.join(known)}.")
    try:
        return Arm(name, {}, AfterTraining(**settings), chosen)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_names(path: Path, values: dict[str, Any], arms: dict[str, Arm]) -> None:
    """Arms that others refer to must be there."""
    trained = {name for name, arm in arms.items() if arm.plan is None}
    for name, arm in arms.items():
        if arm.plan is not None and arm.plan.after not in trained:
            raise ConfigError(f"{path}: arm {name!r} comes after {arm.plan.after!r}, which no trained arm is called.")
    named = {values["control"]} if values.get("control") else set()
    for question in values.get("questions", []):
        if set(question) != {"ask", "arm", "against"}:
            raise ConfigError(f"{path}: a question has `ask`, `arm` and `against`, not {', '.join(question)}.")
        named |= {question["arm"], question["against"]}
    if not named <= set(arms):
        raise ConfigError(f"{path} refers to {', '.join(sorted(named - set(arms)))}, which no arm is called.")
