"""What the coding of levels and that of bits share: a binary arithmetic coder, and a model that learns online, in integers, how likely a decision is.

`docs/format.md` specifies all of it to the last shift, under *coding 3, small*.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sterna.codings import U8

I32 = NDArray[np.int32]

RANK: Final = 32
BINS: Final = 32
TOP: Final = 2816  # logits, with 8 fraction bits, are clamped to +-11
MOST: Final = TOP << 12  # the same with 20
_FACTOR: Final = 8191  # factors stay below 2, so that RANK products of two fit 31 bits
PRIOR: Final = 8  # what an offset is worth before it is taught
SLOWEST: Final = 50  # offsets forget what lies further back than this many non-zeros
_KNOTS = (
    32768, 36843, 40793, 44511, 47911, 50941, 53581, 55834, 57724, 59287, 60565, 61598, 62428, 63090, 63615, 64030, 64357, 64614, 64816, 64974,
    65097, 65194, 65269, 65328, 65374, 65410, 65438, 65459, 65476, 65489, 65500, 65508, 65514, 65519, 65523, 65526, 65528, 65530, 65531, 65532,
    65533, 65534, 65534, 65535, 65535,
)  # fmt: skip
"""65536 * logistic(k / 4), rounded, for k = 0 to 44."""


def _logistic() -> I32:
    """65536 * logistic(t / 256) for t = -TOP to TOP: knots 64 apart, straight lines between them, and 1 - logistic(-t) below 0. From 1 to 65535."""
    half = [_KNOTS[t >> 6] + ((_KNOTS[min((t >> 6) + 1, 44)] - _KNOTS[t >> 6]) * (t & 63) >> 6) for t in range(TOP + 1)]
    return np.array([65536 - p for p in half[:0:-1]] + half, np.int32)


LOGISTIC = _logistic()
RATES = np.array([65536 // n for n in range(1, SLOWEST + 1)], np.int32)
RAW: Final = 32768  # one of two, 65536ths


def _first_factors() -> NDArray[np.int16]:
    """Small numbers to begin with, for 64 columns: the upper 10 bits of SplitMix64's outputs from the state 0, less 512."""
    wrap, state, numbers = (1 << 64) - 1, 0, []
    for _ in range(64 * RANK):
        state = state + 0x9E3779B97F4A7C15 & wrap
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & wrap
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & wrap
        numbers.append(((mixed ^ mixed >> 31) >> 54) - 512)
    return np.array(numbers, np.int16).reshape(64, RANK)


FIRST = _first_factors()


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def clamped(value, most):
    return min(max(value, -most), most)


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def probability(logit):
    """Of a logit with 20 fraction bits, in 65536ths."""
    return np.int64(LOGISTIC[clamped(logit >> 12, TOP) + TOP])


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def moved(offset, error, seen):
    """The offset (20 fraction bits) after an error (16), when it has seen so much (16): the mean of what it saw, less and less moved."""
    return clamped(offset + (error * np.int64(RATES[min(PRIOR + (seen >> 16), SLOWEST) - 1]) >> 12), MOST)


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def decide(decoding, bit, p, low, high, word, stream, at, stop):
    """Code one decision that is 1 with probability p / 65536; returns (bit, low, high, word, at).

    low..high are what the 32-bit word may still be. A writer puts the bytes in which they agree, a reader takes 0 beyond `stop`.
    """
    middle = low + ((high - low) * p >> 16)
    if decoding:
        bit = np.int64(word <= middle)
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> 24 == 0:
        if decoding:
            word = (word & 0xFFFFFF) << 8
            if at < stop:
                word |= np.int64(stream[at])
        elif at < stop:
            stream[at] = np.uint8(high >> 24)
        at += 1
        low = (low & 0xFFFFFF) << 8
        high = (high & 0xFFFFFF) << 8 | 255
    return bit, low, high, word, at


@njit(nogil=True, cache=True, boundscheck=False)
def begin(decoding, stream, at, stop):
    """The coder's word and place: a reader begins with four bytes."""
    word = np.int64(0)
    if decoding:
        for _ in range(4):
            word <<= 8
            if at < stop:
                word |= np.int64(stream[at])
            at += 1
    return word, at


@njit(nogil=True, cache=True, boundscheck=False)
def finish(stream, at, stop, low, high):
    """Put as few bytes as name a word in low..high when zeros follow."""
    shift = 32
    while (high >> shift) << shift < low:
        shift -= 8
    value = (high >> shift) << shift
    for k in range((32 - shift) >> 3):
        if at < stop:
            stream[at] = np.uint8(value >> (24 - 8 * k) & 255)
        at += 1
    return at


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def product(u, V, j):
    """z = u . V_j, with 8 fraction bits, clamped to +-8."""
    z = np.int32(0)
    for a in range(RANK):
        z += np.int32(u[a]) * np.int32(V[j, a])
    return clamped(np.int64(z >> np.int32(16)), np.int64(2047))


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def pull(u, V, j, much):
    """u += much * V_j, with 16 fraction bits in `much`."""
    for a in range(RANK):
        u[a] = np.int16(clamped(np.int32(u[a]) + ((np.int32(much) * np.int32(V[j, a]) + np.int32(32768)) >> np.int32(16)), np.int32(_FACTOR)))


def begin_logit(count: int, entries: int) -> int:
    """The largest logit, 20 fraction bits, that expects no more than `count` non-zeros; -MOST where there is none."""
    return (max(int(np.searchsorted(LOGISTIC, (count << 16) // entries, side="right")) - 1, 0) - TOP) << 12


def varint(number: int) -> bytes:
    """LEB128: 7 bits a byte, low first, the top bit set on all but the last."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def read_varint(data: U8, at: int, stop: int) -> tuple[int, int]:
    """(value, next at) of a varint of at most 8 bytes; next at is -1 for one that is longer, or ends early."""
    value = 0
    for shift in range(0, 56, 7):
        if at >= stop:
            break
        byte, at = int(data[at]), at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 0, -1
