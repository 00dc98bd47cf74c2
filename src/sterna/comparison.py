"""Two experts in two-mask form: inner products, and the positions that both change (ComPEFT, arXiv 2311.13171).

With P and N an expert's masks of levels +1 and -1, l its scale (a tensor's own, or the expert's), and pop the number of set bits:

    <x, y> = sum over tensors of l_x l_y (pop(P_x & P_y | N_x & N_y) - pop(P_x & N_y | N_x & P_y))
    |x|^2  = sum over tensors of l_x^2 pop(P_x | N_x)
    shared = pop(P_x & P_y | N_x & N_y) + pop(P_x & N_y | N_x & P_y), of which the second term conflict in sign

LoRA experts are compared by their products, s B A, whatever their ranks: <B1 A1, B2 A2> = tr((B2^T B1) (A1 A2^T)), exact since levels are integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sterna.errors import InvalidArgument, WrongBase
from sterna.numbers import bits, torch_bits
from sterna.numbers.bits import I64, array, compiled

if TYPE_CHECKING:
    from sterna.bitmasks import Bitmasks, Layout

_ENTRIES = 1 << 20
"""Entries of a LoRA's product that are made at a time."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Where two experts change the same: positions `shared` by both, changed by `either`, and those shared whose signs are `conflicting`."""

    shared: int
    either: int
    conflicting: int

    @property
    def jaccard(self) -> float:
        """shared / either, 0 to 1; NaN where neither changes anything."""
        return self.shared / self.either if self.either else math.nan

    @property
    def conflicts(self) -> float:
        """conflicting / shared, 0 to 1; NaN where nothing is shared."""
        return self.conflicting / self.shared if self.shared else math.nan


def dot(first: Bitmasks, second: Bitmasks) -> float:
    """The inner product of two experts."""
    ours, theirs, products = _both(first, second)
    places = first.layout.start[ours], second.layout.start[theirs], first.layout.length[ours]
    scales = first.layout.scale[ours], second.layout.scale[theirs]
    if compiled(first.words):
        direct = float(bits.inner(array(first.words), array(second.words), *places, *scales))
    else:
        counts = torch_bits.agreements(*_chosen(first, second, *places))
        direct = sum((scales[0] * scales[1] * (counts[0] - counts[1])).tolist())
    return direct + math.fsum(_inner(first, second, name) for name in products)


def square(masks: Bitmasks) -> float:
    """The inner product of an expert with itself."""
    return _square(masks)[0] + math.fsum(_inner(masks, masks, name) for name in masks.layout.products)


def cosine(dot: float, square: float, other: float) -> float:
    """dot / sqrt(square * other), within -1 and 1 whatever rounding does; NaN where a square is 0."""
    return max(-1.0, min(dot / math.sqrt(square * other), 1.0)) if square and other else math.nan


def nonzeros(masks: Bitmasks) -> int:
    """Positions that an expert changes."""
    products = (rows for name in masks.layout.products for rows in _rows(masks, name))
    return _square(masks)[1] + sum(int(torch.count_nonzero(rows)) for rows in products)


def shared(first: Bitmasks, second: Bitmasks) -> tuple[int, int]:
    """Positions that both change, and how many of them with different signs."""
    ours, theirs, products = _both(first, second)
    places = first.layout.start[ours], second.layout.start[theirs], first.layout.length[ours]
    if compiled(first.words):
        agree, differ = bits.shared(array(first.words), array(second.words), *places)
    else:
        agree, differ = torch_bits.agreements(*_chosen(first, second, *places)).sum(1).tolist()
    for name in products:
        for rows, others in zip(_rows(first, name), _rows(second, name), strict=True):
            signs = rows * others
            agree += int((signs > 0).sum())
            differ += int((signs < 0).sum())
    return agree + differ, differ


