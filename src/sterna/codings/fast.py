"""The fast coding: gap coding with Rice and Golomb parameters chosen block by block, in planes that are read eight non-zeros at a time.

A block holds n non-zeros among its entries. With g the number of zeros before a non-zero (since the one before it, or the block's start), and a
divisor M = 2^b or 3 * 2^b, a block is four planes one after another, each of whole bytes, least significant bit first:

    fields    n * (b + 1) bits   (g mod 2^b) << 1 | 1 for a negative level
    third     n bits             M = 3 * 2^b only: whether d = (g >> b) mod 3 is not 0
    which     (set thirds) bits  M = 3 * 2^b only: for each of those, whether d is 2
    quotient  n + zeros bits     floor(g / M) zeros and a one, for each non-zero; no byte at all where all quotients are 0

That is Golomb's code of the gaps (Golomb 1966, Rice 1979) with a raw sign, in another order: a byte of the quotient plane, looked up in a table,
gives up to eight sums of quotients at once, and eight fields, which begin at a byte, become codes in one go. So nothing is read bit by bit and no
branch depends on the data. `docs/format.md` specifies all of it.

`open_block` checks a block's planes and reads its quotients, `place_group` makes eight codes; `live/kernels.py` weaves them into its own loop.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit

from sterna.codings import U8, U32, Blocks, Coding, index, register
from sterna.errors import InvalidFile
from sterna.numbers.machine import fields8, load8, load32, load64, place8, population, spread8, store8, store32, store64

SLACK = 8
"""Items that groups of eight may write beyond a block's non-zeros."""

_MAX_PARAMETER = 2 * 20 + 1  # b <= 20: a block is no longer than a chunk
_MAX_LOWS = 1 << 24  # n << b: the sum of all gaps' lower parts then fits 32 bits, whatever the fields say
_WIDEST = 8  # bits of a field up to which eight of them lie in one load
_SAVING = 128  # M = 3 * 2^b only where it saves one bit in so many: it decodes more slowly
_U = np.uint64
_ONE, _SEVEN, _EIGHT = _U(1), _U(7), _U(8)


def _unary() -> U8:
    """For each byte, the zeros before each of its ones: eight numbers a row."""
    table = np.zeros((256, 8), np.uint8)
    for byte in range(256):
        ones = [bit for bit in range(8) if byte >> bit & 1]
        table[byte, : len(ones)] = [bit - number for number, bit in enumerate(ones)]
    return table.reshape(-1)


def _digits() -> U32:
    """For four bits of the third plane, with the next four of the which plane above them: the four digits, a byte each."""
    table = np.zeros(256, np.uint32)
    for key in range(256):
        which = key >> 4
        for lane in range(4):
            if key >> lane & 1:
                table[key] |= np.uint32((1 + (which & 1)) << 8 * lane)
                which >>= 1
    return table


_UNARY, _DIGITS = _unary(), _digits()


# Reading


@njit(nogil=True, cache=True, boundscheck=False)
def _well_formed(count, length, parameter):
    """Whether each block's planes begin and end inside it, as far as its index tells."""
    for k in range(count.size):
        b = parameter[k] >> 1
        planes = ((count[k] * (b + 1) + 7) >> 3) + (parameter[k] & 1) * ((count[k] + 7) >> 3)
        if parameter[k] > _MAX_PARAMETER or count[k] << b > _MAX_LOWS or planes > length[k]:
            return False
    return True


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _spare(data, at, bits):
    """What is left over of the last byte of a plane of `bits` bits at byte `at`: it must be 0."""
    return load8(data + at + (bits >> _U(3))) >> (bits & _SEVEN) if bits & _SEVEN else _U(0)


@njit(nogil=True, cache=True, boundscheck=False)
def _ones(data, at, stop):
    """Set bits of the bytes from `at` up to `stop`."""
    ones = _U(0)
    while at + _EIGHT <= stop:
        ones += population(load64(data + at))
        at += _EIGHT
    while at < stop:
        ones += population(load8(data + at))
        at += _ONE
    return ones


