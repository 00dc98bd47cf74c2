"""A writer of expert files for tests, made from docs/format.md in plain Python: it writes what the library never would.

A `Draft` is a file in pieces. Every piece can be replaced by bytes that lie before `file` lays them out and signs them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
ADD, FACTORS, MULTIPLY, SET, MASKED, FOLDED, LOSSLESS, PALETTE, LOW_RANK = range(9)
CHUNK = 1 << 20


def varint(*values: int) -> bytes:
    out = bytearray()
    for value in values:
        while value >= 128:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return varint(len(raw)) + raw


# Streams, of coding 2 unless told


def gaps_of(positions: Sequence[int]) -> list[int]:
    return [now - before - 1 for before, now in zip([-1, *positions[:-1]], positions, strict=True)]


def split(gap: int, b: int, tripled: int) -> tuple[int, int, int]:
    """(lower bits, digit, quotient)."""
    high = gap >> b
    return gap & (1 << b) - 1, high % 3 if tripled else 0, high // 3 if tripled else high


def planes(positions: Sequence[int], negative: Sequence[int], parameter: int) -> list[list[int]]:
    """The bits of one block's planes under coding 2: fields, third, which, quotient. Each is of whole bytes once it is packed."""
    b, tripled = parameter >> 1, parameter & 1
    parts = [split(gap, b, tripled) for gap in gaps_of(positions)]
    fields = [(low << 1 | sign) >> i & 1 for (low, _, _), sign in zip(parts, negative, strict=True) for i in range(b + 1)]
    third = [int(digit > 0) for _, digit, _ in parts] if tripled else []
    quotient = [bit for _, _, quotient in parts for bit in [0] * quotient + [1]]
    return [fields, third, [digit - 1 for _, digit, _ in parts if digit], quotient if any(quotient for _, _, quotient in parts) else []]


def planes1(positions: Sequence[int], negative: Sequence[int], parameter: int) -> list[int]:
    """The bits of one block under coding 1."""
    if parameter == 255:
        return list(negative)
    b, tripled = parameter >> 1, parameter & 1
    parts = [split(gap, b, tripled) for gap in gaps_of(positions)]
    bits = [*negative, *(low >> i & 1 for low, _, _ in parts for i in range(b))]
    if tripled:
        bits += [int(digit > 0) for _, digit, _ in parts] + [digit - 1 for _, digit, _ in parts if digit]
    return bits + [bit for _, _, quotient in parts for bit in [0] * quotient + [1]]


def packed(bits: Sequence[int]) -> bytes:
    return bytes(sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))


def block(positions: Sequence[int], negative: Sequence[int], parameter: int, coding: int = 2) -> tuple[bytes, bytes]:
    """(what the index says of a block, its bytes in the payload)."""
    if not positions:
        return b"\0", b""
    one = [planes1(positions, negative, parameter)] if coding == 1 else planes(positions, negative, parameter)
    payload = b"".join(map(packed, one))
    return varint(len(positions)) + bytes([parameter]) + varint(len(payload)), payload


def stream(entries: int, levels: dict[int, int], parameter: int = 2, log2: int = 12, coding: int = 2) -> bytes:
    """The stream of a tensor of `entries` whose non-zeros are `levels` (-1 or +1 by position); under coding 1 full blocks get parameter 255."""
    out = b""
    for chunk in range(0, entries, CHUNK):
        end = min(chunk + CHUNK, entries)
        blocks = []
        for start in range(chunk, end, 1 << log2):
            size = min(1 << log2, end - start)
            inside = [p for p in sorted(levels) if start <= p < start + size]
            signs = [int(levels[p] < 0) for p in inside]
            blocks.append(block([p - start for p in inside], signs, 255 if coding == 1 and len(inside) == size else parameter, coding))
        out += bytes([log2]) + b"".join(index for index, _ in blocks) + b"".join(payload for _, payload in blocks)
    return out


# Table


@dataclass
class Levels:
    """A ternary tensor as its row tells of it; `length` lies about the stream's where it is given."""

    shape: int
    stream: bytes
    coding: int = 2
    length: int | None = None
    scale: bytes = struct.pack("<f", 0.25)

    def row(self, scaled: bool) -> bytes:
        return varint(self.coding, self.shape, len(self.stream) if self.length is None else self.length) + (self.scale if scaled else b"")


@dataclass
class Bits:
    """What a lossless row tells of its tensor."""

    dtype: int
    shape: int
    stream: bytes
    digest: bytes
    coding: int = 1
    length: int | None = None

    def row(self, scaled: bool) -> bytes:
        return varint(self.dtype, self.coding, self.shape, len(self.stream) if self.length is None else self.length) + self.digest


