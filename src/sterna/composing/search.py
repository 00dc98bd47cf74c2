"""A search without gradients for weights that score well, within bounds, from 0, with an L1 penalty, as LoraHub asks for.

Source: Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", arXiv 2307.13269, section 2.3: loss + .05 * mean
|w|, w within [-1.5, 1.5], 40 steps from 0. The authors call nevergrad's NGOpt, which for such budgets is COBYLA (Powell 1994: linear models in a
trust region) with a first step of a sixth of the bounds' width; here that is scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.errors import InvalidArgument
from sterna.needs import needed

BOUNDS, L1, BUDGET = (-1.5, 1.5), 0.05, 40
"""The paper's, and its authors' code's."""
MOST = 1000
"""Weights at most."""
_CLOSE = 1e-3
"""The search ends before its budget where its steps are smaller."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Weights that were tried, what they scored (higher is better), and that less the penalty, which is what is searched by."""

    weights: tuple[float, ...]
    score: float
    penalized: float


class _Spent(Exception):
    """The budget is used up."""


def check_search(count: int, budget: int, bounds: tuple[float, float], l1: float) -> None:
    """Raise InvalidArgument for a search that cannot be made."""
    if not 1 <= count <= MOST:
        raise InvalidArgument(f"weights of {count} experts are to be searched for; expected 1 to {MOST}")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise InvalidArgument(f"the budget is {budget!r} trials; expected an integer of 1 or more")
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and low < high):
        raise InvalidArgument(f"the bounds of weights are {low:g} and {high:g}; expected two numbers around 0, the lower first")
    if not (math.isfinite(l1) and l1 >= 0):
        raise InvalidArgument(f"l1 is {l1:g}; expected 0 or more")


def search(
    count: int,
    score: Callable[[Sequence[float]], float],
    *,
    budget: int = BUDGET,
    seed: int = 0,
    bounds: tuple[float, float] = BOUNDS,
    l1: float = L1,
    rounding: Callable[[Sequence[float]], list[float]] = list,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """The trials, `budget` of them at most; the first has weights 0, the next move one weight each, in an order drawn by `seed`.

    `rounding` is applied to weights before they are tried; `tell` gets each trial as it is made. One that scores no finite number counts as the
    worst. An interruption (Ctrl-C) ends the search with the trials that there are.

    Raises InvalidArgument as `check_search` does, or where no trial has a finite score.
    """
    check_search(count, budget, bounds, l1)
    optimize = needed("scipy.optimize", "sterna[train]")
    order = np.random.default_rng(seed).permutation(count)
    low, high = bounds
    trials: list[Trial] = []

    def objective(asked: NDArray[np.float64]) -> float:
        if len(trials) == budget:
            raise _Spent
        weights = np.empty(count)
        weights[order] = np.clip(asked, low, high)  # COBYLA leaves its bounds by a little
        trials.append(trial_of(rounding(weights.tolist()), score, l1))
        tell(trials[-1])
        return -trials[-1].penalized if math.isfinite(trials[-1].penalized) else 1e30

    try:
        options = {"rhobeg": (high - low) / 6, "tol": _CLOSE, "maxiter": max(budget, count + 2)}
        optimize.minimize(objective, np.zeros(count), method="COBYLA", bounds=[bounds] * count, options=options)
    except _Spent:
        pass
    except KeyboardInterrupt:
        if not trials:
            raise
    if not any(math.isfinite(trial.penalized) for trial in trials):
        raise InvalidArgument(f"none of {len(trials)} trials scored a finite number (the last {trials[-1].score}): look at the score function")
    return trials


def trial_of(weights: Sequence[float], score: Callable[[Sequence[float]], float], l1: float) -> Trial:
    """Score weights. Raises InvalidArgument where the score is no number."""
    found = score(weights)
    try:
        value = float(found)
    except (TypeError, ValueError):
        raise InvalidArgument(f"the score is {found!r}; expected a number, higher for better weights") from None
    return Trial(tuple(weights), value, value - l1 * float(np.mean(np.abs(weights))) if math.isfinite(value) else -math.inf)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of the best penalized score; of equal ones the first."""
    return max(trials, key=lambda trial: trial.penalized)
