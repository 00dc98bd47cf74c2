"""Weights on a grid, so that the weighted sum of any number of experts has few magnitudes.

A merged tensor holds 65,536 magnitudes at most (`sterna.expert.palette`), and n ternary experts may have 3^n sums. Where each expert has one scale
s_i, weights with w_i s_i a multiple of one power of two q make every sum a multiple of q, and q is chosen so that no sum is beyond 32,767 q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sterna.errors import Unsupported
from sterna.expert.changes import Add
from sterna.expert.expert import Expert
from sterna.expert.palette import MOST, Palette

Rounding = Callable[[Sequence[float]], list[float]]


def rounding(experts: Sequence[Expert], bound: float) -> Rounding:
    """Rounds weights of at most `bound` in magnitude to the grid; where the sums are few in any case, it changes nothing.

    Raises Unsupported where the sums may be many and an expert has several scales.
    """
    scales = [_scales(expert) for expert in experts]
    kinds = math.prod(1 + 2 * len(held) for held in scales)
    if kinds // 2 <= MOST:
        return list
    for number, held in enumerate(scales, 1):
        if len(held) > 1:
            told = f"expert {number} has {len(held)} scales, and the sums of {len(experts)} experts may take more than {MOST:,} magnitudes"
            raise Unsupported(f"{told}; compress with one scale for all tensors (scope global), or compose fewer experts")
    single = [next(iter(held), 0.0) for held in scales]
    step = 2.0 ** math.ceil(math.log2(bound * sum(single) / (MOST // 2 - len(single))))
    return lambda weights: [_on_grid(weight, scale, step) for weight, scale in zip(weights, single, strict=True)]


def _scales(expert: Expert) -> set[float]:
    """The magnitudes that an expert's levels have."""
    found: set[float] = set()
    for change in expert.changes:
        if isinstance(change, Add) and change.levels.count:
            found.add(change.levels.scale)
        elif isinstance(change, Palette):
            found.update(change.magnitudes.tolist())
    return found


def _on_grid(weight: float, scale: float, step: float) -> float:
    """The nearest weight whose product with the scale is a multiple of the step, to the bit where a neighbouring float allows it."""
    if not scale:
        return weight
    wanted = round(weight * scale / step) * step
    near = wanted / scale
    return next((each for each in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)) if each * scale == wanted), near)
