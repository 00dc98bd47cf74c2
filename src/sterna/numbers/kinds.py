"""Kinds: what several coded tensors have at each position, as one small number, in compiled loops; and numbers of fixed width in bytes.

Tensor i has at a position digit 0 (nothing), or 1 + 2 * index + negative, where `index` says which of its magnitudes. A position's kind is the sum of
radix_i * digit_i, with radix_i the product of the numbers of digits of the tensors before.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_U = np.uint64
_GOLDEN = _U(0x9E3779B97F4A7C15)
ALL = 1 << 53
"""The chance of a non-zero that always stays, in units of 2^-53."""

NO_INDICES = np.empty(0, np.uint8)


@njit(nogil=True, cache=True, inline="always")
def _random53(seed, number):
    """The upper 53 bits of output `number` (from 1) of SplitMix64 from the state `seed`."""
    z = seed + number * _GOLDEN
    z = (z ^ (z >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U(27))) * _U(0x94D049BB133111EB)
    return (z ^ (z >> _U(31))) >> _U(11)


@njit(nogil=True, cache=True, inline="always")
def _index(indices, width, ordinal):
    """Number `ordinal` of those of `width` bits (0 to 16) that lie one after another in bytes, from the lowest bit on."""
    bit = _U(ordinal) * _U(width)
    at, value = bit >> _U(3), _U(0)
    for i in range((_U(width) + (bit & _U(7)) + _U(7)) >> _U(3)):
        value |= _U(indices[at + _U(i)]) << _U(8 * i)
    return value >> (bit & _U(7)) & ((_U(1) << _U(width)) - _U(1))


@njit(nogil=True, cache=True, boundscheck=False)
def add_plain(codes, counts, starts, radix, kinds):
    """kinds[position] += radix * (1, or 2 where negative) for blocks of codes: block k has counts[k] of them and begins at position starts[k]."""
    at = _U(0)
    for k in range(counts.size):
        start = _U(starts[k])
        for i in range(at, at + _U(counts[k])):
            code = codes[i]
            kinds[start + _U(code >> np.uint32(1))] += kinds.dtype.type(radix << (code & np.uint32(1)))
        at += _U(counts[k])


@njit(nogil=True, cache=True, boundscheck=False)
def add_chosen(codes, counts, starts, radix, kinds, ordinal, indices, width, low, high, seed, chance, place):
    """`add_plain` for a tensor of several magnitudes, of which some non-zeros stay: those whose number in the tensor (the first here is `ordinal`)
    lies in low[index]..high[index] - 1, and of these each with probability chance / 2^53, by its flat position (the first here is `place`)."""
    at = 0
    for k in range(counts.size):
        for i in range(at, at + counts[k]):
            index = _index(indices, width, ordinal + i)
            if not low[index] <= ordinal + i < high[index]:
                continue
            position = starts[k] + (codes[i] >> np.uint32(1))
            if chance < ALL and _random53(_U(seed), _U(place + position + 1)) >= _U(chance):
                continue
            kinds[position] += kinds.dtype.type(radix * (1 + 2 * index + _U(codes[i] & np.uint32(1))))
        at += counts[k]


@njit(nogil=True, cache=True, boundscheck=False)
def drop_random(values, seed, chance, place):
    """Set to 0 the values (flat position of the first: `place`) that `add_chosen` would not keep with probability chance / 2^53."""
    for i in range(values.size):
        if _random53(_U(seed), _U(place + i + 1)) >= _U(chance):
            values[i] = 0.0


@njit(nogil=True, cache=True, boundscheck=False)
def sort_columns(values):
    """Sort every column of float64[n, k], by n rounds of exchanges between neighbouring rows: all columns at a time, for few rows."""
    n, k = values.shape
    for done in range(n):
        for i in range(done % 2, n - 1, 2):
            for j in range(k):
                first, second = values[i, j], values[i + 1, j]
                values[i, j] = second if second < first else first
                values[i + 1, j] = first if second < first else second


@njit(nogil=True, cache=True, boundscheck=False)
def disjoint_sums(values, tie, plus, sums, counts):
    """For each column of float64[n, k], sorted: the sum of its values of the sign that has the larger sum, and how many they are. At a tie (the sum
    of all is no more than the share `tie` of the sum of their magnitudes): of those above 0 if `plus`, else 0 and 0."""
    n, k = values.shape
    above, below = np.zeros(k), np.zeros(k)
    positive, negative = np.zeros(k), np.zeros(k)
    for i in range(n):
        for j in range(k):
            value = values[i, j]
            above[j] += value if value > 0.0 else 0.0
            below[j] += value if value < 0.0 else 0.0
            positive[j] += 1.0 if value > 0.0 else 0.0
            negative[j] += 1.0 if value < 0.0 else 0.0
    for j in range(k):
        whole = above[j] + below[j]
        tied = abs(whole) <= tie * (above[j] - below[j])
        up = plus if tied else whole > 0.0
        sums[j] = above[j] if up else 0.0 if tied else below[j]
        counts[j] = positive[j] if up else 0.0 if tied else negative[j]


@njit(nogil=True, cache=True, boundscheck=False)
def count_kinds(kinds, counts):
    """counts[kind] += 1 for every position."""
    for i in range(kinds.size):
        counts[kinds[i]] += 1


@njit(nogil=True, cache=True, boundscheck=False)
def emit_kinds(kinds, sign, number, codes, numbers):
    """For each position whose kind has a sign (int8, 0: nothing): its code, and number[kind]. Returns how many."""
    count = _U(0)
    for i in range(kinds.size):
        kind = kinds[i]
        if sign[kind]:
            codes[count] = np.uint32(i) << np.uint32(1) | np.uint32(sign[kind] < 0)
            numbers[count] = number[kind]
            count += _U(1)
    return np.int64(count)


@njit(nogil=True, cache=True, boundscheck=False)
def pack(numbers, width, bit, out):
    """Write numbers of `width` bits one after another into the zeroed bytes `out`, from that bit on, the lowest first."""
    for i in range(numbers.size):
        value, place = _U(numbers[i]), _U(bit) + _U(i) * _U(width)
        value <<= place & _U(7)
        at = place >> _U(3)
        while value:
            out[at] |= np.uint8(value & _U(255))
            value >>= _U(8)
            at += _U(1)


@njit(nogil=True, cache=True, boundscheck=False)
def unpack(indices, width, first, out):
    """out[i] = number first + i of those that `pack` wrote. Returns the largest."""
    largest = _U(0)
    for i in range(out.size):
        value = _index(indices, width, first + i)
        out[i] = value
        largest = max(largest, value)
    return np.int64(largest)


def width_of(many: int) -> int:
    """Bits of a number below `many`: ceil(log2 many)."""
    return max(many - 1, 0).bit_length()


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` numbers of that width take."""
    return (count * width + 7) // 8


def packed(numbers: NDArray[np.uint16], width: int) -> NDArray[np.uint8]:
    """The bytes of numbers of that width."""
    out = np.zeros(packed_bytes(numbers.size, width), np.uint8)
    pack(numbers, width, 0, out)
    return out
