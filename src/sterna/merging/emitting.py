"""Tensors merged on their coded levels: kinds counted, the method computed once for each kind, merged values looked up and coded.

Two passes over the parents' streams, block by block on several threads; what is made goes to temporary files without names.
"""

from __future__ import annotations

import mmap
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.codings import CHUNK, I64, PADDING, U8, Coding, default_coding
from sterna.errors import CannotWrite, InvalidArgument
from sterna.expert.changes import Add, Ternary
from sterna.expert.palette import MOST, Palette
from sterna.merging.parents import Leveled, Part
from sterna.merging.registry import F64, Kinds, MergeMethod, Semantics
from sterna.numbers.kinds import add_chosen, add_plain, count_kinds, emit_kinds, packed, width_of
from sterna.progress import Progress
from sterna.streaming import ordered

KINDS = 1 << 16
"""Kinds of one tensor at most: beyond, a block's own columns are merged."""
_HELD = 1 << 20
"""Kinds of tensors whose counts are held at a time."""
_SMALL = 1e-7
"""mergekit rescales no tensor whose norm is below."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One tensor to merge: the parents' parts (None where a parent does not change it), their weights float64[n]."""

    name: str
    shape: tuple[int, ...]
    parts: Sequence[Part | None]
    weights: F64

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def digits(self) -> list[int]:
        """How many digits each parent has."""
        return [1 + 2 * part.magnitudes.size if part is not None else 1 for part in self.parts]

    @property
    def kinds(self) -> int:
        return int(np.prod(self.digits, dtype=object))

    def digit_values(self) -> list[F64]:
        """For each parent, float64: what it has where its digit is 0, 1, ..."""
        plus = [part.magnitudes * part.factor if part is not None else np.empty(0) for part in self.parts]
        return [np.concatenate([[0.0], np.stack([values, -values], 1).reshape(-1)]) for values in plus]

    def values(self) -> F64:
        """float64[n, kinds]: what each parent has at a position of each kind."""
        every, radix = np.arange(self.kinds), 1
        rows = np.zeros((len(self.parts), every.size))
        for row, values in zip(rows, self.digit_values(), strict=True):
            row[:] = values[every // radix % values.size]
            radix *= values.size
        return rows


@dataclass(frozen=True, slots=True, eq=False)
class How:
    """What is done to every tensor."""

    method: MergeMethod
    options: Mapping[str, Any]
    semantics: Semantics
    by_norm: bool = False  # values dropped at random are rescaled by norms, as mergekit does
    bits: Sequence[int] = ()  # for a method that recovers: each parent's bit in masks


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.kinds = np.empty(CHUNK, np.uint16)
        self.codes = np.empty(CHUNK + 8, np.uint32)
        self.numbers = np.empty(CHUNK, np.uint16)


_scratch = _Scratch()


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What becomes of each kind: `sign` int8 (0: nothing), `number` uint16 of its entry in the palette."""

    sign: NDArray[np.int8]
    number: NDArray[np.uint16]
    entries: Entries


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """The entries of one palette: `magnitudes` float32, ascending; `members`, of a method that recovers, int64 masks of parents, else None."""

    magnitudes: NDArray[np.float32]
    members: I64 | None

    @classmethod
    def of(cls, keys: NDArray[np.uint64], masked: bool) -> Entries:
        """Of keys as `key_of` makes them, ascending."""
        magnitudes = (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
        return cls(magnitudes, (keys & np.uint64(0xFFFFFFFF)).astype(np.int64) if masked else None)

    @property
    def width(self) -> int:
        """Bits that say which entry; none where one magnitude is all there is to say."""
        return width_of(self.magnitudes.size)


def key_of(values: NDArray[np.float32], parents: F64, bits: Sequence[int]) -> NDArray[np.uint64]:
    """Numbers that order as magnitudes and then masks do: of merged values [k], with the mask of the parents (float64[n, k]) that have their sign."""
    keys = np.abs(values).view(np.uint32).astype(np.uint64) << np.uint64(32)
    for row, bit in zip(parents, bits, strict=False):
        keys |= (row * values > 0).astype(np.uint64) << np.uint64(bit)
    return keys


class Norms:
    """Of a method that recovers: each parent's L1 norm, and that of the merged values inside its mask, over the tensors so far."""

    def __init__(self, parents: int) -> None:
        self.own = np.zeros(parents)
        self.inside = np.zeros(parents)

    def add(self, values: NDArray[np.float32], parents: F64, counts: I64 | int) -> None:
        """Merged values [k], the parents' [n, k], and how often each occurs."""
        size = np.abs(values.astype(np.float64))
        self.own += (np.abs(parents) * counts).sum(1)
        self.inside += ((parents * values > 0) * size * counts).sum(1)

    def scales(self, bits: Sequence[int]) -> torch.Tensor:
        """float32, by bit: what gives the values inside a mask the norm of its parent."""
        found = np.zeros(self.own.size, np.float32)
        found[list(bits)] = np.divide(self.own, self.inside, out=np.zeros_like(self.own), where=self.inside > 0)
        return torch.from_numpy(found)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Positions start..start + size - 1 of tensor `number` of a group."""

    number: int
    start: int
    size: int


class Output:
    """Coded tensors on their way to two temporary files: streams, and the numbers of magnitudes."""

    def __init__(self, coding: Coding) -> None:
        self.coding = coding
        self._streams: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (close() ends it)
        self._indices: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._made: list[tuple[str, tuple[int, ...], Entries, int, int, int, int]] = []
        self._left = np.empty(0, np.uint16)
        self._open: tuple[int, int] = 0, 0

    def begin(self) -> None:
        self._open = self._streams.tell(), self._indices.tell()

    def add(self, record: bytes, numbers: NDArray[np.uint16], width: int) -> None:
        """A chunk's record, and for each of its non-zeros the number of its magnitude."""
        try:
            self._streams.write(record)
            if width:
                numbers = np.concatenate([self._left, numbers])
                whole = numbers.size // 8 * 8
                self._indices.write(packed(numbers[:whole], width).data)
                self._left = numbers[whole:]
        except OSError as error:
            raise _no_room(error) from error

    def end(self, name: str, shape: tuple[int, ...], entries: Entries) -> None:
        if self._left.size:
            self._indices.write(packed(self._left, entries.width).data)
            self._left = self._left[:0]
        self._made.append((name, shape, entries, self._open[0], self._streams.tell(), self._open[1], self._indices.tell()))

    def changes(self, scales: torch.Tensor | None) -> list[Leveled]:
        """Everything that was added, as views into the files; `scales` are those of the tasks."""
        data, indices = _mapped(self._streams, PADDING), _mapped(self._indices, PADDING)
        made: list[Leveled] = []
        for name, shape, entries, start, stop, first, last in self._made:
            magnitudes = entries.magnitudes
            if magnitudes.size < (2 if entries.members is None else 1):
                scale = float(magnitudes[0]) if magnitudes.size else 0.0
                made.append(Add(name, Ternary.open(shape, scale, self.coding, data, start, stop)))
                continue
            levels = Ternary.open(shape, 1.0, self.coding, data, start, stop)
            members = torch.from_numpy(entries.members) if entries.members is not None else None
            made.append(Palette(name, levels, torch.from_numpy(magnitudes), torch.from_numpy(indices[first:last]), members, scales))
        return made

    def close(self) -> None:
        self._streams.close()
        self._indices.close()


def _mapped(file: IO[bytes], padding: int) -> U8:
    try:
        file.write(bytes(padding))
        file.flush()
    except OSError as error:
        raise _no_room(error) from error
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def _no_room(error: OSError) -> CannotWrite:
    return CannotWrite(f"no room for the coded streams in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a larger folder")


def merged(tasks: Iterator[Task], total: int, how: How, progress: Progress) -> list[Leveled]:
    """The tensors' merged changes, in order. Raises InvalidArgument for values that float32 cannot hold or more than 65,536 magnitudes in one tensor;
    InvalidFile where a stream is damaged; CannotWrite where the temporary folder is full."""
    coding = default_coding()
    assert coding.sequential is False
    from sterna.merging.columns import merge_columns

    output, done = Output(coding), 0
    tables: dict[bytes, F64] = {}
    norms = Norms(len(how.bits))

    def advance(entries: int) -> None:
        nonlocal done
        done += entries
        progress("merge", done, total, "parameters")

    try:
        for group in _groups(tasks):
            if group[0].kinds > KINDS:
                merge_columns(group[0], _chunks(group), how, coding, output, norms, advance)
                continue
            counted = [np.zeros(task.kinds, np.int64) for task in group]
            for chunk, counts in ordered(lambda chunk, group=group: _counts(group[chunk.number], chunk), _chunks(group)):  # type: ignore[misc]
                counted[chunk.number] += counts
            made = [_table(task, counts, how, tables, norms) for task, counts in zip(group, counted, strict=True)]
            for chunk, (record, numbers) in ordered(
                lambda chunk, group=group, made=made: _emitted(group[chunk.number], chunk, made[chunk.number], coding),  # type: ignore[misc]
                _chunks(group),
            ):
                task, table = group[chunk.number], made[chunk.number]
                if not chunk.start:
                    output.begin()
                output.add(record, numbers, table.entries.width)
                if chunk.start + chunk.size == task.size:
                    output.end(task.name, task.shape, table.entries)
                advance(chunk.size)
        return output.changes(norms.scales(how.bits) if how.method.recovers else None)
    finally:
        output.close()


def _groups(tasks: Iterator[Task]) -> Iterator[list[Task]]:
    group: list[Task] = []
    held = 0
    for task in tasks:
        if group and held + task.kinds > (_HELD if task.kinds <= KINDS else 0):
            yield group
            group, held = [], 0
        group.append(task)
        held += task.kinds if task.kinds <= KINDS else _HELD
    if group:
        yield group


def _chunks(group: Sequence[Task]) -> list[Chunk]:
    return [Chunk(number, start, min(CHUNK, task.size - start)) for number, task in enumerate(group) for start in range(0, max(task.size, 1), CHUNK)]


def _kinds(task: Task, chunk: Chunk) -> NDArray[np.uint16]:
    """The kinds of a chunk's positions, in this thread's own memory."""
    kinds = _scratch.kinds[: chunk.size]
    kinds[:] = 0
    radix = 1
    for part, digits in zip(task.parts, task.digits, strict=True):
        if part is not None:
            add(part, chunk, radix, kinds)
        radix *= digits
    return kinds


def add(part: Part, chunk: Chunk, radix: int, kinds: NDArray[np.uint16] | NDArray[np.uint32]) -> None:
    """kinds += radix * what a parent has, its digit, at each of a chunk's positions."""
    levels, blocks = part.levels, part.levels.blocks
    first, last = np.searchsorted(blocks.start, [chunk.start, chunk.start + chunk.size]).tolist()
    if first == last:
        return
    assert levels.coding.sequential is False
    levels.coding.decode(levels.data, blocks, first, last, _scratch.codes)
    counts, starts = blocks.count[first:last], blocks.start[first:last] - chunk.start
    if part.whole:
        add_plain(_scratch.codes, counts, starts, radix, kinds)
        return
    ordinal = int(blocks.count[:first].sum())
    chosen = (part.indices, part.width, part.low, part.high, np.uint64(part.seed), part.chance, chunk.start)
    add_chosen(_scratch.codes, counts, starts, radix, kinds, ordinal, *chosen)


def _counts(task: Task, chunk: Chunk) -> I64:
    counts = np.zeros(task.kinds, np.int64)
    count_kinds(_kinds(task, chunk), counts)
    return counts


def _emitted(task: Task, chunk: Chunk, table: Table, coding: Coding) -> tuple[bytes, NDArray[np.uint16]]:
    codes, numbers = _scratch.codes, _scratch.numbers
    count = emit_kinds(_kinds(task, chunk), table.sign, table.number, codes, numbers)
    record = coding.encode(codes[:count], chunk.size) if chunk.size else b""
    return record, numbers[:count].copy() if table.entries.width else numbers[:0]


def _table(task: Task, counts: I64, how: How, tables: dict[bytes, F64], norms: Norms) -> Table:
    """What becomes of a tensor's kinds. `tables` holds merged values by what they follow from, for methods without statistics."""
    values = task.values()
    if how.by_norm:
        values *= rescaled(task, np.abs(values) @ counts)[:, None]
    gram = (values * counts) @ values.T if how.method.statistics else np.zeros((len(values), len(values)))
    key = values.tobytes() + task.weights.tobytes() if not how.method.statistics else b""
    made = tables.get(key)
    if made is None:
        with np.errstate(over="ignore", invalid="ignore"):
            made = how.method(Kinds(values, task.weights, gram, how.semantics), how.options)
        if key:
            tables.clear()  # one is enough: experts of one scale have the same kinds in every tensor
            tables[key] = made
    near = rounded(task.name, np.where(counts > 0, made, 0))
    if how.method.recovers:
        norms.add(near, values, counts)
    keys = key_of(near, values, how.bits)
    found = np.unique(keys[near != 0])
    if found.size > MOST:
        raise InvalidArgument(magnitude_fault(task.name, found.size))
    return Table(np.sign(near).astype(np.int8), np.searchsorted(found, keys).astype(np.uint16), Entries.of(found, how.method.recovers))


def rounded(name: str, values: F64) -> NDArray[np.float32]:
    """The values rounded once to float32. Raises InvalidArgument where it cannot hold them."""
    with np.errstate(over="ignore"):
        near: NDArray[np.float32] = values.astype(np.float32)
    if not np.isfinite(near).all():
        raise InvalidArgument(f"merged values of {name} are not finite in float32: weights, lambda or scales are too large")
    return near


def magnitude_fault(name: str, many: int) -> str:
    return f"{name} would take {many:,} magnitudes or more, at most {MOST:,} fit: give parents equal weights, or merge fewer"


def rescaled(task: Task, norms: F64) -> F64:
    """What multiplies each parent's values so that what stays (of these L1 norms, float64[n]) has the norm of its whole tensor."""
    factors = np.ones(norms.size)
    for number, (part, after) in enumerate(zip(task.parts, norms.tolist(), strict=True)):
        if part is not None and after >= _SMALL and part.norm1 >= _SMALL:
            factors[number] = part.norm1 / after
    return factors
