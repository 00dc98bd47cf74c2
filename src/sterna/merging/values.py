"""Tensors whose parents have a value at every entry (products of LoRA, differences to a base): merged some entries at a time, never held dense.

What is merged goes to a temporary file in float32, from which it is made ternary or cut to a rank, or is taken as it comes.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sterna.compeft import no_room
from sterna.merging.emitting import How, rounded
from sterna.merging.registry import F64, Kinds
from sterna.numbers import selection
from sterna.numbers.kinds import ALL, drop_random
from sterna.numbers.selection import Threshold, kept_entries
from sterna.streaming import Histogram, ordered
from sterna.taskvector import F32, Piece

Read = Callable[[int, int], F64]
"""Flat entries start to stop - 1 of what a parent adds to one tensor, in memory that is the caller's; several threads may read."""
Step = tuple[int, int]
_STEP = 1 << 16
"""Entries that are merged at a time."""
_COLUMNS = 1 << 13
"""Columns that a method gets at a time."""
_HELD = 64 << 20
"""Bytes of the parents' values of one tensor that are held at most."""
_SMALL = 1e-7
"""mergekit rescales no tensor whose norm is below."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a parent's method drops of one tensor: its `density` and `gamma`, and the task that names its random mask."""

    density: float
    gamma: float
    task: str


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """One tensor to merge. `sources` open what each parent adds (None where it adds nothing); weights are float64[n], shares one a parent."""

    name: str
    size: int
    sources: Sequence[Callable[[], Read] | None]
    weights: F64
    shares: Sequence[Share]


def steps_of(size: int) -> list[Step]:
    return [(start, min(start + _STEP, size)) for start in range(0, size, _STEP)]


def least_magnitudes(tensors: Sequence[Values], how: How) -> list[int]:
    """For each parent the bits of the smallest magnitude that stays where the paper trims over its whole task vector; 0 where nothing goes."""
    parents = len(tensors[0].sources) if tensors else 0
    if how.method.drop != "magnitude" or how.semantics != "paper":
        return [0] * parents
    found = []
    for number in range(parents):
        density = tensors[0].shares[number].density
        entries = sum(values.size for values in tensors if values.sources[number] is not None)
        held = [(source, values.size) for values in tensors if (source := values.sources[number]) is not None]
        found.append(_threshold(held, kept_entries(density, entries)).bits if density < 1 else 0)
    return found


def _threshold(held: Sequence[tuple[Callable[[], Read], int]], wanted: int) -> Threshold:
    """The threshold that keeps `wanted` entries of several tensors together."""
    upper, lower = Histogram(selection.UPPER_BINS), Histogram(selection.LOWER_BINS)
    for source, size in held:
        _each(source(), size, lambda values: selection.count_upper(values, upper.mine()))
    bin_, above = selection.locate_upper(upper.total(), wanted)
    for source, size in held:
        _each(source(), size, lambda values: selection.count_lower(values, bin_, lower.mine()))
    return selection.locate(bin_, above, lower.total(), wanted)


def _each(read: Read, size: int, work: Callable[[F32], object]) -> list[object]:
    return [made for _, made in ordered(lambda step: work(read(*step).astype(np.float32)), steps_of(size))]


