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


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.kinds = np.empty(CHUNK, np.uint16)
        self.codes = np.empty(CHUNK + 8, np.uint32)
        self.numbers = np.empty(CHUNK, np.uint16)


_scratch = _Scratch()


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What becomes of each kind: `sign` int8 (0: nothing), `number` uint16 of its magnitude; `magnitudes` float32, ascending."""

    sign: NDArray[np.int8]
    number: NDArray[np.uint16]
    magnitudes: NDArray[np.float32]
    nonzeros: int


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
        self._made: list[tuple[str, tuple[int, ...], NDArray[np.float32], int, int, int, int]] = []
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

    def end(self, name: str, shape: tuple[int, ...], magnitudes: NDArray[np.float32]) -> None:
        if self._left.size:
            self._indices.write(packed(self._left, width_of(magnitudes.size)).data)
            self._left = self._left[:0]
        self._made.append((name, shape, magnitudes, self._open[0], self._streams.tell(), self._open[1], self._indices.tell()))

    def changes(self) -> list[Leveled]:
        """Everything that was added, as views into the files."""
        data, indices = _mapped(self._streams, PADDING), _mapped(self._indices, PADDING)
        made: list[Leveled] = []
        for name, shape, magnitudes, start, stop, first, last in self._made:
            if magnitudes.size < 2:
                scale = float(magnitudes[0]) if magnitudes.size else 0.0
                made.append(Add(name, Ternary.open(shape, scale, self.coding, data, start, stop)))
                continue
            levels = Ternary.open(shape, 1.0, self.coding, data, start, stop)
            made.append(Palette(name, levels, torch.from_numpy(magnitudes), torch.from_numpy(indices[first:last])))
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

    def advance(entries: int) -> None:
        nonlocal done
        done += entries
        progress("merge", done, total, "parameters")

    try:
        for group in _groups(tasks):
            if group[0].kinds > KINDS:
                merge_columns(group[0], _chunks(group), how, coding, output, advance)
                continue
            counted = [np.zeros(task.kinds, np.int64) for task in group]
            for chunk, counts in ordered(lambda chunk, group=group: _counts(group[chunk.number], chunk), _chunks(group)):  # type: ignore[misc]
                counted[chunk.number] += counts
            made = [_table(task, counts, how, tables) for task, counts in zip(group, counted, strict=True)]
            for chunk, (record, numbers) in ordered(
                lambda chunk, group=group, made=made: _emitted(group[chunk.number], chunk, made[chunk.number], coding),  # type: ignore[misc]
                _chunks(group),
            ):
                task, table = group[chunk.number], made[chunk.number]
                if not chunk.start:
                    output.begin()
                output.add(record, numbers, width_of(table.magnitudes.size))
                if chunk.start + chunk.size == task.size:
                    output.end(task.name, task.shape, table.magnitudes)
                advance(chunk.size)
        return output.changes()
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
    return record, numbers[:count].copy() if table.magnitudes.size > 1 else numbers[:0]


def _table(task: Task, counts: I64, how: How, tables: dict[bytes, F64]) -> Table:
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
    return table_of(task.name, made, counts)


def table_of(name: str, values: F64, counts: I64) -> Table:
    """The palette of merged values (float64[k]) that occur, each rounded once to float32. Raises InvalidArgument where they do not fit."""
    near = rounded(name, np.where(counts > 0, values, 0))
    size = np.abs(near)
    magnitudes = np.unique(size[size > 0])
    if magnitudes.size > MOST:
        raise InvalidArgument(magnitude_fault(name, magnitudes.size))
    sign = np.sign(near).astype(np.int8)
    number = np.searchsorted(magnitudes, size).astype(np.uint16)
    return Table(sign, number, magnitudes, int(counts[sign != 0].sum()))


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
