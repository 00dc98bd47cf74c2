"""Allocations: how a density is spent over the tensors of a task vector, and what the kept entries of each are worth.

Every allocation is worked out of one survey of each tensor (`sterna.compeft.survey`), so trying another one reads nothing. Notation: tensor t has n_t
entries of which c_t are kept, the whole d entries of which floor(density * d) are kept; s_t is the worth of a kept entry for alpha = 1.

| name | the threshold is over | s_t |
| --- | --- | --- |
| global | abs(tau), one for all: ComPEFT | std(tau) |
| tensor | abs(tau) of each tensor, the same density everywhere | std(tau_t) |
| scaled | abs(tau), one for all | sqrt(density) * norm(tau_t) / sqrt(c_t): what is kept has each tensor's norm, as all of it has under `global` |
| balanced | abs(tau) / sqrt(std(tau_t)), one for all: halfway from `global` to `tensor` | as `scaled` |
| fisher | abs(tau) * F_t^(1/4), one for all: F_t is the tensor's mean Fisher information (`sterna.searching.fisher`) | as `scaled` |

F_t^(1/2), which the loss's second-order change asks for, is better on some tasks and worse on others (docs/benchmarks.md); its root is steady.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sterna.codings import I64
from sterna.compeft import Budget, Survey, joined
from sterna.numbers.selection import UPPER_BINS, kept_entries

AllocationName = Literal["global", "tensor", "scaled", "balanced", "fisher"]

FACTOR, EXPONENT = 4.1, 0.65
"""Of the closed form: what the best scales of searches were near to; docs/search.md has how near."""

_ROUNDS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """`budgets` are what `sterna.compeft.coded_levels` takes, with scales of 1; `units` are s_t of every piece, float64."""

    budgets: tuple[Budget, ...]
    units: tuple[float, ...]


def allocated(name: AllocationName, surveys: Sequence[Survey], density: float, fisher: Sequence[float] = ()) -> Allocation:
    """The allocation of that name over tensors that were surveyed one by one; `fisher` is F_t of each, for the one of that name."""
    return _weighted(surveys, density, [value**0.25 for value in fisher]) if name == "fisher" else ALLOCATIONS[name](surveys, density)


def _global(surveys: Sequence[Survey], density: float) -> Allocation:
    whole = joined(surveys)
    return Allocation((_budget(whole, kept_entries(density, whole.entries)),), (whole.deviation,) * len(surveys))


def _tensor(surveys: Sequence[Survey], density: float) -> Allocation:
    budgets = tuple(_budget(found, kept_entries(density, found.entries)) for found in surveys)
    return Allocation(budgets, tuple(found.deviation for found in surveys))


def _scaled(surveys: Sequence[Survey], density: float) -> Allocation:
    whole = joined(surveys)
    kept = _above(surveys, [1.0] * len(surveys), kept_entries(density, whole.entries))
    return Allocation((_budget(whole, kept_entries(density, whole.entries)),), _own_norms(surveys, kept, density))


def _balanced(surveys: Sequence[Survey], density: float) -> Allocation:
    return _weighted(surveys, density, [found.deviation**-0.5 if found.deviation > 0 else 0.0 for found in surveys])


def _weighted(surveys: Sequence[Survey], density: float, weights: Sequence[float]) -> Allocation:
    entries = sum(found.entries for found in surveys)
    kept = _above(surveys, weights, kept_entries(density, entries))
    return Allocation(tuple(_budget(found, count) for found, count in zip(surveys, kept, strict=True)), _own_norms(surveys, kept, density))


ALLOCATIONS: dict[AllocationName, Callable[[Sequence[Survey], float], Allocation]] = {
    "global": _global,
    "tensor": _tensor,
    "scaled": _scaled,
    "balanced": _balanced,
}


def closed_form_alpha(density: float) -> float:
    """FACTOR * (density / .1)^-EXPONENT: near to density^-.5, under which what is kept has the norm of the whole vector."""
    return FACTOR * math.pow(density / 0.1, -EXPONENT)


def _budget(surveyed: Survey, kept: int) -> Budget:
    return Budget(surveyed, kept, (1.0,) * len(surveyed.pieces))


def _own_norms(surveys: Sequence[Survey], kept: Sequence[int], density: float) -> tuple[float, ...]:
    return tuple(math.sqrt(density * found.squares / count) if count else 0.0 for found, count in zip(surveys, kept, strict=True))


def _above(surveys: Sequence[Survey], weights: Sequence[float], wanted: int) -> list[int]:
    """How many entries of each tensor have weight * magnitude above the one threshold that keeps about `wanted` of them all.

    To the resolution of the surveys' bins, 1/256 of a magnitude, and never more than there are non-zeros.
    """
    above = [_counts_above(found.histogram) for found in surveys]
    low, high = -140.0, 140.0  # log2 of the threshold
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if sum(_kept(counts, weight, middle) for counts, weight in zip(above, weights, strict=True)) > wanted:
            low = middle
        else:
            high = middle
    return [_kept(counts, weight, high) for counts, weight in zip(above, weights, strict=True)]


def _counts_above(histogram: I64) -> I64:
    """int64[65537]: how many magnitudes lie in each bin or above it, zeros left out."""
    counts = histogram.copy()
    counts[0] = 0
    return np.concatenate([np.cumsum(counts[::-1])[::-1], [0]])


def _kept(above: I64, weight: float, threshold: float) -> int:
    """Magnitudes of at least 2^threshold / weight, by bins."""
    if weight <= 0:
        return 0
    magnitude = np.float32(min(2.0 ** (threshold - math.log2(weight)), 3e38))
    return int(above[min((int(magnitude.view(np.uint32)) >> 15) + 1, UPPER_BINS)])
