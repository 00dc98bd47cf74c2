"""The coding of bits: a tuned tensor as its base's bit patterns and what was added to them, in units in the last place.

The ordered view of a float's pattern counts all patterns from the most negative NaN to the most positive one, so the next float is the next number.
An entry of the tuned tensor is the base's number plus a difference, and the differences are coded one after another by the model of the small coding,
which learns while it reads a matrix row by row: an offset r for the row, c_j for the column, factors u and V_j, z = u . V_j. Beside them stand
offsets by *class*, the base entry's bits below its sign: in bfloat16 and float32 its exponent, which says what one unit in the last place is worth.

    P(entry changed)         = logistic(r + c_j + k[class] + a[|z|])        a only where a fourth of the entries changed, or more
    P(difference is > 0)     = logistic(w z)
    P(its bit length is > b) = logistic(l[class, b] + (r - r_0 + c_j + b[|z|]))

The last is asked from the class's mean length upwards, or downwards with the parenthesis subtracted. Then two bits of the magnitude under its first
are coded by length, and the rest lies raw in a plane of its own. What makes a change likely makes it large too: r and c_j learn from both.

A tensor is cut into *bands* of whole rows, some BAND entries, that decode alone. Positions and differences mean nothing without the base:
`decode` turns the base's patterns into the tuned ones in place. `docs/format.md` specifies it to the last shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sterna.codings import U8
from sterna.codings.learning import (
    BINS,
    FIRST,
    LOGISTIC,
    MOST,
    RANK,
    RATES,
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

NUMBER = 1
"""Of this coding, in the file's table."""
BAND = 1 << 22
"""Entries of a band, about: what one thread works on, and what is learnt anew."""
ENTRIES_A_BYTE, CHANGES_A_BYTE = 16384, 256
"""Entries in rows that changed, and changes, of a band for each of its bytes at most: so that what it costs to decode is bounded by its size."""
WIDEST = 1 << 18
"""Columns of a matrix at most, each with factors of its own; a wider one is read as vectors are: a band is one row, without factors."""

Words = NDArray[np.uint16] | NDArray[np.uint32]
"""Bit patterns of floats of 16 or 32 bits."""

_CLASSES: Final = 256
_LENGTHS: Final = 32
_ALL: Final = np.int64(SLOWEST << 16)
_SEVERAL: Final = 2  # bits under the first that are coded


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _soon(offset, error, seen):
    """As `moved`, of an offset that is worth little before it is taught."""
    return clamped(offset + (error * np.int64(RATES[min(1 + (seen >> 16), SLOWEST) - 1]) >> 12), MOST)


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _nudged(offset, error):
    return clamped(offset + (error * 21 >> 6), MOST)


