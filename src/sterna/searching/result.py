"""What a search ends with: the chosen expert, every setting that was scored, and how the choice compares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sterna.expert.expert import Expert
from sterna.searching.candidates import Setting

if TYPE_CHECKING:
    from sterna.scoring.outcome import Outcome
    from sterna.training.metrics import Metric


@dataclass(frozen=True, slots=True)
class Goal:
    """The smallest expert that loses at most `within` against the tuned model, in units of the score; or the best one of at most `max_bytes`."""

    within: float | None = None
    max_bytes: int | None = None

    def __str__(self) -> str:
        return f"within {self.within:g}" if self.within is not None else f"at most {self.max_bytes:,} bytes" if self.max_bytes else "without data"

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A setting, bytes of its file but for the note of how it was chosen, and its score in the metric's own units."""

    setting: Setting
    bytes: int
    score: float

    def to_dict(self) -> dict[str, Any]:
        return {**self.setting.to_dict(), "bytes": self.bytes, "score": self.score}


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """The base, the tuned model and the chosen expert on the same rows: values, and outcomes with intervals where rows were scored."""

    base: float
    tuned: float
    expert: float
    outcomes: tuple[Outcome, Outcome, Outcome] | None = None

    @property
    def rows(self) -> int | None:
        return self.outcomes[0].rows if self.outcomes else None

    def rows_to_settle(self, within: float, higher_is_better: bool) -> int | None:
        """How many rows would tell whether the expert loses at most `within`: those of an interval that ends there. None where nothing is known."""
        if self.outcomes is None:
            return None
        loss = (self.tuned - self.expert) * (1 if higher_is_better else -1)
        margin = abs(within - loss)
        return self.outcomes[2].against(self.outcomes[1]).rows_for(margin) if margin > 0 else None

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"base": self.base, "tuned": self.tuned, "expert": self.expert}
        if self.outcomes is None:
            return plain
        base, tuned, expert = self.outcomes
        scores = {name: asdict(found.interval()) for name, found in (("base", base), ("tuned", tuned), ("expert", expert))}
        return {"rows": self.rows, **scores, "difference": asdict(expert.against(tuned)), "over_base": asdict(expert.against(base))}


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """`expert` is the choice (where the goal was not `reached`, the best that was found); `trials` are all settings scored, in their order.

    `metric` is None for a score of yours. `scored` are those that were scored now: the others were kept in the run folder. Without data there are
    no trials, and `selection` is None; `test` is None without rows that selection never saw.
    """

    expert: Expert
    setting: Setting
    bytes: int
    goal: Goal
    reached: bool
    higher_is_better: bool
    trials: tuple[Evaluated, ...] = ()
    scored: int = 0
    metric: Metric | None = None
    selection: Compared | None = None
    test: Compared | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def score(self) -> float | None:
        """The choice's on the selection rows."""
        return self.selection.expert if self.selection else None

    @property
    def frontier(self) -> tuple[Evaluated, ...]:
        """The trials that no other one beats in bytes without losing score, from the smallest on."""
        return frontier(self.trials, self.higher_is_better)

    @property
    def rows_to_settle(self) -> int | None:
        """How many rows like those of the selection would settle whether the goal `within` is reached."""
        if self.goal.within is None or self.selection is None:
            return None
        return self.selection.rows_to_settle(self.goal.within, self.higher_is_better)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the expert."""
        return {
            "goal": self.goal.to_dict(),
            "reached": self.reached,
            "setting": self.setting.to_dict(),
            "bytes": self.bytes,
            "metric": self.metric.name if self.metric else None,
            "higher_is_better": self.higher_is_better,
            "selection": self.selection.to_dict() if self.selection else None,
            "test": self.test.to_dict() if self.test else None,
            "rows_to_settle": self.rows_to_settle,
            "evaluations": len(self.trials),
            "trials": [trial.to_dict() for trial in self.trials],
            "frontier": [trial.to_dict() for trial in self.frontier],
            "notes": list(self.notes),
        }


def frontier(trials: Sequence[Evaluated], higher_is_better: bool) -> tuple[Evaluated, ...]:
    """Those that are the best of all of their size or less."""
    sign, best, kept = 1 if higher_is_better else -1, -math.inf, []
    for trial in sorted(trials, key=lambda trial: (trial.bytes, -sign * trial.score)):
        if sign * trial.score > best:
            best = sign * trial.score
            kept.append(trial)
    return tuple(kept)
