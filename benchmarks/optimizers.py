"""Which search without gradients finds weights of experts in few trials: ours (scipy's COBYLA), nevergrad's NGOpt, or CMA-ES?

Question: The mean cross-entropy of thirty labelled examples, plus LoraHub's penalty, after as many trials as LoraHub takes and more, for
    few and many experts, on problems with planted weights.
Predicted: NGOpt and COBYLA the same for some tens of trials, since NGOpt is COBYLA there; CMA-ES behind them until it has had some hundred trials.
Peer: nevergrad's NGOpt, which LoraHub's authors call, and pycma's CMA-ES.
Note: The examples are Gaussian; an expert adds its own direction to the logits of four classes, and a few experts are of use. Twenty problems each.
    Ratios are paired by problem: the other's objective over ours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

import harness
from sterna.composing.search import BOUNDS, L1, best, search

EXAMPLES, CLASSES, PROBLEMS = 30, 4, 20
COUNTS, BUDGETS = (5, 20, 60), (40, 100, 200)
Objective = Callable[[NDArray[np.float64]], float]


def problem(count: int, seed: int) -> Objective:
    """The penalized loss at weights: log sum exp of base logits + sum of w_i * the expert's logits, less the label's, mean over the examples."""
    draw = np.random.default_rng(seed)
    base = draw.normal(size=(EXAMPLES, CLASSES))
    experts = draw.normal(size=(count, EXAMPLES, CLASSES))
    planted = np.where(np.arange(count) < max(2, count // 5), draw.uniform(-1.5, 1.5, count), 0.0)
    labels = (base + np.tensordot(planted, experts, 1) + 0.5 * draw.normal(size=base.shape)).argmax(1)

    def loss(weights: NDArray[np.float64]) -> float:
        logits = base + np.tensordot(weights, experts, 1)
        return float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(EXAMPLES), labels]).mean() + L1 * np.abs(weights).mean())

    return loss


def ours(loss: Objective, count: int, budget: int, seed: int) -> float:
    def score(weights: object) -> float:
        given = np.asarray(weights, np.float64)
        return -(loss(given) - L1 * float(np.abs(given).mean()))

    return -best(search(count, score, budget=budget, seed=seed)).penalized


def ngopt(loss: Objective, count: int, budget: int, seed: int) -> float:
    import nevergrad

    weights = nevergrad.p.Array(init=np.zeros(count)).set_bounds(*BOUNDS)
    weights.random_state = np.random.RandomState(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=weights, budget=budget)
    seen = []
    for _ in range(budget):
        asked = optimizer.ask()
        seen.append(loss(asked.value))
        optimizer.tell(asked, seen[-1])
    return min(seen)


def cma(loss: Objective, count: int, budget: int, seed: int) -> float:
    import cma as pycma

    seen: list[float] = [loss(np.zeros(count))]
    options = {"bounds": list(BOUNDS), "seed": seed + 1, "verbose": -9, "maxfevals": budget - 1}
    strategy = pycma.CMAEvolutionStrategy(np.zeros(count), 0.5, options)
    while len(seen) < budget:
        asked = strategy.ask()[: budget - len(seen)]
        values = [loss(weights) for weights in asked]
        seen += values
        if len(asked) < strategy.popsize:
            break
        strategy.tell(asked, values)
    return min(seen)


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    problems = 3 if options.quick else PROBLEMS
    rows = []
    for count in COUNTS:
        for budget in BUDGETS:
            found = {
                side.__name__: [side(problem(count, seed), count, budget, seed) for seed in range(problems)] for side in (ours, ngopt, cma)
            }
            start = [problem(count, seed)(np.zeros(count)) for seed in range(problems)]
            means = [f"{np.mean(values):.3f}" for values in (start, *found.values())]
            ratios = [harness.ratio(found[side], found["ours"]) for side in ("ngopt", "cma")]
            rows.append([count, budget, *means, *(f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in ratios)])
    columns = ("experts", "trials", "weights 0", "COBYLA (ours)", "NGOpt", "CMA-ES", "NGOpt over ours", "CMA-ES over ours")
    report.table(f"Penalized loss of the best weights found, mean of {problems} problems; less is better", columns, rows)
    report.write()


if __name__ == "__main__":
    main()
