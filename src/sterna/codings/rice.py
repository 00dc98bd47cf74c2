"""Gap coding with Rice and Golomb parameters chosen block by block, laid out in planes so that decoding has no serial bit pointer.

A block holds n non-zeros among its entries. With g the number of zeros before a non-zero (since the one before it, or the block's start), and a
divisor M = 2^b or 3 * 2^b, the bits of a block are five planes one after another, least significant bit first:

    signs     n bits          1 for a negative level
    low       n * b bits      g mod 2^b
    third     n bits          M = 3 * 2^b only: whether d = (g >> b) mod 3 is not 0
    which     (set thirds)    M = 3 * 2^b only: for each of those, whether d is 2
    quotient  the rest        floor(g / M) zeros and a one, for each non-zero

That is the length of Golomb's code of the gaps (Golomb 1966, Rice 1979) with a raw sign, in another order: every plane but the last two has a
fixed width and is read eight fields at a time, and the last gives its ones one by one. `docs/format.md` specifies the index.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sterna.codings import CHUNK, U8, U32, Blocks, Coding, register
from sterna.errors import InvalidFile
from sterna.numbers.machine import load64, place8, place8_tripled, population, trailing_zeros

FULL = 255  # parameter of a block without zeros: no positions are stored, signs only
_MAX_PARAMETER = 2 * 20 + 1  # b <= 20: a block is no longer than a chunk
_U = np.uint64
_EIGHT = _U(8)
_WIDEST = _U(7)  # b up to which eight low parts, wherever they begin, lie in one load
_FARTHEST = _U(1 << 22)  # quotient bits from which on no block reaches


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _put(out, state, fill, at, value, width):
    """Append `width` <= 32 bits to the bit writer (state, fill, at); returns its new state."""
    state |= value << fill
    fill += width
    while fill >= _U(8):
        out[at] = np.uint8(state & _U(255))
        at += 1
        state >>= _U(8)
        fill -= _U(8)
    return state, fill, at


@njit(nogil=True, cache=True, boundscheck=False)
def _cost(gaps, n, parameter):
    """Bits of the low, third, which and quotient planes under parameter 2 * b + tripled."""
    b = np.uint32(parameter >> 1)
    bits = np.int64(n) * (np.int64(b) + 1)
    if parameter & 1 == 0:
        for i in range(n):
            bits += np.int64(gaps[i] >> b)
        return bits
    bits += np.int64(n)
    for i in range(n):
        high = gaps[i] >> b
        quotient = high // np.uint32(3)
        bits += np.int64(quotient) + np.int64(high != quotient * np.uint32(3))
    return bits


@njit(nogil=True, cache=True, boundscheck=False)
def _cheapest(gaps, n, parameter):
    """Walk from `parameter` by steps of 2 (b by one) while the cost falls; returns (parameter, bits)."""
    best = _cost(gaps, n, parameter)
    for step in (2, -2):
        while 0 <= parameter + step <= _MAX_PARAMETER:
            cost = _cost(gaps, n, parameter + step)
            if cost >= best:
                break
            best = cost
            parameter += step
    return parameter, best


@njit(nogil=True, cache=True, boundscheck=False)
def _best_parameter(gaps, n, zeros):
    """The cheapest parameter near M = ln 2 * mean gap; M = 3 * 2^b only where it saves a hundredth, for it decodes more slowly."""
    b = 0
    while b < 20 and (2 << b) <= 0.6931 * zeros / n:
        b += 1
    power, bits = _cheapest(gaps, n, 2 * b)
    tripled, fewer = _cheapest(gaps, n, max(power - 2, 0) + 1)
    return tripled if fewer + fewer // 100 < bits else power


@njit(nogil=True, cache=True, boundscheck=False)
def _encode_block(codes, first, n, origin, size, gaps, out, at):
    """Write codes[first:first+n], positions counted from `origin`, as one block at out[at]; returns (parameter, next at)."""
    state = _U(0)
    fill = _U(0)
    for i in range(first, first + n):
        state, fill, at = _put(out, state, fill, at, _U(codes[i] & np.uint32(1)), _U(1))
    if n == size:
        if fill > _U(0):
            out[at] = np.uint8(state)
            at += 1
        return FULL, at
    expected = np.uint32(origin)
    for i in range(n):
        position = codes[first + i] >> np.uint32(1)
        gaps[i] = position - expected
        expected = position + np.uint32(1)
    parameter = _best_parameter(gaps, n, size - n)
    b = np.uint32(parameter >> 1)
    mask = (np.uint32(1) << b) - np.uint32(1)
    if b:
        for i in range(n):
            state, fill, at = _put(out, state, fill, at, _U(gaps[i] & mask), _U(b))
    if parameter & 1:
        for i in range(n):
            third = _U((gaps[i] >> b) % np.uint32(3) != np.uint32(0))
            state, fill, at = _put(out, state, fill, at, third, _U(1))
        for i in range(n):
            digit = (gaps[i] >> b) % np.uint32(3)
            if digit != np.uint32(0):
                state, fill, at = _put(out, state, fill, at, _U(digit == np.uint32(2)), _U(1))
    for i in range(n):
        quotient = gaps[i] >> b
        if parameter & 1:
            quotient //= np.uint32(3)
        while quotient >= np.uint32(32):
            state, fill, at = _put(out, state, fill, at, _U(0), _U(32))
            quotient -= np.uint32(32)
        state, fill, at = _put(out, state, fill, at, _U(1) << _U(quotient), _U(quotient) + _U(1))
    if fill > _U(0):
        out[at] = np.uint8(state)
        at += 1
    return parameter, at


@njit(nogil=True, cache=True, boundscheck=False)
def _put_varint(out, at, value):
    """LEB128: 7 bits a byte, low first, the top bit set on all but the last."""
    while value >= 128:
        out[at] = np.uint8((value & 127) | 128)
        value >>= 7
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@njit(nogil=True, cache=True, boundscheck=False)
def _encode_chunk(codes, entries, log2, gaps, out, index):
    """Code a chunk in blocks of 2^log2 entries; returns (payload bytes, index bytes)."""
    index[0] = log2
    at = 0
    index_at = 1
    first = 0
    total = codes.size
    for origin in range(0, entries, 1 << log2):
        size = min(1 << log2, entries - origin)
        last = first
        end = np.uint32(origin + size)
        while last < total and codes[last] >> np.uint32(1) < end:
            last += 1
        n = last - first
        index_at = _put_varint(index, index_at, n)
        if n:
            before = at
            parameter, at = _encode_block(codes, first, n, origin, size, gaps, out, at)
            index[index_at] = parameter
            index_at = _put_varint(index, index_at + 1, at - before)
        first = last
    return at, index_at


@njit(nogil=True, cache=True, boundscheck=False)
def _get_varint(data, at, stop):
    """(value, next at); next at is -1 for a varint that runs past `stop` or past 35 bits."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= stop:
            return 0, -1
        byte = int(data[at])
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 0, -1


