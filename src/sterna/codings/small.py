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
from typing import Literal

import numpy as np
from numba import njit

from sterna.codings import I64, U8, Sequential, register
from sterna.codings.learning import (
    BINS,
    FIRST,
    LOGISTIC,
    MOST,
    RANK,
    RAW,
    SLOWEST,
    TOP,
    begin,
    begin_logit,
    clamped,
    decide,
    finish,
    moved,
    probability,
    product,
    pull,
    read_varint,
    varint,
)
from sterna.errors import InvalidFile

FLAT, MATRIX = 0, 1
NONZEROS_A_BYTE = 256
"""A stream has at least a byte for so many non-zeros, so that what their codes take in memory is bounded by its size."""


@njit(nogil=True, cache=True, boundscheck=False)
def _code_flat(decoding, stream, at, stop, codes, entries):
    """Code a tensor by how many non-zeros are still to come. Returns the place after the last byte."""
    word, at = begin(decoding, stream, at, stop)
    low, high = np.int64(0), np.int64(0xFFFFFFFF)
    found = np.int64(0)
    for position in range(entries):
        if found == codes.size:
            break
        p = clamped(((codes.size - found) << 16) // (entries - position), np.int64(65535))
        bit = np.int64(0 if decoding else codes[found] >> 1 == position)
        bit, low, high, word, at = decide(decoding, bit, max(p, 1), low, high, word, stream, at, stop)
        if bit:
            sign = np.int64(0 if decoding else 1 - (codes[found] & 1))
            sign, low, high, word, at = decide(decoding, sign, RAW, low, high, word, stream, at, stop)
            if decoding:
                codes[found] = position << 1 | (1 - sign)
            found += 1
    if found < codes.size:
        return np.int64(-1)
    return np.int64(at) if decoding else np.int64(finish(stream, at, stop, low, high))


@njit(nogil=True, cache=True, boundscheck=False)
def _code_matrix(decoding, stream, at, stop, codes, usual, rows, cols):
    """Code a matrix row by row; `usual` is the logit to begin with. Returns the place after the last byte, -1 where not all of `codes` came."""
    word, at = begin(decoding, stream, at, stop)
    low, high = np.int64(0), np.int64(0xFFFFFFFF)
    V = np.empty((cols, RANK), np.int16)
    for j in range(cols):
        V[j] = FIRST[j & 63]
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
        p = probability(empties[before])
        bit = np.int64(0 if decoding else codes[found] >> 1 < (i + 1) * cols)
        bit, low, high, word, at = decide(decoding, bit, p, low, high, word, stream, at, stop)
        empties[before] = moved(empties[before], (bit << 16) - p, np.int64(0))
        before = (before << 1 | bit) & 3
        if not bit:
            continue
        u[:] = 0
        offset, so_far = usual, np.int64(0)
        n = 0
        start = np.int64(i) * cols
        for j in range(cols):
            z = product(u, V, j)
            size = min(abs(z) >> 6, BINS - 1)
            p = probability(offset + np.int64(offsets[j]) + by_size[size])
            bit = np.int64(0 if decoding else codes[found] >> 1 == start + j)
            bit, low, high, word, at = decide(decoding, bit, p, low, high, word, stream, at, stop)
            error = (bit << 16) - p
            more = p * (65536 - p) >> 16
            offset = moved(offset, error, so_far)
            so_far += more
            offsets[j] = moved(np.int64(offsets[j]), error, np.int64(seen[j]))
            seen[j] = min(np.int64(seen[j]) + more, np.int64(SLOWEST << 16))
            by_size[size] = clamped(by_size[size] + (error * 21 >> 6), MOST)
            if bit:
                p = np.int64(LOGISTIC[clamped(trust * z >> 16, TOP) + TOP])
                sign = np.int64(0 if decoding else 1 - (codes[found] & 1))
                sign, low, high, word, at = decide(decoding, sign, p, low, high, word, stream, at, stop)
                trust += ((sign << 16) - p) * z >> 17
                if decoding:
                    codes[found] = (start + j) << 1 | (1 - sign)
                found += 1
                kept[n], signs[n] = j, sign
                error = (sign << 16) - np.int64(LOGISTIC[z + TOP])
                pull(u, V, j, 1310720 // (50 + n) * error >> 16)
                n += 1
                if found == codes.size:
                    break
        usual += (offset - usual) * 13 >> 8
        rate = 1310720 // (50 + n)
        for _ in range(2):
            for k in range(n):
                j = kept[k]
                error = (np.int64(signs[k]) << 16) - np.int64(LOGISTIC[product(u, V, j) + TOP])
                pull(u, V, j, rate * error >> 16)
        for k in range(n):
            j = kept[k]
            error = (np.int64(signs[k]) << 16) - np.int64(LOGISTIC[product(u, V, j) + TOP])
            pull(V[j], u.reshape(1, RANK), 0, 2621440 // (100 + np.int64(taught[j])) * error >> 16)
            taught[j] += 1
    if found < codes.size:
        return np.int64(-1)
    return np.int64(at) if decoding else np.int64(finish(stream, at, stop, low, high))


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


class _Small:
    name = "small"
    number = 3
    sequential: Literal[True] = True

    def pack(self, codes: I64, shape: tuple[int, ...]) -> bytes:
        entries = math.prod(shape)
        if not codes.size:
            return varint(0)
        rows, cols = _sides(shape)
        matrix = begin_logit(codes.size, entries), max(rows, cols), min(rows, cols)
        flat = partial(_encoded, _code_flat, codes, entries)
        if min(rows, cols) < 2:
            mode, payload = FLAT, flat()
        else:
            mode, payload = MATRIX, _encoded(_code_matrix, _turned(codes, rows, cols) if rows < cols else codes, *matrix)
            if 8 * len(payload) > entries * _entropy(codes.size / entries) and len(other := flat()) < len(payload):
                mode, payload = FLAT, other
        packed = varint(codes.size) + bytes([mode]) + payload
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
            end = _code_matrix(True, payload, 0, payload.size, codes, begin_logit(count, entries), max(rows, cols), min(rows, cols))
        if end < 0 or end > payload.size + 4 or payload[end:].any():
            raise InvalidFile("a small-coded stream does not decode to its count of non-zeros, or not with its bytes: the file is damaged")
        return _turned(codes, cols, rows) if mode == MATRIX and rows < cols else codes

    def _head(self, data: U8, start: int, stop: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Count of non-zeros, mode, and where the payload begins."""
        entries = math.prod(shape)
        count, at = read_varint(data, start, stop)
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
