"""Many experts in two-mask form added, position by position, block by block: what merging by votes or by weighted sums begins with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from sterna.bitmasks import Bitmasks
from sterna.codings import CHUNK
from sterna.comparison import require_same
from sterna.errors import InvalidArgument
from sterna.numbers import bits, torch_bits
from sterna.numbers.bits import WORD, array, compiled
from sterna.streaming import ordered


def sums(experts: Sequence[Bitmasks], key: str, weights: Sequence[float] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """One tensor added over many experts: pairs of a block's first flat position and the sums from there on, on the experts' device.

    `key` is one of `Bitmasks.tensors`; an expert without it adds nothing. Without weights, levels are added, so a sum is the position's vote: int8,
    int16 from 128 experts on, wide enough for 32,767. With weights, values are: the sum of weights[i] * scale_i * level_i in float32. Experts of
    equal weight * scale are counted first and their count is multiplied once; the products are added in the order of those weights' magnitudes.
    Blocks have `codings.CHUNK` entries, the last what is left; on a CPU they are made by torch's number of threads.
    Raises WrongBase for different bases, InvalidArgument for a key that none has, for shapes that differ, or weights that are not a number an expert.
    """
    if weights is not None and (len(weights) != len(experts) or not all(map(math.isfinite, weights))):
        raise InvalidArgument(f"the weights are {list(weights)} for {len(experts)} experts; expected a finite number each")
    for expert in experts[1:]:
        require_same(experts[0], expert)
    having = [(expert.tensors[key], number) for number, expert in enumerate(experts) if key in expert.tensors]
    shapes = sorted({masks.shape for masks, _ in having})
    if len(shapes) != 1:
        found = f"it has the shapes {shapes}" if shapes else "none has it"
        raise InvalidArgument(f"{key} is to be added over {len(experts)} experts, but {found}")
    groups: dict[float, list[torch.Tensor]] = {}
    for masks, number in having:
        groups.setdefault(weights[number] * masks.scale if weights is not None else 1.0, []).append(masks.words)
    return _blocks(math.prod(shapes[0]), groups, weights is not None)


def _blocks(size: int, groups: dict[float, list[torch.Tensor]], weighted: bool) -> Iterator[tuple[int, torch.Tensor]]:
    by_loops = compiled(next(iter(groups.values()))[0])

    def block(start: int) -> torch.Tensor:
        part = slice(start // WORD, -(-min(start + CHUNK, size) // WORD))
        masks = {weight: [words[:, part] for words in group] for weight, group in groups.items()}
        if not by_loops:
            out = torch_bits.weighted(masks) if weighted else torch_bits.summed(masks[1.0])
        else:
            arrays = {weight: list(map(array, group)) for weight, group in masks.items()}
            out = torch.from_numpy(bits.weighted(arrays) if weighted else bits.summed(arrays[1.0]))
        return out[: size - start]

    starts = range(0, size, CHUNK)
    return ordered(block, starts) if by_loops else ((start, block(start)) for start in starts)