@njit(nogil=True, cache=True, boundscheck=False)
def _read_index(data, at, stop, entries, columns):
    """Walk the records of a stream and fill the int64 columns (start, size, count, offset, length, parameter) as far as there are any.

    Returns the number of blocks that hold non-zeros, -1 for an index that breaks a rule of the format.
    """
    rows = 0
    for chunk in range(0, entries, CHUNK):
        if at >= stop:
            return -1
        log2 = int(data[at])
        at += 1
        if log2 > 20:
            return -1
        chunk_end = min(chunk + CHUNK, entries)
        first = rows
        payload = 0
        for start in range(chunk, chunk_end, 1 << log2):
            size = min(1 << log2, chunk_end - start)
            count, at = _get_varint(data, at, stop)
            if at < 0 or count > size:
                return -1
            if count == 0:
                continue
            if at >= stop:
                return -1
            parameter = int(data[at])
            length, at = _get_varint(data, at + 1, stop)
            if at < 0 or length > stop:
                return -1
            if parameter == FULL:
                if count != size or length != (count + 7) >> 3:
                    return -1
            elif parameter > _MAX_PARAMETER or count * (2 + (parameter >> 1) + (parameter & 1)) > 8 * length:
                return -1
            if rows < columns.shape[1]:
                columns[0, rows] = start
                columns[1, rows] = size
                columns[2, rows] = count
                columns[3, rows] = payload
                columns[4, rows] = length
                columns[5, rows] = parameter
            rows += 1
            payload += length
        for row in range(first, min(rows, columns.shape[1])):
            columns[3, row] += at
        at += payload
        if at > stop:
            return -1
    return rows if at == stop else -1


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _bits(data, at):
    """The 57 bits and more of `data` from bit `at` on, the first lowest."""
    return load64(data, at >> _U(3)) >> (at & _U(7))


