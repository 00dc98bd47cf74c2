"""A second reader of expert files, written from docs/format.md and sharing no code with the library: what it reads is what the specification says."""

from __future__ import annotations

import hashlib
import json
import struct
from io import BytesIO
from typing import Any

import numpy as np

CODES, NATIVE = "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL", "<f8 <f4 <f2 <u2 <i8 <i4 <i2 i1 <u8 <u4 <u2 u1 ?"
DTYPES = dict(zip(CODES.split(), NATIVE.split(), strict=True))
CHUNK = 1 << 20


def varint(data: BytesIO) -> int:
    byte = data.read(1)[0]
    return byte if byte < 128 else (byte & 127) | varint(data) << 7


def text(data: BytesIO) -> str:
    return data.read(varint(data)).decode()


def block_levels(bits: np.ndarray, n: int, parameter: int, entries: int) -> np.ndarray:
    """int8[entries] from the bits of one block."""
    levels, signs, rest = np.zeros(entries, np.int8), 1 - 2 * bits[:n].astype(np.int8), bits[n:].astype(np.int64)
    if parameter == 255:
        return signs
    b, tripled = parameter >> 1, parameter & 1
    gaps, rest = rest[: n * b].reshape(n, b) @ (1 << np.arange(b)), rest[n * b :]
    if tripled:
        digits, ones = rest[:n].copy(), np.flatnonzero(rest[:n])
        digits[ones] += rest[n : n + ones.size]
        gaps, rest = gaps + (digits << b), rest[n + ones.size :]
    ends = np.flatnonzero(rest)[:n]
    assert rest.size - ends[-1] <= 8, "a block ends before its last byte"
    levels[np.cumsum(gaps + 1 + (np.diff(ends, prepend=-1) - 1) * ((3 if tripled else 1) << b)) - 1] = signs
    return levels


def stream_levels(stream: bytes, entries: int) -> np.ndarray:
    """int8[entries] from a stream of coding 1."""
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

    def ternary() -> tuple[np.ndarray, float]:
        assert varint(table) == 1, "the coding"
        shape, stream = shapes[varint(table)], streams.read(varint(table))
        scale = struct.unpack("<f", table.read(4))[0] if facts["scope"] == "tensor" else float(np.float32(facts.get("scale", 0)))
        return stream_levels(stream, int(np.prod(shape, dtype=np.int64))).reshape(shape), scale

    def exact(name: str) -> np.ndarray:
        return np.frombuffer(raw[name], DTYPES[header[name]["dtype"]]).reshape(header[name]["shape"])

    def change(kind: int, name: str) -> tuple[Any, ...]:
        if kind == 0:
            return "add", ternary()
        if kind == 1:
            flags, key, scaling = varint(table), text(table), struct.unpack("<d", table.read(8))[0]
            return "factors", key, ternary(), ternary(), scaling, bool(flags & 1), bool(flags & 2)
        if kind == 2:
            axis, biased, key = varint(table), varint(table), text(table)
            return "multiply", key, axis, text(table) if biased else None, ternary()
        if kind == 3:
            role, number = ("head", "buffer", "rows", "untied", "saved", "tuned")[varint(table)], varint(table)
            scales = exact(f"{name}.scales") if role == "head" and number else None
            return "set", role, number if role == "rows" else 0, scales, exact(name)
        if kind == 4:
            order, count, seed = ("smallest", "largest", "random")[varint(table)], varint(table), varint(table)
            bits = np.unpackbits(np.frombuffer(table.read((len(names) + 7) // 8), np.uint8), bitorder="little")
            eligible = [names[i] for i in np.flatnonzero(bits)]
            assert eligible[0] == name, "the name of a mask"
            values = ternary() if varint(table) else exact("sterna.values")
            assert (values[0] if isinstance(values, tuple) else values).shape == (count,), "the count of a mask"
            return "masked", order, seed, eligible, values
        flags, scale = varint(table), struct.unpack("<d", table.read(8))[0]
        return "folded", ("relu", "gelu", "identity")[flags & 3], bool(flags & 4), scale, exact(f"{name}.D"), exact(f"{name}.U")

    changes: dict[str, list[tuple[Any, ...]]] = {}
    for _ in range(varint(table)):
        kind, number = varint(table), varint(table)
        name = names[number - 1] if number else text(table)
        changes.setdefault(name, []).append(change(kind, name))
    assert not table.read() + streams.read(), "bytes are left"
    return facts, shorts, changes
