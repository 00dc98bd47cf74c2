"""What a tuning trains, tensor by tensor: entries under a mask, a whole tensor, or an adapter that is folded away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from sterna.codings import I64
from sterna.live.weights import Slot
from sterna.tuning.taps import MaskedTap, Tap, install, remove


class Part(Protocol):
    """One base tensor that is trained. `name` is the base's; `slots` are all places where it hangs; `parameters` what an optimizer sees, by role."""

    @property
    def name(self) -> str: ...
    @property
    def slots(self) -> Sequence[Slot]: ...
    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]: ...

    def install(self) -> None:
        """Let the model train it. The forward's values stay as they are."""

    def write(self) -> None:
        """Put what was trained so far into the stored tensor, where the forward reads it from there."""

    def fold(self) -> None:
        """Leave the tuned tensor in the model for good."""

    def restore(self) -> None:
        """Put the base's values back, to the bit."""

    def moved(self) -> bool:
        """Whether training has changed the tensor; an adapter's factors may have moved and still add nothing."""


def hangs_at(tensor: torch.Tensor, slots: Sequence[Slot]) -> list[Slot]:
    """Every place where the tensor hangs: tied weights have several."""
    return [slot for slot in slots if slot.tensor is tensor]


def trained_dtype(stored: torch.Tensor) -> torch.dtype:
    """Half types are trained in float32: their steps would round away."""
    return torch.promote_types(stored.dtype, torch.float32)


@dataclass(eq=False)
class Entries:
    """The entries of a stored tensor under a mask, trained as one vector."""

    name: str
    slots: Sequence[Slot]
    tap: MaskedTap
    base: torch.Tensor

    @classmethod
    def of(cls, name: str, slots: Sequence[Slot], chosen: I64) -> Entries:
        stored = slots[0].tensor.detach()
        index = torch.from_numpy(chosen).to(stored.device)
        base = stored.reshape(-1)[index].clone()
        values = torch.nn.Parameter(base.to(trained_dtype(stored)).clone())
        return cls(name, slots, MaskedTap(values, index, stored.shape), base)

    @property
    def values(self) -> torch.nn.Parameter:
        return self.tap.values

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"values": self.values}

    def install(self) -> None:
        install(self.slots, self.tap)

    def write(self) -> None:
        self._put(self.values.detach())

    def fold(self) -> None:
        self.write()
        remove(self.slots)

    def restore(self) -> None:
        self._put(self.base)
        remove(self.slots)

    def moved(self) -> bool:
        return not torch.equal(self.values.detach().to("cpu", self.base.dtype), self.base.cpu())

    def _put(self, values: torch.Tensor) -> None:
        stored = self.slots[0].tensor.detach()
        values = values.to(stored.device, stored.dtype)
        index = self.tap.on(stored)[0]
        if stored.is_contiguous():
            stored.view(-1).index_copy_(0, index, values)
        else:
            stored[torch.unravel_index(index, stored.shape)] = values


@dataclass(eq=False)
class Whole:
    """A tensor of the model that is trained as it is: the head, or a bias in full."""

    name: str
    slots: Sequence[Slot]
    parameter: torch.nn.Parameter
    base: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.base = self.parameter.detach().clone()

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}  # it is the model's already

    def install(self) -> None:
        self.parameter.requires_grad_(True)

    def write(self) -> None:
        pass

    fold = write

    def restore(self) -> None:
        self.parameter.detach().copy_(self.base)

    def moved(self) -> bool:
        return not torch.equal(self.parameter.detach().cpu(), self.base.cpu())


class FoldingTap(Tap, Protocol):
    D: torch.nn.Parameter
    U: torch.nn.Parameter

    def folded(self, stored: torch.Tensor) -> torch.Tensor:
        """The tensor with the adapter in it, computed in float64, in the stored dtype."""


@dataclass(eq=False)
class Adapter:
    """A stored tensor with a low-rank adapter on it, D [n, r] and U [r, n], until it is folded."""

    name: str
    slots: Sequence[Slot]
    tap: FoldingTap

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"D": self.tap.D, "U": self.tap.U}

    def install(self) -> None:
        install(self.slots, self.tap)

    def write(self) -> None:
        pass

    def fold(self) -> None:
        remove(self.slots)
        stored = self.slots[0].tensor.detach()
        stored.copy_(self.tap.folded(stored))

    def restore(self) -> None:
        remove(self.slots)

    def moved(self) -> bool:
        stored = self.slots[0].tensor.detach()
        return not torch.equal(self.tap.folded(stored), stored)
