"""Scores as tables: each model's with its interval, and its differences to the base and to the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sterna.commands.inspect import printable
from sterna.commands.shared import size
from sterna.scoring.evaluated import Entry, Evaluated, TaskScores, rows_to_settle
from sterna.scoring.intervals import Difference, Estimate
from sterna.training.metrics import Metric

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


def tables(result: Evaluated, console: Console) -> Iterator[RenderableType]:
    """What is to be printed of an evaluation, part by part; narrow terminals get intervals on lines of their own."""
    from rich.measure import Measurement
    from rich.text import Text

    for number, task in enumerate(result.tasks):
        if number:
            yield ""
        yield Text(_heading(task, result.base), style="bold")
        for metric in task.metrics:
            wide = _table(task, metric, " ")
            fits = Measurement.get(console, console.options.update(max_width=10_000), wide).maximum <= console.width
            yield wide if fits else _table(task, metric, "\n")
            yield from (Text(line) for line in _unsettled(task, metric))
    yield Text("[low, high]: 95 % intervals; differences are paired on the rows; noise: the interval holds 0", style="dim")


def _heading(task: TaskScores, base: str) -> str:
    unit = "blocks of text" if task.task == "causal-lm" else "rows"
    what = f"{task.task} in {len(task.classes)} classes" if task.classes else task.task
    name = f"{task.name}: " if task.name else ""
    heads = {"own": "", "new": ", with a new head that knows nothing"}
    return printable(
        f"{name}{task.rows:,} {unit} of {task.data}; {what}; base {base}{heads.get(task.head_from, f', with the head of {task.head_from}')}"
    )


def _table(task: TaskScores, metric: Metric, gap: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    others = [name for name in dict.fromkeys((task.entries[0].name, task.reference)) if name is not None]
    others = [name for name in others if len(task.entries) > 1 and any(name in task.against(entry) for entry in task.entries)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column(metric.title + ("" if metric.higher_is_better else " (less is better)"), justify="right")
    for name in others:
        table.add_column(f"against {printable(name)}", justify="right", overflow="fold")
        table.add_column("", no_wrap=True)
    for entry in task.entries:
        cells = [scored(entry.outcomes[metric.name].interval(), metric, gap)]
        for name in others:
            against = name in task.against(entry) and entry is not task.entries[0]
            cells += differing(task.difference(entry.name, name, metric.name), metric, gap) if against else ["", ""]
        table.add_row(Text(_called(entry)), "-" if entry.bytes is None else size(entry.bytes), *map(Text, cells))
    return table


def _called(entry: Entry) -> str:
    head = entry.detail.get("head")
    return printable(entry.name + (f", head {head}" if head else ""))


def figures(metric: Metric, *numbers: float) -> list[str]:
    """Numbers in as many digits as their size asks for: points with one."""
    if metric.points:
        return [f"{number:z.1f}" for number in numbers]
    largest = max(abs(number) for number in numbers)
    digits = 1 if largest >= 100 else 2 if largest >= 10 else 3 if largest >= 0.1 else 5
    return [f"{number:z.{digits}f}" for number in numbers]


def scored(estimate: Estimate, metric: Metric, gap: str = " ") -> str:
    value, low, high = figures(metric, estimate.value, estimate.low, estimate.high)
    return f"{value}{gap}[{low}, {high}]"


def differing(found: Difference, metric: Metric, gap: str = " ") -> list[str]:
    """A difference with its interval, and what it is worth."""
    value, low, high = figures(metric, found.value, found.low, found.high)
    sign = "" if value.startswith("-") else "+"
    return [f"{sign}{value}{gap}[{low}, {high}]", "noise" if found.noise else _probability(found.p)]


def _probability(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".")


def _unsettled(task: TaskScores, metric: Metric) -> Iterator[str]:
    """How many rows would tell a difference from none, for those to the reference that are noise."""
    for entry in task.entries[1:]:
        if task.reference is None or task.reference not in task.against(entry):
            continue
        found = task.difference(entry.name, task.reference, metric.name)
        rows = rows_to_settle(found)
        if rows is not None:
            (value,) = figures(metric, abs(found.value))
            yield f"{_called(entry)} against {printable(task.reference)}: a difference of {value} would show on about {rows:,} rows like these"
