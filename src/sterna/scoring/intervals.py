"""95 % intervals of scores, of differences on the same rows, and of ratios of paired times; and whether a difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sterna.needs import needed

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point
NOISE = 0.05
"""The p-value from which on a difference is called noise."""
DRAWS, FEWER_DRAWS = 10_000, 1_000
"""Resamples of the bootstrap: where sums of rows give the score, and where every resample is scored anew. Of very many rows that all differ fewer."""

_BLOCK = 1 << 22  # numbers of a block of resamples
_MOST = 200_000_000  # rows drawn one by one in all


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """The same in other units; `factor` is above 0."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high)


@dataclass(frozen=True, slots=True)
class Difference:
    """A score minus another on the same rows, with its 95 % interval and the two-sided p-value of no difference by `test`.

    `error` is the standard error of the value on these `rows`.
    """

    value: float
    low: float
    high: float
    p: float
    test: Literal["McNemar", "bootstrap"]
    rows: int
    error: float

    @property
    def noise(self) -> bool:
        """Whether these rows cannot tell the two apart: the interval holds 0, or p is not below .05."""
        return self.low <= 0 <= self.high or self.p >= NOISE

    def rows_for(self, half: float) -> int | None:
        """How many rows like these would settle it: those of a 95 % interval that reaches `half` to either side, (z * error / half)^2 * rows.

        None where no row tells the two apart, since then nothing is known of how much rows differ.
        """
        return math.ceil(self.rows * (Z95 * self.error / half) ** 2) if self.error > 0 else None

    def times(self, factor: float) -> Difference:
        """The same in other units; `factor` is above 0."""
        scaled = {name: factor * getattr(self, name) for name in ("value", "low", "high", "error")}
        return replace(self, **scaled)


class Evidence(Protocol):
    """What the rows of one model give to a score, so that the score can be had of any resample of them."""

    @property
    def rows(self) -> int: ...

    def of(self, places: I64) -> F64:
        """The score of every resample, places [draws, rows] -> [draws]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """A score that follows from sums over rows: row i gives `table[kind[i]]`, and `score` makes scores [m] of sums [m, k].

    `kind` is [rows] and `table` [kinds, k]; rows of one kind are counted together, so a resample costs as much as there are kinds.
    """

    kind: I64
    table: F64
    score: Callable[[F64], F64]

    @property
    def rows(self) -> int:
        return self.kind.size

    def of(self, places: I64) -> F64:
        return self.score(_counted(self.kind, len(self.table), places) @ self.table)


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A score of all rows together, made anew for every resample."""

    rows: int
    score: Callable[[I64], F64]

    def of(self, places: I64) -> F64:
        return self.score(places)


def mean_of(values: NDArray[np.generic]) -> Sums:
    """The evidence of a score that is the mean of a value for each row."""
    table, kind = np.unique(values.astype(np.float64), return_inverse=True)
    return Sums(kind.astype(np.int64).ravel(), table[:, None], lambda sums: sums[:, 0] / values.size)


def wilson(correct: int, total: int) -> Estimate:
    """Wilson's score interval for a proportion, (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, spread = correct / total, Z95**2 / total
    centre = (p + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(p * (1 - p) / total + spread / (4 * total)) / (1 + spread)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(correct: np.ndarray, reference: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Accuracy minus the reference's on the same texts (two bool arrays of equal length), by the percentile bootstrap over texts.

    A text contributes -1, 0 or +1, so a resample of texts is one draw from a multinomial over these three.
    """
    step = correct.astype(np.int64) - reference.astype(np.int64)
    counts = np.array([(step == -1).sum(), (step == 0).sum(), (step == 1).sum()])
    total = step.size
    resampled = np.random.default_rng(seed).multinomial(total, counts / total, size=draws)
    low, high = np.percentile((resampled[:, 2] - resampled[:, 0]) / total, (2.5, 97.5))
    return Estimate(float(step.mean()), float(low), float(high))


def mcnemar(right: Bools, reference: Bools) -> float:
    """The exact two-sided p-value of McNemar's test: of the rows that one of the two has right, half should be either's."""
    only = int((right & ~reference).sum()), int((~right & reference).sum())
    return float(needed("scipy.stats", "sterna[train]").binomtest(only[0], sum(only), 0.5).pvalue) if sum(only) else 1.0


