"""The best of a few scales for a task vector, found with few evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

FACTORS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)
"""Scales tried on the uncompressed task vector."""


def climb(grid: Sequence[float], start: float, rank: Callable[[float], Any]) -> float:
    """The best value of a sorted grid, found by walking uphill from the value nearest to `start`: the curve over scales has one peak.

    `rank` gives what is greater where a value is better. Walks towards larger values while that is better, and towards smaller ones only where the
    first step up was not.
    """
    first = min(range(len(grid)), key=lambda i: (abs(grid[i] - start), i))
    top = rank(grid[first])
    for direction in (1, -1):
        best = first
        while 0 <= best + direction < len(grid) and (found := rank(grid[best + direction])) > top:
            best, top = best + direction, found
        if best != first:
            return grid[best]
    return grid[first]
