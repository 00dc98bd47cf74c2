"""Sums in float64 in one fixed order, so that a standard deviation has the same bits for any number of threads and any vector width."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sterna.numbers.machine import add_lanes

_LANES = 8


@njit(nogil=True, cache=True, boundscheck=False)
def sums(values: NDArray[np.float32]) -> tuple[float, float]:
    """(sum, sum of squares) of float32 `values`, accumulated in 8 float64 lanes that are added in order."""
    lanes = np.zeros(2 * _LANES, np.float64)
    whole = values.size - values.size % _LANES
    add_lanes(values, np.uint64(whole), lanes)
    for i in range(whole, values.size):
        value = np.float64(values[i])
        lanes[0] += value
        lanes[_LANES] += value * value
    s = q = 0.0
    for lane in range(_LANES):
        s += lanes[lane]
        q += lanes[_LANES + lane]
    return s, q


def standard_deviation(count: int, total: float, squares: float) -> float:
    """Unbiased standard deviation of `count` values from their sum and sum of squares; 0 for fewer than two."""
    if count < 2:
        return 0.0
    return math.sqrt(max(squares - total * total / count, 0.0) / (count - 1))