@njit(nogil=True, cache=True, boundscheck=False)
def _decode_full(data, start, n, codes, out):
    """Codes of a block without zeros: signs alone."""
    for i in range(n):
        codes[out + i] = np.uint32(i << _U(1) | _bits(data, start + i) & _U(1))
    return True


@njit(nogil=True, cache=True, boundscheck=False)
def _quotients(data, start, end, n, highs):
    """Sums of the quotients up to each of n non-zeros, from the plane at bit `start`; False where there are fewer ones before the byte of `end`.

    That is the number of a one's bit less those before it. Up to 7 entries after highs[n - 1] are written too.
    """
    at = start >> _U(3)
    stop = (end + _U(7)) >> _U(3)
    word = load64(data, at) >> (start & _U(7)) << (start & _U(7))
    base = _U(0) - (start & _U(7))
    i = _U(0)
    while True:
        many = min(population(word), n - i)
        zeros = base - i
        for first in range(i, i + many, _EIGHT):
            for j in range(first, first + _EIGHT):  # some too many cost less than a branch that nobody can foresee
                highs[j] = np.uint32(zeros + trailing_zeros(word))
                word &= word - _U(1)
                zeros -= _U(1)
        i += many
        if i >= n:
            return True
        base += _U(64)
        at += _U(8)
        if at >= stop or base > _FARTHEST:
            return False
        word = load64(data, at)


@njit(nogil=True, cache=True, boundscheck=False)
def _decode_power(data, start, end, n, b, size, codes, out, highs):
    """Codes of a block with M = 2^b at codes[out:out+n]; False where its planes do not end in its last byte or a position leaves the block."""
    mask = (_U(1) << b) - _U(1)
    low_at = start + n
    quotient_at = low_at + n * b
    if not _quotients(data, quotient_at, end, n, highs):
        return False
    gaps = _U(0)  # sum of the low parts so far
    i = _U(0)
    if b <= _WIDEST:
        while i + _EIGHT <= n:
            gaps += place8(codes, out + i, highs, i, gaps + i, _bits(data, start + i), _bits(data, low_at), b, mask)
            low_at += _EIGHT * b
            i += _EIGHT
    while i < n:
        gaps += _bits(data, low_at) & mask
        low_at += b
        codes[out + i] = np.uint32(((_U(highs[i]) << b) + gaps + i) << _U(1) | _bits(data, start + i) & _U(1))
        i += _U(1)
    high = _U(highs[n - _U(1)])
    position = (high << b) + gaps + n - _U(1)  # the largest: all others are in the block where this one is
    return end - quotient_at - high - n < _U(8) and position < size  # a last bit beyond the end wraps to a large number


