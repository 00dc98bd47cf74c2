"""The product as the demo uses it: make an expert, keep its file, and measure it. Nothing else in the demo knows what an expert file holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import sterna


@dataclass(frozen=True, slots=True)
class Size:
    """What an expert takes on disk, header included, and against its reference of 16 bits a parameter.

    `bits` are those of the streams, the table and the header for each of `parameters`;
    `exact` are the bytes of tensors kept as they are, the head first of all.
    """

    bytes: int
    exact: int
    parameters: int
    nonzeros: int
    bits: float
    entropy: float

    @property
    def uncompressed(self) -> int:
        """Bytes of the dense delta at 16 bits a parameter, with the same exact tensors."""
        return 2 * self.parameters + self.exact

    @property
    def pruned(self) -> int:
        """Bytes of the same support with 16-bit values: this coding of the positions, the value in the place of the sign bit."""
        return self.bytes + 2 * self.nonzeros - self.nonzeros // 8


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
        parameters=summary.parameters,
        nonzeros=summary.nonzeros,
        bits=summary.bits_per_parameter,
        entropy=summary.entropy_bits_per_parameter,
    )
