"""The small coding: an arithmetic coder whose model learns, while it reads a matrix row by row, where non-zeros fall and which sign they have.

A fine-tuning update is close to a matrix of low rank, and its large entries gather in some rows and columns. Each column j has a factor V_j of RANK
numbers and an offset c_j; the row at hand has a factor u and an offset r. With z = u . V_j

    P(entry is not zero) = logistic(r + c_j + a[|z|])        a: an offset for each of the BINS magnitudes of z
    P(sign is +)         = logistic(w z)                      w: how far z is to be trusted

and r, c, a, w take a gradient step at every entry that they predicted, u and V at every non-zero (online logistic matrix factorisation). Nothing
is stored but a count a tensor: a decoder learns what the encoder learnt. Rows run along the shorter side, so that each column is taught often; a
row without non-zeros is one decision. Tensors that are no matrix, and those that the model does not make smaller, are *flat*: the probability is
that of non-zeros left over entries left, and signs are raw.

All state is integers, so that every machine decodes the same: logits have 20 fraction bits, z has 8, factors 12, probabilities and errors 16.
`docs/format.md` specifies it to the last shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sterna.codings import I64, U8, Sequential, register
from sterna.errors import InvalidFile

I32 = NDArray[np.int32]

FLAT, MATRIX = 0, 1
NONZEROS_A_BYTE = 256
"""A stream has at least a byte for so many non-zeros, so that what their codes take in memory is bounded by its size."""

RANK: Final = 32
BINS: Final = 32
_TOP: Final = 2816  # logits, with 8 fraction bits, are clamped to +-11
_MOST: Final = _TOP << 12  # the same with 20
_FACTOR: Final = 8191  # factors stay below 2, so that RANK products of two fit 31 bits
_PRIOR: Final = 8  # what an offset is worth before it is taught
_SLOWEST: Final = 50  # offsets forget what lies further back than this many non-zeros
_KNOTS = (
    32768, 36843, 40793, 44511, 47911, 50941, 53581, 55834, 57724, 59287, 60565, 61598, 62428, 63090, 63615, 64030, 64357, 64614, 64816, 64974,
    65097, 65194, 65269, 65328, 65374, 65410, 65438, 65459, 65476, 65489, 65500, 65508, 65514, 65519, 65523, 65526, 65528, 65530, 65531, 65532,
    65533, 65534, 65534, 65535, 65535,
)  # fmt: skip
"""65536 * logistic(k / 4), rounded, for k = 0 to 44."""


def _logistic() -> I32:
    """65536 * logistic(t / 256) for t = -_TOP to _TOP: knots 64 apart, straight lines between them, and 1 - logistic(-t) below 0. From 1 to 65535."""
    half = [_KNOTS[t >> 6] + ((_KNOTS[min((t >> 6) + 1, 44)] - _KNOTS[t >> 6]) * (t & 63) >> 6) for t in range(_TOP + 1)]
    return np.array([65536 - p for p in half[:0:-1]] + half, np.int32)


_LOGISTIC = _logistic()
_RATES = np.array([65536 // n for n in range(1, _SLOWEST + 1)], np.int32)
_RAW: Final = 32768


def _first_factors() -> NDArray[np.int16]:
    """Small numbers to begin with, for 64 columns: the upper 10 bits of SplitMix64's outputs from the state 0, less 512."""
    wrap, state, numbers = (1 << 64) - 1, 0, []
    for _ in range(64 * RANK):
        state = state + 0x9E3779B97F4A7C15 & wrap
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & wrap
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & wrap
        numbers.append(((mixed ^ mixed >> 31) >> 54) - 512)
    return np.array(numbers, np.int16).reshape(64, RANK)


_FIRST = _first_factors()


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _clamped(value, most):
    return min(max(value, -most), most)


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _probability(logit):
    """Of a logit with 20 fraction bits, in 65536ths."""
    return np.int64(_LOGISTIC[_clamped(logit >> 12, _TOP) + _TOP])


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _taught(offset, error, seen):
    """The offset (20 fraction bits) after an error (16), when it has seen so much (16): the mean of what it saw, less and less moved."""
    return _clamped(offset + (error * np.int64(_RATES[min(_PRIOR + (seen >> 16), _SLOWEST) - 1]) >> 12), _MOST)


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _decide(decoding, bit, p, low, high, word, stream, at, stop):
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
def _begin(decoding, stream, at, stop):
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
def _finish(stream, at, stop, low, high):
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


