"""The task vector of a full fine-tune: tuned minus base over every floating-point parameter that both have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from sterna.codings import CHUNK
from sterna.errors import PairingError
from sterna.expert.changes import Add, Change, Set, Ternary
from sterna.numbers import moments
from sterna.sources.checkpoint import Checkpoint
from sterna.sources.config import changed_config
from sterna.sources.pairing import Pairing, pair
from sterna.taskvector import F32, Piece, TaskVector, float32


def finetune(base: Checkpoint, tuned: Checkpoint, exclude: Sequence[str], pairing: Pairing | None = None) -> TaskVector:
    """Bring the two together (`pairing`, where they are already) and describe their difference.

    Raises PairingError, Unsupported or InvalidArgument.
    """
    pairing = pairing or pair(base, tuned, exclude)
    if not pairing.pairs:
        raise PairingError("nothing is left to compress: every tensor is excluded, exact or dropped")
    pieces = [difference(p.name, p.shape, base.read(p.name), tuned.read(p.tuned)) for p in pairing.pairs]

    def changes(levels: Sequence[Ternary]) -> list[Change]:
        return [Add(piece.name, ternary) for piece, ternary in zip(pieces, levels, strict=True)]

    def after() -> list[Change]:
        return [Set(p.name, _cut(tuned.read(p.tuned), p.shape), "tuned") for p in pairing.pairs]

    def moved(values: Sequence[torch.Tensor]) -> list[Change]:
        return [Set(p.name, base.read(p.name).float() + value, "tuned") for p, value in zip(pairing.pairs, values, strict=True)]

    def norm() -> float:
        return math.sqrt(sum(_sum_of_squares(base.read(p.name)) for p in pairing.pairs))

    return TaskVector(
        "full",
        pieces,
        changes,
        after,
        moved,
        [Set(e.name, _exact_value(tuned.read(e.tuned), e.first_row), e.role, e.first_row) for e in pairing.exact],
        norm=norm,
        prefixes=pairing.prefixes,
        dropped=pairing.dropped,
        excluded=pairing.excluded,
        architecture=tuned.architecture,
        config=changed_config(base.config, tuned.config, any(e.role == "head" for e in pairing.exact)),
        folder=tuned.folder,
        warnings=pairing.warnings,
    )


def difference(name: str, shape: tuple[int, ...], ours: torch.Tensor, theirs: torch.Tensor) -> Piece:
    """theirs - ours as a piece. A dtype of theirs that cannot hold our values rounds ours first, or rounding noise would fill it."""
    before, after = ours.detach().reshape(-1), theirs.detach().reshape(-1)[: math.prod(shape)]
    round_to = after.dtype if torch.promote_types(before.dtype, after.dtype) != after.dtype else None

    def read(start: int, stop: int, out: F32) -> None:
        old = before[start:stop]
        if round_to is not None:
            old = old.to(round_to)
        np.subtract(float32(after[start:stop]), float32(old), out=out)

    return Piece(name, shape, read)


def _exact_value(tensor: torch.Tensor, first_row: int) -> torch.Tensor:
    rows = tensor.detach()[first_row:] if first_row else tensor.detach()
    return rows.cpu().clone(memory_format=torch.contiguous_format)


def _cut(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The rows that the base has too."""
    return tensor.detach()[: shape[0]].contiguous() if shape else tensor.detach()


def _sum_of_squares(tensor: torch.Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    return math.fsum(moments.sums(float32(flat[start : start + CHUNK]))[1] for start in range(0, flat.numel(), CHUNK))
