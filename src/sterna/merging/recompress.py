"""Merged tensors made ternary again by ComPEFT: their largest entries by sign, and one scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sterna.codings import default_coding
from sterna.compeft import ternarize
from sterna.expert.changes import Add
from sterna.expert.palette import Palette
from sterna.merging.parents import Leveled
from sterna.progress import Progress
from sterna.taskvector import F32, Piece


def recompressed(changes: Sequence[Leveled], density: float, alpha: float, progress: Progress) -> list[Leveled]:
    """The changes as ternary ones: the `density` share of entries of largest magnitude over all of them, each worth alpha * std of all entries.

    Zeros of the merged tensors count as entries. Merged values tie; ties at the threshold are cut by lowest flat index, as `sterna.compress` cuts.
    """
    pieces = [Piece(change.name, change.levels.shape, Entries(change)) for change in changes]
    levels, _ = ternarize(pieces, density=density, alpha=alpha, per_tensor=False, coding=default_coding(), progress=progress)
    return [Add(change.name, ternary) for change, ternary in zip(changes, levels, strict=True)]


class Entries:
    """Entries of a coded tensor, chunk by chunk; several threads may read."""

    def __init__(self, change: Leveled) -> None:
        self._change = change
        blocks = change.levels.blocks
        self._before = np.cumsum(blocks.count) - blocks.count

    def __call__(self, start: int, stop: int, out: F32) -> None:
        """Write entries start to stop - 1, which begin and end where chunks do (or the tensor ends)."""
        out[: stop - start] = 0
        change, blocks = self._change, self._change.levels.blocks
        first, last = np.searchsorted(blocks.start, [start, stop]).tolist()
        if first == last:
            return
        counts = blocks.count[first:last]
        codes = np.empty(int(counts.sum()) + 8, np.uint32)
        change.levels.coding.decode(change.levels.data, blocks, first, last, codes)  # type: ignore[union-attr]  # what merging writes is in blocks
        codes = codes[:-8]
        if isinstance(change, Palette):
            values: F32 = change.magnitudes.numpy()[change.numbers(int(self._before[first]), codes.size)]
        else:
            values = np.full(codes.size, change.levels.scale, np.float32)
        out[(codes >> 1).astype(np.int64) + np.repeat(blocks.start[first:last] - start, counts)] = np.where(codes & 1, -values, values)
