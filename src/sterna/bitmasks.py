"""The computing form of experts: two masks, 64 positions a word (ComPEFT, arXiv 2311.13171), which take 2 bits an entry whatever the density is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from sterna import comparison
from sterna.comparison import Overlap
from sterna.errors import InvalidArgument
from sterna.expert.changes import Add, Factors, Joined, LowRank, Masked, Multiply, Ternary, needs_base, touched
from sterna.expert.expert import DENSE_FREE, DENSE_RATIO
from sterna.expert.facts import BaseFacts
from sterna.expert.palette import Palette
from sterna.numbers import bits, torch_bits
from sterna.numbers.bits import F64, I64, WORD
from sterna.recoding import blockwise

if TYPE_CHECKING:
    from sterna.expert.expert import Expert

Leveled = Add | Factors | Multiply | Masked
"""The changes that are made of levels."""


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """One ternary tensor as two masks, worth scale * level.

    `words` is int64[2, ceil(size / 64)] on any device: the positive mask and the negative one. Bit i % 64 of word i // 64, from the lowest, is flat
    position i in C order; no position has both bits; the bits past the end are 0.
    """

    words: torch.Tensor
    shape: tuple[int, ...]
    scale: float

    @classmethod
    def of(cls, ternary: Ternary) -> Masks:
        """The masks of a coded tensor, in CPU memory. Raises InvalidFile where its stream is damaged."""
        return cls(_packed([ternary]), ternary.shape, ternary.scale)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def positive(self) -> torch.Tensor:
        """int64[ceil(size / 64)], a view."""
        return self.words[0]

    @property
    def negative(self) -> torch.Tensor:
        """int64[ceil(size / 64)], a view."""
        return self.words[1]

    def to(self, device: torch.device | str) -> Masks:
        return replace(self, words=self.words.to(device))

    def levels(self) -> torch.Tensor:
        """int8 of the tensor's shape, -1, 0 and +1, on the masks' device."""
        return torch_bits.unpacked(self.words)[: self.size].view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the changes lie in `Bitmasks.words`, and what their positions mean.

    Changes that compare word by word are *direct*: `number` is each one's row, by name, of the columns `start` (first word), `length` (words) and
    `scale`. LoRA changes are compared by their `products`. `spaces` has, for every tensor that is changed, what must be equal to compare two changes;
    experts of one `digest` have all of that in common, in one order.
    """

    number: dict[str, int]
    start: I64
    length: I64
    scale: F64
    products: dict[str, Factors]
    spaces: dict[str, tuple[object, ...]]
    digest: bytes

    @classmethod
    def of(cls, changes: Sequence[Leveled]) -> Layout:
        widths = [sum(map(words_of, change.ternaries)) for change in changes]
        starts = accumulate(widths, initial=0)
        spaces = {name: _space(change) for change in changes for name in touched(change)}
        direct = [(change, start, width) for change, start, width in zip(changes, starts, widths, strict=False) if not isinstance(change, Factors)]
        return cls(
            {change.name: number for number, (change, _, _) in enumerate(direct)},
            np.array([start for _, start, _ in direct], np.int64),
            np.array([width for _, _, width in direct], np.int64),
            np.array([change.ternaries[0].scale for change, _, _ in direct], np.float64),
            {change.name: change for change in changes if isinstance(change, Factors)},
            spaces,
            hashlib.sha256(repr(spaces).encode()).digest(),
        )


@dataclass(frozen=True, eq=False)
class Bitmasks:
    """The ternary changes of an expert in two-mask form, on one device. Made by `Expert.bitmasks`.

    A *position* is an entry of what is changed: of the base tensor for added levels and for LoRA's products, of the vector for (IA)3, of the mask's
    entries for PaFi. `words` int64[2, n] holds the masks of all `tensors` one after another, each from a whole word on.

    Operations on two experts raise WrongBase where they are for different bases, and InvalidArgument where both change one tensor in ways that have
    no positions in common (LoRA and (IA)3, say). Counting positions makes LoRA's products, some rows at a time; nothing else is ever dense.
    """

    base: BaseFacts
    changes: tuple[Leveled, ...]
    words: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.words.device

    def to(self, device: torch.device | str) -> Bitmasks:
        """The same masks in the memory of another device, where torch does the arithmetic."""
        return replace(self, words=self.words.to(device))

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.changes)

    @cached_property
    def tensors(self) -> dict[str, Masks]:
        """The masks by key, as views: the base's name of the tensor (of the first one under PaFi's mask), with `.lora_A` or `.lora_B` for factors."""
        ternaries = [ternary for change in self.changes for ternary in change.ternaries]
        keys = [key for change in self.changes for key in keys_of(change)]
        starts = accumulate(map(words_of, ternaries), initial=0)
        views = [self.words[:, start : start + words_of(ternary)] for ternary, start in zip(ternaries, starts, strict=False)]
        return {key: Masks(view, ternary.shape, ternary.scale) for key, ternary, view in zip(keys, ternaries, views, strict=True)}

    def dot(self, other: Bitmasks) -> float:
        """The inner product of the task vectors, in float64 of exact counts."""
        return comparison.dot(self, other)

    def norm(self) -> float:
        """The Euclidean norm of the task vector."""
        return math.sqrt(comparison.square(self))

    def cosine(self, other: Bitmasks) -> float:
        """dot / (norm * norm), -1 to 1; NaN where one of them changes nothing."""
        return comparison.cosine(self.dot(other), comparison.square(self), comparison.square(other))

    def nonzeros(self) -> int:
        """Positions that the expert changes."""
        return comparison.nonzeros(self)

    def overlap(self, other: Bitmasks) -> Overlap:
        """The positions that both change, and those that either changes."""
        shared, conflicting = comparison.shared(self, other)
        return Overlap(shared, self.nonzeros() + other.nonzeros() - shared, conflicting)

    def conflicts(self, other: Bitmasks) -> float:
        """The share of the positions changed by both whose signs differ, 0 to 1; NaN where there are none."""
        shared, conflicting = comparison.shared(self, other)
        return Overlap(shared, shared, conflicting).conflicts


