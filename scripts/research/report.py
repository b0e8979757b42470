#!/usr/bin/env python
"""A report on one or several folders of scripts/research/ablate.py: tables and figures in Markdown.

Folders of one experiment are joined: seeds are added up, machines are compared. Intervals are over seeds (Student's t),
differences are taken seed by seed. Results on other text are never mixed. The last line of stdout is one JSON object.

    python scripts/research/report.py results/ablation-nano
    python scripts/research/report.py results/ablation-nano results/ablation-nano-gpu --control MLA-24
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from scipy import stats

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.command_line import (
    console,
    finish,
    parse_with_positional,
    readable_errors,
    require_known,
    results_folder,
)
from kvsplice_hf.bench.figures import draw_curves, draw_losses, draw_quality_against_bytes, draw_speed
from kvsplice_hf.bench.records import read_experiment, read_runs
from kvsplice_hf.bench.tables import with_error


Record = dict[str, Any]


@dataclass
class Arguments:
    """A report on folders of results."""

    folders: list[str] = field(metadata={"help": "folders of results of scripts/research/ablate.py"})
    control: str | None = field(default=None, metadata={"help": "arm that others are compared with; the experiment's"})
    output: str = field(default="results", metadata={"help": "folder for the report"})


class Interval(NamedTuple):
    """A mean and half the width of its 95 % interval, None where there is one value only."""

    mean: float
    half: float | None

    def text(self, form: str = ".4f") -> str:
        return with_error(self.mean, self.half, form)


class Group(NamedTuple):
    """Runs that can be compared: one experiment, budget and text."""

    experiment: str
    budget: str
    data: str


def interval(values: list[float]) -> Interval:
    """The mean of independent values, with its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    return Interval(mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)))


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Interval | None:
    """Mean of the differences seed by seed, over the seeds that both have; None where there is none."""
    shared = sorted(set(ours) & set(theirs))
    return interval([ours[seed] - theirs[seed] for seed in shared]) if shared else None


def load(folders: list[str]) -> tuple[dict[str, Record], dict[Group, list[Record]]]:
    """What was asked, by the name of the experiment, and the runs by group.

    Raises:
        ConfigError: a folder is not there, or holds no finished run.
    """
    definitions: dict[str, Record] = {}
    groups: dict[Group, list[Record]] = defaultdict(list)
    for folder in map(Path, folders):
        definition = read_experiment(folder)
        known = definitions.setdefault(definition["name"], {**definition, "arms": []})
        runs = read_runs(folder)
        if not runs:
            raise ConfigError(f"{folder} holds no finished run yet.")
        known["arms"] += [arm for arm in definition["arms"] if arm not in known["arms"]]
        for run in runs:
            # An arm that was taken out of the experiment since is still a result.
            if run["arm"] not in known["arms"]:
                known["arms"].append(run["arm"])
            groups[Group(run["experiment"], run["budget"], run["data"])].append(run)
    return definitions, dict(groups)


