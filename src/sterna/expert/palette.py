"""A change of a few magnitudes: coded positions and signs, and for each non-zero the number of its magnitude. What sums of ternary tensors are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.errors import InvalidFile
from sterna.numbers.kinds import packed_bytes, unpack, width_of

if TYPE_CHECKING:
    from sterna.expert.changes import Exact, Ternary

MOST = 1 << 16
"""Magnitudes of one tensor, at most."""

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Palette:
    """base + sign * magnitude: non-zero i of `levels` (in the order of its positions; its scale is 1) has the magnitude of number i in `indices`.

    `magnitudes` is float32 [K], 2 <= K <= 65,536, finite, above 0 and ascending; `indices` uint8 [ceil(count * b / 8)] holds numbers of
    b = ceil(log2 K) bits one after another, the lowest bit first, the spare ones 0. (One magnitude is an `Add`.)
    """

    name: str
    levels: Ternary
    magnitudes: torch.Tensor
    indices: torch.Tensor

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.levels,)

    @property
    def exact(self) -> Exact:
        return ((f"{self.name}.magnitudes", self.magnitudes), (f"{self.name}.indices", self.indices))

    @property
    def width(self) -> int:
        """Bits of an index."""
        return width_of(self.magnitudes.numel())

    def numbers(self, first: int, count: int) -> NDArray[np.uint16]:
        """The numbers of the magnitudes of non-zeros first..first + count - 1. Raises InvalidFile where one is beyond the last magnitude."""
        out = np.empty(count, np.uint16)
        if count and unpack(self.indices.numpy(), self.width, first, out) >= self.magnitudes.numel():
            raise InvalidFile(f"an index of {self.name} is beyond its {self.magnitudes.numel()} magnitudes")
        return out

    def batches(self) -> Iterator[tuple[NDArray[np.int64], F32]]:
        """Flat positions (int64, ascending) and values (float32), some at a time. Raises InvalidFile where the stream or an index is damaged."""
        magnitudes, done = self.magnitudes.numpy(), 0
        for codes in self.levels.batches():
            values: F32 = magnitudes[self.numbers(done, codes.size)]
            yield codes >> 1, np.where(codes & 1, -values, values)
            done += codes.size

    def dense(self) -> torch.Tensor:
        """float32 of the tensor's shape."""
        out = np.zeros(self.levels.size, np.float32)
        for positions, values in self.batches():
            out[positions] = values
        return torch.from_numpy(out.reshape(self.levels.shape))


def palette_fault(change: Palette) -> str | None:
    """What is wrong with a palette's own tensors, or None; indices beyond the magnitudes are found when they are read."""
    values, many = change.magnitudes, change.magnitudes.numel()
    if values.dtype != torch.float32 or values.dim() != 1 or not 2 <= many <= MOST:
        return f"has magnitudes {values.dtype} {tuple(values.shape)}; expected 2 to {MOST} in float32"
    plain = values.numpy()
    if not (np.isfinite(plain).all() and plain[0] > 0 and (np.diff(plain) > 0).all()):
        return "has magnitudes that are not finite, above 0 and ascending"
    wanted = packed_bytes(change.levels.count, change.width)
    if change.indices.dtype != torch.uint8 or change.indices.shape != (wanted,):
        return f"has indices {change.indices.dtype} {tuple(change.indices.shape)}; expected {wanted} bytes for {change.levels.count} non-zeros"
    spare = 8 * wanted - change.levels.count * change.width
    if wanted and int(change.indices[-1]) >> (8 - spare):
        return "has indices with bits set beyond the last"
    if change.levels.scale != 1:
        return f"has levels of scale {change.levels.scale}; expected 1"
    return None
