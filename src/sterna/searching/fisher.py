"""Diagonal Fisher information, one number a tensor: how much the tuned model's losses mind a change of its entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sterna.expert.expert import Expert
from sterna.live.weights import live_weights
from sterna.progress import Progress, silent
from sterna.scoring.bench import Bench
from sterna.training.evaluation import evaluating

ROWS = 64
"""How many rows are looked at; a tensor's mean is steady long before its entries are."""


def mean_fisher(bench: Bench, tuned: Expert, names: Sequence[str], progress: Progress = silent) -> tuple[float, ...]:
    """F_t of the base's tensors of these names, at the tuned model: the mean over rows and entries of (d loss / d entry)^2.

    A row's loss is the cross-entropy of its label or the mean one of its tokens, or the squared error; rows are the bench's first 64. This is the
    empirical Fisher information (arXiv 1905.12558). To two significant digits, so that another run agrees. A tensor without gradients, such as a
    buffer, has the mean of the others. Memory: one tensor's gradient at a time.
    """
    bases = tuned.fingerprint.names
    places = live_weights(bench.model, bases, (None,) * len(bases), {}).of_base
    rows = min(ROWS, len(bench))
    sums: dict[int, float] = {}

    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        sums[id(parameter)] = sums.get(id(parameter), 0.0) + float(parameter.grad.float().square().sum())
        parameter.grad = None

    with bench.wearing(tuned) as model, evaluating(model), torch.enable_grad():
        live = {name: tensor for name in names if (tensor := places[name].hung) is not None and tensor.requires_grad}
        once = {id(tensor): tensor for tensor in live.values()}
        handles = [tensor.register_post_accumulate_grad_hook(add) for tensor in once.values()]  # type: ignore[no-untyped-call]
        try:
            for place in range(rows):
                bench.loss(model, place).backward()  # type: ignore[no-untyped-call]
                progress("gradients", place + 1, rows, "rows")
        finally:
            for handle in handles:
                handle.remove()
            model.zero_grad(set_to_none=True)
    found = {name: float(f"{sums.get(id(tensor), 0.0) / (rows * tensor.numel()):.2g}") for name, tensor in live.items()}
    mean = sum(found.values()) / max(len(found), 1)
    return tuple(found.get(name, mean) for name in names)
