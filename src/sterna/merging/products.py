"""LoRA experts merged as products: s B A of one and of another have no common factors, so sums of A and of B apart would mean nothing.

A method that is linear (`MergeMethod.linear`) gives each parent one coefficient a tensor, and the sum of products is the product of stacked factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from sterna.codings import I64, PADDING, default_coding
from sterna.compeft import ternarize
from sterna.expert.changes import Add, Factors, LowRank, Product, Ternary
from sterna.expert.expert import thin_matrices
from sterna.merging.emitting import How, rounded
from sterna.merging.registry import F64, Kinds
from sterna.merging.values import Read, Share, Values
from sterna.numbers.products import product_entries
from sterna.progress import Progress
from sterna.recoding import stream_of
from sterna.taskvector import F32, Piece

Form = Literal["concat", "svd", "sparse"]
FORMS: tuple[Form, ...] = ("concat", "svd", "sparse")
"""What LoRA experts become: factors stacked, which is exact; factors of a rank, by a truncated SVD; or full weights, made ternary by ComPEFT."""


_MORE, _ROUNDS = 8, 2
"""Columns beyond the rank, and rounds, of the iteration that cuts a dense matrix to a rank."""


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """One tensor to merge: the parents' products (None where a parent has none), their weights float64[n], in which order factors are
    stacked, and what a method drops of each."""

    name: str
    parts: Sequence[Product | None]
    weights: F64
    order: Sequence[int]
    shares: Sequence[Share]

    @property
    def any(self) -> Product:
        return next(part for part in self.parts if part is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the products add, as the base has it (convolutions are not flat)."""
        return product_shape(self.any)

    @property
    def rank(self) -> int:
        """The largest of the parents'."""
        return max(part.A.shape[0] for part in self.parts if part is not None)


def product_shape(change: Product) -> tuple[int, ...]:
    out, inner = change.B.shape[0], tuple(change.A.shape[1:])
    return (math.prod(inner), out) if change.transposed else (out, *inner)


def product_fault(first: Product, second: Product) -> str | None:
    """Why two changes of one name are no products of the same tensor, or None."""
    ours, theirs = ((product_shape(each), each.transposed, each.embedding) for each in (first, second))
    return None if ours == theirs else f"products of shapes {ours[0]} and {theirs[0]}, or one of them transposed"


def coefficients(products: Products, how: How) -> F64:
    """float64[n]: what a linear method multiplies each parent's product by, in this tensor: its values for one parent after another."""
    n = len(products.parts)
    gram = np.zeros((n, n))
    if how.method.statistics:
        thin = [thin_matrices(part) if part is not None else None for part in products.parts]
        for i, ours in enumerate(thin):
            for j, theirs in enumerate(thin[: i + 1]):
                if ours is not None and theirs is not None:
                    gram[i, j] = gram[j, i] = inner(ours, theirs)
    return how.method(Kinds(np.eye(n), products.weights, gram, how.semantics), how.options)


def inner(ours: tuple[F64, F64], theirs: tuple[F64, F64]) -> float:
    """<B1 A1, B2 A2> = tr((B2' B1) (A1 A2')), from the thin matrices alone. (einsum adds in one order, by any number of threads.)"""
    return float((np.einsum("mi,mj->ij", ours[0], theirs[0]) * np.einsum("in,jn->ij", ours[1], theirs[1])).sum())


def concatenated(products: Products, scales: F64) -> Product | None:
    """The sum of the parents' products, each times its scale, as one: factors stacked, and each rank with its scale. None where nothing is left.

    Ternary factors stay ternary; where one of them is not, all are float32.
    """
    held = [(part, float(scales[i])) for i in products.order if (part := products.parts[i]) is not None and scales[i] != 0]
    if not held:
        return None
    one = products.any
    if all(isinstance(part, Factors) for part, _ in held):
        return _stacked(products.name, [(part, scale) for part, scale in held if isinstance(part, Factors)])
    A = torch.cat([_plain(part)[0] for part, _ in held])
    B = torch.cat([(_plain(part)[1].double() * scale).float() for part, scale in held], 1)
    return LowRank(products.name, one.key, A, B, one.transposed, one.embedding)


