"""What an evaluation found: every model's scores on the same rows, and the differences between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sterna.errors import InvalidArgument
from sterna.scoring.intervals import Difference
from sterna.scoring.outcome import Outcome
from sterna.training.metrics import Metric

FORMAT = 1
Kind = Literal["base", "tuned", "expert", "control"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One model on the rows: its outcomes by metric, and its bytes on disk beside the base (None: of the base, and of a live model).

    `detail` says more: the head that was chosen, a control's density.
    """

    name: str
    kind: Kind
    bytes: int | None
    outcomes: Mapping[str, Outcome]
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TaskScores:
    """All models on the rows of one task. `entries` begin with the base; `reference` names the model that others are held against beside the base.

    `name` is empty where there is one task only; `packed` is true where rows are blocks of plain text. `head_from` says whose head the base has:
    "own", "new", or a model's name. `selection` more rows were kept apart, to choose the scale of a control on.
    """

    name: str
    data: str
    task: str
    rows: int
    dropped: int
    classes: tuple[str, ...]
    head_from: str
    metrics: tuple[Metric, ...]
    entries: tuple[Entry, ...]
    reference: str | None
    selection: int = 0
    packed: bool = False

    def entry(self, name: str) -> Entry:
        """Raises InvalidArgument, with the names that there are."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise InvalidArgument(f"{name!r} was not evaluated; there are {', '.join(entry.name for entry in self.entries)}")

    def difference(self, name: str, other: str, metric: str | None = None) -> Difference:
        """One model's score minus another's on the same rows, by the first metric or a named one, in the metric's units."""
        key = metric or self.metrics[0].name
        return self.entry(name).outcomes[key].against(self.entry(other).outcomes[key])

    def against(self, entry: Entry) -> tuple[str, ...]:
        """The names that an entry is held against: the base, and the reference."""
        return tuple(name for name in dict.fromkeys((self.entries[0].name, self.reference)) if name is not None and name != entry.name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "data": self.data,
            "task": self.task,
            "rows": self.rows,
            "selection_rows": self.selection,
            "dropped": self.dropped,
            "classes": list(self.classes),
            "base_head": self.head_from,
            "reference": self.reference,
            "metrics": [_metric(metric) for metric in self.metrics],
            "models": [self._entry(entry) for entry in self.entries],
        }

    def _entry(self, entry: Entry) -> dict[str, Any]:
        scores = {}
        for metric in self.metrics:
            estimate = entry.outcomes[metric.name].interval()
            differences = {other: _difference(self.difference(entry.name, other, metric.name)) for other in self.against(entry)}
            scores[metric.name] = {
                "value": _plain(estimate.value),
                "low": _plain(estimate.low),
                "high": _plain(estimate.high),
                "against": differences,
            }
        return {"name": entry.name, "kind": entry.kind, "bytes": entry.bytes, **entry.detail, "scores": scores}


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What `sterna.evaluate` found, task by task, in units of the metrics: points of 100, or a metric's own."""

    base: str
    tasks: tuple[TaskScores, ...]
    versions: Mapping[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        tasks = [task.to_dict() for task in self.tasks]
        return {"format": FORMAT, "base": self.base, "tasks": tasks, "versions": dict(self.versions), "seconds": round(self.seconds, 1)}


def _metric(metric: Metric) -> dict[str, Any]:
    unit = "points of 100" if metric.points else "its own"
    return {"name": metric.name, "title": metric.title, "higher_is_better": metric.higher_is_better, "unit": unit}


def _difference(found: Difference) -> dict[str, Any]:
    numbers = {name: _plain(getattr(found, name)) for name in ("value", "low", "high", "p")}
    return {**numbers, "test": found.test, "noise": found.noise, "rows_to_settle": rows_to_settle(found)}


def rows_to_settle(found: Difference) -> int | None:
    """About how many rows like these would tell a difference of this size from none; None where it is told already, or cannot be said."""
    return found.rows_for(abs(found.value)) if found.noise and found.value else None


def _plain(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None