@dataclass(frozen=True, slots=True, eq=False)
class _Top:
    """The `threshold.count` entries of largest magnitude of one tensor, ties by lowest index; `before` are the ties before each step."""

    threshold: Threshold
    before: NDArray[np.int64]

    @classmethod
    def of(cls, read: Read, size: int, wanted: int) -> _Top:
        threshold = _threshold([(lambda: read, size)], wanted)
        ties = _each(read, size, lambda values: selection.count_equal(values, threshold.bits))
        counts = np.array(ties, np.int64)
        return cls(threshold, np.cumsum(counts) - counts)

    def holds(self, bits: NDArray[np.uint32], start: int) -> NDArray[np.bool_]:
        ties = bits == self.threshold.bits
        stays: NDArray[np.bool_] = (bits > self.threshold.bits) | (ties & (np.cumsum(ties) + self.before[start // _STEP] <= self.threshold.ties))
        return stays


def _kept(read: Read, size: int, how: How, share: Share, least: int, seed: int, name: str) -> Read:
    """The values with zeros where the method drops them, as `sterna.merging.parents` tells of each semantics."""
    drop, paper = how.method.drop, how.semantics == "paper"
    if drop == "random":
        state = np.uint64(int.from_bytes(hashlib.sha256(f"{seed}\0{share.task}\0{name}".encode()).digest()[:8], "little"))
        chance = np.uint64(min(round(share.density * ALL), ALL))

        def drawn(start: int, stop: int) -> F64:
            values = read(start, stop)
            drop_random(values, state, chance, start)
            return values if how.by_norm else values / share.density

        return drawn
    if drop is None or (share.density >= 1 and (drop == "magnitude" or how.semantics == "mergekit")):
        return read
    if drop == "magnitude" and paper:
        return _chosen(read, lambda bits, start: bits >= least)
    wanted = int(share.density * size)
    if drop == "magnitude":
        top = _Top.of(read, size, max(wanted, 1 if how.semantics == "mergekit" else 0))
        return _chosen(read, top.holds)
    outliers = int(share.gamma * size)
    if paper:
        most = _threshold([(lambda: read, size)], min(outliers + 1, size)).bits
        low = _threshold([(lambda: read, size)], min(outliers + wanted, size)).bits if wanted else 0x7FFFFFFF
        return _chosen(read, lambda bits, start: (bits <= most) & (bits >= low))
    last = size - max(0, size - wanted - outliers)
    top, above = _Top.of(read, size, last), _Top.of(read, size, last - wanted)
    return _chosen(read, lambda bits, start: top.holds(bits, start) & ~above.holds(bits, start))


def _chosen(read: Read, stays: Callable[[NDArray[np.uint32], int], NDArray[np.bool_]]) -> Read:
    def some(start: int, stop: int) -> F64:
        values = read(start, stop)
        values[~stays(np.abs(values).astype(np.float32).view(np.uint32), start)] = 0
        return values

    return some


def merged_values(values: Values, how: How, least: Sequence[int], seed: int) -> Iterator[tuple[Step, F64]]:
    """The merged tensor, float64, some entries at a time and in order. Raises what the method raises."""
    reads: list[Read | None] = []
    before = np.zeros(len(values.sources))
    for number, source in enumerate(values.sources):
        read = source() if source is not None else None
        if read is not None and (how.by_norm or (how.method.drop in ("magnitude", "outliers") and how.semantics != "paper")):
            read = _held(read, values.size, len(values.sources))
        if read is not None and how.by_norm:
            before[number] = sum(float(np.abs(part).sum()) for _, part in ordered(lambda step, read=read: read(*step), steps_of(values.size)))  # type: ignore[misc]
        reads.append(_kept(read, values.size, how, values.shares[number], least[number], seed, values.name) if read is not None else None)
    factors, gram = np.ones(len(reads)), np.zeros((len(reads), len(reads)))
    if how.method.statistics or how.by_norm:
        after = np.zeros(len(reads))
        for _, (products, sums) in ordered(partial(_statistics, reads), steps_of(values.size)):
            gram += products
            after += sums
        sound = (before >= _SMALL) & (after >= _SMALL) if how.by_norm else np.zeros(len(reads), bool)
        factors[sound] = before[sound] / after[sound]
        gram *= np.outer(factors, factors)

    def merge(step: Step) -> F64:
        rows = _rows(reads, step)
        if how.by_norm:
            rows *= factors[:, None]
        parts = [np.ascontiguousarray(rows[:, first : first + _COLUMNS]) for first in range(0, rows.shape[1], _COLUMNS)]
        made = [how.method(Kinds(part, values.weights, gram, how.semantics), how.options) for part in parts]
        return np.concatenate([np.empty(0), *made])

    yield from ordered(merge, steps_of(values.size))


def _held(read: Read, size: int, parents: int) -> Read:
    """The same values from memory, for those that are read several times; where all parents' together would take too much, read anew each time."""
    if 8 * size * parents > _HELD:
        return read
    whole = np.concatenate([np.empty(0), *(part for _, part in ordered(lambda step: read(*step), steps_of(size)))])
    return lambda start, stop: whole[start:stop].copy()


def _rows(reads: Sequence[Read | None], step: Step) -> F64:
    rows = np.zeros((len(reads), step[1] - step[0]))
    for row, read in zip(rows, reads, strict=True):
        if read is not None:
            row[:] = read(*step)
    return rows


def _statistics(reads: Sequence[Read | None], step: Step) -> tuple[F64, F64]:
    rows = _rows(reads, step)
    return np.einsum("ik,jk->ij", rows, rows), np.abs(rows).sum(1)


class Spool:
    """Merged tensors in a temporary file without a name, each rounded once to float32."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (close() ends it)
        self._placed: list[tuple[str, tuple[int, ...], int]] = []
        self._entries = 0

    def add(self, name: str, shape: tuple[int, ...], parts: Iterator[tuple[Step, F64]]) -> None:
        """Raises InvalidArgument for values that float32 cannot hold, CannotWrite where there is no room."""
        self._placed.append((name, shape, self._entries))
        for (start, stop), part in parts:
            try:
                self._file.write(rounded(name, part).data)
            except OSError as error:
                raise no_room(error) from error
            self._entries += stop - start

    def pieces(self) -> list[Piece]:
        """What was added, as views into the file."""
        whole = self.view()

        def piece(name: str, shape: tuple[int, ...], first: int) -> Piece:
            def read(start: int, stop: int, out: F32) -> None:
                out[: stop - start] = whole[first + start : first + stop]

            return Piece(name, shape, read)

        return [piece(*placed) for placed in self._placed]

    def tensors(self) -> list[F32]:
        """What was added, flat, one array a tensor."""
        whole = self.view()
        return [whole[first : first + math.prod(shape)] for _, shape, first in self._placed]

    def view(self) -> F32:
        """All values one after another."""
        try:
            self._file.flush()
        except OSError as error:
            raise no_room(error) from error
        if not self._entries:
            return np.empty(0, np.float32)
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY), np.float32)

    def close(self) -> None:
        self._file.close()
