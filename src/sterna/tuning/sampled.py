"""The gradient of a matrix at a few of its entries: sums over tokens of products of two activations, without the dense product.

The weight gradient of a linear layer is G = left.T @ right, summed over tokens. A mask of density .005 needs one entry in 200 of it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Literal

import torch

Gradient = Literal["sampled", "dense"]

_TOKENS = 1024
"""Tokens of one product: twice as fast as all of many thousands at once, whose columns leave the cache."""
_TRIAL_TOKENS = 512

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


@torch.library.custom_op("sterna::sampled_product", mutates_args=())
def sampled_product(left: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """float32[k]: (left.T @ right)[rows, columns]. left [tokens, m], right [tokens, n] of any float dtype; rows, columns int64[k], row by row.

    An operator of its own, for torch.compile: a graph takes no sparse tensors, and torch.sparse.sampled_addmm no half types.
    """
    starts = torch.searchsorted(rows, torch.arange(left.shape[1] + 1, device=rows.device))
    zeros = torch.zeros(rows.shape, device=rows.device)
    product = torch.sparse_csr_tensor(starts, columns, zeros, (left.shape[1], right.shape[1]), check_invariants=False)
    for start in range(0, left.shape[0], _TOKENS):
        a, b = left[start : start + _TOKENS], right[start : start + _TOKENS]
        product = torch.sparse.sampled_addmm(product, a.T.float().contiguous(), b.float().contiguous())
    values: torch.Tensor = product.values()
    return values


@sampled_product.register_fake
def _(left: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return left.new_empty(rows.shape, dtype=torch.float32)


def dense_product(left: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The same by way of the dense product."""
    return (left.T @ right)[rows, columns].float()


def faster(stored: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Gradient:
    """Which of the two ways is faster for a matrix like `stored` with this mask, here and now: the better of two runs each."""
    with torch.no_grad():
        left, right = (torch.ones(_TRIAL_TOKENS, width, dtype=stored.dtype, device=stored.device) for width in stored.shape)

        def seconds(product: Callable[..., torch.Tensor]) -> float:
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                product(left, right, rows, columns).sum().item()
                times.append(time.perf_counter() - begin)
            return min(times[1:])

        return "sampled" if seconds(sampled_product) <= seconds(dense_product) else "dense"
