"""PaFi (Liao et al., arXiv 2305.16742): train only the entries of smallest magnitude, a mask that whoever has the base can make again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sterna.errors import InvalidArgument
from sterna.expert.changes import MaskRule, Order
from sterna.live.weights import Slot
from sterna.mask import mask_of
from sterna.numbers.selection import kept_entries
from sterna.tuning.eligible import chosen, in_blocks
from sterna.tuning.parts import Entries, Part, hangs_at
from sterna.tuning.sampled import faster
from sterna.tuning.taps import is_linear

DENSITY = 0.005


@dataclass(frozen=True, slots=True)
class PaFi:
    """A sparse mask over the transformer blocks: weights and biases, norms too; not embeddings, not the pooler, not the head.

    `density` is the share of the eligible entries that are trained (.005 unless `count` gives their number). `include` are glob patterns over the
    base's names for what is eligible in place of the blocks, `exclude` for what is not. `order`: "smallest" magnitudes, or the controls "largest"
    and "random" (by a hash of `seed` and the flat index). `gradient`: linear layers take their gradient at the mask only ("sampled") or by way of
    the dense product ("dense"); "auto" times both once for each shape. The two round differently, so name one where runs must agree to the bit.
    """

    density: float | None = None
    count: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    order: Order = "smallest"
    seed: int = 0
    gradient: Literal["auto", "sampled", "dense"] = "auto"

    def __post_init__(self) -> None:
        if self.density is not None and self.count is not None:
            raise InvalidArgument(f"density {self.density} and count {self.count} are both given; expected one of them")
        if self.density is not None and not 0 < self.density <= 1:
            raise InvalidArgument(f"density is {self.density}; expected a number above 0, up to 1")
        if self.count is not None and self.count < 1:
            raise InvalidArgument(f"count is {self.count}; expected 1 or more")
        if self.order not in ("smallest", "largest", "random"):
            raise InvalidArgument(f"order is {self.order!r}; expected smallest, largest or random")
        if not 0 <= self.seed < 1 << 53:
            raise InvalidArgument(f"seed is {self.seed}; expected 0 to 2^53 - 1")
        if self.gradient not in ("auto", "sampled", "dense"):
            raise InvalidArgument(f"gradient is {self.gradient!r}; expected auto, sampled or dense")

    def rule(self, slots: dict[str, Slot]) -> MaskRule:
        """The canonical rule over the base's ordinary tensors. Raises InvalidArgument where it selects nothing, or more than there is."""
        names = chosen(slots, in_blocks(slots), self.include, self.exclude)
        entries = sum(slots[name].tensor.numel() for name in names)
        density = DENSITY if self.density is None else self.density
        count = kept_entries(density, entries) if self.count is None else self.count
        if not 0 < count <= entries:
            asked = f"density {density:g}" if self.count is None else f"count {self.count:,}"
            raise InvalidArgument(f"{asked} selects {count:,} of the {entries:,} eligible entries; expected at least 1 and no more than there are")
        return MaskRule(self.order, count, names, self.seed if self.order == "random" else 0)

    def parts(self, slots: dict[str, Slot], all_slots: Sequence[Slot], base: bytes, rule: MaskRule) -> list[Part]:
        """What is trained: the chosen entries of each tensor that has some. `base` is the digest of the base's fingerprint."""
        parts: list[Part] = []
        timed: dict[tuple[object, ...], bool] = {}
        masks = mask_of(base, rule, lambda name: slots[name].tensor)
        for name, index in zip(rule.names, masks, strict=True):
            if not index.size:
                continue
            stored = slots[name].tensor
            part = Entries.of(name, hangs_at(stored, all_slots), index)
            if stored.dim() == 2 and is_linear(slots[name].owner):
                key = (stored.shape, stored.dtype, stored.device, index.size.bit_length())
                if self.gradient == "auto" and key not in timed:
                    timed[key] = faster(stored, *part.tap.on(stored)[1:]) == "sampled"
                part.tap.sampled = timed[key] if self.gradient == "auto" else self.gradient == "sampled"
            parts.append(part)
        return parts


def stored_values(parts: Sequence[Part], dtype: torch.dtype) -> torch.Tensor:
    """The trained values as one vector [count], in the order of the mask, on the CPU."""
    return torch.cat([part.values.detach().to("cpu", dtype) for part in parts if isinstance(part, Entries)])