def _stacked(name: str, held: Sequence[tuple[Factors, float]]) -> Factors:
    one = held[0][0]
    ranks = [part.A.shape[0] for part, _ in held]
    starts = np.cumsum([0, *ranks]).tolist()
    width = math.prod(one.A.shape[1:])
    A = np.concatenate([part.A.codes() + (start * width << 1) for (part, _), start in zip(held, starts, strict=False)])
    B = [_moved(part.B.codes(), rank, starts[-1], start) for (part, _), rank, start in zip(held, ranks, starts, strict=False)]
    scales = [_rank_scales(part) * scale for part, scale in held]
    told = torch.from_numpy(rounded(name, np.concatenate(scales)))
    shapes = (starts[-1], *one.A.shape[1:]), (one.B.shape[0], starts[-1], *one.B.shape[2:])
    levels = [_levels(codes, shape) for codes, shape in zip((A, np.sort(np.concatenate(B))), shapes, strict=True)]
    return Factors(name, one.key, levels[0], levels[1], 1.0, one.transposed, one.embedding, told)


def _moved(codes: I64, rank: int, columns: int, first: int) -> I64:
    """Codes of a matrix of `rank` columns as those of one of `columns`, from column `first` on."""
    rows, places = np.divmod(codes >> 1, rank)
    return (rows * columns + places + first) << 1 | codes & 1


def _rank_scales(part: Factors) -> F64:
    scale = float(np.float32(part.A.scale * part.B.scale * part.scaling))
    return np.full(part.A.shape[0], scale) if part.ranks is None else scale * part.ranks.numpy().astype(np.float64)


def _levels(codes: I64, shape: tuple[int, ...]) -> Ternary:
    """A ternary tensor of scale 1 in memory of its own."""
    stream = stream_of(codes, shape, default_coding())
    return Ternary.open(shape, 1.0, default_coding(), np.frombuffer(stream + bytes(PADDING), np.uint8), 0, len(stream))


