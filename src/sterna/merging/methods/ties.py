"""TIES, and DARE before it: a sign is elected for each position, and those that agree with it are averaged."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sterna.merging.methods.sums import TIE, in_order, sign, total
from sterna.merging.registry import F64, Kinds, merge_method
from sterna.numbers.kinds import disjoint_sums

Election = Literal["total", "frequency"]


@merge_method("ties", drop="magnitude", semantics=("paper", "peft", "mergekit"))
def ties(kinds: Kinds, *, lambda_: float = 1.0, election: Election = "total", normalize: bool = True) -> F64:
    """lambda * disjoint mean of trimmed task vectors (Yadav et al., arXiv 2306.01708). With x_i = w_i t_i and s the elected sign:

        paper:     s = sgn(sum x_i), 0 at a tie; merged = sum of x_i with sgn(x_i) = s, over how many those are; 0 where s is 0
        peft:      s = sgn(sum t_i), + at a tie (weights do not vote); merged = sum of w_i t_i with sgn(t_i) = s, over how many
        mergekit:  s = sgn(sum x_i), + at a tie; merged = sum of x_i with sgn(x_i) = s, over the sum of their w_i (1 where that is 0)

    `election: frequency` lets every parent vote with +1 or -1. `normalize: false` leaves the divisor out.
    """
    return lambda_ * _disjoint(kinds, election, normalize)


@merge_method("dare_ties", drop="random", semantics=("paper", "peft", "mergekit"))
def dare_ties(kinds: Kinds, *, lambda_: float = 1.0, election: Election = "total") -> F64:
    """`ties` of task vectors whose non-zeros stay with probability `density` and are rescaled as in `dare_linear` (arXiv 2311.03099).

    mergekit: without the divisor of the disjoint mean.
    """
    return lambda_ * _disjoint(kinds, election, kinds.semantics != "mergekit")


def _disjoint(kinds: Kinds, election: Election, normalize: bool) -> F64:
    weights = kinds.weights[:, None]
    weighted = weights * kinds.values
    alike = float(kinds.weights[0]) if kinds.weights[0] > 0 and not np.ptp(kinds.weights) else 0.0
    if election == "total" and (alike or kinds.semantics == "paper"):  # the same as below, from values that are sorted once
        sums, counts = np.empty(weighted.shape[1]), np.empty(weighted.shape[1])
        disjoint_sums(in_order(weighted), TIE, kinds.semantics != "paper", sums, counts)
        weight = alike if kinds.semantics == "mergekit" else 1.0
        return sums / np.maximum(counts, 1) / weight if normalize else sums
    voting = kinds.values if kinds.semantics == "peft" else weighted
    elected = sign(np.sign(voting) if election == "frequency" else voting)
    if kinds.semantics != "paper":
        elected = np.where(elected < 0, -1.0, 1.0)
    agree = (np.sign(voting) == elected) & (voting != 0)
    summed = total(np.where(agree, weighted, 0))
    if not normalize:
        return summed
    divisor = total(np.where(agree, weights, 0)) if kinds.semantics == "mergekit" else agree.sum(0).astype(np.float64)
    return summed / np.where(divisor == 0, 1, divisor)