def _square(masks: Bitmasks) -> tuple[float, int]:
    """Of the direct changes, the inner product with itself, and the non-zeros."""
    layout = masks.layout
    if compiled(masks.words):
        total, count = bits.square(array(masks.words), layout.start, layout.length, layout.scale)
        return float(total), int(count)
    counts = torch_bits.populations(_segments(masks.words, layout.start, layout.length), layout.length.tolist())
    return sum((layout.scale * layout.scale * counts).tolist()), int(counts.sum())


def require_same(first: Bitmasks, second: Bitmasks) -> None:
    """Raise WrongBase for experts of different bases, InvalidArgument for masks on different devices."""
    ours, theirs = first.base, second.base
    if ours.fingerprint != theirs.fingerprint:
        raise WrongBase(
            f"the experts are for different bases: {ours.name}, fingerprint {ours.fingerprint[:12]}, and {theirs.name}, {theirs.fingerprint[:12]}; "
            "only experts for the same base can be compared or added"
        )
    if first.device != second.device:
        raise InvalidArgument(f"one expert's masks are on {first.device}, the other's on {second.device}; move one of them with `to`")


def require_comparable(first: Layout, second: Layout) -> None:
    """Raise InvalidArgument where two experts change one tensor in ways that have no positions in common."""
    for name in sorted(first.spaces.keys() & second.spaces.keys()):
        ours, theirs = first.spaces[name], second.spaces[name]
        if ours != theirs:
            ways = " and by ".join(" ".join(map(str, space[:2])) for space in (ours, theirs))
            raise InvalidArgument(f"{name} is changed in ways that cannot be compared: by {ways}")


def _both(first: Bitmasks, second: Bitmasks) -> tuple[I64 | slice, I64 | slice, Iterable[str]]:
    """What both experts change: the rows of direct changes in each one's layout, and the names of products. Raises WrongBase or InvalidArgument."""
    require_same(first, second)
    a, b = first.layout, second.layout
    if a.digest == b.digest:
        return slice(None), slice(None), a.products
    require_comparable(a, b)
    names = [name for name in a.number if name in b.number]
    ours, theirs = (np.array([layout.number[name] for name in names], np.int64) for layout in (a, b))
    return ours, theirs, [name for name in a.products if name in b.products]


def _chosen(first: Bitmasks, second: Bitmasks, ours: I64, theirs: I64, length: I64) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The segments of both, and their lengths, as `torch_bits` takes them."""
    return _segments(first.words, ours, length), _segments(second.words, theirs, length), length.tolist()


def _segments(words: torch.Tensor, start: I64, length: I64) -> torch.Tensor:
    """Segments one after another: the words as they are, where they are all of them."""
    if int(length.sum()) == words.shape[1]:
        return words
    return torch.cat([words[:, :0], *(words[:, a : a + n] for a, n in zip(start.tolist(), length.tolist(), strict=True))], dim=1)


def _factors(masks: Bitmasks, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels of A [r, in] and B [out, r], in float64, which holds their products exactly."""
    A, B = (masks.tensors[f"{name}.lora_{letter}"].levels() for letter in "AB")
    return A.flatten(1).double(), B.flatten(1).double()


def _inner(first: Bitmasks, second: Bitmasks, name: str) -> float:
    """<s1 B1 A1, s2 B2 A2> by way of r x r matrices."""
    (A1, B1), (A2, B2) = _factors(first, name), _factors(second, name)
    levels = float(((B1.T @ B2) * (A1 @ A2.T)).sum())
    scales = [change.A.scale * change.B.scale * change.scaling for change in (first.layout.products[name], second.layout.products[name])]
    return scales[0] * scales[1] * levels


def _rows(masks: Bitmasks, name: str) -> Iterator[torch.Tensor]:
    """B A with the sign of its scaling, some rows at a time: float64[rows, in]."""
    A, B = _factors(masks, name)
    sign = math.copysign(1.0, masks.layout.products[name].scaling)
    for part in torch.split(B, max(_ENTRIES // max(A.shape[1], 1), 1)):
        yield sign * (part @ A)
