"""How one model did on some rows: a score with its interval, held against another's on the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sterna.errors import InvalidArgument
from sterna.scoring import intervals
from sterna.scoring.intervals import Bools, Difference, Estimate, Evidence
from sterna.training.metrics import Metric


@dataclass(frozen=True, eq=False)
class Outcome:
    """How one model did on the rows of a bench. `value` is in units of the metric: points of 100 where `metric.points`.

    `right` are the rows that it had right (bool [rows]) where the metric counts those.
    """

    metric: Metric
    value: float
    evidence: Evidence
    right: Bools | None = None

    @property
    def rows(self) -> int:
        return self.evidence.rows

    @cached_property
    def _interval(self) -> Estimate:
        if self.right is not None:
            return intervals.wilson(int(self.right.sum()), self.rows)
        return intervals.interval(self.value / self.metric.factor, self.evidence)

    def interval(self) -> Estimate:
        """The value with its 95 % interval: Wilson's for a share of right rows, else the percentile bootstrap over rows."""
        return self._interval.times(self.metric.factor)

    def against(self, other: Outcome) -> Difference:
        """This value minus the other's on the same rows: paired bootstrap, with McNemar's exact test where rows are right or wrong.

        Raises InvalidArgument for outcomes of other rows or another metric.
        """
        if self.metric != other.metric or self.rows != other.rows:
            raise InvalidArgument(
                f"{self.metric.name} on {self.rows} rows cannot be held against {other.metric.name} on {other.rows}; expected outcomes of one bench"
            )
        if other in self._differences:
            return self._differences[other]
        if self.right is not None and other.right is not None:
            found = intervals.right_or_wrong(self.right, other.right)
        else:
            found = intervals.difference((self.value - other.value) / self.metric.factor, self.evidence, other.evidence)
        self._differences[other] = found.times(self.metric.factor)
        return self._differences[other]

    @cached_property
    def _differences(self) -> dict[Outcome, Difference]:
        return {}

    def better(self, other: Outcome) -> bool:
        return self.metric.better(self.value, other.value)
