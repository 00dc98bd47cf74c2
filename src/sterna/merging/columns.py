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
from sterna.merging.emitting import Chunk, How, Output, Task, add, magnitude_fault, rescaled, rounded
from sterna.merging.registry import F64, Kinds
from sterna.numbers.kinds import width_of
from sterna.streaming import ordered

_COLUMNS = 1 << 14
"""Columns that a method gets at a time."""


def merge_columns(task: Task, chunks: list[Chunk], how: How, coding: Coding, output: Output, advance: Callable[[int], None]) -> None:
    """Merge one tensor into `output`. Raises as `emitting.merged` does."""
    parents = len(task.parts)
    gram, norms = np.zeros((parents, parents)), np.zeros(parents)
    if how.method.statistics or how.by_norm:
        for _, (products, sums) in ordered(lambda chunk: _statistics(task, chunk), chunks):
            gram += products
            norms += sums
    factors = rescaled(task, norms) if how.by_norm else np.ones(parents)
    gram *= np.outer(factors, factors)
    magnitudes = np.empty(0, np.float32)
    for _, found in ordered(lambda chunk: np.unique(np.abs(_merged(task, chunk, how, factors, gram)[1])), chunks):
        magnitudes = np.union1d(magnitudes, found[found > 0]).astype(np.float32)
        if magnitudes.size > MOST:
            raise InvalidArgument(magnitude_fault(task.name, magnitudes.size))
    output.begin()
    for chunk, (record, numbers) in ordered(lambda chunk: _emitted(task, chunk, how, factors, gram, magnitudes, coding), chunks):
        output.add(record, numbers, width_of(magnitudes.size))
        advance(chunk.size)
    output.end(task.name, task.shape, magnitudes)


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


def _merged(task: Task, chunk: Chunk, how: How, factors: F64, gram: F64) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Positions and merged values, each rounded once to float32."""
    places, merged = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for positions, values in _pieces(task, chunk):
        places.append(positions)
        merged.append(rounded(task.name, how.method(Kinds(values * factors[:, None], task.weights, gram, how.semantics), how.options)))
    return np.concatenate(places), np.concatenate(merged)


def _emitted(
    task: Task, chunk: Chunk, how: How, factors: F64, gram: F64, magnitudes: NDArray[np.float32], coding: Coding
) -> tuple[bytes, NDArray[np.uint16]]:
    positions, values = _merged(task, chunk, how, factors, gram)
    kept = values != 0
    codes = (positions[kept] << 1 | (values[kept] < 0)).astype(np.uint32)
    return coding.encode(codes, chunk.size) if chunk.size else b"", np.searchsorted(magnitudes, np.abs(values[kept])).astype(np.uint16)
