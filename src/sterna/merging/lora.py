"""What LoRA experts become when they are merged: stacked factors, factors of a rank, or full weights made ternary; and how far that is off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
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
    nearest,
    product_piece,
    recompressed_factors,
    sparse,
    truncated,
    values_of,
)
from sterna.merging.recipe import RECOMPRESS, Recipe
from sterna.merging.recompress import Entries
from sterna.merging.values import Spool, least_magnitudes, merged_values
from sterna.progress import Progress
from sterna.streaming import Chunk, chunks_of, ordered
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
    if not recipe.method.linear:
        return _by_entries(recipe, tensors, how, progress)
    form, share = form_of(recipe), recipe.recompress or RECOMPRESS
    sums = [stacked for each in tensors if (stacked := concatenated(each, coefficients(each, how))) is not None]
    if form == "sparse":
        return _sparse([product_piece(stacked) for stacked in sums], share, progress)
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


def _by_entries(recipe: Recipe, tensors: Sequence[Products], how: How, progress: Progress) -> tuple[list[Change], list[Loss]]:
    """Products merged by a method that looks at single entries: their dense result goes through a file, and is cut to a rank or made ternary."""
    share = recipe.recompress or RECOMPRESS
    every = [values_of(each) for each in tensors]
    least = least_magnitudes(every, how)
    total, done = sum(values.size for values in every), 0
    with closing(Spool()) as spool:
        for each, values in zip(tensors, every, strict=True):
            spool.add(each.name, each.shape, merged_values(values, how, least, recipe.seed))
            done += values.size
            progress("merge", done, total, "parameters")
        pieces = spool.pieces()
        if form_of(recipe) == "sparse":
            return _sparse(pieces, share, progress)
        made: list[Product] = []
        losses: list[Loss] = []
        for number, (each, dense) in enumerate(zip(tensors, spool.tensors(), strict=True)):
            about = concatenated(each, each.weights)
            near, lost, whole = nearest(dense.reshape(each.shape[0], -1), each.any, recipe.rank or each.rank, about)
            made.append(near)
            losses.append(Loss(each.name, lost, whole))
            progress("truncate", number + 1, len(tensors), "tensors")
        if recipe.recompress is not None:
            made = recompressed_factors(made, share["density"], share["alpha"], progress)
            losses = [dense_loss(piece, product_piece(change)) for piece, change in zip(pieces, made, strict=True)]
    return list(made), losses


def _sparse(pieces: Sequence[Piece], share: Mapping[str, float], progress: Progress) -> tuple[list[Change], list[Loss]]:
    adds = sparse(pieces, share["density"], share["alpha"], progress)
    made = [Piece(add.name, add.levels.shape, Entries(add)) for add in adds]
    return list(adds), [dense_loss(piece, near) for piece, near in zip(pieces, made, strict=True)]


def product_loss(wanted: Product, made: Product) -> Loss:
    """|M - M'|^2 and |M|^2 of two products, from their thin matrices alone."""
    first, second = thin_matrices(wanted), thin_matrices(made)
    whole = inner(first, first)
    return Loss(wanted.name, whole - 2 * inner(first, second) + inner(second, second), whole)


def dense_loss(wanted: Piece, made: Piece) -> Loss:
    """|M - M'|^2 and |M|^2 of two tensors, chunk by chunk."""
    lost = whole = 0.0
    for _, (difference, square) in ordered(lambda chunk: _squares(chunk, made), chunks_of(wanted)):
        lost += difference
        whole += square
    return Loss(wanted.name, lost, whole)


def _squares(chunk: Chunk, made: Piece) -> tuple[float, float]:
    wanted, near = chunk.read().astype(np.float64), np.empty(chunk.size, np.float32)
    made.read(chunk.start, chunk.stop, near)
    return float(((wanted - near) ** 2).sum()), float((wanted**2).sum())


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
