"""Numbers as a reader wants them, the same in every language: three digits that matter, and a unit of SI or ISO."""

from __future__ import annotations

import math

from sterna.reporting.report import Metric
from sterna.scoring.intervals import Estimate

MINUS = "\u2212"


def digits(value: float, significant: int = 3) -> str:
    """A number with `significant` digits, without an exponent, with thousands separated."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "\u2013"
    after = max(0, significant - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{after}f}"
    if after and sum(letter.isdigit() for letter in text.lstrip("-0.,")) > significant:  # 9.996 became 10.00
        text = f"{value:,.{after - 1}f}"
    return text.replace("-", MINUS)


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit * 0.9995:
            return f"{digits(count / unit)}\u00a0{name}"
    return f"{count:,.0f}\u00a0B"


def duration(seconds: float) -> str:
    """A time, from microseconds to days."""
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= unit * 0.9995:
            return f"{digits(seconds / unit)}\u00a0{name}"
    return f"{digits(seconds * 1e6)}\u00a0\u00b5s"


def milliseconds(value: float) -> str:
    """Milliseconds; seconds from a thousand on."""
    return duration(value / 1e3) if value >= 999.5 else f"{digits(value)}\u00a0ms"


def milliseconds_between(value: float, low: float, high: float) -> str:
    """A time in milliseconds, or seconds from a thousand on, and an interval in the same unit."""
    unit, name = (1e3, "s") if value >= 999.5 else (1.0, "ms")
    return f"{digits(value / unit)}\u00a0{name} {bracket(digits(low / unit), digits(high / unit))}"


def speed(bits: float) -> str:
    """Bits a second."""
    for unit, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits >= unit * 0.9995:
            return f"{digits(bits / unit).removesuffix('.00').removesuffix('.0')}\u00a0{name}"
    return f"{digits(bits)}\u00a0bit/s"


def score(value: float, metric: Metric) -> str:
    """A score in the metric's units: one digit after the point for points of 100, else four that matter."""
    return f"{value:.1f}".replace("-", MINUS) if metric.points else digits(value, 4)


def signed(value: float, metric: Metric | None = None) -> str:
    """A difference with its sign; plain zero has none."""
    text = f"{abs(value):.1f}" if metric is None or metric.points else digits(abs(value), 3)
    if not any(letter in "123456789" for letter in text):
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def difference(estimate: Estimate, metric: Metric) -> str:
    """A difference and its 95 % interval."""
    return f"{signed(estimate.value, metric)} {bracket(signed(estimate.low, metric), signed(estimate.high, metric))}"


def interval(estimate: Estimate, metric: Metric) -> str:
    """A score and its 95 % interval."""
    return f"{score(estimate.value, metric)} {bracket(score(estimate.low, metric), score(estimate.high, metric))}"


def ratio(estimate: Estimate, after: int = 3) -> str:
    """A ratio and its 95 % interval, with `after` digits after the point."""
    return f"{estimate.value:.{after}f} {bracket(f'{estimate.low:.{after}f}', f'{estimate.high:.{after}f}')}"


def bracket(low: str, high: str) -> str:
    """An interval that no line break divides."""
    return f"[{low},\u00a0{high}]"


def times(value: float) -> str:
    """How many times as much: two digits below ten, whole numbers from a hundred on."""
    return f"{digits(value, 2) if value < 10 else digits(value, 3)}\u00d7"


def share(value: float) -> str:
    """A share of 1 as a percentage with two digits that matter."""
    return f"{digits(100 * value, 2)}\u00a0%"
