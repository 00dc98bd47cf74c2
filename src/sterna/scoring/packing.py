"""How controls are stored: a flat task vector as the few tensors of a safetensors file, and back.

Each packing is what a careful user of the method would write: 16-bit numbers beside a float32 unit, levels packed to their bits, positions by the
coding that experts have. `unpack` gives what the file is worth, so that size and score belong to one file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from sterna.codings import PADDING, default_coding
from sterna.expert.changes import Ternary
from sterna.recoding import stream_of

Packed = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """The shapes of a task vector's pieces, in its order, and which of them are embeddings."""

    shapes: tuple[tuple[int, ...], ...]
    embeddings: tuple[bool, ...]

    @cached_property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def split(self, tau: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of a flat vector, in their shapes."""
        return [part.reshape(shape) for part, shape in zip(torch.split(tau, self.sizes), self.shapes, strict=True)]

    def rows(self, chosen: Sequence[bool] | None = None) -> torch.Tensor:
        """The lengths of all rows (int64): along the first axis of what has more than one, else the whole piece; of the chosen pieces."""
        picked = [shape for shape, take in zip(self.shapes, chosen or [True] * len(self.shapes), strict=True) if take]
        lengths = [[math.prod(shape[1:])] * shape[0] if len(shape) > 1 else [math.prod(shape)] for shape in picked]
        return torch.tensor([length for row in lengths for length in row], dtype=torch.int64)

    def mask(self, chosen: Sequence[bool]) -> torch.Tensor:
        """Bool [d]: the entries of the chosen pieces."""
        return torch.repeat_interleave(torch.tensor(chosen, dtype=torch.bool), torch.tensor(self.sizes))


class Packing(Protocol):
    """One way to store a flat float32 task vector [d] in tensors, and to read it again."""

    def pack(self, tau: torch.Tensor, layout: Layout) -> Packed: ...

    def unpack(self, packed: Packed, layout: Layout) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Halves:
    """Every entry in float16, in units of the vector's largest magnitude, times `factor`."""

    factor: float = 1.0

    def pack(self, tau: torch.Tensor, layout: Layout) -> Packed:
        values, unit = halves(tau)
        return {"values": values, "unit": self.factor * unit}

    def unpack(self, packed: Packed, layout: Layout) -> torch.Tensor:
        return packed["values"].float() * packed["unit"]


@dataclass(frozen=True, slots=True)
class Sparse:
    """The entries that are not zero: positions and signs by the experts' coding over the flat vector, magnitudes in float16."""

    def pack(self, tau: torch.Tensor, layout: Layout) -> Packed:
        flat = tau.numpy()
        places = np.flatnonzero(flat).astype(np.int64)
        stream = stream_of(places << 1 | (flat[places] < 0), (flat.size,), default_coding())
        values, unit = halves(torch.from_numpy(np.abs(flat[places])))
        return {"positions": torch.from_numpy(np.frombuffer(stream, np.uint8).copy()), "values": values, "unit": unit}

    def unpack(self, packed: Packed, layout: Layout) -> torch.Tensor:
        data = np.concatenate([packed["positions"].numpy(), np.zeros(PADDING, np.uint8)])
        size = sum(layout.sizes)
        codes = Ternary.open((size,), 1.0, default_coding(), data, 0, data.size - PADDING).codes()
        tau = torch.zeros(size)
        signs = torch.from_numpy((1 - 2 * (codes & 1)).astype(np.float32))
        tau[torch.from_numpy(codes >> 1)] = signs * packed["values"].float() * packed["unit"]
        return tau


@dataclass(frozen=True, slots=True)
class OneBit:
    """BitDelta (arXiv 2402.10193) before its scales are trained: of each matrix the signs (one bit, - for 0) and the mean magnitude.

    The rest is in float16; as in the paper embeddings are of the rest, unless `embeddings`.
    """

    embeddings: bool = False

    def chosen(self, layout: Layout) -> list[bool]:
        return [len(shape) > 1 and (self.embeddings or not embedding) for shape, embedding in zip(layout.shapes, layout.embeddings, strict=True)]

    def pack(self, tau: torch.Tensor, layout: Layout) -> Packed:
        chosen = self.chosen(layout)
        inside = layout.mask(chosen)
        scales = [part.abs().double().mean().float() for part, take in zip(layout.split(tau), chosen, strict=True) if take]
        values, unit = halves(tau[~inside])
        bits = torch.from_numpy(np.packbits(tau[inside].numpy() > 0))
        return {"bits": bits, "scales": torch.stack(scales) if scales else torch.zeros(0), "values": values, "unit": unit}

    def unpack(self, packed: Packed, layout: Layout) -> torch.Tensor:
        chosen = self.chosen(layout)
        inside = layout.mask(chosen)
        lengths = torch.tensor([size for size, take in zip(layout.sizes, chosen, strict=True) if take], dtype=torch.int64)
        signs = np.unpackbits(packed["bits"].numpy(), count=int(lengths.sum())).astype(np.float32) * 2 - 1
        tau = torch.empty(sum(layout.sizes))
        tau[inside] = torch.from_numpy(signs) * torch.repeat_interleave(packed["scales"], lengths)
        tau[~inside] = packed["values"].float() * packed["unit"]
        return tau


@dataclass(frozen=True, slots=True)
class Rounded:
    """Every row in `bits` (8 or 4): round(value / scale) with scale = largest magnitude / (2^(bits - 1) - 1), a float16 scale a row and a unit."""

    bits: int

    def pack(self, tau: torch.Tensor, layout: Layout) -> Packed:
        largest = 2 ** (self.bits - 1) - 1
        lengths = layout.rows()
        peaks = torch.segment_reduce(tau.abs(), "max", lengths=lengths, initial=0.0) if tau.numel() else torch.zeros(lengths.numel())
        scales, unit = halves(peaks / largest)
        steps = torch.repeat_interleave(scales.float() * unit, lengths)
        levels = torch.where(steps > 0, tau / steps, 0).round().clamp(-largest, largest).to(torch.int8)
        if self.bits == 4:
            shifted = torch.cat([levels + 8, levels.new_zeros(levels.numel() % 2)]).to(torch.uint8)
            levels = shifted[0::2] << 4 | shifted[1::2]
        return {"levels": levels, "scales": scales, "unit": unit}

    def unpack(self, packed: Packed, layout: Layout) -> torch.Tensor:
        levels = packed["levels"]
        if self.bits == 4:
            levels = (torch.stack([levels >> 4, levels & 15], 1).reshape(-1)[: sum(layout.sizes)]).to(torch.int8) - 8
        return levels.float() * torch.repeat_interleave(packed["scales"].float() * packed["unit"], layout.rows())


def halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in float16 in units (float32 [1]) of their largest magnitude, so that small ones keep their eleven bits."""
    unit = values.abs().max().reshape(1) if values.numel() else torch.ones(1)
    unit = torch.where(unit > 0, unit, 1.0)
    return (values / unit).half(), unit
