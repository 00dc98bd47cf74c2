"""Sums over parents that do not depend on the parents' order, and signs of sums with a stated tie."""

from __future__ import annotations

import numpy as np

from sterna.merging.registry import F64
from sterna.numbers.kinds import sort_columns

TIE = 2.0**-40
"""A sum of no more than this share of its terms' magnitudes is a tie: what rounding leaves of +a +b -(a + b)."""

_FEW = 12
"""Rows up to which exchanging neighbours is faster than sorting column by column."""


def total(values: F64) -> F64:
    """Sums over axis 0 in the order of the values, so that the parents' order does not matter to the bit."""
    summed: F64 = in_order(values).sum(0)
    return summed


def in_order(values: F64) -> F64:
    """The values, each column sorted, in memory of their own."""
    if values.shape[0] > _FEW:
        return np.sort(values, axis=0)
    ordered: F64 = np.array(values, np.float64, order="C")
    sort_columns(ordered)
    return ordered


def sign(values: F64) -> F64:
    """-1, 0 (a tie) or 1: signs of the sums over axis 0."""
    summed, whole = total(values), total(np.abs(values))
    return np.where(np.abs(summed) <= TIE * whole, 0.0, np.sign(summed))
