"""Machine instructions that numba does not offer: unaligned 64-bit load, bit counts, prefetch for writing, eight codes at a time."""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

if sys.byteorder != "little":
    raise ImportError("sterna's coded streams are little-endian and its kernels need a little-endian machine")


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def load64(typing_context: Any, array: Any, offset: Any) -> Any:
    """The 8 bytes of uint8 `array` at byte `offset`, as a little-endian uint64. No bounds check: 8 bytes must be there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        load = builder.load(builder.bitcast(pointer, ir.IntType(64).as_pointer()))
        load.align = 1
        return load

    return types.uint64(array, offset), codegen


@intrinsic
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Number of zero bits below the lowest set bit of a non-zero uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@intrinsic
def population(typing_context: Any, word: Any) -> Any:
    """Number of set bits of a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index], to be written soon. Any index is safe: a prefetch cannot fault."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        pointer = builder.bitcast(_address(context, builder, signature.args[0], args[0], args[1]), byte)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(function, [pointer, ir.Constant(word, 1), ir.Constant(word, 3), ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(array, index), codegen


# Vectors of eight lanes, in instructions that LLVM has on every machine.
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_LANES = range(8)


def _vector(values: Any, item: Any = _I32) -> Any:
    return ir.Constant(ir.VectorType(item, 8), [ir.Constant(item, value) for value in values])


def _splat(builder: Any, value: Any, item: Any = _I32) -> Any:
    kind = ir.VectorType(item, 8)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _vector([0] * 8))


def _running(builder: Any, vector: Any) -> Any:
    """The sum of each lane and those before it."""
    for step in (1, 2, 4):
        shifted = builder.shuffle_vector(_vector([0] * 8), vector, _vector([8 + lane - step if lane >= step else 0 for lane in _LANES]))
        vector = builder.add(vector, shifted)
    return vector


def _fields(builder: Any, word: Any, width: Any, mask: Any) -> Any:
    """Eight fields of `width` bits of a 64-bit word."""
    shifts = builder.mul(_splat(builder, width, _I64), _vector(_LANES, _I64))
    fields = builder.and_(builder.lshr(_splat(builder, word, _I64), shifts), _splat(builder, mask, _I64))
    return builder.trunc(fields, ir.VectorType(_I32, 8))


def _lane_bits(builder: Any, word: Any) -> Any:
    """The lowest eight bits of a word, one a lane."""
    return builder.and_(builder.lshr(_splat(builder, builder.trunc(word, _I32)), _vector(_LANES)), _vector([1] * 8))


