"""Axes: where a value lies, in percent of a chart's width, and which values are marked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

INSET = 2.0
"""Percent of the width that stay free at each side, so that no mark is cut."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear or logarithmic axis over [low, high]."""

    low: float
    high: float
    log: bool = False
    inset: float = INSET

    def share(self, value: float) -> float:
        """Where a value lies between low (0) and high (1); what lies outside is put on the end."""
        low, high, at = (math.log10(max(x, 1e-300)) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5

    def percent(self, value: float) -> float:
        return round(self.inset + (100 - 2 * self.inset) * self.share(value), 3)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside, no more than `most`."""
        return _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)


def linear(values: Iterable[float], least: float = 0.0, zero: bool = False) -> Scale:
    """A linear axis that holds all values with some air, at least `least` wide; from zero where asked."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    air = max(0.06 * (high - low), (least - (high - low)) / 2, 1e-9 * max(abs(high), 1.0))
    return Scale(0.0 if zero else low - air, high + air, inset=0.0 if zero else INSET)


def logarithmic(values: Iterable[float]) -> Scale:
    """A logarithmic axis that holds all values, which are positive, with some air."""
    known = [value for value in values if value > 0] or [1.0, 10.0]
    low, high = min(known), max(known)
    air = max(1.25, (high / low) ** 0.06)
    return Scale(low / air, high * air, log=True)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(i * step, 12) for i in range(first, last + 1)]
    return [low, high]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) < 2:  # less than a decade: as far apart as on a plain axis
            return _linear_ticks(low, high, most)
        if len(found) <= most:
            return found
    step = math.ceil(len(found) / most)
    return found[::step]
