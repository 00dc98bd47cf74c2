"""95 % intervals for what the demo reports: an accuracy, a difference of two accuracies on the same texts, a ratio of paired times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(correct: int, total: int) -> Estimate:
    """Wilson's score interval for a proportion, (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, spread = correct / total, Z95**2 / total
    centre = (p + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(p * (1 - p) / total + spread / (4 * total)) / (1 + spread)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(correct: np.ndarray, reference: np.ndarray, draws: int = 10_000, seed: int = 0) -> Estimate:
    """Accuracy minus the reference's on the same texts (two bool arrays of equal length), by the percentile bootstrap over texts.

    A text contributes -1, 0 or +1, so a resample of texts is one draw from a multinomial over these three.
    """
    step = correct.astype(np.int64) - reference.astype(np.int64)
    counts = np.array([(step == -1).sum(), (step == 0).sum(), (step == 1).sum()])
    total = step.size
    resampled = np.random.default_rng(seed).multinomial(total, counts / total, size=draws)
    low, high = np.percentile((resampled[:, 2] - resampled[:, 0]) / total, (2.5, 97.5))
    return Estimate(float(step.mean()), float(low), float(high))


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Geometric mean of times[i] / reference[i] with Student's interval on the logarithms; at least two pairs."""
    from sterna.needs import needed

    logs = np.log(np.asarray(times) / np.asarray(reference))
    mean, error = float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(logs.size)
    half = float(needed("scipy.stats").t.ppf(0.975, logs.size - 1)) * error
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half))