def _eight(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.bitcast(_address(context, builder, array_type, array, index), ir.VectorType(_I32, 8).as_pointer())


def _load8(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    load = builder.load(_eight(context, builder, array_type, array, index))
    load.align = 4
    return load


def _write8(context: Any, builder: Any, signature: Any, args: Any, fields: Any, highs: Any) -> Any:
    codes, at, _, _, start, signs, _, width = args[:8]
    sums = _running(builder, fields)
    first = builder.add(_splat(builder, builder.trunc(start, _I32)), _vector(_LANES))
    position = builder.add(builder.add(builder.shl(highs, _splat(builder, builder.trunc(width, _I32))), sums), first)
    code = builder.or_(builder.shl(position, _vector([1] * 8)), _lane_bits(builder, signs))
    store = builder.store(code, _eight(context, builder, signature.args[0], codes, at))
    store.align = 4
    return builder.zext(builder.extract_element(sums, ir.Constant(_I32, 7)), _I64)


@intrinsic
def place8(typing_context: Any, codes: Any, at: Any, highs: Any, i: Any, start: Any, signs: Any, lows: Any, width: Any, mask: Any) -> Any:
    """codes[at + j] = ((highs[i + j] << width) + start + j + fields 0 to j of lows) << 1 | bit j of signs, for eight j; returns all fields' sum.

    `codes` and `highs` are uint32, the rest uint64; `lows` holds eight fields of `width` <= 7 bits, `mask` is one of them full. No bounds check.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        highs = _load8(context, builder, signature.args[2], args[2], args[3])
        return _write8(context, builder, signature, args, _fields(builder, *args[6:9]), highs)

    return types.uint64(codes, at, highs, i, start, signs, lows, width, mask), codegen


@intrinsic
def place8_tripled(
    typing_context: Any, codes: Any, at: Any, highs: Any, i: Any, start: Any, signs: Any, lows: Any, width: Any, mask: Any, thirds: Any, which: Any
) -> Any:
    """The same for highs that count 3 << width: a field has 1 << width more where its bit of `thirds` is set, 2 << width with the next of `which`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        highs = builder.mul(_load8(context, builder, signature.args[2], args[2], args[3]), _vector([3] * 8))
        third = _lane_bits(builder, args[9])
        rank = builder.sub(_running(builder, third), third)
        second = builder.and_(builder.lshr(_splat(builder, builder.trunc(args[10], _I32)), rank), third)
        digit = builder.shl(builder.add(third, second), _splat(builder, builder.trunc(args[7], _I32)))
        return _write8(context, builder, signature, args, builder.add(_fields(builder, *args[6:9]), digit), highs)

    return types.uint64(codes, at, highs, i, start, signs, lows, width, mask, thirds, which), codegen


@intrinsic
def above64(typing_context: Any, patterns: Any, index: Any, bits: Any) -> Any:
    """A uint64 whose bit j says whether patterns[index + j] (a float's bits, uint32) has a magnitude with bits above `bits`. No bounds check."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(_I32, 64)
        load = builder.load(builder.bitcast(_address(context, builder, signature.args[0], args[0], args[1]), kind.as_pointer()))
        load.align = 4
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), args[2], ir.Constant(_I32, 0))
        limit = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(kind, [ir.Constant(_I32, 0)] * 64))
        magnitude = builder.and_(load, ir.Constant(kind, [ir.Constant(_I32, 0x7FFFFFFF)] * 64))
        return builder.bitcast(builder.icmp_unsigned(">", magnitude, limit), _I64)

    return types.uint64(patterns, index, types.uint32), codegen


@intrinsic
def add_lanes(typing_context: Any, values: Any, count: Any, lanes: Any) -> Any:
    """lanes[:8] += values, lanes[8:] += values * values, lane by lane over `count` float32 values, a multiple of 8; lanes is float64[16]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        double = ir.VectorType(ir.DoubleType(), 8)
        total_at = builder.bitcast(_address(context, builder, signature.args[2], args[2], ir.Constant(_I64, 0)), double.as_pointer())
        square_at = builder.gep(total_at, [ir.Constant(_I32, 1)])
        before = [builder.load(total_at), builder.load(square_at)]
        for load in before:
            load.align = 8
        entry, loop, body, end = builder.block, *(builder.append_basic_block(name) for name in ("loop", "body", "end"))
        builder.branch(loop)
        builder.position_at_end(loop)
        i, total, squares = builder.phi(_I64), builder.phi(double), builder.phi(double)
        builder.cbranch(builder.icmp_unsigned("<", i, args[1]), body, end)
        builder.position_at_end(body)
        part = ir.VectorType(ir.FloatType(), 8).as_pointer()
        load = builder.load(builder.bitcast(_address(context, builder, signature.args[0], args[0], i), part))
        load.align = 4
        value = builder.fpext(load, double)
        after = builder.add(i, ir.Constant(_I64, 8)), builder.fadd(total, value), builder.fadd(squares, builder.fmul(value, value))
        builder.branch(loop)
        for phi, first, following in zip((i, total, squares), (ir.Constant(_I64, 0), *before), after, strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(following, body)
        builder.position_at_end(end)
        for value, place in ((total, total_at), (squares, square_at)):
            store = builder.store(value, place)
            store.align = 8
        return context.get_dummy_value()

    return types.void(values, types.uint64, lanes), codegen


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An integer address as a pointer, for numba's carray."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.uint64), codegen


@intrinsic
def add_levels64(typing_context: Any, values: Any, index: Any, plus: Any, minus: Any, value: Any) -> Any:
    """values[index + j] += value * (bit j of plus - bit j of minus), for 64 j; `value` is of the array's type, integers wrap. No bounds check."""
    whole = isinstance(values.dtype, types.Integer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item = context.get_value_type(signature.args[0].dtype)
        kind = ir.VectorType(item, 64)
        place = builder.bitcast(_address(context, builder, signature.args[0], args[0], args[1]), kind.as_pointer())
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), args[4], ir.Constant(_I32, 0))
        splat = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, 64), [0] * 64))
        zeros = ir.Constant(kind, [0 if whole else 0.0] * 64)
        up, down = (builder.select(builder.bitcast(word, ir.VectorType(ir.IntType(1), 64)), splat, zeros) for word in args[2:4])
        add, subtract = (builder.add, builder.sub) if whole else (builder.fadd, builder.fsub)
        load = builder.load(place)
        store = builder.store(add(load, subtract(up, down)), place)
        load.align = store.align = values.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(values, types.uint64, types.uint64, types.uint64, values.dtype), codegen
