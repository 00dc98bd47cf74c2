"""Ternary vectors as two masks of 64 positions a word, in plain arrays: compiled loops that set, compare, count and add them.

`words` is uint64[2, n] throughout: the positive mask, the negative mask; bit i % 64 of word i // 64 is position i. Bits past the end are 0.
A *segment* is a run of words that is counted by itself: `start` its first word, `length` how many.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from numpy.typing import NDArray

from sterna.numbers.machine import add_levels64, pointer, population

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

WORD = 64
"""Positions a word."""

_TILE = 256
"""Words that are added at a time: their planes and sums stay in the first cache."""

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
def _agreements(first, second, a, b, length):
    """Positions of a segment where both are not zero with the same sign, and with different ones."""
    agree = differ = _U(0)
    for i in range(_U(length)):
        plus, minus = first[0, a + i], first[1, a + i]
        other_plus, other_minus = second[0, b + i], second[1, b + i]
        agree += population(plus & other_plus | minus & other_minus)
        differ += population(plus & other_minus | minus & other_plus)
    return np.int64(agree), np.int64(differ)


@njit(nogil=True, cache=True, boundscheck=False)
def inner(first, second, first_start, second_start, length, first_scale, second_scale):
    """The sum over segments of first_scale * second_scale * (positions of equal signs - those of different ones), float64, in their order."""
    total = 0.0
    for k in range(length.size):
        agree, differ = _agreements(first, second, _U(first_start[k]), _U(second_start[k]), length[k])
        total += first_scale[k] * second_scale[k] * (agree - differ)
    return total


@njit(nogil=True, cache=True, boundscheck=False)
def shared(first, second, first_start, second_start, length):
    """Positions of all segments where both are not zero with the same sign, and with different ones."""
    same = different = 0
    for k in range(length.size):
        agree, differ = _agreements(first, second, _U(first_start[k]), _U(second_start[k]), length[k])
        same += agree
        different += differ
    return same, different


@njit(nogil=True, cache=True, boundscheck=False)
def square(words, start, length, scale):
    """(The sum over segments of scale^2 * non-zeros, float64, in their order; all non-zeros.)"""
    total, nonzeros = 0.0, np.int64(0)
    for k in range(length.size):
        a, count = _U(start[k]), _U(0)
        for i in range(_U(length[k])):
            count += population(words[0, a + i] | words[1, a + i])
        total += scale[k] * scale[k] * np.int64(count)
        nonzeros += np.int64(count)
    return total, nonzeros


@njit(nogil=True, cache=True, boundscheck=False)
def _count(addresses, first, last, start, size, planes, carry):
    """Count the masks of vectors first..last-1 in words start..start+size-1: bit w of planes[sign, k] is bit k of position w's count."""
    planes[:] = 0
    for number in range(first, last):
        depth = 1
        while (number - first + 1) >> depth:
            depth += 1
        for sign in range(2):
            mask = carray(pointer(addresses[number, sign] + _U(8 * start)), (size,), np.uint64)
            for w in range(size):
                carry[w] = mask[w]
            for k in range(depth):
                for w in range(size):
                    up = planes[sign, k, w] & carry[w]
                    planes[sign, k, w] ^= carry[w]
                    carry[w] = up


@njit(nogil=True, cache=True, boundscheck=False)
def _add_counts(planes, size, out, start):
    """out[start + 64 * w + j] += the count of +1 of position j of word w, less that of -1."""
    for w in range(_U(size)):
        for k in range(planes.shape[1]):
            add_levels64(out, _U(start) + (w << _U(6)), planes[0, k, w], planes[1, k, w], out.dtype.type(1 << k))


@njit(nogil=True, cache=True, boundscheck=False)
def add_levels(addresses, depth, out):
    """out += the levels of all vectors. addresses[i] are those of vector i's masks, of out.size // 64 words; depth bits hold their number."""
    words = out.size // WORD
    planes, carry = np.empty((2, depth, _TILE), np.uint64), np.empty(_TILE, np.uint64)
    for start in range(0, words, _TILE):
        size = min(_TILE, words - start)
        _count(addresses, 0, len(addresses), start, size, planes, carry)
        _add_counts(planes, size, out, WORD * start)


@njit(nogil=True, cache=True, boundscheck=False)
def add_values(addresses, ends, weights, depth, out):
    """out (float32) += weights[g] * (the sum of the levels of vectors ends[g - 1]..ends[g] - 1), group by group."""
    words = out.size // WORD
    planes, carry = np.empty((2, depth, _TILE), np.uint64), np.empty(_TILE, np.uint64)
    counts = np.empty(WORD * _TILE, np.int16)
    for start in range(0, words, _TILE):
        size = min(_TILE, words - start)
        total = out[WORD * start : WORD * (start + size)]
        first = 0
        for group in range(ends.size):
            if ends[group] - first == 1:
                plus = carray(pointer(addresses[first, 0] + _U(8 * start)), (size,), np.uint64)
                minus = carray(pointer(addresses[first, 1] + _U(8 * start)), (size,), np.uint64)
                for w in range(_U(size)):
                    add_levels64(total, w << _U(6), plus[w], minus[w], weights[group])
            else:
                counts[:] = 0
                _count(addresses, first, ends[group], start, size, planes, carry)
                _add_counts(planes, size, counts, 0)
                for i in range(total.size):
                    total[i] += weights[group] * np.float32(counts[i])
            first = ends[group]


def added(places: U64, words: int, weights: Sequence[tuple[float, int]] | None = None) -> NDArray[np.int8] | NDArray[np.int16] | NDArray[np.float32]:
    """The sum of the levels of vectors of `words` words: int8[64 * words], int16 from 128 vectors on. `places` are their `addresses`.

    With `weights`, for each group of successive vectors its weight and how many they are, the sum of weight * level in float32.
    """
    if weights is None:
        votes: NDArray[np.int8] | NDArray[np.int16] = np.zeros(WORD * words, np.int8) if len(places) < 128 else np.zeros(WORD * words, np.int16)
        add_levels(places, len(places).bit_length(), votes)
        return votes
    values = np.zeros(WORD * words, np.float32)
    sizes = [size for _, size in weights]
    add_values(places, np.cumsum(sizes), np.array([weight for weight, _ in weights], np.float32), max(sizes).bit_length(), values)
    return values


def addresses(masks: Sequence[torch.Tensor]) -> U64:
    """uint64[k, 2]: where the positive and the negative words of each int64[2, n] tensor begin in memory. Keep the tensors while these are used."""
    return np.array([(words.data_ptr(), words.data_ptr() + 8 * words.stride(0)) for words in masks], np.uint64)
