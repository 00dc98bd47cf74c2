"""The exact k-th largest magnitude of a stream of float32 values, by counting on their bits in two passes.

Magnitudes of floats order as their bits do without the sign. The first pass counts the upper 16 of those 31 bits, the second the lower 15
inside the one bin that holds the k-th. Memory is two histograms, whatever the length; nothing is sorted and nothing is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sterna.numbers.machine import above64, trailing_zeros

UPPER_BINS = 1 << 16
LOWER_BINS = 1 << 15
_FIRST_NONFINITE = 0x7F800000 >> 15


def kept_entries(density: float, entries: int) -> int:
    """floor(density * entries), the density taken as the decimal number that it is written as: 0.29 of 100 is 29."""
    return math.floor(Fraction(Decimal(repr(float(density)))) * entries)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Keep every magnitude whose bits are above `bits`, and the first `ties` (by flat index) of those equal to it; `count` in all."""

    bits: int
    ties: int
    count: int


@njit(nogil=True, cache=True, boundscheck=False)
def count_upper(values: NDArray[np.float32], histogram: NDArray[np.int64]) -> None:
    """Add the float32 `values` to the int64[65536] `histogram` of the upper bits of their magnitudes."""
    bits = values.view(np.uint32)
    for i in range(bits.size):
        histogram[(bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(15)] += 1


@njit(nogil=True, cache=True, boundscheck=False)
def count_lower(values: NDArray[np.float32], upper: int, histogram: NDArray[np.int64]) -> None:
    """Add those `values` whose upper bits are `upper` to the int64[32768] `histogram` of their lower bits."""
    bits = values.view(np.uint32)
    wanted = np.uint32(upper)
    last = np.uint32(wanted << np.uint32(15) | np.uint32(0x7FFF))
    whole = bits.size - bits.size % 64
    for first in range(0, whole, 64):
        inside = ~above64(bits, first, last)
        if wanted:
            inside &= above64(bits, first, np.uint32((wanted << np.uint32(15)) - np.uint32(1)))
        while inside:
            histogram[bits[first + trailing_zeros(inside)] & np.uint32(0x7FFF)] += 1
            inside &= inside - np.uint64(1)
    for i in range(whole, bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude >> np.uint32(15) == wanted:
            histogram[magnitude & np.uint32(0x7FFF)] += 1


def has_nonfinite(upper: NDArray[np.int64]) -> bool:
    """Whether a NaN or an infinity was counted."""
    return bool(upper[_FIRST_NONFINITE:].any())


def locate_upper(upper: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin of the upper histogram that holds the `wanted`-th largest magnitude, and how many of `wanted` lie above that bin."""
    return _from_top(upper, wanted)


def locate(upper_bin: int, above: int, lower: NDArray[np.int64], wanted: int) -> Threshold:
    """The threshold that keeps exactly `wanted` entries, or all non-zeros where there are fewer."""
    if wanted == 0:
        return Threshold(bits=0x7FFFFFFF, ties=0, count=0)
    lower_bin, larger = _from_top(lower, wanted - above)
    bits = (upper_bin << 15) | lower_bin
    if bits == 0:  # zeros are never kept, so the tie at zero keeps none
        return Threshold(bits=0, ties=0, count=above + larger)
    return Threshold(bits=bits, ties=wanted - above - larger, count=wanted)


def locate_lowest_upper(upper: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin of the upper histogram that holds the `wanted`-th smallest magnitude, zeros counted, and how many of `wanted` lie below that bin."""
    return _from_bottom(upper, wanted)


def locate_lowest(upper_bin: int, below: int, lower: NDArray[np.int64], wanted: int) -> Threshold:
    """The threshold that keeps exactly `wanted` smallest magnitudes: those whose bits are below `bits`, and the first `ties` equal to them."""
    lower_bin, smaller = _from_bottom(lower, wanted - below)
    return Threshold(bits=(upper_bin << 15) | lower_bin, ties=wanted - below - smaller, count=wanted)


def _from_bottom(histogram: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    from_bottom = np.cumsum(histogram)
    at = int(np.searchsorted(from_bottom, wanted))
    return at, int(from_bottom[at - 1]) if at else 0


def _from_top(histogram: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    from_top = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_top, wanted))
    if at == histogram.size:  # fewer values than wanted: everything is kept
        at -= 1
    return histogram.size - 1 - at, int(from_top[at - 1]) if at else 0


@njit(nogil=True, cache=True, boundscheck=False)
def count_equal(values: NDArray[np.float32], bits: int) -> int:
    """How many magnitudes have exactly these bits."""
    patterns = values.view(np.uint32)
    wanted = np.uint32(bits)
    equal = 0
    for i in range(patterns.size):
        equal += (patterns[i] & np.uint32(0x7FFFFFFF)) == wanted
    return equal


@njit(nogil=True, cache=True, boundscheck=False)
def emit(values: NDArray[np.float32], bits: int, ties: int, codes: NDArray[np.uint32]) -> int:
    """Write `index << 1 | negative` to `codes` for every magnitude above `bits` and the first `ties` equal to it; returns how many.

    `codes` is uint32 with room for as many as there are values.
    """
    patterns = values.view(np.uint32)
    threshold = np.uint32(bits)
    kept = np.uint64(0)
    i = 0
    while ties > 0 and i < patterns.size:
        pattern = patterns[i]
        magnitude = pattern & np.uint32(0x7FFFFFFF)
        codes[kept] = np.uint32(i) << np.uint32(1) | pattern >> np.uint32(31)
        kept += np.uint64(magnitude >= threshold)
        ties -= magnitude == threshold
        i += 1
    while i + 64 <= patterns.size:  # most of 64 are below: look at those above alone
        above = above64(patterns, i, threshold)
        while above:
            j = i + trailing_zeros(above)
            above &= above - np.uint64(1)
            codes[kept] = np.uint32(j) << np.uint32(1) | patterns[j] >> np.uint32(31)
            kept += np.uint64(1)
        i += 64
    for j in range(i, patterns.size):
        pattern = patterns[j]
        codes[kept] = np.uint32(j) << np.uint32(1) | pattern >> np.uint32(31)
        kept += np.uint64((pattern & np.uint32(0x7FFFFFFF)) > threshold)
    return int(kept)


@njit(nogil=True, cache=True, boundscheck=False)
def emit_lowest(values: NDArray[np.float32], bits: int, ties: int, positions: NDArray[np.uint32]) -> int:
    """Write the index of every magnitude below `bits` and of the first `ties` equal to it to `positions`; returns how many.

    `positions` is uint32 with room for as many as there are values.
    """
    patterns = values.view(np.uint32)
    threshold = np.uint32(bits)
    kept = np.uint64(0)
    i = 0
    while i + 64 <= patterns.size:  # most of 64 are above: look at the others alone
        left = ~above64(patterns, i, threshold)
        while left:
            j = i + trailing_zeros(left)
            left &= left - np.uint64(1)
            tie = patterns[j] & np.uint32(0x7FFFFFFF) == threshold
            positions[kept] = j
            kept += np.uint64((not tie) or ties > 0)
            ties -= tie
        i += 64
    for j in range(i, patterns.size):
        magnitude = patterns[j] & np.uint32(0x7FFFFFFF)
        positions[kept] = j
        kept += np.uint64((magnitude < threshold) | ((magnitude == threshold) & (ties > 0)))
        ties -= magnitude == threshold
    return int(kept)


@njit(nogil=True, cache=True, boundscheck=False)
def hash_magnitudes(seed: int, first: int, out: NDArray[np.uint32]) -> None:
    """out[i] = the upper 31 bits of SplitMix64's output number first + i + 1 from the state `seed`: a counter-based hash of (seed, flat index).

    SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    for i in range(out.size):
        z = np.uint64(seed) + (np.uint64(first) + np.uint64(i) + np.uint64(1)) * gamma
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        out[i] = z >> np.uint64(33)
