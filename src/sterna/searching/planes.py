"""Residual planes: a second ternary plane over what the first left, a third over what both left. Their sum is a palette of a few magnitudes.

Plane p is ComPEFT's step with one threshold over r_p = tau - sum of the planes before, each worth m_p = mean of abs(r_p) over what it keeps, the
scale of least squares. Only the ratios m_p / m_1 are kept: alpha scales the sum as it scales one plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.codings import PADDING, Coding
from sterna.compeft import Budget, Survey, coded_levels, joined, survey
from sterna.expert.changes import Add, Ternary
from sterna.expert.palette import Palette
from sterna.numbers.kinds import packed, width_of
from sterna.numbers.selection import kept_entries
from sterna.recoding import stream_of
from sterna.taskvector import F32, Piece


def residual_planes(surveys: Sequence[Survey], density: float, count: int, coding: Coding) -> list[Add | Palette]:
    """The sum of `count` planes, each of that density, for every surveyed tensor; values are in units of m_1, so the largest plane is worth 1."""
    pieces = [piece for found in surveys for piece in found.pieces]
    planes: list[list[Ternary]] = []
    first, left = 0.0, joined(surveys)
    for _ in range(count):
        levels = coded_levels([Budget(left, kept_entries(density, left.entries), (1.0,) * len(pieces))], coding)
        kept = sum(ternary.count for ternary in levels)
        mean = _mean_of_largest(left, kept)
        first = first or mean
        if not kept or not mean:
            break
        planes.append([replace(ternary, scale=float(np.float32(mean / first))) for ternary in levels])
        left = survey([_residual(piece, ternary, mean) for piece, ternary in zip(left.pieces, levels, strict=True)])
    if len(planes) == 1:
        return [Add(piece.name, ternary) for piece, ternary in zip(pieces, planes[0], strict=True)]
    return _sums(pieces, planes, coding)


def _residual(piece: Piece, levels: Ternary, scale: float) -> Piece:
    """The piece minus scale * level."""
    worth = np.float32(scale)

    def read(start: int, stop: int, out: F32) -> None:
        piece.read(start, stop, out)
        codes = _codes(levels)
        first, last = np.searchsorted(codes, [start << 1, stop << 1]).tolist()
        part = codes[first:last]
        out[(part >> 1) - start] -= np.where(part & 1, -worth, worth)

    return Piece(piece.name, piece.shape, read)


@lru_cache(maxsize=8)  # read chunk after chunk, by several threads, plane below plane
def _codes(levels: Ternary) -> NDArray[np.int64]:
    return levels.codes()


def _mean_of_largest(surveyed: Survey, kept: int) -> float:
    """The mean of the `kept` largest magnitudes, each taken as the middle of its bin."""
    counts = surveyed.histogram
    above = np.cumsum(counts[::-1])[::-1]
    taken = np.clip(kept - (above - counts), 0, counts)
    bins = np.flatnonzero(taken)
    middle = ((bins.astype(np.uint32) << 15) | 0x4000).astype(np.uint32).view(np.float32).astype(np.float64)
    return float((taken[bins] * middle).sum() / kept) if kept else 0.0


def _sums(pieces: Sequence[Piece], planes: Sequence[Sequence[Ternary]], coding: Coding) -> list[Add | Palette]:
    """Each tensor's planes added up, all streams in one buffer."""
    streams: list[bytes] = []
    values: list[tuple[F32, NDArray[np.uint16]]] = []
    for number, piece in enumerate(pieces):
        dense = np.zeros(piece.size, np.float32)
        for plane in planes:
            codes, worth = plane[number].codes(), np.float32(plane[number].scale)
            dense[codes >> 1] += np.where(codes & 1, -worth, worth)
        places = np.flatnonzero(dense)
        magnitudes, numbers = np.unique(np.abs(dense[places]), return_inverse=True)
        streams.append(stream_of(places << 1 | (dense[places] < 0), piece.shape, coding))
        values.append((magnitudes, numbers.astype(np.uint16)))
    data = np.frombuffer(b"".join([*streams, bytes(PADDING)]), np.uint8)
    made: list[Add | Palette] = []
    start = 0
    for piece, stream, (magnitudes, indices) in zip(pieces, streams, values, strict=True):
        several = magnitudes.size > 1
        scale = float(magnitudes[0]) if magnitudes.size == 1 else 1.0
        levels = Ternary.open(piece.shape, scale, coding, data, start, start + len(stream))
        start += len(stream)
        bits = torch.from_numpy(packed(indices, width_of(magnitudes.size)))
        made.append(Palette(piece.name, levels, torch.from_numpy(magnitudes), bits) if several else Add(piece.name, levels))
    return made
