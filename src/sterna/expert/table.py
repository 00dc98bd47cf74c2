"""The binary table: names, short digests of the base, shapes, and a row for every change. `docs/format.md` specifies it.

Integers are LEB128 varints unless said otherwise, floats IEEE little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from sterna.codings import U8, by_number
from sterna.errors import InvalidFile
from sterna.expert.changes import Add, Change, Factors, Multiply, Role, Set, Ternary
from sterna.fingerprint import SHORT, Fingerprint

MAX_NAMES = 1 << 20
MAX_NAME = 1024
MAX_DIMENSIONS = 8
MAX_ENTRIES = 1 << 48
_ROLES: tuple[Role, ...] = ("head", "buffer", "rows", "untied", "saved")
_ADD, _FACTORS, _MULTIPLY, _SET = range(4)


# Writing


def write_table(fingerprint: Fingerprint, changes: Iterable[Change], scaled: bool) -> bytes:
    """The table's bytes. `scaled` says that every ternary tensor has a scale of its own."""
    changes = tuple(changes)
    out = bytearray()
    _put_names(out, fingerprint.names)
    out += fingerprint.shorts.tobytes()
    shapes = list(dict.fromkeys(t.shape for change in changes for t in change.ternaries))
    _put(out, len(shapes))
    for shape in shapes:
        _put(out, len(shape), *shape)
    numbers = {name: i for i, name in enumerate(fingerprint.names)}
    _put(out, len(changes))
    for change in changes:
        _put_row(out, change, numbers, {shape: i for i, shape in enumerate(shapes)}, scaled)
    return bytes(out)


def _put(out: bytearray, *values: int) -> None:
    for value in values:
        while value >= 128:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)


def _put_text(out: bytearray, text: str) -> None:
    encoded = text.encode()
    _put(out, len(encoded))
    out += encoded


def _put_names(out: bytearray, names: tuple[str, ...]) -> None:
    """Sorted names as dotted parts: how many leading parts a name shares with the one before, and its new parts from a list of distinct parts."""
    parts = list(dict.fromkeys(part for name in names for part in name.split(".")))
    _put(out, len(parts))
    for part in parts:
        _put_text(out, part)
    numbers = {part: i for i, part in enumerate(parts)}
    _put(out, len(names))
    before: list[str] = []
    for name in names:
        now = name.split(".")
        shared = 0
        while shared < min(len(before), len(now)) and before[shared] == now[shared]:
            shared += 1
        _put(out, shared, len(now) - shared, *(numbers[part] for part in now[shared:]))
        before = now


def _put_row(out: bytearray, change: Change, numbers: Mapping[str, int], shapes: Mapping[tuple[int, ...], int], scaled: bool) -> None:
    kind = {Add: _ADD, Factors: _FACTORS, Multiply: _MULTIPLY, Set: _SET}[type(change)]
    out.append(kind)
    _put(out, numbers.get(change.name, -1) + 1)
    if change.name not in numbers:
        _put_text(out, change.name)
    match change:
        case Factors():
            _put(out, change.transposed | change.embedding << 1)
            _put_text(out, change.key)
            out += struct.pack("<d", change.scaling)
        case Multiply():
            _put(out, change.axis, int(change.bias is not None))
            _put_text(out, change.key)
            if change.bias is not None:
                _put_text(out, change.bias)
        case Set():
            _put(out, _ROLES.index(change.role), change.first_row)
    for ternary in change.ternaries:
        _put(out, ternary.coding.number, shapes[ternary.shape], ternary.stop - ternary.start)
        if scaled:
            out += struct.pack("<f", ternary.scale)


# Reading


