"""ComPEFT (Yadav et al., arXiv 2311.13171): the signs of the largest entries of a task vector, and one scale.

The vector tau is given in pieces, in order, that can be read again and again: gamma keeps the sign of the min(non-zeros, floor(density * d))
entries of largest |tau|, ties cut by lowest flat index; lambda = alpha * std(tau), unbiased, over the whole vector. It is read three times and
never held: upper bits and sums, lower bits, levels.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO

import numpy as np

from sterna.codings import PADDING, U8, Coding
from sterna.errors import CannotWrite, InvalidArgument
from sterna.expert.changes import Ternary
from sterna.numbers import moments, selection
from sterna.numbers.selection import kept_entries
from sterna.progress import Progress
from sterna.streaming import Chunk, Histogram, chunks_of, ordered, scratch
from sterna.taskvector import Piece


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
    groups = [[piece] for piece in pieces] if per_tensor else [list(pieces)]
    total = sum(piece.size for piece in pieces)
    done = 0

    def advance(entries: int) -> None:
        nonlocal done
        done += entries
        progress("compress", done, 3 * total, "parameters")

    with tempfile.TemporaryFile() as file:
        placed: list[tuple[Piece, float, int, int]] = []
        squares = 0.0
        for group in groups:
            threshold, deviation, group_squares = _survey(group, density, advance)
            squares += group_squares
            if alpha * deviation > float(np.finfo(np.float32).max):
                raise InvalidArgument(f"the scale alpha * std is {alpha * deviation:g}, beyond float32: a broken tuned model, or a huge alpha")
            scale = float(np.float32(alpha * deviation))
            for piece, start, stop in _write_streams(group, threshold, coding, file, advance):
                placed.append((piece, scale, start, stop))
        try:
            file.write(bytes(PADDING))
            file.flush()
        except OSError as error:
            raise no_room(error) from error
        data: U8 = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return [Ternary.open(piece.shape, scale, coding, data, start, stop) for piece, scale, start, stop in placed], math.sqrt(squares)


def _survey(pieces: Sequence[Piece], density: float, advance: Callable[[int], None]) -> tuple[selection.Threshold, float, float]:
    """Threshold, standard deviation and sum of squares of the vector that the pieces make up."""
    chunks = [chunk for piece in pieces for chunk in chunks_of(piece)]
    upper = Histogram(selection.UPPER_BINS)

    def first(chunk: Chunk) -> tuple[float, float]:
        tau = chunk.read()
        sums: tuple[float, float] = moments.sums(tau)
        if not math.isfinite(sums[1]):
            raise InvalidArgument(f"the difference in {chunk.piece.name} holds NaN or infinity; the tuned model or the base is broken there")
        selection.count_upper(tau, upper.mine())
        return sums

    total = squares = 0.0
    for chunk, sums in ordered(first, chunks):
        total += sums[0]
        squares += sums[1]
        advance(chunk.size)
    entries = sum(piece.size for piece in pieces)
    wanted = kept_entries(density, entries)
    upper_bin, above = selection.locate_upper(upper.total(), wanted)
    lower = Histogram(selection.LOWER_BINS)

    def second(chunk: Chunk) -> None:
        selection.count_lower(chunk.read(), upper_bin, lower.mine())

    for chunk, _ in ordered(second, chunks):
        advance(chunk.size)
    return selection.locate(upper_bin, above, lower.total(), wanted), moments.standard_deviation(entries, total, squares), squares


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
