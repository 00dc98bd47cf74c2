"""The gradient of a matrix at a few of its entries: sums over tokens of products of two activations, without the dense product.

The weight gradient of a linear layer is G = left.T @ right, summed over tokens. A mask of density .005 needs one entry in 200 of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Literal

import torch

from sterna.tuning.kernels import add_sampled_dots

Gradient = Literal["sampled", "dense"]

_TOKENS = 256
"""Tokens that the CPU kernel transposes at a time, so that both sides stay in cache."""
_THREAD = 1 << 22
"""Multiplications from which another thread pays."""
_TRIAL_TOKENS = 512


@torch.library.custom_op("sterna::sampled_product", mutates_args=())
def sampled_product(left: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """float32[k]: (left.T @ right)[rows, columns]. left [tokens, m], right [tokens, n] of any float dtype; rows, columns int64[k], rows ascending.

    On the CPU a compiled loop over transposed blocks; elsewhere torch.sparse.sampled_addmm, in float32.
    """
    if left.device.type == "cpu":
        return _on_cpu(left, right, rows, columns)
    starts = torch.searchsorted(rows, torch.arange(left.shape[1] + 1, device=rows.device))
    pattern = torch.sparse_csr_tensor(starts, columns, torch.zeros(rows.shape, device=rows.device), (left.shape[1], right.shape[1]))
    product: torch.Tensor = torch.sparse.sampled_addmm(pattern, left.T.float().contiguous(), right.float().contiguous())
    return product.values()


@sampled_product.register_fake
def _(left: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return left.new_empty(rows.shape, dtype=torch.float32)


def _on_cpu(left: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(rows.shape, dtype=torch.float32)
    result, row, column = out.numpy(), rows.numpy(), columns.numpy()
    work = rows.numel() * left.shape[0]
    threads = max(min(torch.get_num_threads(), work // _THREAD), 1)
    bounds = [rows.numel() * part // threads for part in range(threads + 1)]
    for start in range(0, left.shape[0], _TOKENS):
        a = left[start : start + _TOKENS].T.float().contiguous().numpy()
        b = right[start : start + _TOKENS].T.float().contiguous().numpy()
        parts = [(a, b, row[i:j], column[i:j], result[i:j]) for i, j in pairwise(bounds)]
        if threads == 1:
            add_sampled_dots(*parts[0])
        else:
            with ThreadPoolExecutor(threads) as pool:
                for future in [pool.submit(add_sampled_dots, *part) for part in parts]:
                    future.result()
    return out


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