@njit(nogil=True, cache=True, boundscheck=False)
def _code(decoding, stream, plane, base, tuned, count, usual, cols, matrix, limit):
    """Code a band of whole rows of `cols` entries, `count` of which changed; returns the bytes of `stream` and of `plane`.

    A reader takes the base's patterns for the tuned ones in place (`base` and `tuned` may be one array), and returns -1 for the first where the
    changes did not all come, one left the range, bits are left over, or the rows that changed have more than `limit` entries.
    """
    width = np.int64(8 * base.itemsize)
    sign_bit, full = np.int64(1) << (width - 1), (np.int64(1) << width) - 1
    bad = np.int64(-1), np.int64(0)
    rows = base.size // cols
    stop, plane_stop = np.int64(stream.size), np.int64(plane.size)
    word, at = begin(decoding, stream, np.int64(0), stop)
    low, high = np.int64(0), np.int64(0xFFFFFFFF)
    held, bits, plane_at = np.uint64(0), np.int64(0), np.int64(0)
    columns = cols if matrix else 1
    V = np.empty((columns, RANK), np.int16)
    for j in range(columns):
        V[j] = FIRST[j & 63]
    u = np.zeros(RANK, np.int16)
    offsets = np.zeros(columns, np.int32)
    seen = np.zeros(columns, np.int32)
    taught = np.zeros(columns, np.int32)
    kept = np.empty(columns, np.int32)
    signs = np.empty(columns, np.int32)
    by_class = np.zeros((_CLASSES, 2), np.int64)  # offset, and what it has seen; so below
    by_size = np.zeros(BINS, np.int64)
    longer = np.zeros(BINS, np.int64)
    lengths = np.zeros((3, _CLASSES, _LENGTHS, 2), np.int32)  # 0: at least the mean, 1: upwards, 2: downwards
    means = np.zeros((_CLASSES, 2), np.int64)  # mean bit length, 16 fraction bits, and how often
    leading = np.zeros((_LENGTHS, 1 << _SEVERAL, 2), np.int64)
    empties = np.zeros(4, np.int64)
    usual = np.int64(usual)
    trust = np.int64(65536)
    dense = matrix and 4 * count >= base.size
    found, work, before = np.int64(0), np.int64(0), 0
    for i in range(rows):
        if found == count:
            break
        start = np.int64(i) * cols
        bit = np.int64(0)
        if not decoding:
            for j in range(cols):
                bit |= np.int64(base[start + j] != tuned[start + j])
        p = probability(empties[before])
        bit, low, high, word, at = decide(decoding, bit, p, low, high, word, stream, at, stop)
        empties[before] = moved(empties[before], (bit << 16) - p, np.int64(0))
        before = (before << 1 | bit) & 3
        if not bit:
            continue
        work += cols
        if decoding and work > limit:
            return bad
        u[:] = 0
        offset, so_far = usual, np.int64(0)
        n = 0
        for j in range(cols):
            old = np.int64(base[start + j])
            kind = (old & (sign_bit - 1)) >> (width - 9)
            k = j if matrix else 0
            z, size = np.int64(0), np.int64(0)
            if dense:
                z = product(u, V, k)
                size = min(abs(z) >> 6, np.int64(BINS - 1))
            p = probability(offset + np.int64(offsets[k]) + by_class[kind, 0] + by_size[size])
            bit = np.int64(0 if decoding else base[start + j] != tuned[start + j])
            bit, low, high, word, at = decide(decoding, bit, p, low, high, word, stream, at, stop)
            error, more = (bit << 16) - p, p * (65536 - p) >> 16
            offset = moved(offset, error, so_far)
            so_far += more
            offsets[k] = moved(np.int64(offsets[k]), error, np.int64(seen[k]))
            seen[k] = min(np.int64(seen[k]) + more, _ALL)
            by_class[kind, 0] = _soon(by_class[kind, 0], error, by_class[kind, 1])
            by_class[kind, 1] += more
            if dense:
                by_size[size] = _nudged(by_size[size], error)
            if not bit:
                continue
            ordered = full - old if old & sign_bit else old + sign_bit
            change = np.int64(0)
            if not decoding:
                new = np.int64(tuned[start + j])
                change = (full - new if new & sign_bit else new + sign_bit) - ordered
            # Its sign.
            if matrix and not dense:
                z = product(u, V, k)
                size = min(abs(z) >> 6, np.int64(BINS - 1))
            p = np.int64(LOGISTIC[clamped(trust * z >> 16, TOP) + TOP])
            sign = np.int64(change > 0)
            sign, low, high, word, at = decide(decoding, sign, p, low, high, word, stream, at, stop)
            if matrix:
                trust += ((sign << 16) - p) * z >> 17
                kept[n], signs[n] = j, sign
                error = (sign << 16) - np.int64(LOGISTIC[z + TOP])
                pull(u, V, j, 1310720 // (50 + n) * error >> 16)
                n += 1
            # How many bits follow its magnitude's first.
            magnitude, length = abs(change), np.int64(0)
            for b in (16, 8, 4, 2, 1):
                length += b if magnitude >> (length + b) else 0
            b = (means[kind, 0] + 32768) >> 16
            phase = 0 if b else 1
            while not (phase == 1 and b == width - 1) and not (phase == 2 and b == 0):
                scale = offset - usual + np.int64(offsets[k]) + longer[size]
                p = probability(np.int64(lengths[phase, kind, b, 0]) + (-scale if phase == 2 else scale))
                bit = np.int64(length >= b if phase == 0 else length > b if phase == 1 else length < b)
                bit, low, high, word, at = decide(decoding, bit, p, low, high, word, stream, at, stop)
                error, more = (bit << 16) - p, p * (65536 - p) >> 16
                lengths[phase, kind, b, 0] = _soon(np.int64(lengths[phase, kind, b, 0]), error, np.int64(lengths[phase, kind, b, 1]))
                lengths[phase, kind, b, 1] = min(np.int64(lengths[phase, kind, b, 1]) + more, _ALL)
                if phase == 2:
                    error = -error
                longer[size] = _nudged(longer[size], error)
                offset = moved(offset, error, so_far)
                so_far += more
                offsets[k] = moved(np.int64(offsets[k]), error, np.int64(seen[k]))
                seen[k] = min(np.int64(seen[k]) + more, _ALL)
                if phase == 0:
                    phase = 1 if bit else 2
                    b -= 1 - bit
                elif not bit:
                    break
                else:
                    b += 1 if phase == 1 else -1
            length = b
            means[kind, 0] += ((length << 16) - means[kind, 0]) * np.int64(RATES[means[kind, 1]]) >> 16
            means[kind, 1] = min(means[kind, 1] + 1, SLOWEST - 1)
            # Those bits.
            value, left = np.int64(1), length
            while left > 0 and left > length - _SEVERAL:
                left -= 1
                p = probability(leading[length, value, 0])
                bit = magnitude >> left & 1
                bit, low, high, word, at = decide(decoding, bit, p, low, high, word, stream, at, stop)
                leading[length, value, 0] = _soon(leading[length, value, 0], (bit << 16) - p, leading[length, value, 1])
                leading[length, value, 1] += p * (65536 - p) >> 16
                value = value << 1 | bit
            if left > 0:
                mask = (np.uint64(1) << np.uint64(left)) - np.uint64(1)
                if not decoding:
                    held |= (np.uint64(magnitude) & mask) << np.uint64(bits)
                    bits += left
                while bits >= 8 if not decoding else bits < left:
                    if not decoding:
                        if plane_at < plane_stop:
                            plane[plane_at] = np.uint8(held & np.uint64(255))
                        held >>= np.uint64(8)
                        bits -= 8
                    else:
                        if plane_at < plane_stop:
                            held |= np.uint64(plane[plane_at]) << np.uint64(bits)
                        bits += 8
                    plane_at += 1
                if decoding:
                    value = value << left | np.int64(held & mask)
                    held >>= np.uint64(left)
                    bits -= left
            if decoding:
                new = ordered + value if sign else ordered - value
                if new < 0 or new > full:
                    return bad
                tuned[start + j] = full - new if new < sign_bit else new - sign_bit
            found += 1
            if found == count:
                break
        usual += (offset - usual) * 13 >> 8
        for m in range(n):
            j = kept[m]
            error = (np.int64(signs[m]) << 16) - np.int64(LOGISTIC[product(u, V, j) + TOP])
            pull(V[j], u.reshape(1, RANK), 0, 2621440 // (100 + np.int64(taught[j])) * error >> 16)
            taught[j] += 1
    if found < count or (decoding and held):  # bits left over are 0
        return bad
    if not decoding:
        if bits > 0:
            if plane_at < plane_stop:
                plane[plane_at] = np.uint8(held & np.uint64(255))
            plane_at += 1
        at = finish(stream, at, stop, low, high)
    return np.int64(at), np.int64(plane_at)


@dataclass(frozen=True, slots=True)
class Band:
    """Flat entries start..stop-1 of a tensor, `count` of which changed, and the places of its raw bits and of its code among the file's bytes."""

    start: int
    stop: int
    count: int
    plane: tuple[int, int]
    code: tuple[int, int]


def extents(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First entry, and the one after the last, of each band of a tensor."""
    entries, cols = math.prod(shape), _columns(shape)
    step = max(BAND // cols, 1) * cols if cols else BAND
    for start in range(0, entries, step):
        yield start, min(start + step, entries)


def encode(base: Words, tuned: Words, shape: tuple[int, ...]) -> bytes:
    """The record of one band of a tensor of that shape: the base's and the tuned one's patterns, flat, of one dtype."""
    changed = base != tuned
    count = int(np.count_nonzero(changed))
    if not count:
        return varint(0)
    cols = _columns(shape) or base.size
    setting = count, begin_logit(count, base.size), cols, bool(_columns(shape))
    room, plane_room = 1024 + base.size // 2 + 4 * count, 16 + 4 * count
    while True:
        code, plane = np.empty(room, np.uint8), np.empty(plane_room, np.uint8)
        at, plane_at = _code(False, code, plane, base, tuned, *setting, 0)
        if at <= room and plane_at <= plane_room:
            break
        room, plane_room = at + 16, plane_at + 16
    entries = cols * int(np.count_nonzero(changed.reshape(-1, cols).any(axis=1)))
    justified = max(-(-entries // ENTRIES_A_BYTE), -(-count // CHANGES_A_BYTE))
    padding = bytes(max(justified - int(at + plane_at), 0))
    return varint(count) + varint(plane_at) + varint(at + len(padding)) + plane[:plane_at].tobytes() + code[:at].tobytes() + padding


def bands(data: U8, start: int, stop: int, shape: tuple[int, ...]) -> list[Band]:
    """The bands of the stream data[start:stop], one for each of `extents`.

    Raises InvalidFile unless they fill the stream, with counts that fit; memory stays in proportion to the stream's bytes.
    """
    found: list[Band] = []
    at = start
    for first, last in extents(shape):
        count, at = read_varint(data, at, stop)
        plane = code = 0
        if count and at >= 0:
            plane, at = read_varint(data, at, stop)
            code, at = read_varint(data, at, stop) if at >= 0 else (0, -1)
        size = plane + code
        if at < 0 or size > stop - at or count > min(last - first, CHANGES_A_BYTE * size):
            raise InvalidFile("a lossless stream has counts that do not fit its tensor or its bytes: the file is damaged")
        found.append(Band(first, last, count, (at, at + plane), (at + plane, at + size)))
        at += size
    if at != stop:
        raise InvalidFile(f"a lossless stream has {stop - at} bytes left over: the file is damaged")
    return found


def decode(data: U8, band: Band, words: Words, shape: tuple[int, ...]) -> None:
    """Turn the base's patterns of a band, flat in `words`, into the tuned ones. Raises InvalidFile where it does not decode."""
    if not band.count:
        return
    code, plane = data[slice(*band.code)].copy(), data[slice(*band.plane)].copy()  # a file's bytes may be read-only: another type to compile for
    cols = _columns(shape)
    setting = band.count, begin_logit(band.count, words.size), cols or words.size, bool(cols)
    limit = ENTRIES_A_BYTE * (code.size + plane.size)
    at, plane_at = (-1, 0) if cols > limit else _code(True, code, plane, words, words, *setting, limit)
    if at < 0 or at > code.size + 4 or code[at:].any() or plane_at != plane.size:
        raise InvalidFile("a lossless stream does not decode to its count of changes, or not with its bytes: the file is damaged")


def _columns(shape: tuple[int, ...]) -> int:
    """Columns of a matrix: what lies under the first axis; 0 for what is read as vectors are."""
    entries = math.prod(shape)
    cols = entries // shape[0] if len(shape) > 1 and entries else 0
    return cols if shape and shape[0] > 1 and 1 < cols <= WIDEST else 0
