"""Scores of predictions, as plain functions over arrays; each returns numbers by name, in units of 1 (an accuracy of .9, not 90)."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.needs import needed

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: `points` where its values are shown in points of 100, and `function` where it is a person's own.

    A function takes what was predicted and what was wanted, a list of label names (classification) or of texts (seq2seq) or a float64 array
    (regression) each, and gives a number, or one for each row, whose mean is then the score. Its attributes `higher_is_better` (True), `points`
    (False) and `title` are read where it has them.
    """

    name: str
    title: str
    higher_is_better: bool = True
    points: bool = True
    function: Callable[[Any, Any], Any] | None = None

    @property
    def factor(self) -> float:
        """From units of 1 to those in which values are shown."""
        return 100.0 if self.points else 1.0

    def better(self, value: float, other: float) -> bool:
        return value > other if self.higher_is_better else value < other


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy"),
        Metric("macro_f1", "macro F1"),
        Metric("matthews", "Matthews correlation"),
        Metric("spearman", "Spearman correlation"),
        Metric("pearson", "Pearson correlation"),
        Metric("mse", "mean squared error", higher_is_better=False, points=False),
        Metric("perplexity", "perplexity", higher_is_better=False, points=False),
        Metric("loss", "loss", higher_is_better=False, points=False),
        Metric("rouge1", "ROUGE-1"),
        Metric("rouge2", "ROUGE-2"),
        Metric("rougeL", "ROUGE-L"),
        Metric("exact_match", "exact match"),
        Metric("token_f1", "token F1"),
        Metric("bleu", "BLEU"),
        Metric("chrf", "chrF"),
    )
}


def classification(logits: Floats, labels: Integers) -> dict[str, float]:
    """Logits [n, classes] against labels [n]: accuracy, F1 averaged over the classes that occur or are predicted, Matthews', cross-entropy."""
    scores = needed("sklearn.metrics", "sterna[train]")
    predicted = logits.argmax(axis=1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(scores.f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "matthews": float(scores.matthews_corrcoef(labels, predicted)),
        "loss": cross_entropy(logits, labels),
    }


def cross_entropy(logits: Floats, labels: Integers) -> float:
    """Mean of log sum exp(logits) - logits[label], in nats."""
    return float(row_entropies(logits, labels).mean())


def row_entropies(logits: Floats, labels: Integers) -> Floats:
    """The cross-entropy of each row [n], float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    total: Floats = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
    return total - wide[np.arange(labels.size), labels]


def regression(predicted: Floats, wanted: Floats) -> dict[str, float]:
    """Two vectors [n]: rank and linear correlation (0 where either side is constant, or n < 2) and the mean squared error."""
    statistics = needed("scipy.stats", "sterna[train]")
    varied = predicted.size > 1 and float(np.ptp(predicted)) > 0 and float(np.ptp(wanted)) > 0
    return {
        "spearman": float(statistics.spearmanr(predicted, wanted).statistic) if varied else 0.0,
        "pearson": float(statistics.pearsonr(predicted, wanted).statistic) if varied else 0.0,
        "mse": float(np.mean((predicted.astype(np.float64) - wanted.astype(np.float64)) ** 2)),
    }


def language(nats: Floats, tokens: Integers) -> dict[str, float]:
    """Summed cross-entropy [n] of n rows and how many tokens each predicts [n]: the loss a token, and its exponential."""
    loss = float(nats.astype(np.float64).sum() / tokens.sum())
    return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}


def generation(predicted: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The means of `rouge` and `exact_match`."""
    means = {kind: float(values.mean()) for kind, values in rouge(predicted, wanted).items()}
    return {**means, "exact_match": float(exact_match(predicted, wanted).mean())}


def rouge(predicted: Sequence[str], wanted: Sequence[str], kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL")) -> dict[str, Floats]:
    """The F-measure of each row [n] by ROUGE-1, -2 and -L (words of Latin letters and digits, no stemming)."""
    scorer = needed("rouge_score.rouge_scorer", "sterna[train]").RougeScorer(list(kinds), use_stemmer=False)
    scores = [scorer.score(target, text) for text, target in zip(predicted, wanted, strict=True)]
    return {kind: np.array([score[kind].fmeasure for score in scores]) for kind in kinds}


def exact_match(predicted: Sequence[str], wanted: Sequence[str]) -> NDArray[np.bool_]:
    """Which rows [n] are equal but for outer spaces."""
    return np.array([text.strip() == target.strip() for text, target in zip(predicted, wanted, strict=True)])


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_f1(predicted: Sequence[str], wanted: Sequence[str]) -> Floats:
    """The F1 of each row's words [n], as SQuAD's (arXiv 1606.05250) counts them: lower case, no punctuation, no articles, words by spaces.

    2 * shared / (predicted + wanted), shared counted with repeats; two rows without words are equal.
    """
    found = []
    for text, target in zip(predicted, wanted, strict=True):
        ours, theirs = (Counter(_ARTICLES.sub(" ", side.lower().translate(_NO_PUNCTUATION)).split()) for side in (text, target))
        total = ours.total() + theirs.total()
        found.append(2 * (ours & theirs).total() / total if total else 1.0)
    return np.array(found)
