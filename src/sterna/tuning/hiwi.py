"""HiWi (Liao et al., arXiv 2305.16742): an adapter on the biases or weights of the feed-forward layers, folded away after training.

W' = W + s * act(W D) U with D [n, r] and U [r, n]; for biases b' = b + s * act(b D) U. Only D, U and the head are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import gelu, linear, relu

from sterna.errors import InvalidArgument, Unsupported
from sterna.expert.changes import Activation, Folded
from sterna.expert.expert import new_value, rounded
from sterna.live.weights import Slot
from sterna.sources.names import some
from sterna.tuning.eligible import FeedForward, feed_forward
from sterna.tuning.parts import Adapter, Part, Whole, hangs_at, trained_dtype
from sterna.tuning.taps import is_linear

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {"relu": relu, "gelu": gelu, "identity": lambda x: x}

ACTIVATION: dict[str, Activation] = {"bias": "gelu", "weight": "relu"}
"""By target, where none is given."""


@dataclass(frozen=True, slots=True)
class HiWi:
    """An adapter on each bias or weight of the feed-forward layers, with D and U of its own.

    `target`: "bias" trains 2 * rank * (d_ff + d_model) numbers a block and stores the d_ff + d_model new biases; "weight" acts along the d_model axis
    of each matrix and stores D and U, or the compressed change. `activation` is the paper's non-linearity (which it does not name): "relu", "gelu" or
    "identity"; unless given, "relu" on weights and "gelu" on biases, whose adapters may die for good under "relu". `scale` is s. U begins at zero, D
    is drawn from N(0, init_std^2) by torch's generator. `modules` are glob patterns of the base's modules, in place of the feed-forward layers that
    are found by architecture. `zero_bias`: a bias that is zero in every entry cannot move (act(0 D) U = 0): "error", or "direct" to train such biases
    themselves.
    """

    target: Literal["bias", "weight"] = "bias"
    rank: int = 16
    activation: Activation | None = None
    scale: float = 1.0
    init_std: float = 0.02
    modules: Sequence[str] | None = None
    zero_bias: Literal["error", "direct"] = "error"

    def __post_init__(self) -> None:
        if self.activation is None:
            object.__setattr__(self, "activation", ACTIVATION.get(self.target))
        for key, value, known in (
            ("target", self.target, ("bias", "weight")),
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("zero_bias", self.zero_bias, ("error", "direct")),
        ):
            if value not in known:
                raise InvalidArgument(f"{key} is {value!r}; expected one of {', '.join(known)}")
        if not isinstance(self.rank, int) or self.rank < 1:
            raise InvalidArgument(f"rank is {self.rank!r}; expected a whole number, 1 or more")
        if not 0 < abs(self.scale) < 1e6 or not 0 < self.init_std < 1e3:
            raise InvalidArgument(f"scale is {self.scale}, init_std {self.init_std}; expected finite numbers, a scale other than 0, a positive std")

    def parts(self, slots: dict[str, Slot], all_slots: Sequence[Slot], width: int | None) -> list[Part]:
        """What is trained. `slots` are the ordinary tensors by base name; `width` is d_model where the configuration tells it."""
        layers = feed_forward(slots, self.modules)
        return self._biases(layers, slots, all_slots) if self.target == "bias" else self._weights(layers, slots, all_slots, width)

    def _biases(self, layers: Sequence[FeedForward], slots: dict[str, Slot], all_slots: Sequence[Slot]) -> list[Part]:
        found = [f"{layer.module}.bias" for layer in layers if f"{layer.module}.bias" in slots]
        if not found:
            raise Unsupported(
                f"the feed-forward layers of this model have no biases (as {layers[0].module}): HiWi(target='weight') acts on their weights"
            )
        zero = [name for name in found if not slots[name].tensor.detach().any()]
        if zero and self.zero_bias == "error":
            raise InvalidArgument(
                f"{len(zero)} of {len(found)} feed-forward biases are zero in every entry ({some(zero)}), and an adapter on zeros cannot move them; "
                "HiWi(zero_bias='direct') trains those biases themselves, HiWi(target='weight') adapts the weights"
            )
        parts: list[Part] = []
        for name in found:
            places = hangs_at(slots[name].tensor, all_slots)
            if name in zero:
                parts.append(_direct(name, places))
            else:
                parts.append(Adapter(name, places, BiasTap(*self._factors(slots[name].tensor, slots[name].tensor.numel()), self)))
        return parts

    def _weights(self, layers: Sequence[FeedForward], slots: dict[str, Slot], all_slots: Sequence[Slot], width: int | None) -> list[Part]:
        parts: list[Part] = []
        for layer in layers:
            slot = slots[f"{layer.module}.weight"]
            if slot.tensor.dim() != 2:
                raise Unsupported(f"{slot.name} has shape {tuple(slot.tensor.shape)}; HiWi's weight variant acts on matrices")
            by_input = is_linear(slot.owner) and not isinstance(slot.owner, torch.nn.Linear)
            axis = _width_axis(slot, layer, by_input, width)
            tap = WeightTap(*self._factors(slot.tensor, slot.tensor.shape[axis]), self, transposed=axis == 0)
            parts.append(Adapter(f"{layer.module}.weight", hangs_at(slot.tensor, all_slots), tap))
        return parts

    def _factors(self, stored: torch.Tensor, n: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        dtype = trained_dtype(stored)
        D = torch.nn.Parameter((torch.randn(n, self.rank) * self.init_std).to(stored.device, dtype))
        return D, torch.nn.Parameter(torch.zeros(self.rank, n, dtype=dtype, device=stored.device))


def _direct(name: str, places: Sequence[Slot]) -> Whole:
    parameter = places[0].tensor
    if not isinstance(parameter, torch.nn.Parameter):
        raise Unsupported(f"{name} is a buffer of the live model, not a parameter")
    return Whole(name, places, parameter)


def _width_axis(slot: Slot, layer: FeedForward, by_input: bool, width: int | None) -> int:
    """The axis of a stored matrix that is d_model's."""
    side = layer.side
    if side is None:
        out, inner = slot.tensor.shape[::-1] if by_input else slot.tensor.shape
        if width is None or (out == width) == (inner == width):
            raise Unsupported(f"{slot.name} [{out}, {inner}]: which axis is d_model's cannot be told; name feed-forward layers only")
        side = "input" if inner == width else "output"
    return 0 if (side == "output") != by_input else 1


