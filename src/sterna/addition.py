"""Many experts in two-mask form added, position by position, block by block: what merging by votes or by weighted sums begins with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sterna.bitmasks import Bitmasks
from sterna.codings import CHUNK
from sterna.comparison import require_same
from sterna.errors import InvalidArgument
from sterna.numbers import bits, torch_bits
from sterna.numbers.bits import WORD, addresses, compiled


def sums(experts: Sequence[Bitmasks], key: str, weights: Sequence[float] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """One tensor added over many experts: pairs of a block's first flat position and the sums from there on, on the experts' device.

    `key` is one of `Bitmasks.tensors`; an expert without it adds nothing. Without weights, levels are added, so a sum is the position's vote: int8,
    int16 from 128 experts on, wide enough for 32,767. With weights, values are: the sum of weights[i] * scale_i * level_i in float32. Experts of
    equal weight * scale are counted first and their count is multiplied once; the products are added in the order of those weights' magnitudes.
    Blocks have `codings.CHUNK` entries, the last what is left; each is made when it is asked for, on a CPU without holding Python's lock.
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
    order = sorted(groups, key=lambda weight: (abs(weight), weight))  # whatever order the experts came in
    masks = [words for weight in order for words in groups[weight]]
    weights = [(weight, len(groups[weight])) for weight in order] if weighted else None
    places = addresses(masks) if compiled(masks[0]) else None
    for start in range(0, size, CHUNK):
        first, last = start // WORD, -(-min(start + CHUNK, size) // WORD)
        if places is not None:
            out = torch.from_numpy(bits.added(places + np.uint64(8 * first), last - first, weights))
        else:
            out = torch_bits.added([words[:, first:last] for words in masks], weights)
        yield start, out[: size - start]
