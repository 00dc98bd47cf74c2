"""Scores of predictions, as plain functions over arrays; each returns numbers by name, in units of 1 (an accuracy of .9, not 90)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.needs import needed
from sterna.training.tasks import TaskName

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is called, and whether more is better."""

    title: str
    higher_is_better: bool = True


METRICS = {
    "accuracy": Metric("accuracy"),
    "macro_f1": Metric("macro F1"),
    "matthews": Metric("Matthews correlation"),
    "spearman": Metric("Spearman correlation"),
    "pearson": Metric("Pearson correlation"),
    "mse": Metric("mean squared error", higher_is_better=False),
    "perplexity": Metric("perplexity", higher_is_better=False),
    "loss": Metric("loss", higher_is_better=False),
    "rouge1": Metric("ROUGE-1"),
    "rouge2": Metric("ROUGE-2"),
    "rougeL": Metric("ROUGE-L"),
    "exact_match": Metric("exact match"),
}

MAIN: dict[TaskName, str] = {"classification": "accuracy", "regression": "spearman", "causal-lm": "perplexity", "seq2seq": "rougeL"}
"""The metric that stands for each task where there is room for one."""


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
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
    return float((total - wide[np.arange(labels.size), labels]).mean())


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
    """Mean F-measure of ROUGE-1, -2 and -L (words of Latin letters and digits, no stemming), and the share that is equal but for outer spaces."""
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = needed("rouge_score.rouge_scorer", "sterna[train]").RougeScorer(kinds, use_stemmer=False)
    scores = [scorer.score(target, text) for text, target in zip(predicted, wanted, strict=True)]
    means = {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}
    same = [text.strip() == target.strip() for text, target in zip(predicted, wanted, strict=True)]
    return {**means, "exact_match": float(np.mean(same))}
