"""Ternary vectors as two masks of 64 positions a word, in plain arrays: compiled loops that set, compare, count and add them.

`words` is uint64[2, n] throughout: the positive mask, the negative mask; bit i % 64 of word i // 64 is position i. Bits past the end are 0.
A *segment* is a run of words that is counted by itself: `start` its first word, `length` how many.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from sterna.numbers.machine import add_where64, population

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

WORD = 64
"""Positions a word."""

TILE = 2048
"""Words that `sums` takes at a time: their planes and sums stay in cache."""

_U = np.uint64


def compiled(words: torch.Tensor) -> bool:
    """Whether these loops work on the tensor: it is in CPU memory. Elsewhere torch does, by `torch_bits`."""
    return words.device.type == "cpu"


def array(words: torch.Tensor) -> U64:
    """The memory of an int64 tensor, as the loops take it."""
    return words.numpy().view(np.uint64)


@njit(nogil=True, cache=True, boundscheck=False)
def set_bits(codes, first, last, counts, places, words):
    """Set the bits of blocks first..last-1, whose codes lie one after another in `codes`; places[k] is the bit where block k begins."""
    at = _U(0)
    for k in range(first, last):
        place = _U(places[k])
        for i in range(_U(counts[k])):
            code = _U(codes[at + i])
            bit = place + (code >> _U(1))
            words[code & _U(1), bit >> _U(6)] |= _U(1) << (bit & _U(63))
        at += _U(counts[k])


@njit(nogil=True, cache=True, boundscheck=False)
def agreements(first, second, first_start, second_start, length, found):
    """found[k] = positions of segment k where both are not zero with the same sign, and with different signs; int64[k, 2]."""
    for k in range(length.size):
        a, b = _U(first_start[k]), _U(second_start[k])
        agree = differ = _U(0)
        for i in range(_U(length[k])):
            plus, minus = first[0, a + i], first[1, a + i]
            other_plus, other_minus = second[0, b + i], second[1, b + i]
            agree += population(plus & other_plus | minus & other_minus)
            differ += population(plus & other_minus | minus & other_plus)
        found[k, 0], found[k, 1] = agree, differ


@njit(nogil=True, cache=True, boundscheck=False)
def populations(words, start, length, found):
    """found[k] = non-zeros of segment k; int64[k]."""
    for k in range(length.size):
        a = _U(start[k])
        total = _U(0)
        for i in range(_U(length[k])):
            total += population(words[0, a + i] | words[1, a + i])
        found[k] = total


@njit(nogil=True, cache=True, boundscheck=False)
def count_in(mask, planes, depth, carry):
    """Count another mask into a bit-sliced counter: bit w of planes[k] is bit k of position w's count, which stays below 2 ** depth."""
    size = mask.size
    carry[:size] = mask
    for k in range(depth):
        for w in range(size):
            up = planes[k, w] & carry[w]
            planes[k, w] ^= carry[w]
            carry[w] = up


@njit(nogil=True, cache=True, boundscheck=False)
def spread(plus, minus, depth, out):
    """out[64 * w + j] = the count of position j of word w in `plus`, less that in `minus`; out is int8 or int16 [64 * words], and zero before."""
    for w in range(_U(out.size // 64)):
        for k in range(depth):
            add_where64(out, w << _U(6), plus[k, w], 1 << k)
            add_where64(out, w << _U(6), minus[k, w], -(1 << k))


@njit(nogil=True, cache=True, boundscheck=False)
def add_times(counts, weight, total):
    """total += weight * counts, in float32; counts are int8 or int16, weight is float32."""
    for i in range(total.size):
        total[i] += weight * np.float32(counts[i])


def summed(masks: list[U64]) -> NDArray[np.int8] | NDArray[np.int16]:
    """The sum of the levels of vectors of one size: int8[64 * n] of masks uint64[2, n], int16 from 128 vectors on."""
    size = masks[0].shape[1]
    out = np.zeros(WORD * size, np.int8 if len(masks) < 128 else np.int16)
    planes = np.empty((2, len(masks).bit_length(), min(TILE, size)), np.uint64)
    carry = np.empty(planes.shape[2], np.uint64)
    for start in range(0, size, TILE):
        planes[:] = 0
        stop = min(start + TILE, size)
        for number, words in enumerate(masks, 1):
            for sign in (0, 1):
                count_in(words[sign, start:stop], planes[sign], number.bit_length(), carry)
        spread(planes[0], planes[1], planes.shape[1], out[WORD * start : WORD * stop])
    return out


def weighted(groups: dict[float, list[U64]]) -> NDArray[np.float32]:
    """The sum of weight * level over vectors of one size, which are given by their weights: float32[64 * n], added in the order of the magnitudes."""
    total = np.zeros(WORD * next(iter(groups.values()))[0].shape[1], np.float32)
    for weight in sorted(groups, key=lambda weight: (abs(weight), weight)):
        add_times(summed(groups[weight]), np.float32(weight), total)
    return total
