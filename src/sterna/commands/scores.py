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

    every = [(task, metric) for task in result.tasks for metric in task.metrics]
    room = console.options.update(max_width=10_000)
    narrow = any(Measurement.get(console, room, _table(*one, narrow=False)).maximum > console.width for one in every)
    for number, task in enumerate(result.tasks):
        yield Text(("\n" if number else "") + _heading(task, result.base), style="bold")
        for metric in task.metrics:
            yield _table(task, metric, narrow=narrow)
            yield from (Text(line) for line in _unsettled(task, metric))
            if metric is not task.metrics[-1]:
                yield ""
    yield Text("[low, high]: 95 % intervals; differences are paired on the rows; noise: the interval holds 0, or p is not below .05", style="dim")


def _heading(task: TaskScores, base: str) -> str:
    unit = "blocks of text" if task.packed else "rows"
    what = f"{task.task} in {len(task.classes)} classes" if task.classes else task.task
    name = f"{task.name}: " if task.name else ""
    heads = {"own": "", "new": ", with a new head that knows nothing"}
    return printable(
        f"{name}{task.rows:,} {unit} of {task.data}; {what}; base {base}{heads.get(task.head_from, f', with the head of {task.head_from}')}"
    )


def _table(task: TaskScores, metric: Metric, *, narrow: bool) -> Table:
    """A row a model; on a narrow terminal what belongs together stands in one cell, line under line."""
    from rich.table import Table
    from rich.text import Text

    others = [name for name in dict.fromkeys((task.entries[0].name, task.reference)) if name is not None]
    others = [name for name in others if any(_shown(task, entry, name) for entry in task.entries)]
    direction = "" if metric.higher_is_better else "less is better"
    columns = [("model", "size"), (metric.title, direction), *((f"against {printable(name)}", "") for name in others)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, parts in enumerate(columns):
        left = number == 0
        if narrow:
            title = "\n".join(filter(None, parts)) if number < 2 else f"against\n{_short(printable(others[number - 2]))}"
            table.add_column(title, justify="left" if left else "right", overflow="fold", no_wrap=not left, min_width=10 if left else None)
        else:
            titles = parts if left else (" ".join(filter(None, (parts[0], parts[1] and f"({parts[1]})"))), "")
            for place, title in enumerate(titles[: 1 if number == 1 else 2]):
                table.add_column(title, justify="left" if left != bool(place) else "right", no_wrap=True)
    for entry in task.entries:
        estimate = entry.outcomes[metric.name].interval()
        cells: list[tuple[str, ...]] = [(_called(entry), "-" if entry.bytes is None else size(entry.bytes)), (scored(estimate, metric, narrow),)]
        for name in others:
            shown = _shown(task, entry, name)
            cells.append(differing(task.difference(entry.name, name, metric.name), metric, narrow) if shown else ("", ""))
        flat = ["\n".join(filter(None, cell)) for cell in cells] if narrow else [part for cell in cells for part in cell]
        table.add_row(*map(Text, flat))
    return table


def _shown(task: TaskScores, entry: Entry, name: str) -> bool:
    return entry is not task.entries[0] and name in task.against(entry)


def _short(name: str, most: int = 13) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _called(entry: Entry) -> str:
    said = {"head": "head {}", "density": "density {:g}", "alpha": "alpha {:.3g}", "factor": "times {:g}"}
    return printable(", ".join([entry.name, *(how.format(entry.detail[key]) for key, how in said.items() if key in entry.detail)]))


def figures(metric: Metric, *numbers: float) -> list[str]:
    """Numbers in as many digits as their size asks for: points with one."""
    if metric.points:
        return [f"{number:z.1f}" for number in numbers]
    largest = max(abs(number) for number in numbers)
    digits = 1 if largest >= 100 else 2 if largest >= 10 else 3 if largest >= 0.1 else 4
    return [f"{number:z.{digits}f}" for number in numbers]


def scored(estimate: Estimate, metric: Metric, narrow: bool = False) -> str:
    """A value and its interval, which a narrow column has in a line of its own."""
    value, low, high = figures(metric, estimate.value, estimate.low, estimate.high)
    return f"{value}{chr(10) if narrow else ' '}[{low}, {high}]"


def differing(found: Difference, metric: Metric, narrow: bool = False) -> tuple[str, str]:
    """A difference with its interval, and what it is worth."""
    text = scored(Estimate(found.value, found.low, found.high), metric, narrow)
    return text if text.startswith("-") else f"+{text}", "noise" if found.noise else _probability(found.p)


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
