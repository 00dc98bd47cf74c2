"""ComPEFT (Yadav et al., arXiv 2311.13171): the signs of the largest entries of a task vector, and one scale.

The vector tau is given in pieces, in order, that can be read again and again: gamma keeps the sign of the min(non-zeros, floor(density * d))
entries of largest |tau|, ties cut by lowest flat index; lambda = alpha * std(tau), unbiased, over the whole vector. It is read three times and
never held: upper bits and sums (`survey`, which serves every density and scale), lower bits, levels (`coded_levels`).
"""

from __future__ import annotations

import itertools
import math
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np

from sterna.codings import I64, PADDING, U8, Coding
from sterna.errors import CannotWrite, InvalidArgument
from sterna.expert.changes import Ternary
from sterna.numbers import moments, selection
from sterna.numbers.selection import kept_entries
from sterna.progress import Progress
from sterna.streaming import Chunk, Histogram, chunks_of, ordered, scratch
from sterna.taskvector import Piece


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What one reading of some pieces tells of them: how many magnitudes have which upper 16 bits, and each chunk's sum and sum of squares.

    `upper` (int64) counts from the bin `first` on; the bins below and beyond it are empty.
    """

    pieces: tuple[Piece, ...]
    first: int
    upper: I64
    sums: tuple[tuple[float, float], ...]

    @property
    def entries(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def squares(self) -> float:
        """Sum of squares."""
        return float(sum(squares for _, squares in self.sums))

    @property
    def deviation(self) -> float:
        """The unbiased standard deviation."""
        return moments.standard_deviation(self.entries, float(sum(total for total, _ in self.sums)), self.squares)

    @property
    def histogram(self) -> I64:
        """int64[65536], the counts of all bins."""
        whole = np.zeros(selection.UPPER_BINS, np.int64)
        whole[self.first : self.first + self.upper.size] = self.upper
        return whole


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """Pieces under one threshold: the `kept` largest magnitudes of them all keep their signs, and those of piece i are worth scales[i] (float32)."""

    survey: Survey
    kept: int
    scales: tuple[float, ...]


def check_options(density: float, alpha: float) -> None:
    if not 0 < density <= 1:
        raise InvalidArgument(f"density is {density}; expected a number above 0, up to 1")
    if not 0 < alpha < 1e6:
        raise InvalidArgument(f"alpha is {alpha}; expected a number above 0 (the paper's values are 0.5 to 10)")


def ternarize(
    pieces: Sequence[Piece], *, density: float, alpha: float, per_tensor: bool, coding: Coding, progress: Progress
) -> tuple[list[Ternary], float]:
    """The coded levels of every piece, and the norm of the whole vector. `per_tensor` counts, cuts and scales each piece by itself.

    Streams go to a temporary file that has no name. Raises InvalidArgument for NaN or infinity in a piece, CannotWrite where the disk is full.
    """
    advance = _counter(progress, 3 * sum(piece.size for piece in pieces))
    surveys = [survey([piece], advance) for piece in pieces] if per_tensor else [survey(pieces, advance)]
    levels = coded_levels([compeft(found, density, alpha) for found in surveys], coding, advance)
    return levels, math.sqrt(sum(found.squares for found in surveys))


def compeft(surveyed: Survey, density: float, alpha: float) -> Budget:
    """floor(density * d) entries, all worth alpha * std: the method over the pieces of a survey."""
    scale = float32_scale(alpha * surveyed.deviation)
    return Budget(surveyed, kept_entries(density, surveyed.entries), (scale,) * len(surveyed.pieces))


def float32_scale(scale: float) -> float:
    """The scale rounded to float32. Raises InvalidArgument where it does not fit."""
    if scale > float(np.finfo(np.float32).max):
        raise InvalidArgument(f"the scale alpha * std is {scale:g}, beyond float32: a broken tuned model, or a huge alpha")
    return float(np.float32(scale))


def survey(pieces: Sequence[Piece], advance: Callable[[int], None] = lambda entries: None) -> Survey:
    """Read the pieces once. `advance` is told how many entries are done. Raises InvalidArgument for NaN or infinity."""
    upper = Histogram(selection.UPPER_BINS)

    def first(chunk: Chunk) -> tuple[float, float]:
        tau = chunk.read()
        sums: tuple[float, float] = moments.sums(tau)
        if not math.isfinite(sums[1]):
            raise InvalidArgument(f"the difference in {chunk.piece.name} holds NaN or infinity; the tuned model or the base is broken there")
        selection.count_upper(tau, upper.mine())
        return sums

    found = []
    for chunk, sums in ordered(first, [chunk for piece in pieces for chunk in chunks_of(piece)]):
        found.append(sums)
        advance(chunk.size)
    whole = upper.total()
    used = np.flatnonzero(whole)
    low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
    return Survey(tuple(pieces), low, whole[low:high].copy(), tuple(found))


def joined(surveys: Sequence[Survey]) -> Survey:
    """The survey of all their pieces together."""
    whole = sum((found.histogram for found in surveys), start=np.zeros(selection.UPPER_BINS, np.int64))
    pieces = tuple(piece for found in surveys for piece in found.pieces)
    return Survey(pieces, 0, whole, tuple(itertools.chain.from_iterable(found.sums for found in surveys)))


def coded_levels(budgets: Sequence[Budget], coding: Coding, advance: Callable[[int], None] = lambda entries: None) -> list[Ternary]:
    """The coded levels of every piece of the budgets, in order, in one temporary file without a name. `advance` counts every entry twice.

    Raises CannotWrite where the disk is full.
    """
    with tempfile.TemporaryFile() as file:
        placed: list[tuple[Piece, float, int, int]] = []
        for budget in budgets:
            threshold = _threshold(budget, advance)
            written = _write_streams(budget.survey.pieces, threshold, coding, file, advance)
            placed += [(piece, scale, start, stop) for scale, (piece, start, stop) in zip(budget.scales, written, strict=True)]
        try:
            file.write(bytes(PADDING))
            file.flush()
        except OSError as error:
            raise no_room(error) from error
        data: U8 = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return [Ternary.open(piece.shape, scale, coding, data, start, stop) for piece, scale, start, stop in placed]


def _threshold(budget: Budget, advance: Callable[[int], None]) -> selection.Threshold:
    """The exact threshold of a budget: the lower bits of the one bin that holds it are counted in another reading."""
    upper_bin, above = selection.locate_upper(budget.survey.histogram, budget.kept)
    lower = Histogram(selection.LOWER_BINS)

    def second(chunk: Chunk) -> None:
        selection.count_lower(chunk.read(), upper_bin, lower.mine())

    for chunk, _ in ordered(second, [chunk for piece in budget.survey.pieces for chunk in chunks_of(piece)]):
        advance(chunk.size)
    return selection.locate(upper_bin, above, lower.total(), budget.kept)


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def advance(entries: int) -> None:
        nonlocal done
        done += entries
        progress("compress", done, total, "parameters")

    return advance


def _write_streams(
    pieces: Sequence[Piece], threshold: selection.Threshold, coding: Coding, file: IO[bytes], advance: Callable[[int], None]
) -> Iterator[tuple[Piece, int, int]]:
    """Code the pieces one after another into `file`; yields (piece, first byte, byte after the last)."""
    left = threshold.ties

    def levels(chunk: Chunk, ties: int) -> tuple[bytes, int]:
        tau = chunk.read()
        used = min(selection.count_equal(tau, threshold.bits), ties) if ties else 0
        codes = scratch.codes[: tau.size]
        kept = selection.emit(tau, threshold.bits, used, codes)
        return coding.encode(codes[:kept], chunk.size), used

    for piece in pieces:
        begin = file.tell()
        for chunk, (record, used) in ordered(partial(levels, ties=left), chunks_of(piece)):
            if used > left:  # an earlier chunk, worked on at the same time, took some of them
                record, used = levels(chunk, left)
            left -= used
            try:
                file.write(record)
            except OSError as error:
                raise no_room(error) from error
            advance(chunk.size)
        yield piece, begin, file.tell()


def no_room(error: OSError) -> CannotWrite:
    """What to say where coded streams do not fit the temporary folder."""
    return CannotWrite(f"no room for the coded streams in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a larger folder")
