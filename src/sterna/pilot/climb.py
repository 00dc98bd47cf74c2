"""One task's steps: compression raised from density to density, each behind the gates, stopped at the last that passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sterna.codings import DEFAULT
from sterna.compression import match
from sterna.expert.expert import Expert
from sterna.expert.file import load
from sterna.pilot.folder import once
from sterna.pilot.plan import Gates, PilotPlan, TaskPlan
from sterna.progress import Progress
from sterna.reporting.measure import longest_batch, metric_of
from sterna.reporting.report import Candidate, Gate, Metric, Step
from sterna.reporting.sizes import memory_of
from sterna.reporting.timing import latency, live_steps
from sterna.scoring.bench import Bench
from sterna.scoring.intervals import Estimate
from sterna.searching.allocation import closed_form_alpha
from sterna.searching.candidates import Maker, Setting
from sterna.searching.ledger import Ledger
from sterna.searching.scores import OfRows, Scored
from sterna.searching.strategy import Explorer, Family
from sterna.summary import inspect

MOST = 1000
"""Evaluations of a task: a bound that the climbs of some densities never reach."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step with its setting and its score on the selection rows."""

    step: Step
    setting: Setting
    score: Estimate
    rows: int
    metric: Metric


@dataclass(frozen=True, slots=True, eq=False)
class Climbed:
    """What came of a task's steps: all of them, and the last that passed as an expert; None where none did."""

    results: tuple[StepResult, ...]
    expert: Expert | None

    @property
    def trail(self) -> tuple[Candidate, ...]:
        """The steps as what was tried, for the chart of score against bytes."""
        last = next((result for result in reversed(self.results) if result.step.passed), None)
        return tuple(
            Candidate("expert", "", one.step.bytes, one.score, density=one.step.density, alpha=one.step.alpha, chosen=one is last)
            for one in self.results
        )


def climb(
    plan: PilotPlan,
    task: TaskPlan,
    tuned: Path | Expert,
    bench: Callable[[], Bench],
    folder: Path,
    target: Path,
    warn: Callable[[str], None],
    progress: Progress,
) -> Climbed:
    """Take the steps of a task, from the first that `folder` has no result of; the last expert that passed goes to `target`."""
    climber: _Climber | None = None
    results: list[StepResult] = []
    for number, density in enumerate(plan.steps):
        progress(f"{task.name}: steps", number, len(plan.steps), "steps", f"density {density:g}")

        def make(density: float = density, before: int = number) -> StepResult:
            nonlocal climber
            if climber is None:
                climber = _Climber.of(plan, task, tuned, bench(), folder, warn, progress)
                climber.recall(plan.steps[:before])
            return climber.step(density)

        results.append(once(folder / f"step-{density:g}.json", StepResult, make))
        if not results[-1].step.passed:
            break
    progress(f"{task.name}: steps", len(plan.steps), len(plan.steps), "steps")
    last = next((result for result in reversed(results) if result.step.passed), None)
    if last is None:
        return Climbed(tuple(results), None)
    if not target.is_file():
        climber = climber or _Climber.of(plan, task, tuned, bench(), folder, warn, progress)
        climber.problem.maker.expert(last.setting, {"task": task.name}).save(target)
    return Climbed(tuple(results), load(target))


@dataclass(frozen=True, slots=True, eq=False)
class _Climber:
    """A task ready to be compressed and scored again and again."""

    plan: PilotPlan
    task: TaskPlan
    bench: Bench
    scorer: OfRows
    problem: Scored
    explorer: Explorer

    @classmethod
    def of(cls, plan: PilotPlan, task: TaskPlan, tuned: Any, bench: Bench, folder: Path, warn: Callable[[str], None], progress: Progress) -> _Climber:
        maker = Maker(match(plan.model, tuned, warn=warn, progress=progress), DEFAULT, progress)
        scorer = OfRows(bench, progress)
        ledger = replace(Ledger.open(folder, {}), about={"made_of": maker.digest(), "coding": DEFAULT, **scorer.about})
        problem = Scored(maker, scorer, ledger, 1 if bench.metric.higher_is_better else -1)
        return cls(plan, task, bench, scorer, problem, Explorer(problem, MOST))

    def recall(self, densities: Sequence[float]) -> None:
        """Choose again for densities whose steps were taken before a kill: their scores are kept, and what they taught leads the steps to come."""
        for density in densities:
            self._setting(self._family, density)

    @property
    def _family(self) -> Family:
        return Family(head=self.plan.head if self.problem.maker.head_bytes else "exact")

    def step(self, density: float) -> StepResult:
        """The best expert of a density by the plan's alpha, and every gate's decision on it."""
        setting = self._setting(self._family, density)
        expert = self.problem.maker.expert(setting, {"task": self.task.name})
        outcome = self.scorer.outcome(expert, str(setting))
        tuned = self.scorer.outcome(self.problem.maker.tuned(), "the tuned model")
        size = inspect(expert).bytes
        difference = outcome.against(tuned)
        lost = [0.0 - self.problem.sign * value for value in (difference.value, difference.low, difference.high)]
        gates = _gates(self.plan.gates, Estimate(lost[0], min(lost[1:]), max(lost[1:])), size, expert, self.bench, self.plan.repeats)
        step = Step(self.task.name, setting.density, setting.alpha, size, gates)
        return StepResult(step, setting, outcome.interval(), len(self.bench), metric_of(outcome))

    def _setting(self, family: Family, density: float) -> Setting:
        if isinstance(self.plan.alpha, float):
            return replace(family.at(density, 0.0), alpha=self.plan.alpha)
        if self.plan.alpha == "formula":
            return replace(family.at(density, 0.0), alpha=float(f"{closed_form_alpha(density):.3g}"))
        wanted = self.problem.tuned - (self.plan.gates.score if self.plan.gates.score is not None else -math.inf)
        return self.explorer.climb(family, density, wanted).setting


def _gates(gates: Gates, lost: Estimate, size: int, expert: Expert, bench: Bench, repeats: int) -> tuple[Gate, ...]:
    """The decisions of the gates that the plan sets; nothing is measured for those that it leaves out."""
    found: list[Gate] = []
    if gates.score is not None:
        found.append(Gate("score", lost.value, gates.score, lost.low, lost.high))
    if gates.bytes is not None:
        found.append(Gate("bytes", size, gates.bytes))
    if gates.latency is not None:
        ratio = latency(bench.model, expert, longest_batch(bench), repeats).ratio
        found.append(Gate("latency", ratio.value, gates.latency, ratio.low, ratio.high))
    if gates.attach is not None:
        times = live_steps(bench.model, expert, None, repeats).attach
        found.append(Gate("attach", times.median, gates.attach, *times.quartiles))
    if gates.memory is not None:
        memory = memory_of(bench.model, [expert])
        found.append(Gate("memory", memory.expert + memory.undo, gates.memory))
    return tuple(found)
