"""Tensors whose parents have too many values for kinds: the method is computed on the columns of every position that a parent changes.

The same questions in the same order as by kinds (statistics where they are wanted, then which magnitudes occur), each a pass over the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sterna.codings import Coding
from sterna.errors import InvalidArgument
from sterna.expert.palette import MOST
from sterna.merging.emitting import Chunk, Entries, How, Norms, Output, Task, add, key_of, magnitude_fault, rescaled, rounded
from sterna.merging.registry import F64, Kinds
from sterna.streaming import ordered

_COLUMNS = 1 << 14
"""Columns that a method gets at a time."""


def merge_columns(task: Task, chunks: list[Chunk], how: How, coding: Coding, output: Output, norms: Norms, advance: Callable[[int], None]) -> None:
    """Merge one tensor into `output`. Raises as `emitting.merged` does."""
    parents = len(task.parts)
    gram, sizes = np.zeros((parents, parents)), np.zeros(parents)
    if how.method.statistics or how.by_norm:
        for _, (products, sums) in ordered(lambda chunk: _statistics(task, chunk), chunks):
            gram += products
            sizes += sums
    factors = rescaled(task, sizes) if how.by_norm else np.ones(parents)
    gram *= np.outer(factors, factors)
    keys = np.empty(0, np.uint64)
    for _, (found, some) in ordered(lambda chunk: _found(task, chunk, how, factors, gram), chunks):
        keys = np.union1d(keys, found)
        norms.own += some.own
        norms.inside += some.inside
        if keys.size > MOST:
            raise InvalidArgument(magnitude_fault(task.name, keys.size))
    entries = Entries.of(keys, how.method.recovers)
    output.begin()
    for chunk, (record, numbers) in ordered(lambda chunk: _emitted(task, chunk, how, factors, gram, keys, coding), chunks):
        output.add(record, numbers, entries.width)
        advance(chunk.size)
    output.end(task.name, task.shape, entries)


def _pieces(task: Task, chunk: Chunk) -> Iterator[tuple[NDArray[np.int64], F64]]:
    """Positions of a chunk that a parent changes, ascending, some at a time, and the parents' values there: float64[n, positions]."""
    digits = np.zeros((len(task.parts), chunk.size), np.uint32)
    for row, part in zip(digits, task.parts, strict=True):
        if part is not None:
            add(part, chunk, 1, row)
    positions = np.flatnonzero(digits.any(0))
    for first in range(0, positions.size, _COLUMNS):
        some = positions[first : first + _COLUMNS]
        yield some, np.stack([values[row[some]] for values, row in zip(task.digit_values(), digits, strict=True)])


def _statistics(task: Task, chunk: Chunk) -> tuple[F64, F64]:
    gram, norms = np.zeros((len(task.parts), len(task.parts))), np.zeros(len(task.parts))
    for _, values in _pieces(task, chunk):
        gram += values @ values.T
        norms += np.abs(values).sum(1)
    return gram, norms


def _merged(task: Task, chunk: Chunk, how: How, factors: F64, gram: F64) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], F64]]:
    """Positions, merged values, each rounded once to float32, and the parents', some at a time."""
    for positions, values in _pieces(task, chunk):
        rows = values * factors[:, None]
        yield positions, rounded(task.name, how.method(Kinds(rows, task.weights, gram, how.semantics), how.options)), rows


def _found(task: Task, chunk: Chunk, how: How, factors: F64, gram: F64) -> tuple[NDArray[np.uint64], Norms]:
    """The keys that occur in a chunk, and its norms."""
    keys, norms = [np.empty(0, np.uint64)], Norms(len(how.bits))
    for _, values, rows in _merged(task, chunk, how, factors, gram):
        keys.append(np.unique(key_of(values, rows, how.bits)[values != 0]))
        if how.method.recovers:
            norms.add(values, rows, 1)
    return np.unique(np.concatenate(keys)), norms


def _emitted(
    task: Task, chunk: Chunk, how: How, factors: F64, gram: F64, keys: NDArray[np.uint64], coding: Coding
) -> tuple[bytes, NDArray[np.uint16]]:
    codes, numbers = [np.empty(0, np.uint32)], [np.empty(0, np.uint16)]
    for positions, values, rows in _merged(task, chunk, how, factors, gram):
        kept = values != 0
        codes.append((positions[kept] << 1 | (values[kept] < 0)).astype(np.uint32))
        numbers.append(np.searchsorted(keys, key_of(values, rows, how.bits)[kept]).astype(np.uint16))
    return coding.encode(np.concatenate(codes), chunk.size) if chunk.size else b"", np.concatenate(numbers)
