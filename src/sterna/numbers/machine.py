"""Machine instructions that numba does not offer: unaligned 64-bit words, bit counts, prefetch for writing, eight lanes at a time."""

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


_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _loads(item: Any) -> Any:
    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        """The unsigned little-endian word at a uint64 address, which need not be aligned. Nothing is checked."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = builder.load(builder.inttoptr(args[0], item.as_pointer()))
            word.align = 1
            return builder.zext(word, _I64) if item is not _I64 else word

        return types.uint64(types.uint64), codegen

    return load


def _stores(item: Any) -> Any:
    @intrinsic
    def store(typing_context: Any, address: Any, word: Any) -> Any:
        """Write the lower part of a uint64 to a uint64 address, which need not be aligned. Nothing is checked."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            part = builder.trunc(args[1], item) if item is not _I64 else args[1]
            builder.store(part, builder.inttoptr(args[0], item.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64), codegen

    return store


load8, load16, load32, load64 = map(_loads, (_I8, _I16, _I32, _I64))
store8, store16, store32, store64 = map(_stores, (_I8, _I16, _I32, _I64))


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
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line of a uint64 address, to be written soon. Any address is safe: a prefetch cannot fault."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(function, [builder.inttoptr(args[0], byte), *(ir.Constant(_I32, value) for value in (1, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


# Vectors of eight lanes, in instructions that LLVM has on every machine.
_LANES = range(8)


def _vector(values: Any, item: Any = _I32) -> Any:
    return ir.Constant(ir.VectorType(item, 8), [ir.Constant(item, value) for value in values])


def _splat(builder: Any, value: Any, item: Any = _I32) -> Any:
    kind = ir.VectorType(item, 8)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _vector([0] * 8))


def _splat32(builder: Any, word: Any) -> Any:
    return _splat(builder, builder.trunc(word, _I32))


def _running(builder: Any, vector: Any) -> Any:
    """The sum of each lane and those before it."""
    for step in (1, 2, 4):
        shifted = builder.shuffle_vector(_vector([0] * 8), vector, _vector([8 + lane - step if lane >= step else 0 for lane in _LANES]))
        vector = builder.add(vector, shifted)
    return vector


def _eight(context: Any, builder: Any, array_type: Any, array: Any, index: Any, item: Any = _I32) -> Any:
    """A pointer to the eight items of an array from `index` on."""
    return builder.bitcast(_address(context, builder, array_type, array, index), ir.VectorType(item, 8).as_pointer())


def _load8(context: Any, builder: Any, array_type: Any, array: Any, index: Any, item: Any = _I32) -> Any:
    load = builder.load(_eight(context, builder, array_type, array, index, item))
    load.align = item.width // 8
    return load


def _store8(builder: Any, vector: Any, pointer: Any, align: int) -> None:
    builder.store(vector, pointer).align = align


def _shifts(builder: Any, width: Any) -> Any:
    """Where eight fields of `width` bits begin in a word."""
    return builder.mul(_splat(builder, width, _I64), _vector(_LANES, _I64))


@intrinsic
def place8(typing_context: Any, codes: Any, highs: Any, step: Any, fields: Any, width: Any, digits: Any, start: Any) -> Any:
    """codes[j] = start + 2j + highs[j] * step + (lows 0 to j) + sign j, for eight j; returns the sum of all lows.

    All are uint64; `codes` and `highs` are addresses of uint32. `fields` holds eight fields of `width` <= 8 bits, a sign below the rest, and `digits`
    eight bytes: a low is its field without the sign, and its digit << width.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.VectorType(_I32, 8)
        codes, highs, step, fields, width, digits, start = args
        high = builder.load(builder.inttoptr(highs, lanes.as_pointer()))
        high.align = 4
        mask = builder.sub(builder.shl(ir.Constant(_I64, 1), width), ir.Constant(_I64, 1))
        field = builder.trunc(builder.lshr(_splat(builder, fields, _I64), _shifts(builder, width)), lanes)
        field = builder.and_(field, _splat32(builder, mask))
        digit = builder.zext(builder.bitcast(digits, ir.VectorType(_I8, 8)), lanes)
        low = builder.add(builder.and_(field, _vector([0xFFFFFFFE] * 8)), builder.shl(digit, _splat32(builder, width)))
        sums = _running(builder, low)
        position = builder.add(builder.add(builder.mul(high, _splat32(builder, step)), sums), _splat32(builder, start))
        code = builder.add(builder.add(position, _vector(range(0, 16, 2))), builder.and_(field, _vector([1] * 8)))
        _store8(builder, code, builder.inttoptr(codes, lanes.as_pointer()), 4)
        return builder.zext(builder.extract_element(sums, ir.Constant(_I32, 7)), _I64)

    return types.uint64(*[types.uint64] * 7), codegen


@intrinsic
def spread8(typing_context: Any, table: Any, row: Any, more: Any, out: Any, at: Any) -> Any:
    """out[at + j] = table[8 * row + j] + more, for eight j. `table` is uint8, `out` uint32, the rest uint64. No bounds check."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row = _load8(context, builder, signature.args[0], args[0], builder.shl(args[1], ir.Constant(_I64, 3)), _I8)
        value = builder.add(builder.zext(row, ir.VectorType(_I32, 8)), _splat32(builder, args[2]))
        _store8(builder, value, _eight(context, builder, signature.args[3], args[3], args[4]), 4)
        return context.get_dummy_value()

    return types.void(table, row, more, out, at), codegen


