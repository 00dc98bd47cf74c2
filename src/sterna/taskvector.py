"""A task vector as compression sees it: pieces that can be read again and again, and what is to become of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.expert.changes import Change, Set, Ternary
from sterna.expert.facts import SourceKind

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the task vector. `read(start, stop, out)` writes its flat entries to the float32 array `out`; several threads may call it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[int, int, F32], object]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def float32(values: torch.Tensor) -> F32:
    """The values of a tensor on any device, as float32 in CPU memory."""
    wide: F32 = values.detach().to("cpu", torch.float32).numpy()
    return wide


@dataclass(frozen=True, slots=True)
class TaskVector:
    """What one source gives to compression. `pieces` in the order of the flat vector; `changes` makes the expert's changes of their coded levels.

    `tuned` makes the changes that give the tuned tensors themselves, not compressed; `moved` those of any float32 numbers in the pieces' places, of
    their shapes. `exact` are kept as they are. `norm` is that of the base's tensors behind the pieces, None where there are none to differ from.
    """

    source: SourceKind
    pieces: Sequence[Piece]
    changes: Callable[[Sequence[Ternary]], list[Change]]
    tuned: Callable[[], list[Change]]
    moved: Callable[[Sequence[torch.Tensor]], list[Change]]
    exact: Sequence[Set]
    norm: Callable[[], float] | None = None
    prefixes: tuple[str, str] = ("", "")
    dropped: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    adapter: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    warnings: tuple[str, ...] = ()
