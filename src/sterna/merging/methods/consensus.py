"""Consensus merging: what only one task uses, and what none does, is left out."""

from __future__ import annotations

import numpy as np

from sterna.merging.methods.sums import TIE, total
from sterna.merging.registry import F64, Kinds, merge_method


@merge_method("consensus", drop="magnitude", parents=(2, None))
def consensus(kinds: Kinds, *, lambda_: float = 1.0, mask_lambda: float = 0.4, agree: int = 2) -> F64:
    """lambda * t where at least `agree` tasks use the position, else 0 (TALL masks; Wang et al., arXiv 2405.07813).

    t = sum_i w_i t_i, and task i uses a position where |w_i t_i| >= mask_lambda * |t - w_i t_i| and w_i t_i is not 0. The paper tunes mask_lambda for
    each task among .2, .3, .4, .5, .6; here it is one number. A bound that is met but for rounding (2^-40) is met.
    """
    weighted = kinds.weights[:, None] * kinds.values
    summed = total(weighted)
    used = (np.abs(weighted) * (1 + TIE) >= mask_lambda * np.abs(summed - weighted)) & (weighted != 0)
    return np.where(used.sum(0) >= agree, lambda_ * summed, 0.0)