@dataclass
class Row:
    """A row: its kind, the number of its name (0 and a name of its own for a tensor that the base lacks), the kind's fields, what it codes."""

    kind: int
    number: int
    own: str | bytes = ""
    fields: bytes = b""
    levels: Sequence[Levels | Bits | Numbers] = ()

    def bytes(self, scaled: bool) -> bytes:
        name = varint(self.number) + (b"" if self.number else text(self.own))
        return varint(self.kind) + name + self.fields + b"".join(levels.row(scaled) for levels in self.levels)


def name_table(names: Sequence[str]) -> bytes:
    parts = list(dict.fromkeys(part for name in names for part in name.split(".")))
    out = varint(len(parts)) + b"".join(text(part) for part in parts) + varint(len(names))
    before: list[str] = []
    for name in names:
        now = name.split(".")
        shared = 0
        while shared < min(len(before), len(now)) and before[shared] == now[shared]:
            shared += 1
        out += varint(shared, len(now) - shared, *(parts.index(part) for part in now[shared:]))
        before = now
    return out


def shape_table(shapes: Sequence[Sequence[int]]) -> bytes:
    return varint(len(shapes)) + b"".join(varint(len(shape), *shape) for shape in shapes)


# File

Tensor = tuple[str, str, Sequence[int], bytes]