def right_or_wrong(right: Bools, reference: Bools) -> Difference:
    """The difference of two shares of right rows: `paired_difference` and McNemar's test, in units of 1."""
    found = paired_difference(right, reference)
    step = right.astype(np.float64) - reference
    error = float(step.std(ddof=1)) / math.sqrt(step.size) if step.size > 1 else 0.0
    return Difference(found.value, found.low, found.high, mcnemar(right, reference), "McNemar", step.size, error)


def interval(value: float, evidence: Evidence, seed: int = 0) -> Estimate:
    """The percentile bootstrap over rows; `value` is the score of the rows themselves."""
    low, high = _percentiles(_resampled([evidence], seed)[0], value)
    return Estimate(value, low, high)


def difference(value: float, evidence: Evidence, reference: Evidence, seed: int = 0) -> Difference:
    """The paired percentile bootstrap: every resample of rows is scored for both. `value` is the difference on the rows themselves.

    p is twice the share of resamples on the rarer side of 0, (count + 1) / (draws + 1) each way, at most 1. Raises ValueError for other rows.
    """
    if evidence.rows != reference.rows:
        raise ValueError(f"{evidence.rows} rows against {reference.rows}: only scores of the same rows can be paired")
    ours, theirs = _resampled([evidence, reference], seed)
    steps = ours - theirs
    steps = steps[np.isfinite(steps)]
    low, high = _percentiles(steps, value)
    sides = [(int(side.sum()) + 1) / (steps.size + 1) for side in (steps <= 0, steps >= 0)]
    error = float(steps.std()) if steps.size else 0.0
    return Difference(value, low, high, min(1.0, 2 * min(sides)), "bootstrap", evidence.rows, error)


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Geometric mean of times[i] / reference[i] with Student's interval on the logarithms; at least two pairs."""
    logs = np.log(np.asarray(times) / np.asarray(reference))
    mean, error = float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(logs.size)
    half = float(needed("scipy.stats").t.ppf(0.975, logs.size - 1)) * error
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def _percentiles(scores: F64, value: float) -> tuple[float, float]:
    """The middle 95 % of the resamples that have a score; the value itself where none has."""
    finite = scores[np.isfinite(scores)]
    if not finite.size:
        return value, value
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def _resampled(parts: Sequence[Evidence], seed: int) -> list[F64]:
    """Every part's score on the same resamples of rows."""
    random = np.random.default_rng(seed)
    sums = [part for part in parts if isinstance(part, Sums)]
    if len(sums) < len(parts):
        blocks = _places(parts[0].rows, FEWER_DRAWS, random)
        found = [[part.of(places) for part in parts] for places in blocks]
    else:
        kinds, together = np.unique(np.stack([part.kind for part in sums]), axis=1, return_inverse=True)  # kinds of rows for all parts at once
        tables = [part.table[row] for part, row in zip(sums, kinds, strict=True)]
        found = [
            [part.score(counts @ table) for part, table in zip(sums, tables, strict=True)]
            for counts in _counts(together.ravel(), kinds.shape[1], DRAWS, random)
        ]
    return [np.concatenate(column) for column in zip(*found, strict=True)]


def _places(rows: int, draws: int, random: np.random.Generator) -> Iterator[I64]:
    step = max(1, _BLOCK // rows)
    for start in range(0, draws, step):
        yield random.integers(0, rows, (min(step, draws - start), rows))


def _counts(kind: I64, kinds: int, draws: int, random: np.random.Generator) -> Iterator[I64]:
    """How many rows of each kind every resample has, [some draws, kinds]: drawn at once where kinds are few, else row by row."""
    share = np.bincount(kind, minlength=kinds) / kind.size
    if 8 * kinds <= kind.size:
        step = max(1, _BLOCK // kinds)
        for start in range(0, draws, step):
            yield random.multinomial(kind.size, share, size=min(step, draws - start))
        return
    for places in _places(kind.size, max(FEWER_DRAWS, min(draws, _MOST // kind.size)), random):
        yield _counted(kind, kinds, places)


def _counted(kind: I64, kinds: int, places: I64) -> I64:
    """How often each kind of row occurs in each resample: [draws, kinds]."""
    shifted = kind[places] + kinds * np.arange(len(places))[:, None]
    return np.bincount(shifted.ravel(), minlength=kinds * len(places)).reshape(len(places), kinds)
