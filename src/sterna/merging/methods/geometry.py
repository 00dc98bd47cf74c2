"""Methods that look at the angles between task vectors, tensor by tensor."""

from __future__ import annotations

import math

import numpy as np

from sterna.errors import InvalidArgument
from sterna.merging.methods.sums import total
from sterna.merging.registry import F64, Kinds, merge_method

PARALLEL = 0.9995
"""|cos| above which slerp is linear: the sine in its divisor is too small."""


@merge_method("model_stock", statistics=True, semantics=("paper", "mergekit"), parents=(2, None), linear=True)
def model_stock(kinds: Kinds) -> F64:
    """r * mean of t_i, with r = n c / (1 + (n - 1) c) and c the mean cosine of pairs in this tensor (Jang et al., arXiv 2403.19522, eq. 5).

    Weights must be equal: the method has none. A tensor that a parent does not change has cosine 0 with it. r is 0 where 1 + (n - 1) c is.
    mergekit: the same.
    """
    if np.ptp(kinds.weights):
        raise InvalidArgument(f"model_stock takes no weights; given {kinds.weights.tolist()}")
    n = kinds.weights.size
    norms = np.sqrt(kinds.gram.diagonal())
    products = np.outer(norms, norms)
    cosines = np.divide(kinds.gram, products, out=np.zeros_like(kinds.gram), where=products > 0)
    cosine = float(np.clip(cosines[np.triu_indices(n, 1)], -1, 1).mean())
    below = 1 + (n - 1) * cosine
    ratio = n * cosine / below if abs(below) >= 1e-6 else 0.0
    return ratio * total(kinds.values) / n


@merge_method("slerp", statistics=True, parents=(2, 2), linear=True)
def slerp(kinds: Kinds, *, t: float = 0.5) -> F64:
    """sin((1 - t) a) / sin(a) * t_1 + sin(t a) / sin(a) * t_2, with a the angle between the two in this tensor (Shoemake, SIGGRAPH 1985).

    Of task vectors, from the first parent (t = 0) to the second (t = 1); linear where |cos a| > 0.9995 or one of the two is 0. Weights must be 1.
    mergekit interpolates whole weights, which no expert holds: its semantics are not offered.
    """
    if (kinds.weights != 1).any():
        raise InvalidArgument(f"slerp takes no weights but t; given {kinds.weights.tolist()}")
    product = math.sqrt(kinds.gram[0, 0] * kinds.gram[1, 1])
    cosine = min(max(float(kinds.gram[0, 1]) / product, -1.0), 1.0) if product else 1.0
    first, second = 1 - t, t
    if abs(cosine) <= PARALLEL:
        angle = math.acos(cosine)
        first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    between: F64 = first * kinds.values[0] + second * kinds.values[1]
    return between
