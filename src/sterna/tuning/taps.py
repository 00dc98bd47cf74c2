"""Parameters that are trained through others: while a model is tuned, `module.weight` gives the stored tensor with another way for its gradient.

A module's class is exchanged for a subclass whose attribute computes what is trained; parameters, names and state_dict stay as they are. The stored
tensor itself is what the forward uses under masks, so nothing is copied and nothing is added.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from sterna.live.weights import TUNED, Slot
from sterna.tuning.sampled import dense_product, sampled_product


class Tap(Protocol):
    """What an attribute of a module gives in place of the stored parameter; `linear` what a linear layer computes, None where it does as always."""

    def __call__(self, stored: torch.Tensor) -> torch.Tensor: ...

    def linear(self, x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None, by_input: bool) -> torch.Tensor | None: ...


class MaskedTap:
    """The stored tensor; of its gradient only the entries at `index` (flat, ascending, int64) go on, to `values`."""

    def __init__(self, values: torch.nn.Parameter, index: torch.Tensor, shape: torch.Size) -> None:
        width = shape[-1] if len(shape) else 1
        self.values = values
        self.sampled = False
        self._index = index, index // width, index % width

    def on(self, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flat index, row and column of each entry, where the stored tensor is: a model may move while it is tuned."""
        if self._index[0].device != stored.device:
            flat, rows, columns = (part.to(stored.device) for part in self._index)
            self._index = flat, rows, columns
        return self._index

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return stored
        tapped: torch.Tensor = _Masked.apply(self.values, stored, self.on(stored)[0])  # type: ignore[no-untyped-call]
        return tapped

    def linear(self, x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None, by_input: bool) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        _, rows, columns = self.on(stored)
        y: torch.Tensor = _MaskedLinear.apply(x, self.values, stored, bias, rows, columns, by_input, self.sampled)  # type: ignore[no-untyped-call]
        return y


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, stored: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.dtype = values.dtype
        return stored.view_as(stored)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradients[0].reshape(-1)[index].to(ctx.dtype), None, None


class _MaskedLinear(torch.autograd.Function):
    """x @ W.T + bias, or x @ W + bias where W is stored by input. Saves x and W, and makes of W's gradient the masked entries only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        stored: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor,
        columns: torch.Tensor,
        by_input: bool,
        sampled: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, stored, rows, columns)
        ctx.values = values.dtype
        ctx.bias = None if bias is None else bias.dtype
        ctx.by_input, ctx.sampled = by_input, sampled
        weight = stored.to(x.dtype)
        return linear(x, weight.T if by_input else weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, stored, rows, columns = ctx.saved_tensors
        dy = gradients[0]
        dx = values = bias = None
        if ctx.needs_input_grad[0]:
            weight = stored.to(dy.dtype)
            dx = dy @ (weight.T if ctx.by_input else weight)
        flat, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[1]:
            product = sampled_product if ctx.sampled else dense_product
            left, right = (inputs, flat) if ctx.by_input else (flat, inputs)
            values = product(left, right, rows, columns).to(ctx.values)
        if ctx.needs_input_grad[3]:
            bias = flat.sum(0).to(ctx.bias)
        return dx, values, None, bias, None, None, None, None


def install(slots: Iterable[Slot], tap: Tap) -> None:
    """Let every module that holds the tensor give what `tap` makes of it."""
    for slot in slots:
        module = slot.owner
        plain = type(module).__mro__[1] if TUNED in module.__dict__ else type(module)
        taps = module.__dict__.setdefault(TUNED, {})
        taps[slot.attribute] = tap
        module.__class__ = _tuned_class(plain, frozenset(taps))


def remove(slots: Iterable[Slot]) -> None:
    """Give the modules their own classes back."""
    for slot in slots:
        module = slot.module()
        if module is not None and module.__dict__.pop(TUNED, None) is not None:
            module.__class__ = type(module).__mro__[1]


@cache
def _tuned_class(plain: type[torch.nn.Module], attributes: frozenset[str]) -> type[torch.nn.Module]:
    members: dict[str, Any] = {attribute: property(_getter(attribute)) for attribute in attributes}
    by_input = _stored_by_input(plain)
    if "weight" in attributes and (by_input or plain.forward is torch.nn.Linear.forward):
        members["forward"] = _linear_forward(plain, by_input)
    return type(plain.__name__, (plain,), {**members, "__module__": plain.__module__})


def _getter(attribute: str) -> Callable[[torch.nn.Module], torch.Tensor]:
    def get(self: torch.nn.Module) -> torch.Tensor:
        tapped: torch.Tensor = self.__dict__[TUNED][attribute](self._parameters[attribute])
        return tapped

    return get


def _linear_forward(plain: type[torch.nn.Module], by_input: bool) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.__dict__[TUNED]["weight"].linear(x, self._parameters["weight"], self.bias, by_input)
        plainly: torch.Tensor = plain.forward(self, x) if y is None else y
        return plainly

    return forward


def is_linear(module: torch.nn.Module) -> bool:
    """Whether the module is a linear layer, of torch's class or of transformers' Conv1D, and no more."""
    return type(module).forward is torch.nn.Linear.forward or _stored_by_input(type(module))


def _stored_by_input(plain: type[torch.nn.Module]) -> bool:
    """Whether it is transformers' Conv1D, which GPT-2 has: a linear layer with its weight stored [in, out]."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and plain.forward is library.Conv1D.forward