def bitmasks(expert: Expert, names: Collection[str] | None = None) -> Bitmasks:
    """The two-mask form of an expert's ternary changes, in CPU memory; of the changes of those names alone where `names` are given.

    Heads, buffers, gained rows and saved modules are no part of it. Raises InvalidArgument for exact values of PaFi and HiWi, which have no levels,
    and where the masks would take more memory than the file justifies; InvalidFile where a stream is damaged.
    """
    changes = leveled(expert, names)
    ternaries = [ternary for change in changes for ternary in change.ternaries]
    wanted = 16 * sum(map(words_of, ternaries))
    allowed = max(DENSE_FREE, DENSE_RATIO * sum(ternary.stop - ternary.start for ternary in ternaries))
    if wanted > allowed:
        raise InvalidArgument(f"the bit masks take {wanted:,} bytes, more than the {allowed:,} that the coded ones justify")
    return Bitmasks(expert.facts.base, changes, _packed(ternaries))


def leveled(expert: Expert, names: Collection[str] | None = None) -> tuple[Leveled, ...]:
    """The changes (of those names) that are made of levels, in their order. Raises InvalidArgument for exact values of PaFi and HiWi."""
    picked = [change for change in expert.changes if names is None or change.name in names]
    merged = (c for c in picked if isinstance(c, Palette | LowRank | Factors | Multiply))
    several = [c.name for c in merged if isinstance(c, Palette | LowRank) or c.exact]
    if several:
        raise InvalidArgument(f"the expert has several magnitudes in {several[0]}, which two masks cannot hold: merge it with recompress first")
    exact = [change.name for change in picked if needs_base(change) and not change.ternaries]
    if exact:
        more = f" (and {len(exact) - 1} more)" if exact[1:] else ""
        how = "compress it over its base first" if expert.lossless is None else "compress the tuned model without lossless"
        raise InvalidArgument(f"the expert holds exact values for {exact[0]}{more}, which bit masks cannot: {how}")
    return tuple(change for change in picked if isinstance(change, Add | Factors | Multiply | Masked))


def keys_of(change: Leveled) -> tuple[str, ...]:
    """The keys of a change's tensors in `Bitmasks.tensors`, in the order of its ternaries."""
    return (f"{change.name}.lora_A", f"{change.name}.lora_B") if isinstance(change, Factors) else (change.name,)


def words_of(ternary: Ternary) -> int:
    """Words that each of a tensor's two masks takes."""
    return -(-ternary.size // WORD)


def _packed(ternaries: Sequence[Ternary]) -> torch.Tensor:
    """The masks of coded tensors one after another, int64[2, n]."""
    starts = list(accumulate(map(words_of, ternaries), initial=0))
    words = np.zeros((2, starts[-1]), np.uint64)
    for _, group in groupby(zip(ternaries, starts, strict=False), key=lambda one: (id(one[0].data), one[0].coding.number)):
        members, firsts = zip(*group, strict=True)
        joined = Joined.of(blockwise(members))
        places = WORD * np.array(firsts, np.int64)[joined.tensor] + joined.blocks.start
        codes = np.empty(joined.room, np.uint32)
        for batch in range(len(joined.batches) - 1):
            first, last = joined.decode(batch, codes)
            bits.set_bits(codes, first, last, joined.blocks.count, places, words)
    return torch.from_numpy(words.view(np.int64))


def _space(change: Leveled) -> tuple[object, ...]:
    """What must be equal for the positions of two changes to be the same: in words, the shape or count, and what else there is."""
    match change:
        case Add():
            return "added levels of shape", change.levels.shape
        case Factors():
            return "a LoRA product of shape", (change.B.shape[0], change.A.size // max(change.A.shape[0], 1)), change.transposed
        case Multiply():
            return "an (IA)3 vector of shape", change.vector.shape, change.axis, change.bias
        case Masked():
            return "masked entries, in number", change.rule.count, change.rule