def losses_by_seed(records: list[Record]) -> dict[str, dict[int, float]]:
    """Validation losses by arm and seed; one seed on several machines is one observation, their mean."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record["arm"]][record["seed"]].append(record["validation_loss"])
    return {arm: {seed: statistics.fmean(v) for seed, v in seeds.items()} for arm, seeds in found.items()}


def speeds_by_machine(records: list[Record], arms: list[str]) -> dict[str, dict[str, float]]:
    """Median tokens per second of training, by arm and machine; arms that train."""
    found: dict[str, dict[str, list[float]]] = {arm: defaultdict(list) for arm in arms}
    for record in records:
        if record.get("tokens_per_second"):
            found[record["arm"]][machine_of(record)].append(record["tokens_per_second"])
    return {arm: {name: statistics.median(v) for name, v in by.items()} for arm, by in found.items() if by}


def machine_of(record: Record) -> str:
    processes = record.get("processes", 1)
    return record["machine"] if processes == 1 else f"{record['machine']}, {processes} processes"


def rows_of(records: list[Record], arms: list[str], control: str | None) -> list[Record]:
    """A row per arm that has results, in the order of the experiment."""
    losses, speeds = losses_by_seed(records), speeds_by_machine(records, arms)
    rows = []
    for arm in (arm for arm in arms if arm in losses):
        mine = [record for record in records if record["arm"] == arm]
        loss = interval(list(losses[arm].values()))
        against = paired_difference(losses[arm], losses.get(control or "", {})) if arm != control else None
        rows.append(
            {
                "arm": arm,
                "after": mine[0].get("after"),
                "seeds": len(losses[arm]),
                "losses": list(losses[arm].values()),
                "loss": loss.mean,
                "loss_interval": loss.half,
                "difference": None if against is None else against.mean,
                "difference_interval": None if against is None else against.half,
                "cache_bytes_per_token": mine[0]["cache_bytes_per_token"],
                "parameters": mine[0]["parameters"],
                "tokens": statistics.fmean(record["tokens"] for record in mine) if "tokens" in mine[0] else None,
                "tokens_per_second": statistics.median(speeds[arm].values()) if arm in speeds else None,
            }
        )
    return rows


_HEAD = ("arm", "seeds", "validation loss", "perplexity", "against control", "cache bytes/token", "tokens/s")


def cells_of(row: Record) -> tuple[str, ...]:
    difference = None if row["difference"] is None else Interval(row["difference"], row["difference_interval"])
    return (
        row["arm"],
        str(row["seeds"]),
        Interval(row["loss"], row["loss_interval"]).text(),
        f"{math.exp(row['loss']):.2f}",
        "" if difference is None else difference.text("+.4f"),
        f"{row['cache_bytes_per_token']:.1f}",
        "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
    )


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def answer(question: Record, losses: dict[str, dict[int, float]]) -> str:
    """One sentence, as sure as the interval is."""
    arm, against = question["arm"], question["against"]
    found = paired_difference(losses.get(arm, {}), losses.get(against, {}))
    if found is None:
        return "Not measured yet."
    percent = 100 * math.expm1(found.mean)
    numbers = f"{found.text('+.4f')} nats, perplexity {percent:+.2f} %"
    if found.half is None:
        return f"One seed only: {numbers}."
    if abs(found.mean) <= found.half:
        return f"Not decided by these seeds: {numbers}."
    return f"{'Yes' if found.mean < 0 else 'No'}: {arm} against {against}, {numbers}."


def machine_lines(records: list[Record], arms: list[str]) -> list[str]:
    """Speed and loss of each arm on each machine, where there are several."""
    machines = sorted({machine_of(record) for record in records})
    if len(machines) < 2:
        return [f"Machine: {machines[0]}.", ""]
    speeds = speeds_by_machine(records, arms)
    rows = []
    for arm in arms:
        cells = [arm]
        for machine in machines:
            mine = [record for record in records if record["arm"] == arm and machine_of(record) == machine]
            loss = interval(list(losses_by_seed(mine)[arm].values())).text() if mine else ""
            speed = speeds.get(arm, {}).get(machine)
            cells += [loss, "" if speed is None else f"{speed:,.0f}"]
        rows.append(tuple(cells))
    head = ("arm", *(f"{machine}: {what}" for machine in machines for what in ("loss", "tokens/s")))
    return ["### Machines", "", *markdown_table(head, rows)]


def section(group: Group, definition: Record, records: list[Record], control: str | None, folder: Path) -> list[str]:
    """The part of the report on one group, its figures drawn beside it."""
    arms = [arm for arm in definition["arms"] if any(record["arm"] == arm for record in records)]
    rows = rows_of(records, arms, control)
    stem = f"{group.experiment}-{group.budget}-{group.data[:6]}"
    figures = {
        "Validation loss while training": draw_curves(records, arms, folder / f"{stem}-curves.png"),
        "Final loss": draw_losses(rows, control, folder / f"{stem}-losses.png"),
        "Quality against cache bytes": draw_quality_against_bytes(rows, folder / f"{stem}-bytes.png"),
    }
    speeds = speeds_by_machine(records, arms)
    if speeds:
        figures["Training speed"] = draw_speed(speeds, folder / f"{stem}-speed.png")
    losses = losses_by_seed(records)
    lines = [f"## {group.experiment}, budget {group.budget}", ""]
    lines += [f"Text `{group.data}`: {trained_on(rows)}{records[0]['validation_tokens']:,} tokens of validation."]
    lines += machine_lines(records, arms)
    lines += markdown_table(_HEAD, [cells_of(row) for row in rows])
    lines += [f"Control: {control}." if control else "No control.", ""]
    for question in definition["questions"]:
        lines += [f"**{question['ask']}** {answer(question, losses)}", ""]
    for title, path in figures.items():
        lines += [f"![{title}]({path.name})", ""] if path is not None else []
    return lines


def trained_on(rows: list[Record]) -> str:
    """How much text the arms were trained on, where any was."""
    tokens = [row["tokens"] for row in rows if row["tokens"]]
    if not tokens:
        return ""
    least, most = f"{min(tokens):,.0f}", f"{max(tokens):,.0f}"
    return (least if least == most else f"{least} to {most}") + " tokens of training, "


_NOTE = """Losses are nats per token on text that no training saw. ± is half a 95 % interval over seeds (Student's t:
with three seeds it is 4.3 standard errors); differences to the control are taken seed by seed, on the same text in the
same order. Cache bytes are those of a real cache in bf16, all layers together. Seconds count training alone.
"""


def print_tables(groups: dict[Group, list[Record]], definitions: dict[str, Record], control: str | None) -> None:
    for group, records in groups.items():
        definition = definitions[group.experiment]
        table = Table(*_HEAD, title=f"{group.experiment}, budget {group.budget}")
        for row in rows_of(records, definition["arms"], control or definition["control"]):
            table.add_row(*cells_of(row))
        console().print(table)


def main() -> None:
    args = parse_with_positional(Arguments, "folders", __doc__.split("\n")[0])
    with readable_errors():
        definitions, groups = load(args.folders)
        if args.control is not None:
            require_known("control", [args.control], [arm for d in definitions.values() for arm in d["arms"]])
        folder = results_folder(args.output, "report")
        lines = ["# Ablation", "", _NOTE]
        for group, records in groups.items():
            definition = definitions[group.experiment]
            lines += section(group, definition, records, args.control or definition["control"], folder)
        path = folder / "report.md"
        path.write_text("\n".join(lines), encoding="utf-8")
    print_tables(groups, definitions, args.control)
    results = {
        f"{group.experiment}, {group.budget}, {group.data}": rows_of(
            records, definitions[group.experiment]["arms"], args.control or definitions[group.experiment]["control"]
        )
        for group, records in groups.items()
    }
    finish({"markdown": str(path), "folders": args.folders, "results": results}, folder)


if __name__ == "__main__":
    main()
