"""The first gap coding, which is read and no longer written: Rice and Golomb parameters chosen block by block, in planes; see `fast`, its successor.

A block holds n non-zeros among its entries. With g the number of zeros before a non-zero (since the one before it, or the block's start), and a
divisor M = 2^b or 3 * 2^b, the bits of a block are five planes one after another, least significant bit first:

    signs     n bits          1 for a negative level
    low       n * b bits      g mod 2^b
    third     n bits          M = 3 * 2^b only: whether d = (g >> b) mod 3 is not 0
    which     (set thirds)    M = 3 * 2^b only: for each of those, whether d is 2
    quotient  the rest        floor(g / M) zeros and a one, for each non-zero

That is the length of Golomb's code of the gaps (Golomb 1966, Rice 1979) with a raw sign, in another order. `docs/format.md` specifies the index.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit

from sterna.codings import U8, U32, Blocks, Coding, index, register
from sterna.errors import InvalidArgument, InvalidFile
from sterna.numbers.machine import load64, population, trailing_zeros

FULL = 255  # parameter of a block without zeros: no positions are stored, signs only
_MAX_PARAMETER = 2 * 20 + 1  # b <= 20: a block is no longer than a chunk
_U = np.uint64
_EIGHT = _U(8)
_FARTHEST = _U(1 << 22)  # quotient bits from which on no block reaches


@njit(nogil=True, cache=True, boundscheck=False)
def _well_formed(size, count, length, parameter):
    """Whether each block's planes but the last begin and end inside it, as far as its index tells."""
    for k in range(count.size):
        if parameter[k] == FULL:
            if count[k] != size[k] or length[k] != (count[k] + 7) >> 3:
                return False
        elif parameter[k] > _MAX_PARAMETER or count[k] * (2 + (parameter[k] >> 1) + (parameter[k] & 1)) > 8 * length[k]:
            return False
    return True


@njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _bits(data, at):
    """The 57 bits and more from bit `at` on of what lies at the address `data`, the first lowest."""
    return load64(data + (at >> _U(3))) >> (at & _U(7))


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
    word = load64(data + at) >> (start & _U(7)) << (start & _U(7))
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
        word = load64(data + at)


@njit(nogil=True, cache=True, boundscheck=False)
def _decode_power(data, start, end, n, b, size, codes, out, highs):
    """Codes of a block with M = 2^b at codes[out:out+n]; False where its planes do not end in its last byte or a position leaves the block."""
    mask = (_U(1) << b) - _U(1)
    low_at = start + n
    quotient_at = low_at + n * b
    if not _quotients(data, quotient_at, end, n, highs):
        return False
    gaps = i = _U(0)  # gaps: sum of the low parts so far
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
    gaps = i = _U(0)
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


class _Rice:
    name = "rice"
    number = 1
    sequential: Literal[False] = False

    def encode(self, codes: U32, entries: int) -> bytes:
        raise InvalidArgument("the rice coding is read, and no longer written; ask for 'fast'")

    def blocks(self, data: U8, start: int, stop: int, entries: int) -> Blocks:
        blocks = index.read(data, start, stop, entries)
        if not _well_formed(blocks.size, blocks.count, blocks.length, blocks.parameter):
            raise index.malformed()
        return blocks

    def decode(self, data: U8, blocks: Blocks, first: int, last: int, codes: U32) -> None:
        part = slice(first, last)
        columns = (blocks.size[part], blocks.count[part], blocks.offset[part], blocks.length[part], blocks.parameter[part])
        highs = np.empty(int(blocks.count[part].max(initial=0)) + 8, np.uint32)
        bad = _decode_blocks(_U(data.ctypes.data), *columns, codes, highs)
        if bad >= 0:
            raise InvalidFile(f"block {first + bad} of a stream does not decode within its bounds: the file is damaged")


RICE: Coding = register(_Rice())
