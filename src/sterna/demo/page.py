"""What the demo found as a report of `sterna.reporting`: the same numbers, nothing measured anew."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace

from sterna.demo.report import DemoResult, Row, TaskResult
from sterna.demo.study import Findings, Study
from sterna.expert.file import load
from sterna.reporting.report import Candidate, Kind, Metric, Report, TaskReport
from sterna.reporting.sizes import layers_of, ways_to_keep
from sterna.scoring.intervals import Estimate
from sterna.summary import inspect

ACCURACY = Metric("accuracy", "accuracy")
KINDS: dict[str, Kind] = {"words alone": "words", "base alone": "base", "uncompressed": "tuned"}
CONTROLS = ("uncompressed with tuned scale", "prune only", "STC with mean magnitude", "ComPEFT with alpha 1")


def report_of_demo(result: DemoResult, studies: Sequence[Study], found: Sequence[Findings]) -> Report:
    """The demo's report. The chosen expert of a task is the one that went onto the live model; one at the controls' density."""
    live = result.live
    tasks = tuple(_task(task, study, part) for task, study, part in zip(result.tasks, studies, found, strict=True))
    files = tuple((task.name, f"{part.expert.name}, sha256 {inspect(part.expert).digest}") for task, part in zip(tasks, found, strict=True))
    return Report(
        base=studies[0].base.name,
        parameters=load(found[0].expert).facts.base.parameters,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        tasks=tasks,
        steps=live.steps,
        latency=live.latency,
        memory=live.memory,
        restored=live.restored,
        dtypes=result.dtypes,
        threads=live.threads,
        side_by_side=live.side_by_side,
        machine=result.machine,
        inputs=(*((task.name, task.line) for task in result.tasks), *files),
        seconds=sum(result.seconds.values()),
    )


def _task(task: TaskResult, study: Study, found: Findings) -> TaskReport:
    summary = inspect(found.expert)
    candidates = [_candidate(row) for row in task.rows]
    chosen = next(place for place, one in enumerate(candidates) if one.kind == "expert" and one.bytes == summary.bytes)
    candidates[chosen] = replace(candidates[chosen], chosen=True)
    kept = ways_to_keep(summary, study.subject.model, study.base, study.trained)
    return TaskReport(task.name, ACCURACY, task.test_rows, tuple(candidates), kept, layers_of(summary))


def _candidate(row: Row) -> Candidate:
    kind: Kind = KINDS.get(row.method, "control" if row.method in CONTROLS else "expert")
    ternary = kind == "expert" and row.density is not None
    label = "" if kind in ("base", "tuned") else f"{row.method}, density {row.density:g}" if ternary else row.method
    return Candidate(
        kind,
        label,
        row.bytes,
        _points(row.accuracy),
        None if row.difference is None else _points(row.difference),
        density=row.density if row.method == "ComPEFT" else None,
        alpha=row.alpha,
    )


def _points(share: Estimate) -> Estimate:
    return share.times(100.0)