@njit(nogil=True, cache=True, boundscheck=False)
def open_block(data, offset, length, n, parameter, size, highs):
    """Check a block's planes, and write the sum of quotients up to each of its n non-zeros to `highs`, uint32[n + SLACK].

    `data` is the buffer's address; it and the rest are uint64. Returns (whether the block is sound so far, where its third and which plane begin).
    """
    b, tripled = parameter >> _ONE, parameter & _ONE
    stop = offset + length
    bits = n * (b + _ONE)
    third = which = at = offset + ((bits + _SEVEN) >> _U(3))
    spare = _spare(data, offset, bits)
    if tripled:
        which = third + ((n + _SEVEN) >> _U(3))
        digits = _ones(data, third, which)
        at = which + ((digits + _SEVEN) >> _U(3))
        if at > stop:
            return False, third, which
        spare |= _spare(data, third, n) | _spare(data, which, digits)
    if at == stop:
        highs[: n + _SEVEN] = np.uint32(0)
        return spare == _U(0), third, which
    last = load8(data + stop - _ONE)
    zeros = _EIGHT * (stop - at) - n  # of the plane, with those that are left over
    divisor = (_U(3) if tripled else _ONE) << b
    over = _U(0)
    while last and last >> _SEVEN == _U(0):
        last <<= _ONE
        over += _ONE
    if spare or last == _U(0) or _ones(data, at, stop) != n or (zeros - over) * divisor + n > size:
        return False, third, which
    zeros = _U(0)
    i = _U(0)
    for k in range(at, stop):
        byte = load8(data + k)
        spread8(_UNARY, byte, zeros, highs, i)
        ones = population(byte)
        i += ones
        zeros += _EIGHT - ones
    return True, third, which


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def place_group(data, group, offset, third, which, n, parameter, highs, codes, lows):
    """Write the codes of non-zeros 8 * group and the seven after it to `codes`, those beyond the last one without meaning.

    `which` is the bit of the which plane that comes next, `lows` the sum of lower parts so far, doubled; returns both as they are afterwards.
    All are uint64, and `data`, `highs` and `codes` (with room for eight) addresses: counting references to arrays would cost more than all else.
    """
    width = (parameter >> _ONE) + _ONE
    i = _EIGHT * group
    highs += _U(4) * i
    step, digits = _ONE << width, _U(0)
    if parameter & _ONE:
        step *= _U(3)
        thirds = load8(data + third + group)
        seconds = load64(data + (which >> _U(3))) >> (which & _SEVEN)
        digits = _U(_DIGITS[thirds & _U(15) | (seconds & _U(15)) << _U(4)])
        seconds >>= population(thirds & _U(15))
        digits |= _U(_DIGITS[thirds >> _U(4) | (seconds & _U(15)) << _U(4)]) << _U(32)
        which += population(thirds)
    if width <= _U(_WIDEST):
        lows += place8(codes, highs, step, load64(data + offset + group * width), width, digits, lows + i + i)
    else:
        bit = offset * _EIGHT + i * width
        for j in range(min(_EIGHT, n - i)):
            field = load64(data + (bit >> _U(3))) >> (bit & _SEVEN) & (_ONE << width) - _ONE
            lows += (field >> _ONE << _ONE) + ((digits >> _EIGHT * j & _U(3)) << width)
            store32(codes + _U(4) * j, load32(highs + _U(4) * j) * step + lows + (i + j << _ONE) | field & _ONE)
            bit += width
    return which, lows


