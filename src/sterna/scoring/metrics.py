"""Metrics by name, and a person's own function by its import path: a score of what a model gave, with what it takes to resample its rows."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sterna.errors import InvalidArgument, SternaError
from sterna.needs import needed
from sterna.scoring.intervals import F64, I64, Bools, Evidence, Sums, Whole, mean_of
from sterna.sources.names import near
from sterna.training import metrics
from sterna.training.evaluation import Evaluation, Outputs
from sterna.training.metrics import Metric
from sterna.training.tasks import TaskName

OF_TEXTS = ("rougeL", "rouge1", "rouge2", "exact_match", "token_f1", "bleu", "chrf")
"""The metrics of texts that a model writes."""
OF_TOKENS = ("perplexity", "loss")
"""The metrics of a text's tokens as they stand, for which nothing is written."""

BY_TASK: dict[TaskName, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "matthews", "loss"),
    "regression": ("spearman", "pearson", "mse"),
    "causal-lm": (*OF_TOKENS, *OF_TEXTS),
    "seq2seq": (*OF_TEXTS, *OF_TOKENS),
}
"""The metrics of each task by name; the first is the task's own where none is asked for. Plain text has no answers to hold texts against."""


Choice = str | Callable[[Any, Any], Any] | Metric


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A score in units of 1 and its evidence; `right` where the score is the share of right rows."""

    value: float
    evidence: Evidence
    right: Bools | None = None


class BadMetric(SternaError, ValueError):
    """A person's own metric that raises, or gives something other than a finite number."""


def metric_of(given: Choice | None, task: TaskName, *, answered: bool = True) -> Metric:
    """The metric of that name, of the import path "package.module:function", or of a function; without one, the task's own.

    `answered` is false for rows of plain text. Raises InvalidArgument for a name that the task does not have (with those that it has), for what
    cannot be imported or called, and for a metric of texts where none are wanted.
    """
    if isinstance(given, Metric):
        return _refused_unanswered(given, answered)
    if callable(given):
        own = _own(given, f"{getattr(given, '__module__', '')}:{getattr(given, '__qualname__', type(given).__name__)}")
        return _refused_unanswered(own, answered)
    names = BY_TASK[task]
    name = names[0] if given is None else given
    if ":" in name:
        return _refused_unanswered(_own(_imported(name), name), answered)
    if name not in names:
        alike = near(name, names)
        meant = f"did you mean {alike[0]!r}? " if alike else ""
        raise InvalidArgument(f"metric is {name!r}; {meant}{task} has {', '.join(names)}; a function of yours is package.module:function")
    return _refused_unanswered(metrics.METRICS[name], answered)


def writes(metric: Metric) -> bool:
    """Whether the metric is of texts, where a model writes any: the long part of a run, which is left out where no metric needs it."""
    return metric.function is not None or metric.name in OF_TEXTS


def _refused_unanswered(metric: Metric, answered: bool) -> Metric:
    if not answered and writes(metric):
        raise InvalidArgument(
            f"metric is {metric.name!r}, which holds texts that the model writes against wanted ones, and plain text has none: expected rows with a "
            f"target (--target NAME; the columns prompt and completion; or chats in messages), or {' or '.join(OF_TOKENS)}"
        )
    return metric


def _own(function: Callable[[Any, Any], Any], name: str) -> Metric:
    title = str(getattr(function, "title", name.rpartition(":")[2]))
    return Metric(name, title, bool(getattr(function, "higher_is_better", True)), bool(getattr(function, "points", False)), function)


