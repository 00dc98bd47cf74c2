"""A new head for a task that no expert knows: a linear layer over the features of the composed model, fitted to a few examples by ridge regression.

The fit is exact and takes milliseconds, so each trial of a search has its own; it is scored on examples that it was not fitted to, each left out in
turn, which for ridge regression follows from one decomposition (Allen 1974): leave-one-out residual i = (y - H y)_i / (1 - H_ii).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.errors import Unsupported
from sterna.training.evaluation import Evaluation, outputs
from sterna.training.methods import head_names

F64 = NDArray[np.float64]

_RIDGES = np.logspace(-4, 2, 13)
"""Penalties tried, in units of the features' largest squared singular value."""
_TEMPERATURES = 2.0 ** np.arange(0, 7, 0.5)
"""What the fitted values, of targets 0 and 1, are multiplied by to be logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A linear layer: weight float64 [outputs, features], bias [outputs]. `score` is minus the leave-one-out loss of the examples: cross-entropy in
    nats, or for numbers the squared error over their variance."""

    weight: F64
    bias: F64
    score: float


def fit(features: F64, answers: Sequence[int] | Sequence[float], classes: int | None, *, intercept: bool = True) -> Fitted:
    """Fit `features` [n, d] to class indices, or to numbers where `classes` is None; penalty and temperature have the least leave-one-out loss.

    Without `intercept` the layer has no bias (it is 0).
    """
    wanted = np.asarray(answers)
    targets = np.eye(classes)[wanted] if classes is not None else wanted.astype(np.float64)[:, None]
    mean, level = (features.mean(0), targets.mean(0)) if intercept else (np.zeros(features.shape[1]), np.zeros(targets.shape[1]))
    left, singular, right = np.linalg.svd(features - mean, full_matrices=False)
    along = left.T @ (targets - level)
    best: tuple[float, float, F64] | None = None
    for ridge in _RIDGES * max(float(singular[0]) ** 2, 1e-12):
        shrunk = singular**2 / (singular**2 + ridge)
        own = (left**2) @ shrunk + (1 / len(targets) if intercept else 0)
        without = targets - (targets - level - left @ (shrunk[:, None] * along)) / np.maximum(1 - own, 1e-6)[:, None]
        for temperature in _TEMPERATURES if classes is not None else (1.0,):
            loss = _cross_entropy(temperature * without, wanted) if classes is not None else float(((without - targets) ** 2).mean())
            if best is None or loss < best[0]:
                best = loss, temperature, singular / (singular**2 + ridge)
    assert best is not None
    loss, temperature, scale = best
    weight = temperature * (right.T @ (scale[:, None] * along)).T
    bias = temperature * level - weight @ mean
    if classes is None:
        loss /= max(float(targets.var()), 1e-12)
    return Fitted(weight, bias, -loss)


def _cross_entropy(logits: F64, labels: NDArray[np.generic]) -> float:
    top = logits.max(1, keepdims=True)
    return float((np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(logits)), labels]).mean())


def last_layer(model: Any) -> tuple[torch.nn.Module, str]:
    """The module that holds the head's last linear layer, and its attribute. Raises Unsupported where a head does not end in one."""
    names = sorted(head_names(model))
    outputs = int(model.config.num_labels)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in names and module.out_features == outputs:
            found.append(name)
    if not found:
        told = f"the head of {type(model).__name__} ({', '.join(names[:4]) or 'none'})"
        raise Unsupported(f"{told} does not end in a linear layer of {outputs} outputs")
    parent, _, attribute = found[-1].rpartition(".")
    return model.get_submodule(parent), attribute


def features(model: Any, prepared: Evaluation) -> F64:
    """float64 [n, d]: what the head's last layer is given for each row."""
    with _open_ended(*last_layer(model)):
        found = outputs(prepared, model).logits
    assert found is not None
    return found.astype(np.float64)


@contextlib.contextmanager
def _open_ended(module: torch.nn.Module, attribute: str) -> Iterator[None]:
    """The model without the head's last layer: its logits are then the features."""
    layer = getattr(module, attribute)
    setattr(module, attribute, torch.nn.Identity())
    try:
        yield
    finally:
        setattr(module, attribute, layer)


def fit_head(model: Any, prepared: Evaluation, classes: int | None) -> Fitted:
    """Fit a head to rows over the model as it is now, and put it on, in place."""
    module, attribute = last_layer(model)
    layer = getattr(module, attribute)
    fitted = fit(features(model, prepared), prepared.examples.answers or (), classes, intercept=layer.bias is not None)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(fitted.weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(fitted.bias))
    return fitted
