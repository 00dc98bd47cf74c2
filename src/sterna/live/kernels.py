"""Compiled loops that add decoded levels to live memory, saving what they overwrite, and that put it back.

Every update is computed in float32 and rounded once, to nearest even, to the live dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

from sterna.codings.fast import SLACK, open_block, place_group
from sterna.numbers.machine import add8, load16, load32, population, prefetch, put8, store16
from sterna.numbers.products import product_entries

FLOAT, BF16, FP16 = range(3)
"""How a live word is read: as the float that it is, or as the bits of a 16-bit float."""

_U = np.uint64
_LINE = _U(64)  # bytes
_LEAD = _U(256 * 64)  # bytes by which prefetches run ahead where most lines of a block are touched, and are asked for one after another
_AHEAD = _U(96)  # codes by which they run ahead elsewhere


@intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.float32(types.uint32), codegen


@intrinsic
def _as_bits(typing_context: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.uint32(types.float32), codegen


@njit(nogil=True, cache=True)
def bf16_to_float(word):
    return _as_float(np.uint32(word) << np.uint32(16))


@njit(nogil=True, cache=True)
def float_to_bf16(value):
    bits = _as_bits(value)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(bits >> np.uint32(16) | np.uint32(0x40))  # a NaN stays one
    return np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True)
def fp16_to_float(word):
    sign = np.uint32(word & np.uint16(0x8000)) << np.uint32(16)
    rest = np.uint32(word & np.uint16(0x7FFF))
    if rest >= np.uint32(0x7C00):  # infinities and NaNs
        return _as_float(sign | np.uint32(0x7F800000) | (rest & np.uint32(0x3FF)) << np.uint32(13))
    scaled = _as_float(rest << np.uint32(13)) * _as_float(np.uint32(0x77800000))  # 2^112 mends the exponent, of subnormals too
    return _as_float(_as_bits(scaled) | sign)


@njit(nogil=True, cache=True)
def float_to_fp16(value):
    bits = _as_bits(value)
    sign = np.uint16(bits >> np.uint32(16) & np.uint32(0x8000))
    rest = bits & np.uint32(0x7FFFFFFF)
    if rest > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint16(0x7E00))
    if rest >= np.uint32(0x477FF000):  # rounds to more than the largest float16
        return np.uint16(sign | np.uint16(0x7C00))
    if rest < np.uint32(0x38800000):  # subnormal: adding 0.5 leaves the rounded bits at the end of the word
        return np.uint16(sign | np.uint16(_as_bits(_as_float(rest) + np.float32(0.5)) - np.uint32(0x3F000000)))
    return np.uint16(sign | np.uint16((rest - np.uint32(0x38000000) + np.uint32(0xFFF) + (rest >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)))


def _add_eight(address, codes, saved, update, like, kind):
    """`add8`, for words of every kind."""


@overload(_add_eight, inline="always")
def _add_eight_in(address, codes, saved, update, like, kind):
    if isinstance(like, types.Float):
        return lambda address, codes, saved, update, like, kind: add8(address, codes, saved, update, like)

    def of_bits(address, codes, saved, update, like, kind):
        for j in range(_U(8)):
            store16(saved + _U(2) * j, load16(address + _U(2) * (load32(codes + _U(4) * j) >> _U(1))))
        same = _U(0)
        for j in range(_U(8)):  # only now: the last group may hold a word twice
            code, old = load32(codes + _U(4) * j), load16(saved + _U(2) * j)
            step = -update if code & _U(1) else update
            new = float_to_bf16(bf16_to_float(old) + step) if kind == BF16 else float_to_fp16(fp16_to_float(np.uint16(old)) + step)
            store16(address + _U(2) * (code >> _U(1)), _U(new))
            same |= _U(new == old) << j
        return same

    return of_bits


@njit(nogil=True, cache=True, boundscheck=False)
def write_blocks(data, first, last, columns, addresses, saved_from, scales, undo, kind, done, restoring):
    """Decode blocks first..last-1 of the fast coding and add scale * level to their live words, saving the old ones in `undo`; or put those back.

    `data` is the address of the streams' buffer, addresses[k] where block k begins in memory, of words of undo.dtype; `columns` are (size, count,
    offset, length, parameter). The saved words of block k begin at undo[saved_from[k]], in groups of eight, each aligned. Blocks whose `done` is set
    already (or, to restore, is not) are left alone; it is set (or cleared) once all words of a block are written.

    While one block is written, group by group, the next is decoded: the decoder works while the writes wait for memory. A block is written only after
    all its positions were found to lie inside it. Returns (the first block that does not decode, or -1; how many words an update left as they were).
    """
    size, count, offset, length, parameter = columns
    item = _U(undo.itemsize)
    room = 0
    for k in range(first, last):
        room = max(room, count[k])
    half = _U(room + SLACK)
    codes = np.empty(_U(2) * half + _AHEAD, np.uint32)  # of the block being written and of the next one, in turn
    highs = np.empty(half, np.uint32)
    codes_at, highs_at, undo_at = _U(codes.ctypes.data), _U(highs.ctypes.data), _U(undo.ctypes.data)
    like = undo.dtype.type(0)
    lost = n_old = groups_old = address_old = _U(0)
    by_line = False
    for k in range(first, last + 1):
        cur, old = half * _U(k & 1), half * _U(~k & 1)
        n = offset_k = third = which = kind_k = lows = address = groups = _U(0)
        if k < last and (done[k] == 1) == restoring:
            n, offset_k, kind_k, address = _U(count[k]), _U(offset[k]), _U(parameter[k]), addresses[k]
            sound, third, which = open_block(data, offset_k, _U(length[k]), n, kind_k, _U(size[k]), highs)
            if not sound:
                n = _U(0)
            which *= _U(8)
            groups = (n + _U(7)) >> _U(3)
        line = limit = lines = saved = _U(0)
        update = np.float32(0)
        runs_on = False
        if n_old:
            saved, update = undo_at + _U(saved_from[k - 1]) * item, np.float32(scales[k - 1])
            limit = address_old + _U(size[k - 1]) * item
            lines = (limit - address_old) // (_LINE * groups_old) + _U(1)
            line = address_old + _LEAD
            runs_on = bool(by_line and address == limit)
            if runs_on:
                limit += _LEAD  # into the next block
        for g in range(max(groups, groups_old)):
            at = _U(8) * g
            if g < groups:
                which, lows = place_group(data, g, offset_k, third, which, n, kind_k, highs_at, codes_at + _U(4) * (cur + at), lows)
            if g < groups_old:
                if by_line:
                    if line < limit:
                        for _ in range(lines):
                            prefetch(line)
                            line += _LINE
                else:
                    for j in range(_U(8)):
                        prefetch(address_old + _U(codes[old + at + _AHEAD + j] >> np.uint32(1)) * item)
                where, to = codes_at + _U(4) * (old + at), saved + at * item
                if restoring:
                    put8(address_old, where, to, like)
                else:
                    same = _add_eight(address_old, where, to, update, like, kind)
                    lost += population(same & (_U(255) >> (at + _U(8) - n_old) if at + _U(8) > n_old else _U(255)))
        if n_old:
            done[k - 1] = not restoring
        if k < last and (done[k] == 1) == restoring:
            if n == _U(0) or _U(codes[cur + n - _U(1)] >> np.uint32(1)) >= _U(size[k]):  # the largest of the block
                return k, lost
            for i in range(n, _U(8) * groups):  # the last group is filled up with the last one, again and again
                codes[cur + i] = codes[cur + n - _U(1)]
            by_line = bool(n * _U(2) * _LINE >= _U(size[k]) * item)  # most of its lines are touched
            if not by_line:
                for i in range(min(n, _AHEAD)):
                    prefetch(address + _U(codes[cur + i] >> np.uint32(1)) * item)
            elif not runs_on:
                for i in range(min(_LEAD, _U(size[k]) * item) // _LINE):
                    prefetch(address + i * _LINE)
        n_old, groups_old, address_old = n, groups, address
    return -1, lost


@njit(nogil=True, cache=True, boundscheck=False)
def add_product(live, A, B, scale, kind):
    """live[i, j] += scale * (B @ A)[i, j], rounded once. A int8[r, in], B int8[out, r], scale float32, live words [out, in].

    Returns how many entries of the product are not zero, and how many of those rounding left as they were.
    """
    rank, inner = A.shape
    row = np.empty(inner, np.int32)
    updates = lost = 0
    for i in range(B.shape[0]):
        row[:] = 0
        empty = True
        for k in range(rank):
            if B[i, k] > 0:
                for j in range(inner):
                    row[j] += np.int32(A[k, j])
            elif B[i, k] < 0:
                for j in range(inner):
                    row[j] -= np.int32(A[k, j])
            empty &= B[i, k] == 0
        if empty:
            continue
        changed = same = 0
        for j in range(inner):
            old = live[i, j]
            step = np.float32(row[j]) * scale
            if kind == FLOAT:
                new = live.dtype.type(np.float32(old) + step)
            elif kind == BF16:
                new = live.dtype.type(float_to_bf16(bf16_to_float(np.uint16(old)) + step))
            else:
                new = live.dtype.type(float_to_fp16(fp16_to_float(np.uint16(old)) + step))
            live[i, j] = new
            changed += row[j] != 0
            same += (row[j] != 0) & (new == old)
        updates += changed
        lost += same
    return updates, lost


@njit(nogil=True, cache=True, boundscheck=False)
def add_factors(live, A, B, kind):
    """`add_product` of float64 matrices: an entry of the product is made as `product_entries` makes it, and rounded to float32."""
    updates = lost = 0
    row = np.empty(A.shape[1], np.float32)
    for i in range(B.shape[0]):
        product_entries(B[i : i + 1], A, 0, row)
        for j in range(row.size):
            if row[j] == 0:
                continue
            old = live[i, j]
            if kind == FLOAT:
                new = live.dtype.type(np.float32(old) + row[j])
            elif kind == BF16:
                new = live.dtype.type(float_to_bf16(bf16_to_float(np.uint16(old)) + row[j]))
            else:
                new = live.dtype.type(float_to_fp16(fp16_to_float(np.uint16(old)) + row[j]))
            live[i, j] = new
            updates += 1
            lost += new == old
    return updates, lost


@njit(nogil=True, cache=True, boundscheck=False)
def add_values(live, codes, counts, starts, numbers, magnitudes, undo, kind):
    """live[position] += its value, rounded once, for blocks of codes, counts[k] of them from position starts[k] on; the old words go to `undo`.

    A value is magnitudes[numbers[i]] (float32) with the code's sign. `live` and `undo` hold words as `add_product` takes them. Returns how many words
    rounding left as they were.
    """
    at = same = 0
    for k in range(counts.size):
        for i in range(at, at + counts[k]):
            code = codes[i]
            position = starts[k] + (code >> np.uint32(1))
            value = magnitudes[numbers[i]]
            step = -value if code & np.uint32(1) else value
            old = live[position]
            if kind == FLOAT:
                new = live.dtype.type(np.float32(old) + step)
            elif kind == BF16:
                new = live.dtype.type(float_to_bf16(bf16_to_float(np.uint16(old)) + step))
            else:
                new = live.dtype.type(float_to_fp16(fp16_to_float(np.uint16(old)) + step))
            undo[i] = old
            live[position] = new
            same += new == old
        at += counts[k]
    return same


@njit(nogil=True, cache=True, boundscheck=False)
def put_back(live, codes, counts, starts, undo):
    """live[position] = undo[i] for the codes that `add_values` took."""
    at = 0
    for k in range(counts.size):
        for i in range(at, at + counts[k]):
            live[starts[k] + (codes[i] >> np.uint32(1))] = undo[i]
        at += counts[k]
