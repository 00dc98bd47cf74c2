"""A second reader of expert files, written from docs/format.md and sharing no code with the library: what it reads is what the specification says."""

from __future__ import annotations

import hashlib
import json
import struct
from io import BytesIO
from typing import Any

import numpy as np

import small_reader

CODES, NATIVE = "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL", "<f8 <f4 <f2 <u2 <i8 <i4 <i2 i1 <u8 <u4 <u2 u1 ?"
DTYPES = dict(zip(CODES.split(), NATIVE.split(), strict=True))
CHUNK = 1 << 20


def varint(data: BytesIO) -> int:
    byte = data.read(1)[0]
    return byte if byte < 128 else (byte & 127) | varint(data) << 7


def text(data: BytesIO) -> str:
    return data.read(varint(data)).decode()


def positions(gaps: np.ndarray, digits: np.ndarray, quotients: np.ndarray, parameter: int) -> np.ndarray:
    """Where the non-zeros of a block lie, from the three parts of each gap."""
    b, tripled = parameter >> 1, parameter & 1
    return np.cumsum(gaps + (digits << b) + (quotients * (3 if tripled else 1) << b) + 1) - 1


def digits_of(third: np.ndarray, which: np.ndarray) -> np.ndarray:
    digits = third.copy()
    digits[np.flatnonzero(third)] += which
    return digits


def rice_levels(bits: np.ndarray, n: int, parameter: int, entries: int) -> np.ndarray:
    """int8[entries] from the bits of one block of coding 1."""
    levels, signs, rest = np.zeros(entries, np.int8), 1 - 2 * bits[:n].astype(np.int8), bits[n:].astype(np.int64)
    if parameter == 255:
        return signs
    b, digits = parameter >> 1, np.zeros(n, np.int64)
    gaps, rest = rest[: n * b].reshape(n, b) @ (1 << np.arange(b)), rest[n * b :]
    if parameter & 1:
        ones = int(rest[:n].sum())
        digits, rest = digits_of(rest[:n], rest[n : n + ones]), rest[n + ones :]
    ends = np.flatnonzero(rest)[:n]
    assert rest.size - ends[-1] <= 8, "a block ends before its last byte"
    levels[positions(gaps, digits, np.diff(ends, prepend=-1) - 1, parameter)] = signs
    return levels