@dataclass(slots=True)
class _Reader:
    """A cursor over bytes that raises InvalidFile instead of reading past the end."""

    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise InvalidFile("the table ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, limit: int, what: str) -> int:
        """A varint of at most 8 bytes, at most `limit`."""
        value = 0
        for shift in range(0, 56, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                break
        else:
            raise InvalidFile(f"the table's {what} is longer than 8 bytes")
        if value > limit:
            raise InvalidFile(f"the table's {what} is {value}; at most {limit} is possible")
        return value

    def text(self, what: str) -> str:
        try:
            text = self.take(self.number(MAX_NAME, f"{what} length")).decode()
        except UnicodeDecodeError:
            raise InvalidFile(f"the table's {what} is not UTF-8") from None
        if not text.isprintable():
            raise InvalidFile(f"the table's {what} {text!r} is not printable")
        return text

    def floating(self, layout: str, what: str) -> float:
        value: float = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        if not math.isfinite(value):
            raise InvalidFile(f"the table's {what} is {value}; expected a finite number")
        return value

    @property
    def left(self) -> int:
        return len(self.data) - self.at


@dataclass(slots=True)
class _Streams:
    """Deals out the bytes of the streams tensor in the order of the rows."""

    data: U8
    at: int
    stop: int
    scale: float | None
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def ternary(self, reader: _Reader) -> Ternary:
        coding = by_number(reader.number(255, "coding"))
        shape = self.shapes[reader.number(len(self.shapes) - 1, "shape number")]
        length = reader.number(self.stop - self.at, "stream length")
        scale = reader.floating("<f", "scale") if self.scale is None else self.scale
        if scale < 0:
            raise InvalidFile(f"the table's scale is {scale}; expected 0 or more")
        start, self.at = self.at, self.at + length
        return Ternary.open(shape, scale, coding, data=self.data, start=start, stop=self.at)


def read_table(
    table: bytes, digest: bytes, data: U8, start: int, stop: int, scale: float | None, exact: Callable[[str], torch.Tensor]
) -> tuple[Fingerprint, tuple[Change, ...]]:
    """Fingerprint and changes from the table's bytes and the streams data[start:stop].

    `scale` is the global one, None where every ternary tensor has its own; `exact` gives an exact tensor by name and raises InvalidFile.
    Raises InvalidFile for whatever breaks a rule, and allocates no more than the bytes that are there justify.
    """
    reader = _Reader(table)
    names = _names(reader)
    shorts = np.frombuffer(reader.take(len(names) * 3 * SHORT), np.uint8).reshape(len(names), 3, SHORT)
    streams = _Streams(data, start, stop, scale)
    for _ in range(reader.number(reader.left, "number of shapes")):
        shape = tuple(reader.number(MAX_ENTRIES, "dimension") for _ in range(reader.number(MAX_DIMENSIONS, "number of dimensions")))
        if math.prod(shape) > MAX_ENTRIES:
            raise InvalidFile(f"the table has a shape {shape} of more than {MAX_ENTRIES} entries")
        streams.shapes.append(shape)
    changes: list[Change] = []
    for _ in range(reader.number(reader.left, "number of changes")):
        changes.append(_row(reader, names, streams, exact))
        if len(changes) > 1 and not changes[-2].name < changes[-1].name and not _rows_after_add(*changes[-2:]):
            raise InvalidFile(f"the table's rows are not in order of their names at {changes[-1].name!r}")
    if reader.left or streams.at != stop:
        raise InvalidFile(f"{reader.left} bytes of the table and {stop - streams.at} bytes of the streams belong to nothing")
    return Fingerprint(names, digest, shorts), tuple(changes)


def _rows_after_add(first: Change, second: Change) -> bool:
    """The one pair of changes that may share a name: an embedding's old rows, then those it gained."""
    return first.name == second.name and not isinstance(first, Set) and isinstance(second, Set) and second.role == "rows"


def _names(reader: _Reader) -> tuple[str, ...]:
    parts = [reader.text("name part") for _ in range(reader.number(reader.left, "number of name parts"))]
    names: list[str] = []
    before: list[str] = []
    for _ in range(reader.number(min(reader.left, MAX_NAMES), "number of names")):
        shared = reader.number(len(before), "shared name parts")
        now = before[:shared] + [parts[reader.number(len(parts) - 1, "name part")] for _ in range(reader.number(64, "new name parts"))]
        if len(now) > 64 or sum(map(len, now)) + len(now) > MAX_NAME:
            raise InvalidFile(f"the table has a name of more than {MAX_NAME} characters")
        names.append(".".join(now))
        before = now
        if len(names) > 1 and not names[-2] < names[-1]:
            raise InvalidFile(f"the table's names are not sorted at {names[-1]!r}")
    return tuple(names)


def _row(reader: _Reader, names: tuple[str, ...], streams: _Streams, exact: Callable[[str], torch.Tensor]) -> Change:
    kind = reader.number(3, "kind of change")
    number = reader.number(len(names), "name")
    name = names[number - 1] if number else reader.text("name")
    if kind == _ADD:
        return Add(name, streams.ternary(reader))
    if kind == _FACTORS:
        flags = reader.number(3, "flags")
        key = reader.text("key")
        scaling = reader.floating("<d", "scaling")
        change = Factors(name, key, streams.ternary(reader), streams.ternary(reader), scaling, bool(flags & 1), bool(flags & 2))
        if len(change.A.shape) < 2 or len(change.B.shape) < 2 or change.A.shape[0] != change.B.shape[1]:
            raise InvalidFile(f"the factors of {name} have shapes {change.A.shape} and {change.B.shape}; expected [r, in] and [out, r]")
        return change
    if kind == _MULTIPLY:
        axis = reader.number(MAX_DIMENSIONS - 1, "axis")
        biased = reader.number(1, "flag")
        key = reader.text("key")
        bias = reader.text("bias") if biased else None
        return Multiply(name, key, streams.ternary(reader), axis, bias)
    role = _ROLES[reader.number(len(_ROLES) - 1, "role")]
    first_row = reader.number(MAX_ENTRIES, "first row")
    return Set(name, exact(name), role, first_row)
