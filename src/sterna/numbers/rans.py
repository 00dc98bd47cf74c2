"""Numbers by an asymmetric numeral system (rANS; Duda, arXiv 1311.2540): each costs log2(65536 / frequency) bits, and is read by a table look-up.

A state x begins between 2^23 and 2^31, loses and gains whole bytes, and ends as 2^23; numbers are written from the last to the first.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

TOTAL = 1 << 16
"""What the frequencies add up to."""
BLOCK = 1 << 16
"""Numbers that are coded by one state."""
_LOW = np.uint64(1 << 23)
_U = np.uint64


@njit(nogil=True, cache=True, boundscheck=False)
def encode(numbers, frequency, start, out):
    """Write one block's bytes to the end of uint8 `out`; returns the first one's place. `start[j]` is the sum of the frequencies before j."""
    x = _LOW
    at = out.size
    for i in range(numbers.size - 1, -1, -1):
        f = _U(frequency[numbers[i]])
        while x >= f << _U(15):
            at -= 1
            out[at] = np.uint8(x & _U(255))
            x >>= _U(8)
        x = (x // f << _U(16)) + x % f + _U(start[numbers[i]])
    for byte in range(4):
        at -= 1
        out[at] = np.uint8(x >> _U(8 * byte) & _U(255))
    return at


@njit(nogil=True, cache=True, boundscheck=False)
def decode(data, first, stop, frequency, start, number, out):
    """Read one block, the bytes data[first:stop], into uint16 `out`; `number[slot]` is whose slot it is. Returns whether the block is sound."""
    if stop - first < 4:
        return False
    x = _U(data[first]) << _U(24) | _U(data[first + 1]) << _U(16) | _U(data[first + 2]) << _U(8) | _U(data[first + 3])
    if not _LOW <= x < _U(1 << 31):
        return False
    at = first + 4
    for i in range(out.size):
        slot = x & _U(0xFFFF)
        j = number[slot]
        out[i] = j
        x = _U(frequency[j]) * (x >> _U(16)) + slot - _U(start[j])
        while x < _LOW:
            if at >= stop:
                return False
            x = x << _U(8) | _U(data[at])
            at += 1
    return x == _LOW and at == stop


@njit(nogil=True, cache=True, boundscheck=False)
def fill(frequency, slots):
    """slots[s] = the number whose slot s is, for frequencies that add up to TOTAL."""
    at = 0
    for j in range(frequency.size):
        for _ in range(frequency[j]):
            slots[at] = np.uint16(j)
            at += 1


def frequencies(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frequencies that add up to TOTAL, in proportion to the counts and at least 1 where there is one; `counts` are not all 0, at most TOTAL of them
    above 0. What rounding leaves over goes to, or comes from, the largest (of equal ones the first)."""
    held = counts > 0
    scaled = counts * (TOTAL - int(held.sum())) // int(counts.sum()) + held
    scaled[int(np.argmax(scaled))] += TOTAL - int(scaled.sum())
    return scaled
