"""What LoRA experts become when they are merged: stacked factors, factors of a rank, or full weights made ternary; and how far that is off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sterna.expert.changes import Add, Change, Factors, LowRank, Product
from sterna.expert.expert import thin_matrices
from sterna.merging.emitting import How
from sterna.merging.products import (
    Form,
    Products,
    coefficients,
    concatenated,
    inner,
    product_piece,
    recompressed_factors,
    sparse,
    truncated,
)
from sterna.merging.recipe import RECOMPRESS, Recipe
from sterna.merging.recompress import Entries
from sterna.progress import Progress
from sterna.streaming import chunks_of, ordered
from sterna.taskvector import Piece


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """How far one tensor of the result is from the method's own: squares of Frobenius norms, of the difference and of the whole."""

    name: str
    lost: float
    whole: float

    @property
    def relative(self) -> float:
        return math.sqrt(max(self.lost, 0.0) / self.whole) if self.whole else 0.0


def form_of(recipe: Recipe) -> Form:
    """What LoRA experts become by a recipe: where it does not say, stacked factors by a linear method, factors of a rank by another."""
    return recipe.lora or ("concat" if recipe.method.linear else "svd")


def merge_products(recipe: Recipe, tensors: Sequence[Products], how: How, progress: Progress) -> tuple[list[Change], list[Loss]]:
    """The merged tensors' changes, in order, and what was lost of each (nothing is told of what is exact).

    Raises InvalidArgument for values that float32 cannot hold.
    """
    form = form_of(recipe)
    share = recipe.recompress or RECOMPRESS
    sums = [stacked for each in tensors if (stacked := concatenated(each, coefficients(each, how))) is not None]
    if form == "sparse":
        pieces = [product_piece(stacked) for stacked in sums]
        adds = sparse(pieces, share["density"], share["alpha"], progress)
        return list(adds), sparse_losses(pieces, adds)
    made: list[Product] = list(sums)
    losses: list[Loss] = []
    if form == "svd":
        made = []
        ranks = {each.name: recipe.rank or each.rank for each in tensors}
        for number, each in enumerate(sums):
            near, lost, whole = truncated(each, ranks[each.name])
            made.append(near)
            losses.append(Loss(each.name, lost, whole))
            progress("truncate", number + 1, len(sums), "tensors")
    if recipe.recompress is not None:
        made = recompressed_factors(made, share["density"], share["alpha"], progress)
        losses = [product_loss(before, after) for before, after in zip(sums, made, strict=True)]
    return list(made), losses


def product_loss(wanted: Product, made: Product) -> Loss:
    """|M - M'|^2 and |M|^2 of two products, from their thin matrices alone."""
    first, second = thin_matrices(wanted), thin_matrices(made)
    whole = inner(first, first)
    return Loss(wanted.name, whole - 2 * inner(first, second) + inner(second, second), whole)


def sparse_losses(pieces: Sequence[Piece], adds: Sequence[Add]) -> list[Loss]:
    """|M - M'|^2 and |M|^2 of full weights and the ternary ones that were made of them, chunk by chunk."""
    losses = []
    for piece, add in zip(pieces, adds, strict=True):
        made = Entries(add)
        lost = whole = 0.0
        for chunk, wanted in ordered(lambda chunk: chunk.read().astype(np.float64), chunks_of(piece)):
            near = np.empty(chunk.size, np.float32)
            made(chunk.start, chunk.stop, near)
            lost += float(((wanted - near) ** 2).sum())
            whole += float((wanted**2).sum())
        losses.append(Loss(piece.name, lost, whole))
    return losses


def loss_record(losses: Sequence[Loss]) -> dict[str, Any]:
    """What the result's facts say of the loss: relative to the method's own result, over all these tensors, and where it is largest."""
    if not losses:
        return {}
    whole = Loss("", sum(loss.lost for loss in losses), sum(loss.whole for loss in losses))
    worst = max(losses, key=lambda loss: loss.relative)
    return {"relative": _told(whole.relative), "largest": {"tensor": worst.name, "relative": _told(worst.relative)}}


def _told(value: float) -> float:
    return float(f"{value:.4g}")


def product_entries_of(changes: Sequence[Change]) -> int:
    """Entries of what was merged: of full weights, or of factors."""
    count = 0
    for change in changes:
        if isinstance(change, LowRank):
            count += change.A.numel() + change.B.numel()
        elif isinstance(change, Add | Factors):
            count += sum(ternary.size for ternary in change.ternaries)
    return count