def header_of(metadata: Any, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The header as JSON; the checksum's tensor last."""
    header: dict[str, Any] = {"__metadata__": {"sterna": metadata}}
    at = 0
    for name, dtype, shape, data in (*tensors, ("sterna.sha256", "U8", [32], bytes(32))):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    return header


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def signed(body: bytes) -> bytes:
    """A file's bytes with the checksum at their end."""
    return body + hashlib.sha256(body).digest()


def signed_again(file: bytes) -> bytes:
    """The same file with its last 32 bytes replaced by the checksum of the rest."""
    return signed(file[:-32])


def framed(header: str | bytes, body: bytes) -> bytes:
    """Header and tensors as a file, signed."""
    raw = header.encode() if isinstance(header, str) else header
    raw += b" " * (-len(raw) % 8)
    return signed(struct.pack("<Q", len(raw)) + raw + body)


@dataclass
class Draft:
    """A file in pieces. A piece given as bytes stands for itself."""

    facts: Any
    names: Sequence[str] | bytes
    shapes: Sequence[Sequence[int]] | bytes
    rows: list[Row]
    exact: list[Tensor] = field(default_factory=list)
    shorts: bytes | None = None
    row_count: int | None = None
    table_tail: bytes = b""
    streams_tail: bytes = b""
    header: Callable[[dict[str, Any]], Any] = lambda header: None

    @property
    def streams(self) -> bytes:
        return b"".join(levels.stream for row in self.rows for levels in row.levels) + self.streams_tail

    @property
    def table(self) -> bytes:
        scaled = isinstance(self.facts, dict) and self.facts.get("scope") == "tensor"
        names = self.names if isinstance(self.names, bytes) else name_table(self.names)
        shorts = self.shorts if self.shorts is not None else b"" if isinstance(self.names, bytes) else bytes(9 * len(self.names))
        shapes = self.shapes if isinstance(self.shapes, bytes) else shape_table(self.shapes)
        count = varint(len(self.rows) if self.row_count is None else self.row_count)
        return names + shorts + shapes + count + b"".join(row.bytes(scaled) for row in self.rows) + self.table_tail

    @property
    def metadata(self) -> str:
        return self.facts if isinstance(self.facts, str) else json.dumps(self.facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.exact, ("sterna.table", "U8", [len(self.table)], self.table), ("sterna.streams", "U8", [len(self.streams)], self.streams)]

    def file(self) -> bytes:
        header = header_of(self.metadata, self.tensors)
        changed = self.header(header)
        return framed(compact(header if changed is None else changed), b"".join(data for _, _, _, data in self.tensors))

    def but(self, **pieces: Any) -> Draft:
        """A copy with other pieces."""
        other = copy.deepcopy(self)
        for name, piece in pieces.items():
            setattr(other, name, piece)
        return other


# Specimens: sound files


def facts(**changes: Any) -> dict[str, Any]:
    """Sound facts, with fields changed, or taken away where None is given."""
    base = {"name": "tiny", "fingerprint": "ab" * 32, "parameters": 100_000}
    whole = {
        "format": 1, "method": "compeft", "source": "full", "density": 0.1, "alpha": 4.0, "scope": "global", "scale": 0.5, "base": base,
        "writer": "craft",
    }  # fmt: skip
    return {key: value for key, value in (whole | changes).items() if value is not None}


def exact_facts(**changes: Any) -> dict[str, Any]:
    """Sound facts of an expert that PaFi trained, its values exact."""
    told = {"rule": 1, "order": "smallest"}
    return facts(**({"method": "exact", "source": "pafi", "density": None, "alpha": None, "scale": None, "mask": told} | changes))


def plain() -> Draft:
    """Two added tensors: one of two blocks (b = 1 and tripled), one of 12 entries of which 3 are not zero."""
    levels = {5: 1, 6: -1, 700: 1, 4095: -1, 4096: -1, 4999: 1}
    rows = [
        Row(ADD, 1, levels=[Levels(0, stream(5000, levels, parameter=2 * 8 + 1))]),
        Row(ADD, 2, levels=[Levels(1, stream(12, {0: -1, 4: 1, 11: 1}, parameter=2))]),
    ]
    return Draft(facts(), ["a.0.w", "a.1.b", "b"], [(50, 100), (12,)], rows)


def scaled() -> Draft:
    """The same with a scale for each tensor."""
    return plain().but(facts=facts(scope="tensor", scale=0.0))


def kinds() -> Draft:
    """A change of every kind, and exact tensors in every role."""
    names = ["a.weight", "b.bias", "b.weight", "c.weight", "d.running_var", "e.weight", "f.weight", "g.bias"]
    full = {p: 1 if p % 3 else -1 for p in range(20)}
    rows = [
        Row(ADD, 1, levels=[Levels(0, stream(20, full))]),
        Row(MULTIPLY, 3, fields=varint(0, 1) + text("b") + text("b.bias"), levels=[Levels(1, stream(6, {1: -1, 2: 1}, parameter=0))]),
        Row(FACTORS, 4, fields=varint(1) + text("c") + struct.pack("<d", 2.0), levels=[
            Levels(2, stream(14, {0: 1, 9: -1}, parameter=3)), Levels(3, stream(10, {3: -1, 7: 1}, parameter=4)),
        ]),
        Row(SET, 0, "classifier.weight", varint(0, 0)),
        Row(SET, 5, fields=varint(1, 0)),
        Row(ADD, 6, levels=[Levels(4, stream(9000, {8999: -1}, parameter=2 * 12))]),
        Row(SET, 6, fields=varint(2, 900)),
        Row(SET, 7, fields=varint(4, 0)),
        Row(SET, 0, "lm_head.weight", varint(3, 0)),
    ]  # fmt: skip
    exact: list[Tensor] = [
        ("d.running_var", "I64", [2], struct.pack("<2q", 1, 2)),
        ("classifier.weight", "F32", [2, 3], struct.pack("<6f", *range(6))),
        ("e.weight", "BF16", [1, 10], bytes(20)),
        ("lm_head.weight", "F16", [4], bytes(8)),
        ("f.weight", "BOOL", [3], bytes([1, 0, 1])),
    ]
    return Draft(facts(source="lora", config={"num_beams": 4}), names, [(4, 5), (6,), (2, 7), (5, 2), (900, 10)], rows, exact)


def mask(order: int, count: int, chosen: Sequence[int], names: int, *, seed: int = 0, form: int = 0) -> bytes:
    """The fields of a masked row over the tensors of those numbers, counted from 0."""
    bits = sum(1 << number for number in chosen)
    return varint(order, count, seed) + bits.to_bytes((names + 7) // 8, "little") + varint(form)


def trained() -> Draft:
    """What PaFi and HiWi leave: masked values, a folded weight, a tuned bias, a head in 8 bit."""
    names = [f"layer.{i}.{name}" for i in range(5) for name in ("bias", "weight")]
    rows = [
        Row(SET, 1, fields=varint(5, 0)),
        Row(FOLDED, 2, fields=varint(1 | 4) + struct.pack("<d", 0.5)),
        Row(MASKED, 3, fields=mask(0, 6, [2, 4, 9], 10)),
        Row(SET, 0, "score.weight", varint(0, 1)),
    ]
    exact: list[Tensor] = [
        ("layer.0.weight.D", "F32", [3, 2], struct.pack("<6f", *range(6))),
        ("layer.0.weight.U", "F32", [2, 3], struct.pack("<6f", *range(6))),
        ("score.weight.scales", "F32", [2], struct.pack("<2f", 0.5, 0.0)),
        ("layer.0.bias", "BF16", [3], bytes(6)),
        ("sterna.values", "F16", [6], struct.pack("<6e", *range(6))),
        ("score.weight", "I8", [2, 3], bytes(range(6))),
    ]
    return Draft(exact_facts(), names, [], rows, exact)


def masked() -> Draft:
    """A masked row of levels, of a random mask."""
    levels = Levels(0, stream(70, {p: 1 if p % 3 else -1 for p in range(0, 70, 2)}, parameter=0))
    rows = [Row(MASKED, 1, fields=mask(2, 70, range(3), 3, seed=(1 << 53) - 1, form=1), levels=[levels])]
    told = {"rule": 1, "order": "random", "seed": (1 << 53) - 1, "density": 0.25}
    return Draft(facts(source="pafi", mask=told, tuning={"method": "pafi"}), ["a", "b", "c"], [(70,)], rows)


def first_coding() -> Draft:
    """Streams of coding 1: with M = 2, with M = 3 * 256, and a block without zeros."""
    levels = {5: 1, 6: -1, 700: 1, 4095: -1, 4096: -1, 4999: 1}
    streams = [
        stream(5000, levels, 2 * 8 + 1, coding=1),
        stream(12, {0: -1, 4: 1, 11: 1}, coding=1),
        stream(9, dict.fromkeys(range(9), -1), coding=1),
    ]
    rows = [Row(ADD, 1 + i, levels=[Levels(i, raw, coding=1)]) for i, raw in enumerate(streams)]
    return Draft(facts(), ["a.0.w", "a.1.b", "b"], [(50, 100), (12,), (9,)], rows)


BITS = bytes.fromhex("0c 02 0d 08 00 88 92 5a 77 5e af ed 9b 68 dd 8e 04 ba")
"""The stream of the first test vector of lossless coding 1: 12 of 6 x 5 entries in bfloat16 changed."""


def lossless_facts(**changes: Any) -> dict[str, Any]:
    return facts(**({"method": "lossless", "density": None, "alpha": None, "scale": None, "parameters": 100} | changes))


def lossless() -> Draft:
    """Bits of a matrix and of a vector, an equal tensor in another dtype, and an exact head."""
    rows = [
        Row(LOSSLESS, 1, levels=[Bits(2, 0, BITS, bytes(range(16)))]),
        Row(LOSSLESS, 2, levels=[Bits(0, 1, bytes.fromhex("01 00 01 35"), bytes(16))]),
        Row(LOSSLESS, 3, levels=[Bits(1, 1, b"\0", bytes(16))]),
        Row(SET, 0, "score.weight", varint(0, 0)),
    ]
    return Draft(lossless_facts(), ["a", "b", "c"], [(6, 5), (3, 1)], rows, [("score.weight", "BF16", [4], bytes(8))])


def merge_facts(**changes: Any) -> dict[str, Any]:
    told = {"merge_method": "ties", "models": [{"model": "a.safetensors", "task": "a"}]}
    given = {"method": "merge", "density": None, "alpha": None, "scale": None, "scope": "tensor", "merge": told, "heads": {"a": {}, "b": {}}}
    return facts(**(given | changes))


def palette_of(magnitudes: Sequence[float], scales: Sequence[float] = (), masks: Sequence[int] = ()) -> bytes:
    """A palette as the first row that uses it tells of it."""
    floats = struct.pack(f"<{len(magnitudes) + len(scales)}f", *magnitudes, *scales)
    return varint(len(magnitudes), len(scales)) + floats + b"".join(mask.to_bytes((len(scales) + 7) // 8, "little") for mask in masks)


def numbers_of(numbers: Sequence[int], frequencies: Sequence[int]) -> bytes:
    """The numbers of a palette's non-zeros, at most 65,536 of them, under these frequencies."""
    x, out = 1 << 23, bytearray()
    for number in reversed(numbers):
        while x >= frequencies[number] << 15:
            out.append(x & 255)
            x >>= 8
        x = (x // frequencies[number] << 16) + x % frequencies[number] + sum(frequencies[:number])
    block = x.to_bytes(4, "big") + bytes(reversed(out))
    return varint(*frequencies, len(block)) + block


@dataclass
class Numbers:
    """What a palette's row tells behind its levels: the palette's number, the palette where it is new, the length of the numbers."""

    stream: bytes
    number: int = 0
    palette: bytes = b""
    length: int | None = None

    def row(self, scaled: bool) -> bytes:
        return varint(self.number) + self.palette + varint(len(self.stream) if self.length is None else self.length)


NINE = (0, 1, 2, 3, 4, 4, 0, 3, 1)
"""The numbers of the nine non-zeros of `merged`."""


def merged() -> Draft:
    """A palette of five magnitudes over nine non-zeros, twice, an added tensor, and heads of two tasks, one of them in 8 bit."""
    levels = Levels(1, stream(20, {2 * i: 1 if i % 2 else -1 for i in range(9)}), scale=b"")
    numbers, again = (numbers_of(NINE, frequencies) for frequencies in ((20000, 10000, 5536, 20000, 10000), (1, 1, 1, 1, 65532)))
    rows = [
        Row(ADD, 1, levels=[Levels(0, stream(12, {3: 1}))]),
        Row(SET, 0, "score.weight", varint(0, 2) + text("a")),
        Row(SET, 0, "score.weight", varint(0, 3) + text("b")),
        Row(PALETTE, 2, levels=[levels, Numbers(numbers, 0, palette_of([0.25, 0.5, 0.75, 1.0, 1.5]))]),
        Row(PALETTE, 3, levels=[levels, Numbers(again, 0)]),
    ]
    exact: list[Tensor] = [
        ("b:score.weight.scales", "F32", [2], struct.pack("<2f", 0.5, 0.0)),
        ("a:score.weight", "BF16", [4], bytes(8)),
        ("b:score.weight", "I8", [2, 3], bytes(range(6))),
    ]
    return Draft(merge_facts(), ["a.bias", "w", "x"], [(12,), (4, 5)], rows, exact)


def recovering() -> Draft:
    """Palettes with masks of two tasks: of three magnitudes, two of them equal; of one magnitude; and of no non-zero."""
    levels = Levels(0, stream(20, {2 * i: 1 for i in range(4)}), scale=b"")
    three, one = palette_of([0.25, 0.5, 0.5], [1.5, 0.0], [1, 2, 3]), palette_of([0.5], [1.5, 0.0], [2])
    rows = [
        Row(PALETTE, 1, levels=[levels, Numbers(numbers_of([0, 1, 2, 0], [40000, 20000, 5536]), 0, three)]),
        Row(PALETTE, 2, levels=[levels, Numbers(b"", 1, one)]),
        Row(PALETTE, 3, levels=[Levels(0, stream(20, {}), scale=b""), Numbers(b"", 0)]),
    ]
    return Draft(merge_facts(), ["a", "b", "c"], [(4, 5)], rows)


def adapters() -> Draft:
    """Merged adapters: stacked ternary factors with a scale for each rank, exact factors, and an exact vector of (IA)3."""
    one = struct.pack("<f", 1.0)
    rows = [
        Row(FACTORS, 1, fields=varint(16) + text("m.a") + struct.pack("<d", 1.0), levels=[
            Levels(0, stream(14, {0: 1, 9: -1}), scale=one), Levels(1, stream(10, {3: -1, 7: 1}), scale=one),
        ]),
        Row(LOW_RANK, 2, fields=varint(1 | 4)),
        Row(MULTIPLY, 3, fields=varint(1, 4) + text("m.c")),
    ]  # fmt: skip
    exact: list[Tensor] = [
        ("a.weight.ranks", "F32", [2], struct.pack("<2f", 0.5, -0.25)),
        ("b.weight.A", "F32", [1, 3], struct.pack("<3f", *range(3))),
        ("b.weight.B", "F32", [2, 1], struct.pack("<2f", 1.0, -2.0)),
        ("c.weight.vector", "F32", [1, 3], struct.pack("<3f", 0.5, -0.25, 0.0)),
    ]
    return Draft(merge_facts(source="lora"), ["a.weight", "b.weight", "c.weight"], [(2, 7), (5, 2)], rows, exact)


def nothing() -> Draft:
    """An expert without a change, of a base without a tensor."""
    return Draft(facts(), [], [], [])


def edges() -> Draft:
    """A scalar, a tensor without entries, an empty chunk before a full one's beginning, and names whose parts are shared."""
    names = ["x", "x.y", "x.y.z", "x.yy", "y"]
    rows = [
        Row(ADD, 1, levels=[Levels(0, stream(1, {0: -1}))]),
        Row(ADD, 2, levels=[Levels(1, stream(0, {}))]),
        Row(ADD, 4, levels=[Levels(2, stream(CHUNK + 9, {CHUNK + 8: 1}, parameter=1, log2=20))]),
    ]
    return Draft(facts(), names, [(), (3, 0), (CHUNK + 9,)], rows)


SPECIMENS: dict[str, Callable[[], Draft]] = {
    "plain": plain,
    "scaled": scaled,
    "kinds": kinds,
    "nothing": nothing,
    "edges": edges,
    "trained": trained,
    "masked": masked,
    "first_coding": first_coding,
    "lossless": lossless,
    "merged": merged,
    "adapters": adapters,
    "recovering": recovering,
}
