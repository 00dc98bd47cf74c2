"""Gap coding with Rice and Golomb parameters chosen block by block, laid out in planes so that decoding has no serial bit pointer.

A block holds n non-zeros among its entries. With g the number of zeros before a non-zero (since the one before it, or the block's start), and a
divisor M = 2^b or 3 * 2^b, the bits of a block are five planes one after another, least significant bit first:

    signs     n bits          1 for a negative level
    low       n * b bits      g mod 2^b
    third     n bits          M = 3 * 2^b only: whether d = (g >> b) mod 3 is not 0
    which     (set thirds)    M = 3 * 2^b only: for each of those, whether d is 2
    quotient  the rest        floor(g / M) zeros and a one, for each non-zero

That is the length of Golomb's code of the gaps (Golomb 1966, Rice 1979) with a raw sign, in another order: every plane but the last two has a
fixed width, and the last is read 56 bits at a time. `docs/format.md` specifies the index.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sterna.codings import CHUNK, U8, U32, Blocks, Coding, register
from sterna.errors import InvalidFile
from sterna.numbers.machine import load64, trailing_zeros

FULL = 255  # parameter of a block without zeros: no positions are stored, signs only
_MAX_PARAMETER = 2 * 20 + 1  # b <= 20: a block is no longer than a chunk
_U = np.uint64


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
def _best_parameter(gaps, n, zeros):
    """The cheapest parameter near M = ln 2 * mean gap, walking while the cost falls."""
    wanted = 0.6931 * zeros / n
    rank = 0  # M = 1, 2, 3, 4, 6, 8, 12, ...: rank r >= 1 has b = (r - 1) // 2 + 1 or tripled b = r // 2 - 1
    while rank < 2 * 19 and _divisor(rank + 1) <= wanted:
        rank += 1
    best = _cost(gaps, n, _parameter_of(rank))
    step = 1
    if rank < 2 * 19:
        other = _cost(gaps, n, _parameter_of(rank + 1))
        if other < best:
            rank += 1
            best = other
        else:
            step = -1
    while 0 <= rank + step <= 2 * 19:
        other = _cost(gaps, n, _parameter_of(rank + step))
        if other >= best:
            break
        best = other
        rank += step
    return _parameter_of(rank), best


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _parameter_of(rank):
    if rank == 0:
        return 0
    if rank & 1:
        return 2 * ((rank + 1) >> 1)
    return 2 * ((rank >> 1) - 1) + 1


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _divisor(rank):
    parameter = _parameter_of(rank)
    return (3 if parameter & 1 else 1) << (parameter >> 1)


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
    parameter, _ = _best_parameter(gaps, n, size - n)
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

    Returns the number of blocks, -1 for an index that breaks a rule of the format.
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
            length = 0
            parameter = 0
            if count:
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


@njit(nogil=True, cache=True, boundscheck=False)
def _decode_block(data, offset, length, n, parameter, size, codes, out):
    """Codes of one block at codes[out:out+n]; False where the block's bits end early or a position leaves the block."""
    start = _U(offset) << _U(3)
    end = start + (_U(length) << _U(3))
    total = _U(n)
    out = _U(out)
    i = _U(0)
    if parameter == FULL:
        while i < total:
            at = start + i
            codes[out + i] = np.uint32(i << _U(1) | (load64(data, at >> _U(3)) >> (at & _U(7))) & _U(1))
            i += _U(1)
        return True
    b = _U(parameter >> 1)
    tripled = _U(parameter & 1)
    mask = (_U(1) << b) - _U(1)
    low_at = start + total
    third_at = low_at + total * b
    which_at = third_at + total * tripled
    at = which_at
    if tripled:
        thirds = _U(0)
        for k in range(total):
            bit = third_at + _U(k)
            thirds += (load64(data, bit >> _U(3)) >> (bit & _U(7))) & _U(1)
        at += thirds
    window = (_U(1) << _U(56)) - _U(1)
    base = _U(0)  # quotient bits before this window
    gaps = _U(0)  # sum of the low parts and digits so far, and of the non-zeros themselves
    position = _U(0)
    while i < total:
        if at >= end:
            return False
        word = (load64(data, at >> _U(3)) >> (at & _U(7))) & window
        while word != _U(0):
            bit = base + trailing_zeros(word)
            word &= word - _U(1)
            gaps += (load64(data, low_at >> _U(3)) >> (low_at & _U(7))) & mask
            low_at += b
            quotients = bit - i
            if tripled:
                digit_at = third_at + i
                digit = (load64(data, digit_at >> _U(3)) >> (digit_at & _U(7))) & _U(1)
                which = (load64(data, which_at >> _U(3)) >> (which_at & _U(7))) & digit
                which_at += digit
                gaps += (digit + which) << b
                quotients *= _U(3)
            sign_at = start + i
            sign = (load64(data, sign_at >> _U(3)) >> (sign_at & _U(7))) & _U(1)
            position = (quotients << b) + gaps + i
            codes[out + i] = np.uint32(position << _U(1) | sign)
            i += _U(1)
            if i == total:
                break
        base += _U(56)
        at += _U(56)
    return position < _U(size)


@njit(nogil=True, cache=True, boundscheck=False)
def _decode_blocks(data, size, count, offset, length, parameter, codes):
    """Decode blocks one after another into `codes`; returns the first that does not decode, or -1."""
    out = 0
    for k in range(count.size):
        n = count[k]
        if n:
            if not _decode_block(data, offset[k], length[k], n, parameter[k], size[k], codes, out):
                return k
            out += n
    return -1


def _block_log2(nonzeros: int, entries: int) -> int:
    """The smallest block that holds about a thousand non-zeros: its index record then costs less than a percent of it."""
    wanted = 1024 * entries / max(nonzeros, 1)
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
        bad = _decode_blocks(data, *columns, codes)
        if bad >= 0:
            raise InvalidFile(f"block {first + bad} of a stream does not decode within its bounds: the file is damaged")


RICE: Coding = register(_Rice())
