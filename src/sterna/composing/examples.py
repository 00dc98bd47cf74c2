"""Experts composed for the task of a few labelled rows, and what that is worth on rows that the search never saw."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sterna.composing.compose import Composed, names_of, opened_parents
from sterna.composing.grid import rounding
from sterna.composing.heads import fit_head
from sterna.composing.pool import Pool
from sterna.composing.search import BOUNDS, BUDGET, L1, Trial, best, check_search, search, trial_of
from sterna.errors import InvalidArgument
from sterna.expert.changes import Set
from sterna.expert.expert import Expert
from sterna.expert.fitted import with_fitted
from sterna.live.weights import live_weights
from sterna.merging.merge import Parent, merge
from sterna.progress import Progress, silent
from sterna.scoring.bench import Bench, Outcome
from sterna.scoring.metrics import Choice, metric_of
from sterna.scoring.purpose import of_expert
from sterna.sources.checkpoint import open_checkpoint
from sterna.sources.config import changed_config
from sterna.training.config import Data
from sterna.training.data import TaskData, guessed_task, load_data
from sterna.training.errors import Faults
from sterna.training.evaluation import Evaluation, evaluation, outputs
from sterna.training.methods import head_names
from sterna.training.models import DTYPES, length_limit, load_model, load_tokenizer, model_folder
from sterna.training.plan import usual_length
from sterna.training.tasks import TaskName
from sterna.training.tokens import Lengths


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """A weighting that is compared: the base, the best expert alone, or the composition. `score` is of the examples, `outcome` of the test rows."""

    name: str
    weights: tuple[float, ...]
    score: float
    outcome: Outcome | None


@dataclass(frozen=True, slots=True, eq=False)
class ComposedExamples:
    """`composed.expert` has the head that was fitted to the examples, where the task has one. `base`, `single` and `own` are scored alike."""

    composed: Composed
    task: TaskName
    rows: int
    base: Contender
    single: Contender
    own: Contender

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: weights by parent, scores, and on test rows values with intervals and paired differences."""
        weights = dict(zip(self.composed.parents, self.composed.weights, strict=True))
        told: dict[str, Any] = {"task": self.task, "examples": self.rows, "trials": len(self.composed.trials), "weights": weights}
        for key in ("base", "single", "own"):
            contender: Contender = getattr(self, key)
            told[key] = {"name": contender.name, "score": contender.score, **_told(contender.outcome)}
        if self.own.outcome is not None and self.base.outcome is not None and self.single.outcome is not None:
            for key, other in (("over_base", self.base.outcome), ("over_single", self.single.outcome)):
                found = self.own.outcome.against(other)
                told[key] = {"value": found.value, "low": found.low, "high": found.high, "p": found.p}
        return told


