"""How an expert changes a base tensor: four kinds of change, all plain frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Role = Literal["head", "buffer", "rows", "untied", "saved"]


@dataclass(frozen=True, slots=True)
class Ternary:
    """One coded tensor of levels -1, 0, +1, worth `scale * level`.

    `stream` is a uint8 view of the coded bytes, `count` the number of non-zeros, `coding` the registered name of the coding.
    """

    shape: tuple[int, ...]
    count: int
    scale: float
    coding: str
    stream: np.ndarray

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        return self.count / self.size if self.size else 0.0


@dataclass(frozen=True, slots=True)
class Add:
    """base + scale * level, for full fine-tunes."""

    name: str
    levels: Ternary

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.levels,)


@dataclass(frozen=True, slots=True)
class Factors:
    """base + scaling * (B @ A), for LoRA.

    `A` is [r, in] and `B` is [out, r] as PEFT stores them (convolutions: the trailing axes are flattened by the product);
    `transposed` says that the product is transposed before it is added (embeddings, and Conv1D weights stored [in, out]).
    `key` is the module path inside the adapter file, without its `base_model.model.` prefix.
    """

    name: str
    key: str
    A: Ternary
    B: Ternary
    scaling: float
    transposed: bool = False

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.A, self.B)


@dataclass(frozen=True, slots=True)
class Multiply:
    """base * (1 + scale * level) along one axis, for (IA)3.

    `axis` is the axis of the base tensor that the vector runs along. Outside feed-forward layers the module's bias is scaled with its weight:
    `bias` is then its name. `key` is the module path inside the adapter file.
    """

    name: str
    key: str
    vector: Ternary
    axis: int
    bias: str | None = None

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.vector,)


@dataclass(frozen=True, slots=True)
class Set:
    """An exact tensor that takes the place of the live one.

    `role` says why it is exact: a task `head`; a `buffer`; `rows` that an embedding gained, appended after the base's `first_row` rows;
    an `untied` copy of a tensor that the base ties; a module `saved` beside an adapter.
    """

    name: str
    value: torch.Tensor
    role: Role
    first_row: int = 0

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return ()


Change = Add | Factors | Multiply | Set
