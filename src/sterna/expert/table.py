"""The binary table: names, short digests of the base, shapes, and a row for every change. `docs/format.md` specifies it.

Integers are LEB128 varints unless said otherwise, floats IEEE little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from sterna.codings import U8, by_number, lossless
from sterna.errors import InvalidArgument, InvalidFile
from sterna.expert.changes import (
    DIGEST,
    VALUES,
    Activation,
    Add,
    Change,
    Factors,
    Folded,
    Lossless,
    LowRank,
    Masked,
    MaskRule,
    Multiply,
    Order,
    Product,
    Role,
    Set,
    Ternary,
    coded_shapes,
    exact_name,
    needs_base,
    touched,
)
from sterna.expert.palette import MOST, MOST_TASKS, Palette, decoded_numbers, entries_fault, palette_fault
from sterna.fingerprint import SHORT, Fingerprint

MAX_NAMES = 1 << 18
"""Names, distinct parts of names, shapes, and rows, at most so many of each."""
MAX_NAME = 1024
MAX_NAME_PARTS = 64
MAX_NAMES_TEXT = 1 << 26
"""Bytes of a name, its dotted parts, and bytes of all the base's names, at most: shared parts make names longer than their table."""
MAX_DIMENSIONS = 8
MAX_ENTRIES = 1 << 48
_ROLES: tuple[Role, ...] = ("head", "buffer", "rows", "untied", "saved", "tuned")
_ORDERS: tuple[Order, ...] = ("smallest", "largest", "random")
_ACTIVATIONS: tuple[Activation, ...] = ("relu", "gelu", "identity")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ADD, _FACTORS, _MULTIPLY, _SET, _MASKED, _FOLDED, _LOSSLESS, _PALETTE, _LOW_RANK = range(9)
_KINDS = {
    Add: _ADD, Factors: _FACTORS, Multiply: _MULTIPLY, Set: _SET, Masked: _MASKED, Folded: _FOLDED, Lossless: _LOSSLESS, Palette: _PALETTE,
    LowRank: _LOW_RANK,
}  # fmt: skip
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def name_fault(name: str) -> str | None:
    """Why a text cannot be the name of a tensor or module, or None. Nothing that reads as a path: names end up in terminals and file names."""
    if len(name.encode(errors="replace")) > MAX_NAME or name.count(".") >= MAX_NAME_PARTS:
        return f"is longer than {MAX_NAME} bytes or {MAX_NAME_PARTS} parts"
    if not name or not name.isprintable():
        return "is not printable text"
    if "\\" in name or name[0] == "/" or ".." in name.split("/"):
        return "is a path"
    return None


@dataclass(slots=True)
class _Before:
    """What the rows before tell of the next one: what an adapter's key has before the module's own name, and its scaling; the palettes so far."""

    lead: str | None = None
    scaling: bytes | None = None
    palettes: dict[bytes, int] = field(default_factory=dict)

    def key(self, name: str) -> str | None:
        return None if self.lead is None else self.lead + name.rpartition(".")[0]

    def learn(self, name: str, key: str) -> None:
        module = name.rpartition(".")[0]
        self.lead = key.removesuffix(module) if key.endswith(module) else None


# Writing


def write_table(fingerprint: Fingerprint, changes: Iterable[Change], scaled: bool) -> bytes:
    """The table's bytes. `scaled` says that every ternary tensor has a scale of its own. Raises InvalidArgument for what no reader takes."""
    changes = tuple(changes)
    _refuse_unreadable(fingerprint, changes)
    out = bytearray()
    _put_names(out, fingerprint.names)
    out += fingerprint.shorts.tobytes()
    shapes = list(dict.fromkeys(shape for change in changes for shape in coded_shapes(change)))
    _put(out, len(shapes))
    for shape in shapes:
        _put(out, len(shape), *shape)
    numbers = {name: i for i, name in enumerate(fingerprint.names)}
    _put(out, len(changes))
    before = _Before()
    for change in changes:
        _put_row(out, change, before, numbers, {shape: i for i, shape in enumerate(shapes)}, scaled)
    return bytes(out)