@njit(nogil=True, cache=True, boundscheck=False)
def _decode_tripled(data, start, end, n, b, size, codes, out, highs):
    """The same for M = 3 * 2^b."""
    mask = (_U(1) << b) - _U(1)
    low_at = start + n
    third_at = low_at + n * b
    which_at = third_at + n
    quotient_at = which_at
    for k in range(_U(0), n, _U(56)):
        quotient_at += population(_bits(data, third_at + k) & ((_U(1) << min(_U(56), n - k)) - _U(1)))
    if not _quotients(data, quotient_at, end, n, highs):
        return False
    gaps = _U(0)
    i = _U(0)
    if b <= _WIDEST:
        while i + _EIGHT <= n:
            thirds = _bits(data, third_at + i) & _U(255)
            lows = _bits(data, low_at)
            gaps += place8_tripled(codes, out + i, highs, i, gaps + i, _bits(data, start + i), lows, b, mask, thirds, _bits(data, which_at))
            low_at += _EIGHT * b
            which_at += population(thirds)
            i += _EIGHT
    while i < n:
        third = _bits(data, third_at + i) & _U(1)
        gaps += (_bits(data, low_at) & mask) + ((third + (_bits(data, which_at) & third)) << b)
        low_at += b
        which_at += third
        codes[out + i] = np.uint32(((_U(3) * _U(highs[i]) << b) + gaps + i) << _U(1) | _bits(data, start + i) & _U(1))
        i += _U(1)
    high = _U(highs[n - _U(1)])
    position = (_U(3) * high << b) + gaps + n - _U(1)
    return end - quotient_at - high - n < _U(8) and position < size


@njit(nogil=True, cache=True, boundscheck=False)
def _decode_blocks(data, size, count, offset, length, parameter, codes, highs):
    """Decode blocks one after another into `codes`; returns the first that does not decode, or -1. `highs`: the largest count and 8 more."""
    out = 0
    for k in range(count.size):
        n = count[k]
        if n:
            start = _U(offset[k]) << _U(3)
            end = start + (_U(length[k]) << _U(3))
            half = _U(parameter[k] >> 1)
            if parameter[k] == FULL:
                good = _decode_full(data, start, _U(n), codes, _U(out))
            elif parameter[k] & 1:
                good = _decode_tripled(data, start, end, _U(n), half, _U(size[k]), codes, _U(out), highs)
            else:
                good = _decode_power(data, start, end, _U(n), half, _U(size[k]), codes, _U(out), highs)
            if not good:
                return k
            out += n
    return -1


def _block_log2(nonzeros: int, entries: int) -> int:
    """The smallest block that holds about two thousand non-zeros: its index record then costs less than a percent of it."""
    wanted = 2048 * entries / max(nonzeros, 1)
    return min(max(math.ceil(math.log2(max(wanted, 1))), 12), 20)


class _Rice:
    name = "rice"
    number = 1

    def encode(self, codes: U32, entries: int) -> bytes:
        log2 = _block_log2(codes.size, entries)
        gaps = np.empty(codes.size, np.uint32)
        out = np.empty(entries // 4 + codes.size + 16, np.uint8)
        index = np.empty(16 + 12 * ((entries >> log2) + 1), np.uint8)
        payload_bytes, index_bytes = _encode_chunk(codes, entries, log2, gaps, out, index)
        return index[:index_bytes].tobytes() + out[:payload_bytes].tobytes()

    def blocks(self, data: U8, start: int, stop: int, entries: int) -> Blocks:
        rows = _read_index(data, start, stop, entries, np.empty((6, 0), np.int64))
        if rows < 0:
            raise InvalidFile("a stream's block index is not well-formed or does not fill the stream")
        columns = np.empty((6, rows), np.int64)
        _read_index(data, start, stop, entries, columns)
        return Blocks(*columns)

    def decode(self, data: U8, blocks: Blocks, first: int, last: int, codes: U32) -> None:
        part = slice(first, last)
        columns = (blocks.size[part], blocks.count[part], blocks.offset[part], blocks.length[part], blocks.parameter[part])
        highs = np.empty(int(blocks.count[part].max(initial=0)) + 8, np.uint32)
        bad = _decode_blocks(data, *columns, codes, highs)
        if bad >= 0:
            raise InvalidFile(f"block {first + bad} of a stream does not decode within its bounds: the file is damaged")


RICE: Coding = register(_Rice())