def fast_levels(bits: np.ndarray, n: int, parameter: int, entries: int) -> np.ndarray:
    """int8[entries] from the bits of one block of coding 2."""
    levels, rest, b = np.zeros(entries, np.int8), bits.astype(np.int64), parameter >> 1

    def plane(size: int) -> np.ndarray:
        nonlocal rest
        whole, rest = rest[: -(-size // 8) * 8], rest[-(-size // 8) * 8 :]
        assert not whole[size:].any(), "bits are left over in a plane"
        return whole[:size]

    fields = plane(n * (b + 1)).reshape(n, b + 1) @ (1 << np.arange(b + 1))
    third = plane(n) if parameter & 1 else np.zeros(n, np.int64)
    which = plane(int(third.sum()))
    ends = np.flatnonzero(rest) if rest.size else np.arange(n)
    assert ends.size == n, "the ones of the last plane"
    assert max(rest.size - ends[-1], 0) <= 8, "a block ends before its last byte"
    levels[positions(fields >> 1, digits_of(third, which), np.diff(ends, prepend=-1) - 1, parameter)] = 1 - 2 * (fields & 1)
    return levels


def stream_levels(stream: bytes, entries: int, coding: int = 2) -> np.ndarray:
    """int8[entries] from a stream of coding 1 or 2."""
    block_levels = {1: rice_levels, 2: fast_levels}[coding]
    levels, data = np.zeros(entries, np.int8), BytesIO(stream)
    for chunk in range(0, entries, CHUNK):
        size, end, index = 1 << data.read(1)[0], min(chunk + CHUNK, entries), []
        for start in range(chunk, end, size):
            if n := varint(data):
                index += [(start, min(start + size, end), n, data.read(1)[0], varint(data))]
        for start, stop, n, parameter, length in index:
            bits = np.unpackbits(np.frombuffer(data.read(length), np.uint8), bitorder="little")
            levels[start:stop] = block_levels(bits, n, parameter, stop - start)
    assert not data.read(), "a stream is longer than its chunks"
    return levels


def numbers_of(data: BytesIO, count: int, many: int) -> list[int]:
    """The numbers of a palette's non-zeros."""
    if not count or many == 1:
        assert not data.read(), "numbers where there is nothing to tell"
        return [0] * count
    frequencies, numbers = [varint(data) for _ in range(many)], []
    starts, slots = [sum(frequencies[:j]) for j in range(many)], [j for j in range(many) for _ in range(frequencies[j])]
    assert len(slots) == 1 << 16, "the frequencies"
    for first in range(0, count, 1 << 16):
        block = BytesIO(data.read(varint(data)))
        x = int.from_bytes(block.read(4), "big")
        for _ in range(min(count - first, 1 << 16)):
            numbers.append(slots[x % 65536])
            x = frequencies[numbers[-1]] * (x >> 16) + x % 65536 - starts[numbers[-1]]
            while x < 1 << 23:
                x = x << 8 | block.read(1)[0]
        assert (x, block.read()) == (1 << 23, b""), "the end of a block of numbers"
    assert not data.read(), "numbers are longer than their blocks"
    return numbers


def read(file: bytes) -> tuple[dict[str, Any], dict[str, bytes], dict[str, list[tuple[Any, ...]]]]:
    """Facts, short digests, and changes by name: a kind, then its fields; a ternary tensor is (int8 levels, scale), bfloat16 its bits."""
    origin = 8 + struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8:origin])
    facts = json.loads(header.pop("__metadata__")["sterna"])
    raw = {name: file[origin + e["data_offsets"][0] : origin + e["data_offsets"][1]] for name, e in header.items()}
    assert hashlib.sha256(file[:-32]).digest() == raw["sterna.sha256"], "the checksum"
    table, streams = BytesIO(raw["sterna.table"]), BytesIO(raw["sterna.streams"])
    parts = [text(table) for _ in range(varint(table))]
    split: list[list[str]] = [[]]
    for _ in range(varint(table)):
        split.append(split[-1][: varint(table)] + [parts[varint(table)] for _ in range(varint(table))])
    names = [".".join(name) for name in split[1:]]
    shorts = {name: table.read(9) for name in names}
    shapes = [tuple(varint(table) for _ in range(varint(table))) for _ in range(varint(table))]

    def ternary(given: float | None = None) -> tuple[np.ndarray, float]:
        coding, shape, stream = varint(table), shapes[varint(table)], streams.read(varint(table))
        scale = given or (struct.unpack("<f", table.read(4))[0] if facts["scope"] == "tensor" else float(np.float32(facts.get("scale", 0))))
        if coding == 3:
            return np.array(small_reader.read(stream, shape), np.int8).reshape(shape), scale
        return stream_levels(stream, int(np.prod(shape, dtype=np.int64)), coding).reshape(shape), scale

    def exact(name: str) -> np.ndarray:
        return np.frombuffer(raw[name], DTYPES[header[name]["dtype"]]).reshape(header[name]["shape"])

    before: dict[str, Any] = {}
    palettes: list[Any] = []

    def key_of(name: str, known: bool) -> str:
        module = name.rpartition(".")[0]
        key = before["lead"] + module if known else text(table)
        before["lead"] = key[: len(key) - len(module)] if key.endswith(module) else None
        return key

    def change(kind: int, name: str) -> tuple[Any, ...]:
        if kind == 0:
            return "add", ternary()
        if kind == 1:
            flags = varint(table)
            key = key_of(name, bool(flags & 4))
            before["scaling"] = scaling = before["scaling"] if flags & 8 else struct.unpack("<d", table.read(8))[0]
            ranks = exact(f"{name}.ranks") if flags & 16 else None
            return "factors", key, ternary(), ternary(), scaling, bool(flags & 1), bool(flags & 2), ranks
        if kind == 2:
            axis, flags = varint(table), varint(table)
            key = key_of(name, bool(flags & 2))
            bias = text(table) if flags & 1 else None
            return "multiply", key, axis, bias, exact(f"{name}.vector") if flags & 4 else ternary()
        if kind == 3:
            role, number = ("head", "buffer", "rows", "untied", "saved", "tuned")[varint(table)], varint(table)
            task = text(table) if role == "head" and number & 2 else ""
            own = f"{task}:{name}" if task else name
            scales = exact(f"{own}.scales") if role == "head" and number & 1 else None
            return "set", role, number if role == "rows" else 0, task, scales, exact(own)
        if kind == 4:
            order, count, seed = ("smallest", "largest", "random")[varint(table)], varint(table), varint(table)
            bits = np.unpackbits(np.frombuffer(table.read((len(names) + 7) // 8), np.uint8), bitorder="little")
            eligible = [names[i] for i in np.flatnonzero(bits)]
            assert eligible[0] == name, "the name of a mask"
            values = ternary() if varint(table) else exact("sterna.values")
            assert (values[0] if isinstance(values, tuple) else values).shape == (count,), "the count of a mask"
            return "masked", order, seed, eligible, values
        if kind == 6:
            dtype, coding, shape, length = ("F32", "F16", "BF16")[varint(table)], varint(table), shapes[varint(table)], varint(table)
            assert coding == 1, "the lossless coding"
            return "lossless", dtype, list(shape), streams.read(length), table.read(16)
        if kind == 7:
            levels, number = ternary(1.0)[0], varint(table)
            if number == len(palettes):
                many, tasks = varint(table), varint(table)
                floats = np.frombuffer(table.read(4 * (many + tasks)), "<f4")
                masks = [int.from_bytes(table.read((tasks + 7) // 8), "little") for _ in range(many)]
                palettes.append((floats[:many], floats[many:], np.array(masks, np.int64)))
            magnitudes, scales, masks = palettes[number]
            numbers = numbers_of(BytesIO(streams.read(varint(table))), np.count_nonzero(levels), len(magnitudes))
            values, members = levels.astype(np.float32), np.zeros(levels.shape, np.int64)
            values[levels != 0] *= magnitudes[numbers]
            members[levels != 0] = masks[numbers]
            return "palette", (levels, 1.0), values, members, scales
        if kind == 8:
            flags = varint(table)
            return "lowrank", key_of(name, bool(flags & 4)), bool(flags & 1), bool(flags & 2), exact(f"{name}.A"), exact(f"{name}.B")
        flags, scale = varint(table), struct.unpack("<d", table.read(8))[0]
        return "folded", ("relu", "gelu", "identity")[flags & 3], bool(flags & 4), scale, exact(f"{name}.D"), exact(f"{name}.U")

    changes: dict[str, list[tuple[Any, ...]]] = {}
    for _ in range(varint(table)):
        kind, number = varint(table), varint(table)
        name = names[number - 1] if number else text(table)
        changes.setdefault(name, []).append(change(kind, name))
    assert not table.read() + streams.read(), "bytes are left"
    return facts, shorts, changes