def _imported(path: str) -> Callable[[Any, Any], Any]:
    """The function of an import path; modules of the current folder are found too. Raises InvalidArgument."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where python -m would look, and a console script does not
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # a module of somebody else's may raise anything
        raise InvalidArgument(f"metric is {path!r}, and {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidArgument(f"metric is {path!r}, and {module} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise InvalidArgument(f"metric is {path!r}, a {type(found).__name__}; expected a function of predictions and answers")
    wanted: Callable[[Any, Any], Any] = found
    return wanted


def measured(metric: Metric, prepared: Evaluation, found: Outputs, classes: Sequence[str]) -> Measured:
    """The metric over what a model gave for the rows of an evaluation. Raises BadMetric."""
    if metric.function is not None:
        return _of_function(metric, *_sides(metric, prepared, found, classes))
    answers = prepared.examples.answers or ()
    if found.logits is not None:
        if prepared.task == "regression":
            return _of_numbers(metric.name, found.logits[:, 0].astype(np.float64), np.array(answers, np.float64))
        return _of_classes(metric.name, found.logits, np.array(answers, np.int64))
    if metric.name in ("perplexity", "loss"):
        assert found.nats is not None
        assert found.tokens is not None
        return _of_tokens(metric.name, found.nats, found.tokens)
    return _of_texts(metric.name, _texts(metric, found), prepared.wanted)


def _sides(metric: Metric, prepared: Evaluation, found: Outputs, classes: Sequence[str]) -> tuple[Any, Any]:
    """What a person's function gets: what was predicted, and what was wanted."""
    answers = prepared.examples.answers or ()
    if prepared.task == "classification":
        assert found.logits is not None
        return [classes[place] for place in found.logits.argmax(1)], [classes[int(place)] for place in answers]
    if prepared.task == "regression":
        assert found.logits is not None
        return found.logits[:, 0].astype(np.float64), np.array(answers, np.float64)
    return list(_texts(metric, found)), prepared.wanted


def _texts(metric: Metric, found: Outputs) -> tuple[str, ...]:
    if found.texts is None:
        raise InvalidArgument(f"metric is {metric.name!r}, and no texts were written; expected it among the metrics that outputs are asked for")
    return found.texts


def _of_function(metric: Metric, predicted: Any, wanted: Any) -> Measured:
    rows = len(wanted)
    whole = _called(metric, predicted, wanted)
    if whole.ndim:
        return Measured(float(whole.mean()), mean_of(whole))

    def score(places: I64) -> F64:
        found = np.full(len(places), np.nan)
        for draw, chosen in enumerate(places):
            sides = [side[chosen] if isinstance(side, np.ndarray) else [side[place] for place in chosen] for side in (predicted, wanted)]
            try:
                found[draw] = float(_called(metric, *sides))
            except BadMetric:
                continue  # a resample may lack what the function needs; it is left out of the interval
        return found

    return Measured(float(whole), Whole(rows, score))


def _called(metric: Metric, predicted: Any, wanted: Any) -> F64:
    """What the function gives: one number, or one for each row. Raises BadMetric."""
    assert metric.function is not None
    rows = len(wanted)
    try:
        given = np.asarray(metric.function(predicted, wanted), dtype=np.float64)
    except Exception as error:  # a function of somebody else's may raise anything
        raise BadMetric(f"the metric {metric.name} raises {type(error).__name__} on {rows} rows: {error}") from error
    if given.shape not in ((), (rows,)):
        raise BadMetric(f"the metric {metric.name} gives an array of shape {given.shape} on {rows} rows; expected a number, or one for each row")
    if not np.isfinite(given).all():
        said = f"{float(given)}" if not given.ndim else f"{int((~np.isfinite(given)).sum())} values that are not finite"
        raise BadMetric(f"the metric {metric.name} gives {said} on {rows} rows; expected finite numbers")
    return given


def _of_classes(name: str, logits: Any, labels: I64) -> Measured:
    predicted = logits.argmax(1).astype(np.int64)
    right = predicted == labels
    if name == "accuracy":
        return Measured(float(right.mean()), mean_of(right), right)
    if name == "loss":
        values = metrics.row_entropies(logits, labels)
        return Measured(float(values.mean()), mean_of(values))
    cells, kind = np.unique(np.stack([labels, predicted]), axis=1, return_inverse=True)
    hot = np.eye(logits.shape[1])
    table = np.concatenate([hot[cells[0]], hot[cells[1]], hot[cells[0]] * (cells[0] == cells[1])[:, None]], axis=1)
    value = metrics.classification(logits, labels)[name]
    return Measured(value, Sums(kind.ravel().astype(np.int64), table, macro_f1 if name == "macro_f1" else matthews))