def _told(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {}
    interval = outcome.interval()
    return {"metric": outcome.metric.name, "value": outcome.value, "low": interval.low, "high": interval.high, "rows": outcome.rows}


def compose_examples(
    experts: Sequence[Parent],
    base: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    test: str | os.PathLike[str] | None = None,
    task: TaskName | None = None,
    metric: Choice | None = None,
    columns: Mapping[str, str | None] | None = None,
    max_length: int | None = None,
    budget: int = BUDGET,
    seed: int = 0,
    bounds: tuple[float, float] = BOUNDS,
    l1: float = L1,
    dtype: str = "fp32",
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> ComposedExamples:
    """Compose experts (or their files) over a base folder for the task of the rows in `data`, 5 to 50 of them, and hold the result on the rows of
    `test` against the base and the best expert alone, all treated alike.

    A language model is searched by minus the loss a token. A classification (or regression) gets a new head in every trial, fitted to the examples
    by ridge regression over the composed model's features, and is searched by minus its leave-one-out loss: the parents' heads are for other labels
    and are left out. `columns` name the `text`, `text_pair`, `label` or `target` where these are not found by usual names. Each expert is also tried
    alone, with weight 1, beside the `budget`; the result is the best of all.

    Raises InvalidConfig for rows that do not fit the task; and as `sterna.compose` and `load_model` do.
    """
    check_search(len(experts), budget, bounds, l1)
    if dtype not in DTYPES:
        raise InvalidArgument(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    opened = opened_parents(experts)
    names, near = names_of(experts, opened), rounding(opened, max(1.0, *map(abs, bounds)))
    files = {"train": os.fspath(data), "test": None if test is None else os.fspath(test), "validation": None}
    said = Data.model_validate({**dict(columns or {}), **files})
    task = task or _task_of(opened) or guessed_task(said)
    folder = model_folder(os.fspath(base))
    read = _read(said, task)
    tokenizer = load_tokenizer(folder)
    length, limit = (length_limit(folder, tokenizer, wanted) for wanted in (max_length or usual_length(task, read.train), sys.maxsize))
    lengths = Lengths(length, limit=limit)
    shots = evaluation(tokenizer, read.train, task, lengths)
    held = evaluation(tokenizer, read.test, task, lengths) if read.test is not None else None
    chosen = metric_of(metric, task, answered=read.train.answers is not None)
    torch.manual_seed(seed)  # before a head is drawn
    model = load_model(folder, task, tokenizer, read.classes or None, DTYPES[dtype])
    score = _scorer(model, shots, task, len(read.classes) or None)
    done = 0

    def tell(trial: Trial) -> None:
        nonlocal done
        done += 1
        progress("search", done, budget + len(opened), "trials", f"score {trial.score:.4g}")

    with Pool(model, opened, progress) as pool:

        def scored(weights: Sequence[float]) -> float:
            pool.weigh(weights)
            return score()

        alone = []
        for number in range(len(opened)):
            alone.append(trial_of(near([float(number == other) for other in range(len(opened))]), scored, l1))
            tell(alone[-1])
        trials = search(len(opened), scored, budget=budget, seed=seed, bounds=bounds, l1=l1, rounding=near, tell=tell)
        found, single = best([*trials, *alone]), best(alone)

        def contender(name: str, trial: Trial) -> Contender:
            scored(trial.weights)
            outcome = Bench(folder, model, held, chosen, read.classes, read.classes).run_live(progress=progress) if held is not None else None
            return Contender(name, trial.weights, trial.score, outcome)

        start = contender("base", trials[0])
        first = contender(names[alone.index(single)], single)
        own = contender("composed", found)  # last: its head is on the model now
        head = _head(model) if task in ("classification", "regression") else None
    merged = merge(list(experts), "task_arithmetic", weights=found.weights, tasks=names, base=folder, metadata=metadata, progress=progress)
    if head is not None:
        merged = _with_head(merged, model, folder, head)
    composed = Composed(merged, names, found.weights, found.score, (*alone, *trials))
    return ComposedExamples(composed, task, len(shots.rows), start, first, own)


def _task_of(experts: Sequence[Expert]) -> TaskName | None:
    """What the experts were made for, where one of them says so."""
    return next((task for expert in experts if (task := of_expert(expert, next(iter(expert.facts.heads), None)).task)), None)


def _read(said: Data, task: TaskName) -> TaskData:
    faults = Faults()
    read = load_data(said, task, faults)
    faults.stop()
    assert read is not None
    return read


def _scorer(model: Any, shots: Evaluation, task: TaskName, classes: int | None) -> Callable[[], float]:
    """Scores the model as it is now on the examples, with a head fitted to them where the task has one."""
    if task in ("classification", "regression"):
        return lambda: fit_head(model, shots, classes).score

    def likelihood() -> float:
        found = outputs(shots, model, write=False)
        assert found.nats is not None
        assert found.tokens is not None
        return -float(found.nats.sum() / found.tokens.sum())

    return likelihood


def _head(model: Any) -> list[Set]:
    """The live model's head, copied."""
    live = dict(model.named_parameters())
    return [Set(name, live[name].detach().cpu().clone(), "head") for name in sorted(head_names(model))]


def _with_head(merged: Expert, model: Any, folder: Path, head: Sequence[Set]) -> Expert:
    """The merged expert with a fitted head in the place of its parents', and what goes with it."""
    names = merged.fingerprint.names
    found = live_weights(model, names, (None,) * len(names), {}).alignment
    config = changed_config(open_checkpoint(folder).config, json.loads(model.config.to_json_string(use_diff=False)), True)
    return with_fitted(merged, head, config=config, architecture=type(model).__name__, prefixes=(found.base_prefix, found.other_prefix))