@njit(nogil=True, cache=True, boundscheck=False)
def _decode(data, size, count, offset, length, parameter, codes, highs):
    """Decode blocks one after another into `codes`; returns the first that does not decode, or -1."""
    codes_at, highs_at = _U(codes.ctypes.data), _U(highs.ctypes.data)
    at = _U(0)
    for k in range(count.size):
        n, first, kind = _U(count[k]), _U(offset[k]), _U(parameter[k])
        sound, third, which = open_block(data, first, _U(length[k]), n, kind, _U(size[k]), highs)
        if not sound:
            return k
        which *= _EIGHT
        lows = _U(0)
        for group in range(n + _SEVEN >> _U(3)):
            place = codes_at + _U(4) * (at + _EIGHT * group)
            which, lows = place_group(data, group, first, third, which, n, kind, highs_at, place, lows)
        at += n
        if codes[at - _ONE] >> np.uint32(1) >= size[k]:  # the largest of the block
            return k
    return -1


# Writing


@njit(nogil=True, cache=True, boundscheck=False)
def _cost(gaps, n, parameter):
    """Bits of all planes but the signs under parameter 2 * b + tripled, as if none were padded."""
    b = np.uint32(parameter >> 1)
    more = np.uint32(0)
    if parameter & 1 == 0:
        for i in range(n):
            more += gaps[i] >> b
        return np.int64(n) * (np.int64(b) + 1) + np.int64(more)
    for i in range(n):
        high = gaps[i] >> b
        quotient = np.uint32((_U(high) * _U(0xAAAAAAAB)) >> _U(33))  # a third of it
        more += quotient + np.uint32(high != quotient * np.uint32(3))
    return np.int64(n) * (np.int64(b) + 2) + np.int64(more)


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
    """The cheapest parameter near M = ln 2 * mean gap."""
    b = 0
    while b < 20 and (2 << b) <= 0.6931 * zeros / n:
        b += 1
    power, bits = _cheapest(gaps, n, 2 * b)
    tripled, fewer = _cheapest(gaps, n, max(power - 2, 0) + 1)
    return tripled if fewer + fewer // _SAVING < bits else power


@njit(nogil=True, cache=True, boundscheck=False)
def _put_fields(out, at, gaps, n, codes, first, b):
    """Write the fields plane at byte `at`; returns the byte after it."""
    width = b + _ONE
    i = _U(0)
    if width <= _U(_WIDEST):
        while i + _EIGHT <= n:
            store64(out + at, fields8(gaps, i, codes, first + i, width))
            at += width
            i += _EIGHT
    state = fill = _U(0)
    mask = (_ONE << b) - _ONE
    while i < n:
        state |= ((_U(gaps[i]) & mask) << _ONE | _U(codes[first + i] & np.uint32(1))) << fill
        fill += width
        i += _ONE
        store64(out + at, state)
        at += fill >> _U(3)
        state >>= fill & ~_SEVEN
        fill &= _SEVEN
    return at + _U(fill > _U(0))


@njit(nogil=True, cache=True, boundscheck=False)
def _put_digits(out, at, gaps, n, b):
    """Write the third and which planes at byte `at`; returns the byte after them."""
    which = at + (n + _SEVEN >> _U(3))
    thirds = seconds = fill = _U(0)
    for i in range(n):
        digit = _U((gaps[i] >> np.uint32(b)) % np.uint32(3))
        third, second = (digit + _ONE) >> _ONE, digit >> _ONE
        thirds = thirds >> _ONE | third << _SEVEN
        seconds |= second << fill
        fill += third
        if i & _SEVEN == _SEVEN:
            store8(out + at + (i >> _U(3)), thirds)
            store64(out + which, seconds)
            which += fill >> _U(3)
            seconds >>= fill & ~_SEVEN
            fill &= _SEVEN
    if n & _SEVEN:
        store8(out + at + (n >> _U(3)), (thirds & _U(255)) >> (_EIGHT - (n & _SEVEN)))
        store64(out + which, seconds)
    return which + (fill + _SEVEN >> _U(3))