@njit(nogil=True, cache=True, boundscheck=False)
def _code_flat(decoding, stream, at, stop, codes, entries):
    """Code a tensor by how many non-zeros are still to come. Returns the place after the last byte."""
    word, at = _begin(decoding, stream, at, stop)
    low, high = np.int64(0), np.int64(0xFFFFFFFF)
    found = np.int64(0)
    for position in range(entries):
        if found == codes.size:
            break
        p = _clamped(((codes.size - found) << 16) // (entries - position), np.int64(65535))
        bit = np.int64(0 if decoding else codes[found] >> 1 == position)
        bit, low, high, word, at = _decide(decoding, bit, max(p, 1), low, high, word, stream, at, stop)
        if bit:
            sign = np.int64(0 if decoding else 1 - (codes[found] & 1))
            sign, low, high, word, at = _decide(decoding, sign, _RAW, low, high, word, stream, at, stop)
            if decoding:
                codes[found] = position << 1 | (1 - sign)
            found += 1
    if found < codes.size:
        return np.int64(-1)
    return np.int64(at) if decoding else np.int64(_finish(stream, at, stop, low, high))


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _product(u, V, j):
    """z = u . V_j, with 8 fraction bits, clamped to +-8."""
    z = np.int32(0)
    for a in range(RANK):
        z += np.int32(u[a]) * np.int32(V[j, a])
    return _clamped(np.int64(z >> np.int32(16)), np.int64(2047))


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _pull(u, V, j, much):
    """u += much * V_j, with 16 fraction bits in `much`."""
    for a in range(RANK):
        u[a] = np.int16(_clamped(np.int32(u[a]) + ((np.int32(much) * np.int32(V[j, a]) + np.int32(32768)) >> np.int32(16)), np.int32(_FACTOR)))


@njit(nogil=True, cache=True, boundscheck=False)
def _code_matrix(decoding, stream, at, stop, codes, usual, rows, cols):
    """Code a matrix row by row; `usual` is the logit to begin with. Returns the place after the last byte, -1 where not all of `codes` came."""
    word, at = _begin(decoding, stream, at, stop)
    low, high = np.int64(0), np.int64(0xFFFFFFFF)
    V = np.empty((cols, RANK), np.int16)
    for j in range(cols):
        V[j] = _FIRST[j & 63]
    u = np.empty(RANK, np.int16)
    offsets = np.zeros(cols, np.int32)
    seen = np.zeros(cols, np.int32)
    taught = np.zeros(cols, np.int32)
    by_size = np.zeros(BINS, np.int64)
    empties = np.zeros(4, np.int64)
    kept = np.empty(cols, np.int32)
    signs = np.empty(cols, np.int32)
    trust = np.int64(65536)
    usual = np.int64(usual)
    found = np.int64(0)
    before = 0
    for i in range(rows):
        if found == codes.size:
            break
        p = _probability(empties[before])
        bit = np.int64(0 if decoding else codes[found] >> 1 < (i + 1) * cols)
        bit, low, high, word, at = _decide(decoding, bit, p, low, high, word, stream, at, stop)
        empties[before] = _taught(empties[before], (bit << 16) - p, np.int64(0))
        before = (before << 1 | bit) & 3
        if not bit:
            continue
        u[:] = 0
        offset, so_far = usual, np.int64(0)
        n = 0
        start = np.int64(i) * cols
        for j in range(cols):
            z = _product(u, V, j)
            size = min(abs(z) >> 6, BINS - 1)
            p = _probability(offset + np.int64(offsets[j]) + by_size[size])
            bit = np.int64(0 if decoding else codes[found] >> 1 == start + j)
            bit, low, high, word, at = _decide(decoding, bit, p, low, high, word, stream, at, stop)
            error = (bit << 16) - p
            more = p * (65536 - p) >> 16
            offset = _taught(offset, error, so_far)
            so_far += more
            offsets[j] = _taught(np.int64(offsets[j]), error, np.int64(seen[j]))
            seen[j] = min(np.int64(seen[j]) + more, np.int64(_SLOWEST << 16))
            by_size[size] = _clamped(by_size[size] + (error * 21 >> 6), _MOST)
            if bit:
                p = np.int64(_LOGISTIC[_clamped(trust * z >> 16, _TOP) + _TOP])
                sign = np.int64(0 if decoding else 1 - (codes[found] & 1))
                sign, low, high, word, at = _decide(decoding, sign, p, low, high, word, stream, at, stop)
                trust += ((sign << 16) - p) * z >> 17
                if decoding:
                    codes[found] = (start + j) << 1 | (1 - sign)
                found += 1
                kept[n], signs[n] = j, sign
                error = (sign << 16) - np.int64(_LOGISTIC[z + _TOP])
                _pull(u, V, j, 1310720 // (50 + n) * error >> 16)
                n += 1
                if found == codes.size:
                    break
        usual += (offset - usual) * 13 >> 8
        rate = 1310720 // (50 + n)
        for _ in range(2):
            for k in range(n):
                j = kept[k]
                error = (np.int64(signs[k]) << 16) - np.int64(_LOGISTIC[_product(u, V, j) + _TOP])
                _pull(u, V, j, rate * error >> 16)
        for k in range(n):
            j = kept[k]
            error = (np.int64(signs[k]) << 16) - np.int64(_LOGISTIC[_product(u, V, j) + _TOP])
            _pull(V[j], u.reshape(1, RANK), 0, 2621440 // (100 + np.int64(taught[j])) * error >> 16)
            taught[j] += 1
    if found < codes.size:
        return np.int64(-1)
    return np.int64(at) if decoding else np.int64(_finish(stream, at, stop, low, high))


def _begin_logit(count: int, entries: int) -> int:
    """The largest logit, 20 fraction bits, that expects no more than `count` non-zeros; -_MOST where there is none."""
    return (max(int(np.searchsorted(_LOGISTIC, (count << 16) // entries, side="right")) - 1, 0) - _TOP) << 12


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The first axis and the product of the others; (1, entries) for what is no matrix."""
    entries = math.prod(shape)
    return (shape[0], entries // shape[0]) if len(shape) > 1 and entries else (1, entries)


def _turned(codes: I64, rows: int, cols: int) -> I64:
    """The codes of a matrix [rows, cols] as those of its transpose, ascending."""
    i, j = np.divmod(codes >> 1, cols)
    turned: I64 = (j * rows + i) << 1 | (codes & 1)
    turned.sort()
    return turned


def _entropy(density: float) -> float:
    """i.i.d. entropy in bits an entry, signs included."""
    return density - sum(p * math.log2(p) for p in (density, 1 - density) if p)


def _varint(number: int) -> bytes:
    """LEB128: 7 bits a byte, low first, the top bit set on all but the last."""
    return bytes([number & 127 | 128]) + _varint(number >> 7) if number > 127 else bytes([number])


def _read_varint(data: U8, at: int, stop: int) -> tuple[int, int]:
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


class _Small:
    name = "small"
    number = 3

    def pack(self, codes: I64, shape: tuple[int, ...]) -> bytes:
        entries = math.prod(shape)
        if not codes.size:
            return _varint(0)
        rows, cols = _sides(shape)
        matrix = _begin_logit(codes.size, entries), max(rows, cols), min(rows, cols)
        flat = partial(_encoded, _code_flat, codes, entries)
        if min(rows, cols) < 2:
            mode, payload = FLAT, flat()
        else:
            mode, payload = MATRIX, _encoded(_code_matrix, _turned(codes, rows, cols) if rows < cols else codes, *matrix)
            if 8 * len(payload) > entries * _entropy(codes.size / entries) and len(other := flat()) < len(payload):
                mode, payload = FLAT, other
        packed = _varint(codes.size) + bytes([mode]) + payload
        return packed + bytes(max(-(-codes.size // NONZEROS_A_BYTE) - len(packed), 0))

    def count(self, data: U8, start: int, stop: int, shape: tuple[int, ...]) -> int:
        return self._head(data, start, stop, shape)[0]

    def unpack(self, data: U8, start: int, stop: int, shape: tuple[int, ...]) -> I64:
        count, mode, at = self._head(data, start, stop, shape)
        codes = np.empty(count, np.int64)
        if not count:
            return codes
        entries = math.prod(shape)
        rows, cols = _sides(shape)
        payload = data[at:stop].copy()  # a file's own bytes may be read-only, which would be another type to compile for
        if mode == FLAT:
            end = _code_flat(True, payload, 0, payload.size, codes, entries)
        else:
            end = _code_matrix(True, payload, 0, payload.size, codes, _begin_logit(count, entries), max(rows, cols), min(rows, cols))
        if end < 0 or end > payload.size + 4 or payload[end:].any():
            raise InvalidFile("a small-coded stream does not decode to its count of non-zeros, or not with its bytes: the file is damaged")
        return _turned(codes, cols, rows) if mode == MATRIX and rows < cols else codes

    def _head(self, data: U8, start: int, stop: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Count of non-zeros, mode, and where the payload begins."""
        entries = math.prod(shape)
        count, at = _read_varint(data, start, stop)
        if at < 0 or count > entries or count > NONZEROS_A_BYTE * (stop - start) or (count == 0 and at != stop) or (count and at >= stop):
            raise InvalidFile("a small-coded stream has a count of non-zeros that does not fit its tensor or its bytes")
        mode = int(data[at]) if count else FLAT
        if mode > MATRIX or (mode == MATRIX and min(_sides(shape)) < 2):
            raise InvalidFile(f"a small-coded stream has the mode {mode}, which its tensor cannot have")
        return count, mode, at + 1


def _encoded(code: Callable[..., int], codes: I64, *numbers: int) -> bytes:
    """The payload, in room that is made larger where it does not suffice."""
    room = 1024 + codes.size
    while True:
        out = np.empty(room, np.uint8)
        end = code(False, out, 0, room, codes, *numbers)
        if end <= room:
            return out[:end].tobytes()
        room = end + 16


SMALL: Sequential = register(_Small())