@intrinsic
def fields8(typing_context: Any, gaps: Any, i: Any, codes: Any, at: Any, width: Any) -> Any:
    """A uint64 of eight fields of `width` <= 8 bits: the lowest bit of codes[at + j], and above it the lowest width - 1 bits of gaps[i + j].

    `gaps` and `codes` are uint32. No bounds check.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.VectorType(_I64, 8)
        gap = builder.shl(_load8(context, builder, signature.args[0], args[0], args[1]), _vector([1] * 8))
        sign = builder.and_(_load8(context, builder, signature.args[2], args[2], args[3]), _vector([1] * 8))
        mask = builder.sub(builder.shl(ir.Constant(_I64, 1), args[4]), ir.Constant(_I64, 1))
        field = builder.or_(builder.and_(gap, _splat32(builder, mask)), sign)
        placed = builder.shl(builder.zext(field, wide), _shifts(builder, args[4]))
        for half in (4, 2, 1):
            other = builder.shuffle_vector(placed, placed, _vector([(lane + half) % 8 for lane in _LANES]))
            placed = builder.or_(placed, other)
        return builder.extract_element(placed, ir.Constant(_I32, 0))

    return types.uint64(gaps, i, codes, at, types.uint64), codegen


def _live8(context: Any, builder: Any, address: Any, codes: Any, item: Any) -> tuple[Any, list[Any]]:
    """Eight codes, and pointers to the words of memory that they tell of."""
    load = builder.load(builder.inttoptr(codes, ir.VectorType(_I32, 8).as_pointer()))
    load.align = 4
    positions = builder.lshr(load, _vector([1] * 8))
    base = builder.inttoptr(address, item.as_pointer())
    return load, [builder.gep(base, [builder.zext(builder.extract_element(positions, ir.Constant(_I32, lane)), _I64)]) for lane in _LANES]


@intrinsic
def add8(typing_context: Any, address: Any, codes: Any, saved: Any, update: Any, like: Any) -> Any:
    """Eight words of memory += `update`, or -= it, in float32; the old ones go to `saved`. Returns a uint64: bit j says that word j is as it was.

    `address` is that of words of the type of `like`, float32 or float64; `codes` is that of uint32: a word's number << 1 | whether to subtract.
    `saved` is aligned to eight words.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item, single = context.get_data_type(like), ir.VectorType(ir.FloatType(), 8)
        words = ir.VectorType(item, 8)
        code, pointers = _live8(context, builder, args[0], args[1], item)
        sign = builder.shl(code, _vector([31] * 8))
        step = builder.bitcast(builder.xor(sign, _splat(builder, builder.bitcast(args[3], _I32))), single)
        old = ir.Constant(words, ir.Undefined)
        for lane, pointer in enumerate(pointers):
            old = builder.insert_element(old, builder.load(pointer), ir.Constant(_I32, lane))
        new = builder.fadd(old if like == types.float32 else builder.fptrunc(old, single), step)
        new = new if like == types.float32 else builder.fpext(new, words)
        store = builder.store(old, builder.inttoptr(args[2], words.as_pointer()))
        store.align = like.bitwidth  # of eight words, in bytes
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))  # past the cache: nobody reads it soon
        for lane, pointer in enumerate(pointers):
            builder.store(builder.extract_element(new, ir.Constant(_I32, lane)), pointer)
        return builder.zext(builder.bitcast(builder.fcmp_ordered("==", old, new), _I8), _I64)

    return types.uint64(types.uint64, types.uint64, types.uint64, types.float32, like), codegen


@intrinsic
def put8(typing_context: Any, address: Any, codes: Any, saved: Any, like: Any) -> Any:
    """The eight words of memory at `address` that eight uint32 at `codes`, >> 1, count become those at `saved`. All are of the type of `like`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        item = context.get_data_type(like)
        source = builder.inttoptr(args[2], item.as_pointer())
        for lane, pointer in enumerate(_live8(context, builder, args[0], args[1], item)[1]):
            builder.store(builder.load(builder.gep(source, [ir.Constant(_I64, lane)])), pointer)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64, like), codegen


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