def _palette_bytes(change: Palette) -> bytes:
    """Magnitudes, and where tasks have masks these and the tasks' scales."""
    out = bytearray()
    _put(out, change.magnitudes.numel(), change.tasks)
    out += change.magnitudes.numpy().astype("<f4").tobytes()
    if change.scales is not None and change.members is not None:
        out += change.scales.numpy().astype("<f4").tobytes()
        out += change.members.numpy().astype("<u8").view(np.uint8).reshape(-1, 8)[:, : (change.tasks + 7) // 8].tobytes()
    return bytes(out)


def _refuse_unreadable(fingerprint: Fingerprint, changes: tuple[Change, ...]) -> None:
    keys = [change.key for change in changes if isinstance(change, Product | Multiply)]
    for name in (*fingerprint.names, *(change.name for change in changes), *_biases(changes), *keys):
        if fault := name_fault(name):
            raise InvalidArgument(f"the name {name[:80]!r} {fault}, which an expert cannot hold")
    if max(len(fingerprint.names), len(changes)) > MAX_NAMES or sum(map(len, fingerprint.names)) > MAX_NAMES_TEXT:
        raise InvalidArgument(f"the base has {len(fingerprint.names)} tensors, the expert {len(changes)} changes; at most {MAX_NAMES} fit")
    if any(not first < second for first, second in pairwise(fingerprint.names)):
        raise InvalidArgument("the fingerprint's names are not sorted and distinct")
    for change in changes:
        if fault := _change_fault(change):
            raise InvalidArgument(f"the expert's change of {change.name} {fault}")
    of_base = [name for change in changes if needs_base(change) for name in touched(change)]
    if lost := set(of_base) - set(fingerprint.names):
        raise InvalidArgument(f"the expert tunes {min(lost)!r}, which its base's fingerprint does not name")
    if fault := _rows_fault(changes):
        raise InvalidArgument(f"the expert's {fault}")
    for shape in {shape for change in changes for shape in coded_shapes(change)}:
        if len(shape) > MAX_DIMENSIONS or _extent(shape) > MAX_ENTRIES:
            raise InvalidArgument(f"a tensor has shape {shape}; at most {MAX_DIMENSIONS} dimensions and 2^48 entries fit")


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


def _put_row(
    out: bytearray, change: Change, before: _Before, numbers: Mapping[str, int], shapes: Mapping[tuple[int, ...], int], scaled: bool
) -> None:
    out.append(_KINDS[type(change)])
    _put(out, numbers.get(change.name, -1) + 1)
    if change.name not in numbers:
        _put_text(out, change.name)
    match change:
        case Factors():
            scaling = struct.pack("<d", change.scaling)
            known, same = change.key == before.key(change.name), scaling == before.scaling
            _put(out, change.transposed | change.embedding << 1 | known << 2 | same << 3 | (change.ranks is not None) << 4)
            if not known:
                _put_text(out, change.key)
            if not same:
                out += scaling
            before.learn(change.name, change.key)
            before.scaling = scaling
        case LowRank():
            known = change.key == before.key(change.name)
            _put(out, change.transposed | change.embedding << 1 | known << 2)
            if not known:
                _put_text(out, change.key)
            before.learn(change.name, change.key)
        case Multiply():
            known = change.key == before.key(change.name)
            _put(out, change.axis, (change.bias is not None) | known << 1 | (not change.ternaries) << 2)
            if not known:
                _put_text(out, change.key)
            before.learn(change.name, change.key)
            if change.bias is not None:
                _put_text(out, change.bias)
        case Set():
            flags = (change.scales is not None) | bool(change.task) << 1
            _put(out, _ROLES.index(change.role), flags if change.role == "head" else change.first_row)
            if change.task:
                _put_text(out, change.task)
        case Masked(rule=rule):
            _put(out, _ORDERS.index(rule.order), rule.count, rule.seed)
            chosen = set(rule.names)
            out += np.packbits([name in chosen for name in numbers], bitorder="little").tobytes()
            out.append(len(change.ternaries))
        case Folded():
            _put(out, _ACTIVATIONS.index(change.activation) | change.transposed << 2)
            out += struct.pack("<d", change.scale)
        case Lossless():
            _put(out, _FLOATS.index(change.dtype), lossless.NUMBER, shapes[change.shape], change.stop - change.start)
            out += change.digest
    for ternary in change.ternaries:
        _put(out, ternary.coding.number, shapes[ternary.shape], ternary.stop - ternary.start)
        if scaled and not isinstance(change, Palette):
            out += struct.pack("<f", ternary.scale)
    if isinstance(change, Palette):
        entries = _palette_bytes(change)
        new = entries not in before.palettes
        _put(out, before.palettes.setdefault(entries, len(before.palettes)))
        if new:
            out += entries
        _put(out, change.coded.size)


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
            raise InvalidFile(f"the table's {what} {text[:80]!r} is not printable")
        return text

    def name(self, what: str) -> str:
        name = self.text(what)
        if fault := name_fault(name):
            raise InvalidFile(f"the table's {what} {name[:80]!r} {fault}")
        return name

    def floating(self, layout: str, what: str) -> float:
        value: float = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        if not math.isfinite(value):
            raise InvalidFile(f"the table's {what} is {value}; expected a finite number")
        return value

    @property
    def left(self) -> int:
        return len(self.data) - self.at


_Entries = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""A palette's magnitudes, masks and scales."""


@dataclass(slots=True)
class _Streams:
    """Deals out the bytes of the streams tensor in the order of the rows."""

    data: U8
    at: int
    stop: int
    scale: float | None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    palettes: list[_Entries] = field(default_factory=list)

    def ternary(self, reader: _Reader, given: float | None = None) -> Ternary:
        """The next ternary tensor; `given` is a scale that its row does not tell."""
        coding = by_number(reader.number(255, "coding"))
        shape = self.shapes[reader.number(len(self.shapes) - 1, "shape number")]
        length = reader.number(self.stop - self.at, "stream length")
        known = self.scale if given is None else given
        scale = reader.floating("<f", "scale") if known is None else known
        if scale < 0:
            raise InvalidFile(f"the table's scale is {scale}; expected 0 or more")
        start, self.at = self.at, self.at + length
        return Ternary.open(shape, scale, coding, data=self.data, start=start, stop=self.at)

    def palette(self, reader: _Reader, name: str) -> Palette:
        levels = self.ternary(reader, 1.0)
        number = reader.number(len(self.palettes), "palette number")
        if number == len(self.palettes):
            self.palettes.append(_palette(reader, name))
        magnitudes, members, scales = self.palettes[number]
        start, self.at = self.at, self.at + reader.number(self.stop - self.at, "length of numbers")
        indices = decoded_numbers(self.data, start, self.at, levels.count, magnitudes.numel(), name)
        return Palette(name, levels, magnitudes, indices, members, scales)

    def lossless(self, reader: _Reader, name: str) -> Lossless:
        dtype = _FLOATS[reader.number(len(_FLOATS) - 1, "dtype")]
        if (coding := reader.number(255, "lossless coding")) != lossless.NUMBER:
            raise InvalidFile(f"the file uses lossless coding {coding}, which this version of Sterna does not know; a newer Sterna may read it")
        shape = self.shapes[reader.number(len(self.shapes) - 1, "shape number")]
        start, self.at = self.at, self.at + reader.number(self.stop - self.at, "stream length")
        return Lossless.open(name, shape, dtype, reader.take(DIGEST), self.data, start, self.at)


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
    for _ in range(reader.number(min(reader.left, MAX_NAMES), "number of shapes")):
        shape = tuple(reader.number(MAX_ENTRIES, "dimension") for _ in range(reader.number(MAX_DIMENSIONS, "number of dimensions")))
        if _extent(shape) > MAX_ENTRIES:
            raise InvalidFile(f"the table has a shape {shape} of more than 2^48 entries")
        streams.shapes.append(shape)
    before = _Before()
    changes = [_row(reader, before, names, streams, exact) for _ in range(reader.number(min(reader.left, MAX_NAMES), "number of changes"))]
    if fault := _rows_fault(changes):
        raise InvalidFile(f"the table's {fault}")
    if reader.left or streams.at != stop:
        raise InvalidFile(f"{reader.left} bytes of the table and {stop - streams.at} bytes of the streams belong to nothing")
    return Fingerprint(names, digest, shorts), tuple(changes)


def _extent(shape: tuple[int, ...]) -> int:
    """Entries of a shape, had it no empty axis: strides are made of all of them."""
    return math.prod(max(dimension, 1) for dimension in shape)


def _change_fault(change: Change) -> str | None:
    """What is wrong with the tensors of one change, or None."""
    match change:
        case Palette():
            return palette_fault(change)
        case Factors(ranks=torch.Tensor() as ranks):
            if ranks.dtype != torch.float32 or ranks.shape != change.A.shape[:1] or not bool(torch.isfinite(ranks).all()):
                return f"has scales {ranks.dtype} {tuple(ranks.shape)} of its {change.A.shape[0]} ranks; expected as many finite float32 numbers"
            if abs(change.scaling) * change.A.scale * change.B.scale * float(ranks.double().abs().sum()) > _LARGEST_FLOAT32:
                return "has scales of its ranks whose sum float32 cannot hold"
        case Multiply(vector=torch.Tensor() as vector):
            if vector.dtype != torch.float32 or not bool(torch.isfinite(vector).all()):
                return f"has a vector of {vector.dtype}; expected finite numbers in float32"
        case LowRank(A=A, B=B):
            fits = A.dim() >= 2 and B.dim() >= 2 and A.shape[0] == B.shape[1] and math.prod(B.shape[2:]) == 1 and A.numel() and B.numel()
            if A.dtype != torch.float32 or B.dtype != torch.float32 or not fits or B.shape[0] * (A.numel() // A.shape[0]) > MAX_ENTRIES:
                return f"has factors {A.dtype} {tuple(A.shape)} and {B.dtype} {tuple(B.shape)}; expected [r, in] and [out, r] in float32, none empty"
            largest = float(A.abs().max()) * float(B.abs().max()) * A.shape[0]
            if not largest <= _LARGEST_FLOAT32:
                return f"has factors whose product may reach {largest}, which float32 cannot hold"
        case Set(task=str() as task) if task and (change.role != "head" or name_fault(task)):
            return f"is a {change.role} of the task {task[:80]!r}; only a head has a task, named by printable text that is no path"
        case Set(scales=torch.Tensor() as scales, value=value):
            if change.role != "head" or value.dtype != torch.int8 or not value.dim():
                return f"has scales for {value.dtype} in the role {change.role}; expected an int8 head of rows"
            if scales.dtype != torch.float32 or scales.shape != value.shape[:1] or not bool((torch.isfinite(scales) & (scales >= 0)).all()):
                return f"has scales that are not {value.shape[0]} finite float32 numbers of 0 or more"
        case Masked(rule=rule, values=torch.Tensor() as values):
            if values.dtype not in _FLOATS or values.shape != (rule.count,) or not rule.count:
                return f"has {values.dtype} values of shape {tuple(values.shape)}; expected {rule.count} (1 or more) in float32, float16 or bfloat16"
        case Masked(rule=rule, values=Ternary(shape=shape)):
            if shape != (rule.count,) or not rule.count:
                return f"has levels of shape {shape}; expected {rule.count}, at least 1"
        case Lossless():
            if change.dtype not in _FLOATS or len(change.digest) != DIGEST:
                return f"is of {change.dtype} with a digest of {len(change.digest)} bytes; expected float32, float16 or bfloat16, and {DIGEST} bytes"
        case Folded(D=D, U=U):
            if D.dtype not in _FLOATS or U.dtype not in _FLOATS or D.dim() != 2 or U.shape != D.T.shape or not D.numel():
                return f"has factors of shapes {tuple(D.shape)} and {tuple(U.shape)}; expected [n, r] and [r, n] in float32, float16 or bfloat16"
            if not math.isfinite(change.scale):
                return f"has the scale {change.scale}; expected a finite number"
    return None


def _biases(changes: Iterable[Change]) -> list[str]:
    return [change.bias for change in changes if isinstance(change, Multiply) and change.bias is not None]


def _rows_fault(changes: Sequence[Change]) -> str | None:
    """What breaks the order of the rows, or changes one tensor twice; None where nothing does."""
    for first, second in pairwise(changes):
        if not first.name < second.name and not _rows_after_add(first, second) and not _other_task(first, second):
            return f"rows are not in order of their names at {second.name!r}"
    masks = [change for change in changes if isinstance(change, Masked)]
    if len(masks) > 1:
        return "masks are more than one"
    if masks and not {name for change in changes if change is not masks[0] for name in touched(change)}.isdisjoint(masks[0].rule.names):
        return "mask lies over a tensor that another row changes"
    biases = _biases(changes)
    twice = len(set(biases)) < len(biases) or not {change.name for change in changes}.isdisjoint(biases)
    return "biases are changed twice" if twice else None


def _rows_after_add(first: Change, second: Change) -> bool:
    """The one pair of changes that may share a name: an embedding's old rows, then those it gained."""
    return first.name == second.name and isinstance(first, Add | Product | Multiply | Lossless) and isinstance(second, Set) and second.role == "rows"


def _other_task(first: Change, second: Change) -> bool:
    """Whether two changes are heads of one name, of tasks in order."""
    return first.name == second.name and isinstance(first, Set) and isinstance(second, Set) and "" < first.task < second.task


def _names(reader: _Reader) -> tuple[str, ...]:
    parts = [reader.text("name part") for _ in range(reader.number(min(reader.left, MAX_NAMES), "number of name parts"))]
    if len(set(parts)) < len(parts):
        raise InvalidFile("the table's name parts are not distinct")
    names: list[str] = []
    before: list[str] = []
    text = 0
    for _ in range(reader.number(min(reader.left, MAX_NAMES), "number of names")):
        shared = reader.number(len(before), "number of shared name parts")
        new = reader.number(MAX_NAME_PARTS, "number of new name parts")
        before = before[:shared] + [parts[reader.number(len(parts) - 1, "name part")] for _ in range(new)]
        name = ".".join(before)
        if fault := name_fault(name):
            raise InvalidFile(f"the table's name {name[:80]!r} {fault}")
        if names and not names[-1] < name:
            raise InvalidFile(f"the table's names are not sorted at {name!r}")
        names.append(name)
        text += len(name)
        if text > MAX_NAMES_TEXT:
            raise InvalidFile(f"the table's names are longer than {MAX_NAMES_TEXT} characters together")
    return tuple(names)


def _key(reader: _Reader, before: _Before, name: str, known: bool) -> str:
    """The key of an adapter's row: the row's own, or made of the one before."""
    key = before.key(name) if known else reader.name("key")
    if key is None or (fault := name_fault(key)):
        raise InvalidFile(f"the table's key of {name} is to be made of the row before, " + ("which has none such" if key is None else f"but {fault}"))
    before.learn(name, key)
    return key


def _row(reader: _Reader, before: _Before, names: tuple[str, ...], streams: _Streams, exact: Callable[[str], torch.Tensor]) -> Change:
    kind = reader.number(_LOW_RANK, "kind of change")
    number = reader.number(len(names), "name")
    name = names[number - 1] if number else reader.name("name")
    if kind == _ADD:
        return Add(name, streams.ternary(reader))
    if kind == _PALETTE:
        return streams.palette(reader, name)
    if kind == _FACTORS:
        flags = reader.number(31, "flags")
        key = _key(reader, before, name, bool(flags & 4))
        if flags & 8 and before.scaling is None:
            raise InvalidFile(f"the table's scaling of {name} is to be that of the row before, which has none")
        scaling: float = struct.unpack("<d", before.scaling)[0] if flags & 8 and before.scaling else reader.floating("<d", "scaling")
        before.scaling = struct.pack("<d", scaling)
        ranks = exact(f"{name}.ranks") if flags & 16 else None
        change = Factors(name, key, streams.ternary(reader), streams.ternary(reader), scaling, bool(flags & 1), bool(flags & 2), ranks)
        A, B = change.A, change.B
        if len(A.shape) < 2 or len(B.shape) < 2 or A.shape[0] != B.shape[1] or math.prod(B.shape[2:]) != 1 or not A.size or not B.size:
            raise InvalidFile(f"the factors of {name} have shapes {A.shape} and {B.shape}; expected [r, in] and [out, r], none of them empty")
        if B.shape[0] * (A.size // A.shape[0]) > MAX_ENTRIES or abs(scaling) * A.scale * B.scale > _LARGEST_FLOAT32:
            raise InvalidFile(f"the product of the factors of {name} has more than 2^48 entries, or values that float32 cannot hold")
        if fault := _change_fault(change):
            raise InvalidFile(f"the table's change of {name} {fault}")
        return change
    if kind == _LOW_RANK:
        flags = reader.number(7, "flags")
        key = _key(reader, before, name, bool(flags & 4))
        low = LowRank(name, key, exact(f"{name}.A"), exact(f"{name}.B"), bool(flags & 1), bool(flags & 2))
        if fault := _change_fault(low):
            raise InvalidFile(f"the table's change of {name} {fault}")
        return low
    if kind == _MULTIPLY:
        axis = reader.number(MAX_DIMENSIONS - 1, "axis")
        flags = reader.number(7, "flags")
        key = _key(reader, before, name, bool(flags & 2))
        bias = reader.name("bias") if flags & 1 else None
        scaled = Multiply(name, key, exact(f"{name}.vector") if flags & 4 else streams.ternary(reader), axis, bias)
        if fault := _change_fault(scaled):
            raise InvalidFile(f"the table's change of {name} {fault}")
        return scaled
    if kind == _SET:
        return _set_row(reader, name, bool(number), exact)
    if not number:
        raise InvalidFile(f"the table tunes {name!r}, which is not a tensor of the base")
    if kind == _LOSSLESS:
        return streams.lossless(reader, name)
    made = _masked_row(reader, name, names, streams, exact) if kind == _MASKED else _folded_row(reader, name, exact)
    if fault := _change_fault(made):
        raise InvalidFile(f"the table's change of {name} {fault}")
    return made


def _palette(reader: _Reader, name: str) -> _Entries:
    """A palette that a row is the first to use."""
    many, tasks = reader.number(MOST, "number of magnitudes"), reader.number(MOST_TASKS, "number of tasks")
    magnitudes = torch.from_numpy(np.frombuffer(reader.take(4 * many), "<f4").astype(np.float32))
    members = scales = None
    if tasks:
        scales = torch.from_numpy(np.frombuffer(reader.take(4 * tasks), "<f4").astype(np.float32))
        width = (tasks + 7) // 8
        wide = np.zeros((many, 8), np.uint8)
        wide[:, :width] = np.frombuffer(reader.take(width * many), np.uint8).reshape(many, width)
        members = torch.from_numpy(wide.reshape(-1).view("<i8").astype(np.int64))
    if fault := entries_fault(magnitudes, members, scales):
        raise InvalidFile(f"the table's change of {name} {fault}")
    return magnitudes, members, scales


def _set_row(reader: _Reader, name: str, of_base: bool, exact: Callable[[str], torch.Tensor]) -> Set:
    role = _ROLES[reader.number(len(_ROLES) - 1, "role")]
    if role == "tuned" and not of_base:
        raise InvalidFile(f"the table tunes {name!r}, which is not a tensor of the base")
    number = reader.number({"rows": MAX_ENTRIES, "head": 3}.get(role, 0), "first row" if role == "rows" else "flags")
    if role == "rows" or not number:
        return Set(name, exact(name), role, number)
    task = reader.name("task") if number & 2 else ""
    own = exact_name(name, task)
    change = Set(name, exact(own), role, scales=exact(f"{own}.scales") if number & 1 else None, task=task)
    if fault := _change_fault(change):
        raise InvalidFile(f"the table's change of {name} {fault}")
    return change


def _masked_row(reader: _Reader, name: str, names: tuple[str, ...], streams: _Streams, exact: Callable[[str], torch.Tensor]) -> Masked:
    order = _ORDERS[reader.number(len(_ORDERS) - 1, "order")]
    count = reader.number(MAX_ENTRIES, "count")
    seed = reader.number((1 << 53) - 1, "seed")
    bits = np.unpackbits(np.frombuffer(reader.take((len(names) + 7) // 8), np.uint8), bitorder="little")
    if bits[len(names) :].any():
        raise InvalidFile("the table's mask names tensors beyond the last")
    chosen = tuple(names[i] for i in np.flatnonzero(bits))
    if not chosen or chosen[0] != name:
        raise InvalidFile(f"the table's mask begins with {chosen[0] if chosen else None!r}; expected {name!r}, the name of its row")
    values = streams.ternary(reader) if reader.number(1, "form") else exact(VALUES)
    return Masked(MaskRule(order, count, chosen, seed), values)


def _folded_row(reader: _Reader, name: str, exact: Callable[[str], torch.Tensor]) -> Folded:
    flags = reader.number(2 | 4, "flags")
    if flags & 3 == 3:
        raise InvalidFile(f"the table's flags are {flags}: an activation of that number is not known")
    scale = reader.floating("<d", "scale")
    return Folded(name, exact(f"{name}.D"), exact(f"{name}.U"), _ACTIVATIONS[flags & 3], scale, bool(flags & 4))
