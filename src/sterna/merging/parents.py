"""One parent's change of one tensor as merging reads it, and which of its non-zeros stay: trimmed, without outliers, or at random.

Every non-zero of a ternary tensor has one magnitude, so ranks by magnitude leave ties. Under `semantics: paper` all non-zeros of one magnitude
stand or fall together, as under the papers' thresholds: they stay while the first of them is inside the share that is kept. The packages keep an
exact number of entries, and which of the ties is an accident of their sorting: under `peft` and `mergekit` those of lowest flat index stay here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sterna.codings import I64
from sterna.expert.changes import Add, Ternary
from sterna.expert.palette import Palette
from sterna.merging.registry import Drop, Semantics
from sterna.numbers.kinds import ALL, NO_INDICES
from sterna.numbers.selection import kept_entries
from sterna.recoding import blockwise

F64 = NDArray[np.float64]
Leveled = Add | Palette
_NO_END = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What a parent has in one tensor: coded levels (under a block coding) with K magnitudes, ascending.

    Of the non-zeros of magnitude m those stay whose number in the tensor is low[m] to high[m] - 1, each with probability chance / 2^53, by the
    generator of state `seed`. `counts` are all non-zeros by magnitude. Values are multiplied by `factor`.
    """

    levels: Ternary
    magnitudes: F64
    counts: I64
    low: I64
    high: I64
    indices: NDArray[np.uint8] = field(default_factory=lambda: NO_INDICES)
    width: int = 0
    seed: int = 0
    chance: int = ALL
    factor: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether every non-zero stays, of one magnitude."""
        return self.magnitudes.size == 1 and self.chance == ALL and self.low[0] == 0 and int(self.high[0]) >= self.levels.count

    @property
    def norm1(self) -> float:
        """The sum of magnitudes before anything is dropped."""
        return float(self.counts @ self.magnitudes)


def part_of(change: Leveled) -> Part:
    """All of a change. Raises InvalidFile where an index of a palette is beyond its magnitudes."""
    levels = blockwise([change.levels])[0]
    if isinstance(change, Add):
        magnitudes, counts = np.array([change.levels.scale], np.float64), np.array([levels.count], np.int64)
        return Part(levels, magnitudes, counts, np.zeros(1, np.int64), np.full(1, _NO_END))
    magnitudes = change.magnitudes.numpy().astype(np.float64)
    counts = np.bincount(change.numbers(0, levels.count), minlength=magnitudes.size).astype(np.int64)
    low, high = np.zeros(magnitudes.size, np.int64), np.full(magnitudes.size, _NO_END)
    return Part(levels, magnitudes, counts, low, high, change.indices.numpy(), change.width)


def threshold(changes: Sequence[Leveled], density: float) -> float:
    """The smallest magnitude that stays where the `density` share of a parent's whole task vector is kept; 0 where all do."""
    entries = sum(change.levels.size for change in changes)
    wanted = kept_entries(density, entries)
    if sum(change.levels.count for change in changes) <= wanted:
        return 0.0
    counted: dict[float, int] = {}
    for part in map(part_of, changes):
        for magnitude, count in zip(part.magnitudes.tolist(), part.counts.tolist(), strict=True):
            counted[magnitude] = counted.get(magnitude, 0) + count
    above = 0
    for magnitude in sorted(counted, reverse=True):
        above += counted[magnitude]
        if above >= wanted:
            return magnitude
    return 0.0


def trimmed(part: Part, change: Leveled, drop: Drop, semantics: Semantics, density: float, gamma: float, least: float) -> Part:
    """The part with what a method drops by magnitude. `least` is the parent's `threshold`, for magnitudes under semantics "paper"."""
    size = part.levels.size
    if drop == "magnitude" and semantics == "paper":
        return replace(part, high=np.where(part.magnitudes >= least, part.high, 0))
    if density >= 1 and (drop == "magnitude" or semantics == "mergekit"):
        return part
    if drop == "magnitude":
        return _ranked(part, change, 0, max(int(density * size), 1 if semantics == "mergekit" else 0))
    wanted, top = int(density * size), int(gamma * size)
    if semantics == "mergekit":
        last = size - max(0, size - wanted - top)
        return _ranked(part, change, last - wanted, last)
    above = np.cumsum(part.counts[::-1])[::-1]  # non-zeros of this magnitude or more
    stays = (above > top) & (above - part.counts < top + wanted)
    return replace(part, high=np.where(stays, part.high, 0))


def dropped(part: Part, density: float, seed: int, task: str, name: str, *, rescale: bool) -> Part:
    """The part with each non-zero kept with probability `density`: the same ones for the same seed, task and tensor, whatever else is merged.

    Values are rescaled by 1 / density, unless `rescale` is false (mergekit's norms are known only when all is counted).
    """
    state = hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()
    return replace(part, chance=min(round(density * ALL), ALL), seed=int.from_bytes(state[:8], "little"), factor=1 / density if rescale else 1.0)


def _ranked(part: Part, change: Leveled, first: int, last: int) -> Part:
    """Non-zeros of rank first to last - 1 by magnitude, the largest first, and of equal ones by flat index."""
    ranks = np.cumsum(part.counts[::-1])[::-1] - part.counts  # of the first non-zero of each magnitude
    low, high = np.clip(first - ranks, 0, part.counts), np.clip(last - ranks, 0, part.counts)
    if isinstance(change, Palette):  # from ranks among equals to numbers in the tensor
        numbers = change.numbers(0, part.levels.count)
        whole = (low == 0) & (high == part.counts)
        for magnitude in np.flatnonzero(~whole & (low < high)):
            places = np.append(np.flatnonzero(numbers == magnitude), part.levels.count)
            low[magnitude], high[magnitude] = places[low[magnitude]], places[high[magnitude]]
        high = np.where(whole, _NO_END, high)
    return replace(part, low=low, high=high)