def _plain(part: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 A and B of PEFT's shapes; B carries all scales."""
    if isinstance(part, LowRank):
        return part.A, part.B
    A, B = (torch.from_numpy(levels.levels()).float() for levels in (part.A, part.B))
    return A, (B.double() * torch.from_numpy(_rank_scales(part)).reshape(1, -1, *[1] * (B.dim() - 2))).float()


def truncated(change: Product, rank: int) -> tuple[LowRank, float, float]:
    """The nearest product of that rank (Eckart and Young), and the squares of the Frobenius norms of what is lost, and of the whole.

    From the thin matrices alone: B = Q R and A' = P S by QR, then the SVD of R S', all of them small.
    """
    A, B = (factor.flatten(1).double() for factor in _plain(change))
    with one_thread():
        left, upper = torch.linalg.qr(B)
        right, lower = torch.linalg.qr(A.T)
        U, S, V = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        made = low_rank(change, left @ U[:, :rank], S[:rank], right @ V[:rank].T, rank)
    return made, float((S[rank:] ** 2).sum()), float((S**2).sum())


def low_rank(like: Product, U: torch.Tensor, S: torch.Tensor, V: torch.Tensor, rank: int) -> LowRank:
    """U S V' (float64 [out, k], [k], [in, k]) cut to `rank` values, both factors with their roots; `like` tells of shapes."""
    kept = max(min(rank, int((S > 0).sum())), 1)
    roots = S[:kept].sqrt()
    signs = U[:, :kept].gather(0, U[:, :kept].abs().argmax(0, keepdim=True)).sign()  # an SVD leaves signs open
    A, B = (V[:, :kept] * roots * signs).T.float().contiguous(), (U[:, :kept] * roots * signs).float().contiguous()
    shapes = (kept, *like.A.shape[1:]), (like.B.shape[0], kept, *like.B.shape[2:])
    return LowRank(like.name, like.key, A.reshape(shapes[0]), B.reshape(shapes[1]), like.transposed, like.embedding)


def nearest(M: F32, like: Product, rank: int, about: Product | None) -> tuple[LowRank, float, float]:
    """A product of that rank near a dense float32 M [rows, columns], and what is lost, as `truncated` tells; M is read some rows at a time.

    By subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4) that begins in the range of `about`, a product that is near.
    """
    m, n = M.shape
    width = min(rank + _MORE, m, n)
    noise = np.random.RandomState(0).standard_normal((m + n, width))  # whose numbers stay what they are
    with one_thread():
        whole, begin = torch.from_numpy(M), torch.from_numpy(noise[m:])
        if about is not None:
            left, right = map(torch.from_numpy, thin_matrices(about))
            many = min(width, right.shape[0])
            begin[:, :many] = right.T @ (left.T @ torch.from_numpy(noise[:m, :many]))
        V = torch.linalg.qr(begin.float()).Q
        for _ in range(_ROUNDS):
            U = torch.linalg.qr(whole @ V).Q
            V = torch.linalg.qr(whole.T @ U).Q
        U = torch.linalg.qr((whole @ V).double()).Q
        rows = max((1 << 20) // n, 1)
        small, squares = torch.zeros(n, width, dtype=torch.float64), 0.0
        for first in range(0, m, rows):
            part = whole[first : first + rows].double()
            small += part.T @ U[first : first + rows]
            squares += float((part**2).sum())
        right, S, left = torch.linalg.svd(small, full_matrices=False)
        sides = (right, U @ left.T) if like.transposed else (U @ left.T, right)
        made = low_rank(like, sides[0], S, sides[1], rank)
    return made, squares - float((S[:rank] ** 2).sum()), squares


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: what LAPACK rounds depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def values_of(products: Products) -> Values:
    """A tensor's products by their entries, for methods that look at single ones."""
    sources = [partial(_read, part) if part is not None else None for part in products.parts]
    return Values(products.name, math.prod(products.shape), sources, products.weights, products.shares)


def _read(change: Product) -> Read:
    left, right = thin_matrices(change)

    def read(start: int, stop: int) -> F64:
        out = np.empty(stop - start, np.float32)
        product_entries(left, right, start, out)
        return out.astype(np.float64)

    return read


def product_piece(change: Product) -> Piece:
    """A product's entries, some at a time."""
    left, right = thin_matrices(change)

    def read(start: int, stop: int, out: F32) -> None:
        product_entries(left, right, start, out[: stop - start])

    return Piece(change.name, product_shape(change), read)


def sparse(pieces: Sequence[Piece], density: float, alpha: float, progress: Progress) -> list[Add]:
    """Merged tensors made ternary by ComPEFT, over all of them."""
    levels, _ = ternarize(pieces, density=density, alpha=alpha, per_tensor=False, coding=default_coding(), progress=progress)
    return [Add(piece.name, ternary) for piece, ternary in zip(pieces, levels, strict=True)]


def recompressed_factors(changes: Sequence[Product], density: float, alpha: float, progress: Progress) -> list[Product]:
    """Factors made ternary by ComPEFT, A and B of all tensors as one vector, as `sterna.compress` makes those of an adapter."""
    balanced = [_balanced(change) for change in changes]
    pieces = [_factor_piece(f"{change.name}.{side}", getattr(change, side)) for change in balanced for side in ("A", "B")]
    levels, _ = ternarize(pieces, density=density, alpha=alpha, per_tensor=False, coding=default_coding(), progress=progress)
    pairs = zip(balanced, levels[0::2], levels[1::2], strict=True)
    return [Factors(each.name, each.key, A, B, 1.0, each.transposed, each.embedding) for each, A, B in pairs]


def _balanced(change: Product) -> LowRank:
    """The same product with rows of A and columns of B of equal norms."""
    A, B = (factor.double() for factor in _plain(change))
    norms = A.flatten(1).norm(dim=1), B.flatten(1).norm(dim=0)
    ratio = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[1] / norms[0].clamp(min=1e-300)).sqrt(), torch.ones(()).double())
    A, B = A * ratio.reshape(-1, *[1] * (A.dim() - 1)), B / ratio.reshape(1, -1, *[1] * (B.dim() - 2))
    return LowRank(change.name, change.key, A.float(), B.float(), change.transposed, change.embedding)


def _factor_piece(name: str, tensor: torch.Tensor) -> Piece:
    flat = tensor.reshape(-1).numpy()

    def read(start: int, stop: int, out: F32) -> None:
        out[: stop - start] = flat[start:stop]

    return Piece(name, tuple(tensor.shape), read)


def adapter_config(configs: Sequence[Mapping[str, Any]], changes: Sequence[Product]) -> dict[str, Any]:
    """The adapter_config.json of merged products: the first parent's, with the ranks that they have now, and a scaling of 1."""
    config = {key: value for key, value in configs[0].items() if key not in ("use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform")}
    ranks = {change.key: int(change.A.shape[0]) for change in changes}
    config["r"] = config["lora_alpha"] = max(ranks.values())
    if len(set(ranks.values())) > 1:
        config["rank_pattern"] = config["alpha_pattern"] = ranks
    if any(other.get(field) != config.get(field) for other in configs for field in ("target_modules", "layers_to_transform", "exclude_modules")):
        config["target_modules"] = sorted(ranks)
        config.pop("exclude_modules", None)
    return config | saved_modules(configs)


def saved_modules(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The modules that any of the parents saved whole, as a field of adapter_config.json."""
    saved = sorted({name for other in configs for name in other.get("modules_to_save") or ()})
    return {"modules_to_save": saved} if saved else {}