def macro_f1(sums: F64) -> F64:
    """Of [m, 3 * classes] counts of labels, predictions and hits by class: the mean of 2 hits / (labels + predictions) over classes that occur."""
    labels, predictions, hits = np.split(sums, 3, axis=1)
    seen = labels + predictions
    scores = np.divide(2 * hits, seen, out=np.zeros_like(hits), where=seen > 0)
    mean: F64 = scores.sum(1) / (seen > 0).sum(1)
    return mean


def matthews(sums: F64) -> F64:
    """Of the same counts: Gorodkin's correlation for any number of classes (Computational Biology and Chemistry 28, 2004), 0 where it has none."""
    labels, predictions, hits = np.split(sums, 3, axis=1)
    rows, right = labels.sum(1), hits.sum(1)
    spread = (rows**2 - (predictions**2).sum(1)) * (rows**2 - (labels**2).sum(1))
    shared = right * rows - (labels * predictions).sum(1)
    found: F64 = np.divide(shared, np.sqrt(spread), out=np.zeros_like(shared), where=spread > 0)
    return found


def _of_numbers(name: str, predicted: F64, wanted: F64) -> Measured:
    if name == "mse":
        return Measured(metrics.regression(predicted, wanted)[name], mean_of((predicted - wanted) ** 2))
    ranks = needed("scipy.stats", "sterna[train]").rankdata

    def score(places: I64) -> F64:
        sides = predicted[places], wanted[places]
        return correlation(*((ranks(side, axis=1) for side in sides) if name == "spearman" else sides))

    return Measured(metrics.regression(predicted, wanted)[name], Whole(wanted.size, score))


def correlation(x: F64, y: F64) -> F64:
    """Pearson's correlation of each row of two arrays [m, n] -> [m]; 0 where a side is constant."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    spread = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    shared = (x * y).sum(1)
    found: F64 = np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 0)
    return found


def _of_tokens(name: str, nats: F64, tokens: I64) -> Measured:
    """Loss is all nats over all tokens, so rows weigh by their tokens; perplexity its exponential."""
    table, kind = np.unique(np.stack([nats, tokens.astype(np.float64)], axis=1), axis=0, return_inverse=True)

    def score(sums: F64) -> F64:
        loss = sums[:, 0] / sums[:, 1]
        found: F64 = np.exp(np.minimum(loss, 700)) if name == "perplexity" else loss
        return found

    return Measured(metrics.language(nats, tokens)[name], Sums(kind.ravel().astype(np.int64), table, score))


def _of_texts(name: str, predicted: Sequence[str], wanted: Sequence[str]) -> Measured:
    if name in ("bleu", "chrf"):
        return _of_corpus(name, predicted, wanted)
    if name == "exact_match":
        right = metrics.exact_match(predicted, wanted)
        return Measured(float(right.mean()), mean_of(right), right)
    values = metrics.token_f1(predicted, wanted) if name == "token_f1" else metrics.rouge(predicted, wanted, [name])[name]
    return Measured(float(values.mean()), mean_of(values))


def _of_corpus(name: str, predicted: Sequence[str], wanted: Sequence[str]) -> Measured:
    """sacrebleu's BLEU (arXiv 1804.08771) and chrF with its defaults, from 0 to 1: scores of counts summed over the corpus."""
    library = needed("sacrebleu.metrics", "sterna[train]")
    scorer = library.BLEU(force=True) if name == "bleu" else library.CHRF()
    table = np.array(scorer._extract_corpus_statistics(list(predicted), [list(wanted)]), np.float64)

    def score(sums: F64) -> F64:
        return np.array([scorer._compute_score_from_stats([int(count) for count in row]).score / 100 for row in sums])

    value = float(scorer.corpus_score(list(predicted), [list(wanted)]).score) / 100
    return Measured(value, Sums(np.arange(len(table)), table, score))
