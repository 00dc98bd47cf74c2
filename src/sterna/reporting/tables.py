"""The numbers behind each chart as rows of plain cells: shown in the page, and downloaded as CSV."""

from __future__ import annotations

import csv
import io
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

from sterna.reporting.charts import seconds
from sterna.reporting.report import Report, TaskReport, Times, frontier
from sterna.scoring.intervals import Estimate

Cell = str | int | float | bool | None

SPEEDS = (56e3, 256e3, 1e6, 10e6, 100e6, 1e9)
"""Bits a second."""
WAIT = 0.1
"""Seconds before the first byte, until the page's reader says otherwise."""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns by the keys of their titles, and rows."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def csv(self) -> str:
        """Comma-separated, with a line of column names. A text that a spreadsheet would take for a formula begins with an apostrophe."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(self.columns)
        writer.writerows([[_safe(cell) for cell in row] for row in self.rows])
        return out.getvalue()

    def uri(self) -> str:
        """The CSV as a data URI, with the mark that tells spreadsheets that it is UTF-8."""
        return f"data:text/csv;charset=utf-8,{urllib.parse.quote(chr(0xFEFF) + self.csv())}"


def _safe(cell: Cell) -> Cell:
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def shown(cell: Cell) -> str:
    """A cell as the page shows it: whole numbers with separators, others with six digits."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "\u2713" if cell else "\u2717"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.6g}" if isinstance(cell, float) else cell


def tables(report: Report) -> dict[str, Table]:
    """All tables of a report by name."""
    found = [_scores(report.tasks), _trail(report.tasks), _storage(report.tasks), _transfer(report.tasks), _layers(report.tasks)]
    found += [_steps(report), _latency(report), _memory(report), _dtypes(report), _threads(report), _gates(report), _side(report)]
    return {table.name: table for table in found}


def _interval(estimate: Estimate | None) -> tuple[Cell, Cell, Cell]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)


def _scores(tasks: Sequence[TaskReport]) -> Table:
    columns = ("task", "metric", "rows", "kind", "label", "density", "alpha", "bytes", "score", "low", "high")
    more = ("to_tuned", "to_tuned_low", "to_tuned_high", "p", "to_base", "to_base_low", "to_base_high", "chosen", "frontier")
    rows: list[tuple[Cell, ...]] = []
    for task in tasks:
        best = frontier(task.candidates, task.metric.higher_is_better)
        for one in task.candidates:
            known = (task.name, task.metric.name, task.rows, one.kind, one.label, one.density, one.alpha, one.bytes)
            rows.append((*known, *_interval(one.score), *_interval(one.to_tuned), one.p, *_interval(one.to_base), one.chosen, one in best))
    return Table("scores", (*columns, *more), tuple(rows))


def _trail(tasks: Sequence[TaskReport]) -> Table:
    rows = [
        (task.name, task.metric.name, task.trail_rows, one.label, one.density, one.alpha, one.bytes, *_interval(one.score), one.chosen)
        for task in tasks
        for one in task.trail
    ]
    return Table("trail", ("task", "metric", "rows", "label", "density", "alpha", "bytes", "score", "low", "high", "chosen"), tuple(rows))


def _storage(tasks: Sequence[TaskReport]) -> Table:
    rows = [(task.name, kept.way, kept.bytes, kept.measured) for task in tasks for kept in task.kept]
    return Table("storage", ("task", "way", "bytes", "measured"), tuple(rows))


def _transfer(tasks: Sequence[TaskReport]) -> Table:
    rows = [
        (task.name, kept.way, kept.bytes, int(speed), round(1e3 * WAIT), seconds(kept.bytes, speed, WAIT))
        for task in tasks
        for kept in task.kept
        for speed in SPEEDS
    ]
    return Table("transfer", ("task", "way", "bytes", "bits_per_second", "wait_ms", "seconds"), tuple(rows))


def _layers(tasks: Sequence[TaskReport]) -> Table:
    rows = [(task.name, layer.name or "\u2013", layer.entries, layer.nonzeros, layer.density, layer.bytes) for task in tasks for layer in task.layers]
    return Table("layers", ("task", "layer", "entries", "nonzeros", "density", "bytes"), tuple(rows))


def _runs(named: Sequence[tuple[str, Times]]) -> tuple[tuple[Cell, ...], ...]:
    return tuple((name, place, value) for name, times in named for place, value in enumerate(times.samples, 1))


def _steps(report: Report) -> Table:
    steps = report.steps
    named = [] if steps is None else [("first_attach", Times((steps.first_attach,))), ("attach", steps.attach), ("detach", steps.detach)]
    if steps is not None and steps.swap is not None:
        named.append(("swap", steps.swap))
    return Table("steps", ("step", "run", "milliseconds"), _runs(named))


def _latency(report: Report) -> Table:
    found = report.latency
    return Table("latency", ("what", "run", "milliseconds"), _runs([] if found is None else [("base", found.base), ("attached", found.attached)]))


def _memory(report: Report) -> Table:
    found = report.memory
    sizes = [] if found is None else [4 * 10**9 // 2**power for power in range(6, -9, -1)]
    rows = [(size / 1e9, found.experts(size), found.copies(size)) for size in sizes if found is not None and size >= found.base]
    return Table("memory", ("memory_gb", "experts", "copies"), tuple(rows[:8]))


def _dtypes(report: Report) -> Table:
    rows = [(run.task, run.dtype, *_interval(run.score), *_interval(run.to_fp32), run.swallowed) for run in report.dtypes]
    return Table("dtypes", ("task", "dtype", "score", "low", "high", "to_fp32", "to_fp32_low", "to_fp32_high", "swallowed"), tuple(rows))


def _threads(report: Report) -> Table:
    rows = [(run.threads, place, value, run.same_bits) for run in report.threads for place, value in enumerate(run.attach.samples, 1)]
    return Table("threads", ("threads", "run", "milliseconds", "same_bits"), tuple(rows))


def _gates(report: Report) -> Table:
    rows = [
        (step.task, step.density, step.alpha, step.bytes, gate.name, gate.value, gate.low, gate.high, gate.limit, gate.passed)
        for step in report.gates
        for gate in step.gates
    ]
    return Table("gates", ("task", "density", "alpha", "bytes", "gate", "value", "low", "high", "limit", "passed"), tuple(rows))


def _side(report: Report) -> Table:
    found = report.side_by_side
    rows = [(one.name, one.alone.value, one.among.value, one.same_answers, one.swap.median) for one in (found.experts if found else ())]
    return Table("side_by_side", ("task", "alone", "among", "same_answers", "swap_ms"), tuple(rows))
