"""`sterna.search`: the smallest expert within a loss of the tuned model, or the best one under a size, in few evaluations."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sterna.codings import DEFAULT
from sterna.compression import DENSITY, match, refuse_strangers
from sterna.errors import InvalidArgument
from sterna.expert.expert import Expert
from sterna.expert.file import file_pieces
from sterna.precision import HeadPrecision
from sterna.progress import Progress, silent
from sterna.searching.allocation import AllocationName, closed_form_alpha
from sterna.searching.candidates import Maker, Setting
from sterna.searching.ledger import Ledger
from sterna.searching.result import Compared, Evaluated, Goal, SearchResult
from sterna.searching.strategy import Explorer, Family, Spent, Trial, density_for
from sterna.sources.checkpoint import Source

if TYPE_CHECKING:
    from sterna.scoring.bench import Bench
    from sterna.scoring.rows import Rows
    from sterna.searching.scores import OfRows, Scored

EVALUATIONS = 24
NOTE = 640
"""Bytes that the note of how an expert was chosen may add to its file."""
_EQUAL = 1e-9


def search(
    base: Source,
    tuned: Source | Expert,
    *,
    score: Callable[[Any], float] | None = None,
    higher_is_better: bool = True,
    data: Rows | None = None,
    test: Rows | float = 0.5,
    metric: Any = None,
    within: float | None = None,
    max_bytes: int | None = None,
    evaluations: int = EVALUATIONS,
    coding: str = DEFAULT,
    exclude: Sequence[str] = (),
    force: bool = False,
    run_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
    **rows: Any,
) -> SearchResult:
    """Choose density, alpha, allocation, planes and the head's precision of an expert by its score.

    `base` and `tuned` are what `sterna.compress` takes. The goal is either `within`, the smallest file whose score is at most that much worse than
    the tuned model's, or `max_bytes`, the best score of at most so many bytes. The score is `score(model)`, any function of the live model (given as
    `base`, or loaded from its folder), `higher_is_better` or not; or `metric` on the rows `data` (see `sterna.evaluate`; a share is in points of
    100, and so is `within`). Of `data` the share `test` is put aside, each label in proportion, by `seed`; or `test` are rows of their own. They are
    scored once, at the end. `rows` are further arguments of `sterna.scoring.bench.open_bench`: task, text, label, max_length, dtype, ...
    At most `evaluations` settings are scored. With a `run_dir` scores outlast the process, and the same call goes on with them; a function is known
    by its name and source there. Without score and data the choice is made by a formula, alpha = 4.1 (density / .1)^-.65, for `max_bytes` or the
    density .1.

    Where no setting reaches `within`, the best one is returned with `reached` False.

    Raises InvalidArgument (arguments, or a size that not even an empty expert has), BadMetric (a score that raises or is not finite), CannotWrite
    (the run folder), and what `compress` and `open_bench` raise, before work starts.
    """
    goal = _goal(within, max_bytes, score, data, evaluations)
    if data is None and (rows or metric is not None):
        raise InvalidArgument(f"{next(iter(rows), 'metric')} is given; expected it with data alone")
    ledger = Ledger.open(run_dir, {})
    benches = _benches(base, tuned, data, test, metric, seed, warn, rows) if data is not None else None
    matched = match(base, tuned, exclude=exclude, warn=warn, progress=progress)
    maker = Maker(matched, coding, progress, _fisher(benches[0], progress) if benches is not None else None)
    refuse_strangers(matched, maker.norm, force, warn)
    if not maker.norm:
        raise InvalidArgument("the tuned model equals the base in every tensor that is compressed; there is nothing to search for")
    families = families_of(maker)
    limit = _limit(maker, families[0], max_bytes, metadata)
    if score is None and data is None:
        return _by_formula(maker, goal, limit, metadata)
    from sterna.searching.scores import OfFunction, OfRows, Scored, live_model

    if benches is not None:
        scorer: OfRows | OfFunction = OfRows(benches[0], progress)
        higher_is_better = benches[0].metric.higher_is_better
    else:
        assert score is not None
        scorer = OfFunction(score, live_model(base, maker.expert(families[0].at(1e-9, 0.0))))
    ledger = replace(ledger, about={"made_of": maker.digest(), "coding": coding, **scorer.about})
    sign = 1 if higher_is_better else -1
    problem = Scored(maker, scorer, ledger, sign)
    if problem.tuned < problem.base:
        warn(f"the tuned model scores {sign * problem.tuned:.4g}, worse than the base, {sign * problem.base:.4g}: were the two swapped?")
    trials = _explore(problem, families, goal, limit, evaluations, sign, progress)
    chosen, reached = choice(trials, goal, limit, problem.tuned)
    selection = _compared(problem, scorer if isinstance(scorer, OfRows) else None, chosen)
    tested = _tested(benches[1], maker, chosen, progress) if benches is not None else None
    shown = tuple(Evaluated(trial.setting, trial.bytes, sign * trial.score) for trial in trials)
    note = _note(goal, reached, chosen.setting, scorer.about["metric"], len(trials), selection, tested)
    expert = maker.expert(chosen.setting, {**(metadata or {}), "search": note})
    return SearchResult(
        expert=expert,
        setting=chosen.setting,
        bytes=_size(expert),
        goal=goal,
        reached=reached,
        higher_is_better=higher_is_better,
        trials=shown,
        scored=problem.made,
        metric=benches[1].metric if benches is not None else None,
        selection=selection,
        test=tested,
        notes=tuple(matched.task.warnings),
    )


def _goal(within: float | None, max_bytes: int | None, score: object, data: object, evaluations: int) -> Goal:
    if score is not None and data is not None:
        raise InvalidArgument("score and data are both given; expected one of them")
    if within is not None and max_bytes is not None:
        raise InvalidArgument("within and max_bytes are both given; expected one of them")
    if within is not None and not (math.isfinite(within) and within >= 0):
        raise InvalidArgument(f"within is {within}; expected how much the score may be worse, 0 or more")
    if max_bytes is not None and max_bytes < 1:
        raise InvalidArgument(f"max_bytes is {max_bytes}; expected a number of bytes")
    if (score is not None or data is not None) and within is None and max_bytes is None:
        raise InvalidArgument("the goal is missing; expected within (the smallest file within a loss) or max_bytes (the best one of that size)")
    if within is not None and score is None and data is None:
        raise InvalidArgument("within is given without a score or data to measure it; expected one, or max_bytes alone")
    if evaluations < 1:
        raise InvalidArgument(f"evaluations is {evaluations}; expected 1 or more")
    return Goal(within, max_bytes)


def families_of(maker: Maker) -> list[Family]:
    """What a search looks at, the first before the others: the order of docs/benchmarks.md's evidence. An adapter's factors differ much in size."""
    head: HeadPrecision = "int8" if maker.head_bytes else "exact"
    if len(maker.surveys) == 1:
        return [Family(head=head)]
    names: tuple[AllocationName, ...] = ("scaled", "balanced")
    if maker.matched.task.source in ("lora", "ia3"):
        names = ("tensor", "balanced")
    elif maker.has_fisher:
        names = ("fisher", "scaled")
    families = [Family(name, 1, head) for name in names]
    return [*families, Family("global", 2, head)] if maker.of_whole_tensors else families


def _fisher(bench: Bench, progress: Progress) -> Callable[[Expert, Sequence[str]], Sequence[float]]:
    from sterna.searching.fisher import mean_fisher

    return lambda tuned, names: mean_fisher(bench, tuned, names, progress)


def _limit(maker: Maker, family: Family, max_bytes: int | None, metadata: Mapping[str, Any] | None) -> int | None:
    """The bytes that a candidate may have without metadata. Raises InvalidArgument where nothing has so few."""
    if max_bytes is None:
        return None
    beside = NOTE + len(json.dumps(dict(metadata or {}), ensure_ascii=False).encode())
    empty = maker.bytes(family.at(1e-9, 0.0)) + beside
    if empty >= max_bytes:
        raise InvalidArgument(f"max_bytes is {max_bytes:,}, and an expert of the head alone takes some {empty:,}; expected more")
    return max_bytes - beside


def _by_formula(maker: Maker, goal: Goal, limit: int | None, metadata: Mapping[str, Any] | None) -> SearchResult:
    """The scale of the closed form under the first family, for the size asked for or density .1."""
    family = families_of(maker)[0]
    density: float | None = DENSITY
    if limit is not None:
        density = density_for(maker.bytes, family, limit)
        assert density is not None
    assert density is not None
    plain = family.at(density, 0.0)
    setting = replace(plain, alpha=float(f"{closed_form_alpha(plain.density):.3g}"))
    note = {"goal": str(goal), "chosen": "by formula", **_said(setting)}
    expert = maker.expert(setting, {**(metadata or {}), "search": note})
    return SearchResult(expert, setting, _size(expert), goal, True, True)


def _benches(
    base: Source,
    tuned: Source | Expert,
    data: Rows,
    test: Rows | float,
    metric: Any,
    seed: int,
    warn: Callable[[str], None],
    rows: Mapping[str, Any],
) -> tuple[Bench, Bench]:
    """The rows of selection and those of the test, on one live model."""
    from sterna.scoring.bench import open_bench

    if not isinstance(base, str | os.PathLike):
        raise InvalidArgument(f"base is a {type(base).__name__}; expected a model folder or a hub id, with data")
    if isinstance(test, float | int) and not 0 < test < 1:
        raise InvalidArgument(f"test is {test}; expected rows, or the share of the data to put aside, above 0 and below 1")
    like = tuned if isinstance(tuned, str | os.PathLike | Expert) else None
    options = {"metric": metric, "like": like, "seed": seed, "warn": warn, **rows}
    bench = open_bench(base, data, **options)
    if isinstance(test, float | int):
        return bench.split(1 - test, seed)
    held = open_bench(base, test, **{**options, "task": bench.task, "rows": None})
    return bench, replace(held, model=bench.model)


def _explore(problem: Scored, families: Sequence[Family], goal: Goal, limit: int | None, most: int, sign: int, progress: Progress) -> list[Trial]:
    """Try settings until the goal is settled, or as many as are allowed."""
    wanted = problem.tuned - goal.within - _EQUAL if goal.within is not None else math.inf

    def tell(trial: Trial) -> None:
        done = list(explorer.trials.values())
        best, reached = choice(done, goal, limit, problem.tuned)
        progress(
            "search", len(done), most, "evaluations", f"best {best.bytes:,} bytes, {sign * best.score:.4g}{'' if reached else ', not there yet'}"
        )

    explorer = Explorer(problem, most, tell)
    progress("search", 0, most, "evaluations")
    try:
        if limit is None:
            explorer.smallest(families, wanted)
        else:
            explorer.best_under(families, limit)
    except Spent:
        pass
    return list(explorer.trials.values())


def choice(trials: Sequence[Trial], goal: Goal, limit: int | None, tuned: float) -> tuple[Trial, bool]:
    """The smallest trial that loses at most `within`, or the best of at most `limit` bytes; the best of all where there is none, and False."""
    if goal.within is not None:
        passing = [trial for trial in trials if trial.score >= tuned - goal.within - _EQUAL]
        if passing:
            return min(passing, key=lambda trial: (trial.bytes, -trial.score)), True
    fitting = [trial for trial in trials if limit is None or trial.bytes <= limit]
    return max(fitting, key=lambda trial: (trial.score, -trial.bytes)), goal.within is None


def _compared(problem: Scored, scorer: OfRows | None, chosen: Trial) -> Compared:
    values = (problem.sign * problem.base, problem.sign * problem.tuned, problem.sign * chosen.score)
    if scorer is None:
        return Compared(*values)
    outcomes = (  # what came out of the ledger is run again, for its rows
        scorer.outcome(None, "the base model"),
        scorer.outcome(problem.maker.tuned(), "the tuned model"),
        scorer.outcome(problem.maker.expert(chosen.setting), str(chosen.setting)),
    )
    return Compared(*values, outcomes)


def _tested(held: Bench, maker: Maker, chosen: Trial, progress: Progress) -> Compared:
    outcomes = (
        held.run(None, progress=progress),
        held.run(maker.tuned(), progress=progress),
        held.run(maker.expert(chosen.setting), progress=progress),
    )
    base, tuned, expert = outcomes
    return Compared(base.value, tuned.value, expert.value, outcomes)


def _note(goal: Goal, reached: bool, setting: Setting, metric: str, evaluations: int, selection: Compared, test: Compared | None) -> dict[str, Any]:
    """What the file says of how it was chosen, short."""
    note: dict[str, Any] = {
        "goal": str(goal),
        "reached": reached,
        "metric": metric.partition(" ")[0][:80],
        "evaluations": evaluations,
        **_said(setting),
    }
    for name, found in (("selection", selection), ("test", test)):
        if found is not None:
            values = {key: float(f"{getattr(found, key):.6g}") for key in ("base", "tuned", "expert")}
            note[name] = values | ({"rows": found.rows} if found.rows else {})
    return note


def _said(setting: Setting) -> dict[str, Any]:
    return {"allocation": setting.allocation, "planes": setting.planes, "head": setting.head}


def _size(expert: Expert) -> int:
    return sum(len(piece) for piece in file_pieces(expert))