@njit(nogil=True, cache=True, boundscheck=False)
def _put_quotients(out, at, gaps, n, b, tripled):
    """Write the quotient plane at byte `at`; returns the byte after it. It leaves the quotients in `gaps`."""
    zeros = _U(0)
    shift = np.uint32(b)
    for i in range(n):
        high = gaps[i] >> shift
        if tripled:
            high = np.uint32((_U(high) * _U(0xAAAAAAAB)) >> _U(33))
        gaps[i] = high
        zeros += _U(high)
    if zeros == _U(0):
        return at
    stop = at + (zeros + n + _SEVEN >> _U(3))
    for k in range(at, stop, _EIGHT):
        store64(out + k, _U(0))
    word = bit = state = _U(0)
    for i in range(n):
        bit += _U(gaps[i])
        state = (state if bit >> _U(6) == word else _U(0)) | _ONE << (bit & _U(63))
        word = bit >> _U(6)
        store64(out + at + _EIGHT * word, state)
        bit += _ONE
    return stop


@njit(nogil=True, cache=True, boundscheck=False)
def _position_from(codes, first, end):
    """Where in ascending codes[first:] the first position from `end` on is."""
    last = codes.size
    while first < last:
        middle = (first + last) >> 1
        if codes[middle] >> np.uint32(1) < end:
            first = middle + 1
        else:
            last = middle
    return first


@njit(nogil=True, cache=True, boundscheck=False)
def _encode(codes, entries, log2, gaps, out, table):
    """Code a chunk in blocks of 2^log2 entries, the payload to the address `out`; returns (payload bytes, index bytes)."""
    table[0] = log2
    at = _U(0)
    table_at = 1
    first = 0
    for origin in range(0, entries, 1 << log2):
        size = min(1 << log2, entries - origin)
        last = _position_from(codes, first, origin + size)
        n = last - first
        table_at = index.put_varint(table, table_at, n)
        if n:
            count, at_code = _U(n), _U(first)
            gaps[0] = (codes[at_code] >> np.uint32(1)) - np.uint32(origin)
            for i in range(_ONE, count):
                gaps[i] = (codes[at_code + i] >> np.uint32(1)) - (codes[at_code + i - _ONE] >> np.uint32(1)) - np.uint32(1)
            parameter = _best_parameter(gaps, n, size - n)
            b, before = _U(parameter >> 1), at
            at = _put_fields(out, at, gaps, count, codes, at_code, b)
            if parameter & 1:
                at = _put_digits(out, at, gaps, count, b)
            at = _put_quotients(out, at, gaps, count, b, parameter & 1)
            table[table_at] = parameter
            table_at = index.put_varint(table, table_at + 1, at - before)
        first = last
    return at, table_at


class _Fast:
    name = "fast"
    number = 2
    sequential: Literal[False] = False

    def encode(self, codes: U32, entries: int) -> bytes:
        log2 = index.block_log2(codes.size, entries)
        gaps = np.empty(codes.size, np.uint32)
        out = np.empty(entries // 4 + codes.size + 64, np.uint8)
        table = np.empty(16 + 12 * ((entries >> log2) + 1), np.uint8)
        payload_bytes, table_bytes = _encode(codes, entries, log2, gaps, _U(out.ctypes.data), table)
        return table[:table_bytes].tobytes() + out[:payload_bytes].tobytes()

    def blocks(self, data: U8, start: int, stop: int, entries: int) -> Blocks:
        blocks = index.read(data, start, stop, entries)
        if not _well_formed(blocks.count, blocks.length, blocks.parameter):
            raise index.malformed()
        return blocks

    def decode(self, data: U8, blocks: Blocks, first: int, last: int, codes: U32) -> None:
        part = slice(first, last)
        columns = (blocks.size[part], blocks.count[part], blocks.offset[part], blocks.length[part], blocks.parameter[part])
        highs = np.empty(int(blocks.count[part].max(initial=0)) + SLACK, np.uint32)
        bad = _decode(_U(data.ctypes.data), *columns, codes, highs)
        if bad >= 0:
            raise not_sound(first + bad)


def not_sound(block: int) -> InvalidFile:
    return InvalidFile(f"block {block} of a stream does not decode within its bounds: the file is damaged")


FAST: Coding = register(_Fast())
