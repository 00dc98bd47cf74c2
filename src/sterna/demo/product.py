"""The product as the demo uses it: make an expert, keep its file, and measure it. Nothing else in the demo knows what an expert file holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import sterna


@dataclass(frozen=True, slots=True)
class Size:
    """What an expert takes on disk, header included, and what it is measured against.

    `exact` are the bytes of tensors kept as they are, the head first of all; `uncompressed` those of a 16-bit copy of the task vector and of these
    tensors. `bits` are those of the streams and the table for each of `parameters`; `entropy` is the i.i.d. bound.
    """

    bytes: int
    exact: int
    uncompressed: int
    parameters: int
    nonzeros: int
    bits: float
    entropy: float

    @property
    def pruned(self) -> int:
        """Bytes of the same support with 16-bit values: this coding of the positions, a value in the place of each sign bit."""
        return self.bytes + 15 * self.nonzeros // 8

    @property
    def pruned_bits(self) -> float:
        return self.bits + 15 * self.nonzeros / self.parameters


def saved(expert: sterna.Expert, folder: Path, name: str) -> Path:
    """Save under a name made of letters, digits, dots and dashes."""
    path = folder / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.safetensors"
    expert.save(path)
    return path


def measured(expert: sterna.Expert) -> Size:
    summary = sterna.inspect(expert)
    return Size(
        bytes=summary.bytes,
        exact=summary.bytes_exact,
        uncompressed=round(summary.ratio_to_16bit * summary.bytes),
        parameters=summary.parameters,
        nonzeros=summary.nonzeros,
        bits=summary.bits_per_parameter,
        entropy=summary.entropy_bits_per_parameter,
    )
