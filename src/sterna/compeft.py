"""ComPEFT (Yadav et al., arXiv 2311.13171): the signs of the largest entries of a task vector, and one scale.

The vector tau is given in pieces, in order, that can be read again and again: gamma keeps the sign of the min(non-zeros, floor(density * d))
entries of largest |tau|, ties cut by lowest flat index; lambda = alpha * std(tau), unbiased, over the whole vector. It is read three times and
never held: upper bits and sums, lower bits, levels.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import IO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.codings import PADDING, U8, Coding
from sterna.errors import CannotWrite, InvalidArgument
from sterna.expert.changes import Ternary
from sterna.numbers import moments, selection
from sterna.progress import Progress
from sterna.taskvector import F32, Piece

T = TypeVar("T")


def kept_entries(density: float, entries: int) -> int:
    """floor(density * entries), the density taken as the decimal number that it is written as: 0.29 of 100 is 29."""
    return math.floor(Fraction(Decimal(repr(float(density)))) * entries)


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
            scale = float(np.float32(alpha * deviation))
            for piece, start, stop in _write_streams(group, threshold, coding, file, advance):
                placed.append((piece, scale, start, stop))
        try:
            file.write(bytes(PADDING))
            file.flush()
        except OSError as error:
            raise _no_room(error) from error
        data: U8 = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return [Ternary.open(piece.shape, scale, coding, data, start, stop) for piece, scale, start, stop in placed], math.sqrt(squares)


def _survey(pieces: Sequence[Piece], density: float, advance: Callable[[int], None]) -> tuple[selection.Threshold, float, float]:
    """Threshold, standard deviation and sum of squares of the vector that the pieces make up."""
    chunks = [chunk for piece in pieces for chunk in piece.chunks()]

    def first(chunk: tuple[Piece, int, int]) -> tuple[NDArray[np.int64], tuple[float, float]]:
        piece, start, stop = chunk
        tau = piece.read(start, stop)
        sums = moments.sums(tau)
        if not math.isfinite(sums[1]):
            raise InvalidArgument(f"the difference in {piece.name} holds NaN or infinity; the tuned model or the base is broken there")
        return _counted(selection.UPPER_BINS, selection.count_upper, tau), sums

    upper = np.zeros(selection.UPPER_BINS, np.int64)
    total = squares = 0.0
    for (_, start, stop), (histogram, sums) in _ordered(first, chunks):
        upper += histogram
        total += sums[0]
        squares += sums[1]
        advance(stop - start)
    entries = sum(piece.size for piece in pieces)
    wanted = kept_entries(density, entries)
    upper_bin, above = selection.locate_upper(upper, wanted)

    def second(chunk: tuple[Piece, int, int]) -> NDArray[np.int64]:
        piece, start, stop = chunk
        return _counted(selection.LOWER_BINS, lambda tau, h: selection.count_lower(tau, upper_bin, h), piece.read(start, stop))

    lower = np.zeros(selection.LOWER_BINS, np.int64)
    for (_, start, stop), histogram in _ordered(second, chunks):
        lower += histogram
        advance(stop - start)
    return selection.locate(upper_bin, above, lower, wanted), moments.standard_deviation(entries, total, squares), squares


def _counted(bins: int, count: Callable[[F32, NDArray[np.int64]], None], tau: F32) -> NDArray[np.int64]:
    histogram = np.zeros(bins, np.int64)
    count(tau, histogram)
    return histogram


def _write_streams(
    pieces: Sequence[Piece], threshold: selection.Threshold, coding: Coding, file: IO[bytes], advance: Callable[[int], None]
) -> Iterator[tuple[Piece, int, int]]:
    """Code the pieces one after another into `file`; yields (piece, first byte, byte after the last)."""
    ties = threshold.ties

    def levels(chunk: tuple[Piece, int, int], ties: int) -> tuple[bytes, int]:
        piece, start, stop = chunk
        codes = np.empty(stop - start, np.uint32)
        kept, left = selection.emit(piece.read(start, stop), 0, threshold.bits, ties, codes)
        return coding.encode(codes[:kept], stop - start), ties - left

    for piece in pieces:
        begin = file.tell()
        for chunk, (record, used) in _ordered(partial(levels, ties=ties), piece.chunks()):
            if used > ties:  # an earlier chunk, worked on at the same time, took some of them
                record, used = levels(chunk, ties)
            ties -= used
            try:
                file.write(record)
            except OSError as error:
                raise _no_room(error) from error
            advance(chunk[2] - chunk[1])
        yield piece, begin, file.tell()


def _no_room(error: OSError) -> CannotWrite:
    return CannotWrite(f"no room for the coded streams in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a larger folder")


def _ordered(work: Callable[[tuple[Piece, int, int]], T], chunks: Iterable[tuple[Piece, int, int]]) -> Iterator[tuple[tuple[Piece, int, int], T]]:
    """(chunk, work(chunk)) in order, by torch's number of threads, with no more than a few results waiting."""
    threads = torch.get_num_threads()
    listed = list(chunks)
    if threads == 1 or len(listed) < 2:
        for chunk in listed:
            yield chunk, work(chunk)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead = 2 * threads
        waiting = [pool.submit(work, chunk) for chunk in listed[:ahead]]
        for i, chunk in enumerate(listed):
            result = waiting.pop(0).result()
            if i + ahead < len(listed):
                waiting.append(pool.submit(work, listed[i + ahead]))
            yield chunk, result
