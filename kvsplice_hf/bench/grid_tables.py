"""Tables and figures of programs that measure recipes at every batch size and context."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from rich.console import RenderableType
from rich.table import Table

from kvsplice_hf.bench.command_line import console
from kvsplice_hf.bench.grid import Row, measured
from kvsplice_hf.bench.tables import NOT_MEASURED


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


# Columns of tables where stderr is no terminal.
_WIDTH = 170


def spread(values: Sequence[float] | None, unit: str = "", scale: float = 1.0, digits: int = 2) -> str:
    """Median and range, as tables show them."""
    if not values:
        return NOT_MEASURED
    low, middle, high = (scale * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f}-{high:.{digits}f})"


def setting_cells(row: Row) -> list[str]:
    """The first cells of a row of a table."""
    return [str(row["batch_size"]), str(row["context"]), row["recipe"]]


def new_table(rows: Sequence[Row], *columns: str) -> Table:
    """An empty table; the rows that were skipped are named below it."""
    notes = [f"{' / '.join(setting_cells(row))}: skipped. {row['skipped']}" for row in rows if "skipped" in row]
    return Table("batch", "context", "recipe", *columns, caption="\n".join(notes) or None, caption_justify="left")


def draw(rows: Sequence[Row], of: Callable[[Row], float], label: str, path: Path) -> None:
    """A figure of each row against the context, a panel per batch size and a line per recipe; none without figures."""
    shown = measured(rows)
    if not shown:
        return
    batches = sorted({row["batch_size"] for row in shown})
    figure, panels = plt.subplots(
        1, len(batches), figsize=(5.5 * len(batches), 4.2), squeeze=False, constrained_layout=True
    )
    for axes, batch in zip(panels[0], batches, strict=True):
        for name in dict.fromkeys(row["recipe"] for row in shown):
            mine = sorted(
                (row["context"], of(row)) for row in shown if (row["recipe"], row["batch_size"]) == (name, batch)
            )
            axes.plot([length for length, _ in mine], [value for _, value in mine], marker="o", label=name)
        axes.set(xlabel="context (tokens)", ylabel=label, title=f"batch {batch}", xscale="log", yscale="log")
        ticks = sorted({row["context"] for row in shown})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(*parts: RenderableType) -> None:
    """Tables and remarks on stderr."""
    terminal = console()
    if not terminal.is_terminal:
        terminal.width = _WIDTH
    terminal.print(*parts, sep="\n")
