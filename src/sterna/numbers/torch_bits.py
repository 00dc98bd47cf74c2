"""What `bits` does, through torch operations, on any device: `words` is int64[2, n] there, of the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sterna.numbers.bits import I64


def population(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each int64, int64 of the same shape: sums over neighbours of 1, 2 and 4 bits, then of bytes by a multiplication."""
    pairs = words - (words >> 1 & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333)
    octets = nibbles + (nibbles >> 4) & 0x0F0F0F0F0F0F0F0F
    return octets * 0x0101010101010101 >> 56


def agreements(first: torch.Tensor, second: torch.Tensor, length: Sequence[int]) -> I64:
    """int64[2, k]: positions where both are not zero, with equal signs and with different ones, of each segment (of `length` words, in a row)."""
    same = first & second
    cross = first & second.flip(0)
    both = torch.stack([population(same[0] | same[1]), population(cross[0] | cross[1])])
    return _by_segment(both, length)


def populations(words: torch.Tensor, length: Sequence[int]) -> I64:
    """Non-zeros of each segment, int64[k]."""
    return _by_segment(population(words[0] | words[1]), length)


def _by_segment(counts: torch.Tensor, length: Sequence[int]) -> I64:
    """Sums over the last axis, by segment; the one thing that leaves the device."""
    ends = torch.tensor(length, dtype=torch.int64, device=counts.device).cumsum(0)
    totals = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    return totals[..., torch.nn.functional.pad(ends, (1, 0))].diff(dim=-1).cpu().numpy()


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """The levels of words int64[2, n]: int8[64 * n]."""
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    octets = words.contiguous().view(torch.uint8) if words.numel() else words.to(torch.uint8)  # whose strides torch may not let it view
    bits = (octets.unsqueeze(-1) >> places & 1).view(torch.int8).flatten(1)
    return bits[0] - bits[1]


def added(masks: Sequence[torch.Tensor], weights: Sequence[tuple[float, int]] | None = None) -> torch.Tensor:
    """The sum of the levels of vectors of one size, as `bits.added` gives it."""
    if weights is None:
        return _votes(masks)
    total = torch.zeros((), device=masks[0].device)
    first = 0
    for weight, size in weights:
        total = total + weight * _votes(masks[first : first + size]).float()
        first += size
    return total


def _votes(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    total = unpacked(masks[0]).to(torch.int8 if len(masks) < 128 else torch.int16)
    for words in masks[1:]:
        total += unpacked(words)
    return total