class BiasTap:
    """b + s * act(b D) U."""

    def __init__(self, D: torch.nn.Parameter, U: torch.nn.Parameter, method: HiWi) -> None:
        assert method.activation is not None
        self.D, self.U = D, U
        self.activation, self.scale = method.activation, method.scale

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        wide = stored.to(self.D.dtype)
        return (wide + self.scale * (ACTIVATIONS[self.activation](wide @ self.D) @ self.U)).to(stored.dtype)

    def linear(self, x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None, by_input: bool) -> torch.Tensor | None:
        return None

    def folded(self, stored: torch.Tensor) -> torch.Tensor:
        wide, D, U = stored.double(), self.D.detach().double(), self.U.detach().double()
        return rounded(wide + self.scale * (ACTIVATIONS[self.activation](wide @ D) @ U), stored.dtype)


class WeightTap:
    """W + s * act(W D) U, or of W.T; in a linear layer as two thin products, so that the tuned matrix is never made while it is trained."""

    def __init__(self, D: torch.nn.Parameter, U: torch.nn.Parameter, method: HiWi, transposed: bool) -> None:
        assert method.activation is not None
        self.D, self.U, self.transposed = D, U, transposed
        self.activation, self.scale = method.activation, method.scale

    def _product(self, stored: torch.Tensor, D: torch.Tensor, U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two factors whose product, left @ right, is the change of the stored matrix."""
        hidden = ACTIVATIONS[self.activation]((stored.T if self.transposed else stored) @ D)
        return (self.scale * U.T, hidden.T) if self.transposed else (self.scale * hidden, U)

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        left, right = self._product(stored.to(self.D.dtype), self.D, self.U)
        return (stored + left @ right).to(stored.dtype)

    def linear(self, x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None, by_input: bool) -> torch.Tensor | None:
        left, right = (factor.to(x.dtype) for factor in self._product(stored.to(self.D.dtype), self.D, self.U))
        if by_input:
            return linear(x, stored.T, bias) + (x @ left) @ right
        return linear(x, stored, bias) + linear(linear(x, right), left)

    def folded(self, stored: torch.Tensor) -> torch.Tensor:
        return new_value(self.change(""), stored).to(stored.device)

    def change(self, name: str, dtype: torch.dtype | None = None) -> Folded:
        """The adapter as an expert's change of the tensor `name`, its factors in `dtype` where one is given."""
        D, U = (factor.detach().cpu().to(dtype or factor.dtype).clone() for factor in (self.D, self.U))
        return Folded(name, D, U, self.activation, self.scale, self.transposed)
