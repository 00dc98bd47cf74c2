"""EMR-Merging: one vector for all tasks, and for each a mask and a scale."""

from __future__ import annotations

import numpy as np

from sterna.errors import InvalidArgument
from sterna.merging.methods.sums import sign
from sterna.merging.registry import F64, Kinds, merge_method


@merge_method("emr", recovers=True)
def emr(kinds: Kinds) -> F64:
    """The unified vector of EMR-Merging (Huang et al., arXiv 2405.17461): s * max of |t_i| over the i with sgn(t_i) = s, where s = sgn(sum t_i).

    Task i has the mask M_i = (t_i * unified > 0) and the scale sum |t_i| / sum |M_i * unified|, both over the whole vector, and becomes
    scale * M_i * unified. At a tie s is 0, and so is every task there (the authors' code takes -). Weights must be 1: the method has none.
    """
    if (kinds.weights != 1).any():
        raise InvalidArgument(f"emr takes no weights; given {kinds.weights.tolist()}")
    elected = sign(kinds.values)
    largest: F64 = np.where(np.sign(kinds.values) == elected, np.abs(kinds.values), 0).max(0)
    return elected * largest
