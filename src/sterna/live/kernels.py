"""Compiled loops that add decoded levels to live memory, saving what they overwrite, and that put it back.

Every update is computed in float32 and rounded once, to nearest even, to the live dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from sterna.numbers.machine import prefetch

FLOAT, BF16, FP16 = range(3)
"""How a live word is read: as the float that it is, or as the bits of a 16-bit float."""

AHEAD = 64
"""Codes that the loops look ahead, and so may read beyond the last one."""

_AHEAD = np.uint64(AHEAD)
_U = np.uint64


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An integer address as a pointer, for carray."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.uint64), codegen


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


@njit(nogil=True, cache=True, boundscheck=False)
def add(codes, first, last, addresses, sizes, counts, saved_from, scales, undo, like, kind, done, swallowed, batch):
    """Add scale * level to the live words of blocks first..last-1, whose codes lie one after another in `codes`, and save the old words in `undo`.

    addresses[k] is where block k begins in memory, of words of like.dtype; done[batch] is set once all is saved and written.
    """
    at = _U(0)
    lost = 0
    for k in range(first, last):
        live = carray(_pointer(addresses[k]), (sizes[k],), like.dtype)
        saved = _U(saved_from[k])
        plus, minus = np.float32(scales[k]), np.float32(-scales[k])
        for i in range(_U(counts[k])):
            code = codes[at + i]
            position = _U(code >> np.uint32(1))
            prefetch(live, _U(codes[at + i + _AHEAD] >> np.uint32(1)))
            update = minus if code & np.uint32(1) else plus
            old = live[position]
            undo[saved + i] = old
            if kind == FLOAT:
                new = like.dtype.type(np.float32(old) + update)
            elif kind == BF16:
                new = like.dtype.type(float_to_bf16(bf16_to_float(np.uint16(old)) + update))
            else:
                new = like.dtype.type(float_to_fp16(fp16_to_float(np.uint16(old)) + update))
            live[position] = new
            lost += new == old
        at += _U(counts[k])
    swallowed[batch] = lost
    done[batch] = 1


@njit(nogil=True, cache=True, boundscheck=False)
def restore(codes, first, last, addresses, sizes, counts, saved_from, undo, done, batch):
    """Put the saved words of blocks first..last-1 back."""
    at = _U(0)
    for k in range(first, last):
        live = carray(_pointer(addresses[k]), (sizes[k],), undo.dtype)
        saved = _U(saved_from[k])
        for i in range(_U(counts[k])):
            prefetch(live, _U(codes[at + i + _AHEAD] >> np.uint32(1)))
            live[_U(codes[at + i] >> np.uint32(1))] = undo[saved + i]
        at += _U(counts[k])
    done[batch] = 0


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
