"""What is kept of a task vector, as dense formulas on one flat vector, independent of the product's code.

A task vector is a 1-D fp32 tensor of d entries. `support` follows section 1 of the method: the min(non-zeros, floor(k*d)) largest magnitudes,
ties by lowest flat index, entries that are exactly zero never kept.
"""

from __future__ import annotations

from decimal import Decimal

import torch


def kept(tau: torch.Tensor, density: float) -> int:
    """min(non-zeros, floor(k*d)), with k*d as an exact decimal product."""
    return min(int(torch.count_nonzero(tau)), int(Decimal(repr(density)) * tau.numel()))


def support(tau: torch.Tensor, density: float) -> torch.Tensor:
    """Bool mask [d] of the entries that are kept."""
    count = kept(tau, density)
    if count == 0:
        return torch.zeros_like(tau, dtype=torch.bool)
    magnitude = tau.abs()
    threshold = magnitude.kthvalue(tau.numel() - count + 1).values
    mask = magnitude > threshold
    ties = (magnitude == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def prune_only(tau: torch.Tensor, density: float) -> torch.Tensor:
    """The kept entries at their own values, zero elsewhere."""
    return torch.where(support(tau, density), tau, 0.0)


def stc(tau: torch.Tensor, density: float) -> torch.Tensor:
    """Sparse ternary compression: sign(tau) on the support times mean |tau| there (the mean magnitude, not the signed mean)."""
    mask = support(tau, density)
    return torch.where(mask, tau.sign() * mean_magnitude(tau[mask]), 0.0)


def mean_magnitude(values: torch.Tensor) -> torch.Tensor:
    """Mean |value| in fp64, rounded to fp32; 0 of nothing. On the support it is the scale of least squares."""
    return values.abs().double().sum().div(max(values.numel(), 1)).float()


def mean_in_std(tau: torch.Tensor, density: float) -> float:
    """STC's scale in units of ComPEFT's alpha: mean |tau| on the support over the std of the whole."""
    std = float(tau.double().std())
    return float(mean_magnitude(tau[support(tau, density)])) / std if std else 0.0


def compeft(tau: torch.Tensor, density: float, alpha: float) -> torch.Tensor:
    """alpha * std(tau) * sign(tau) on the support; the std is the unbiased one of the whole vector, in fp64, rounded to fp32."""
    scale = (alpha * tau.double().std()).float()
    return torch.where(support(tau, density), tau.sign() * scale, 0.0)


def dare(tau: torch.Tensor, density: float, seed: int = 0) -> torch.Tensor:
    """DARE (arXiv 2311.03099): each entry kept with probability `density` and divided by it, zero elsewhere."""
    kept_at = torch.rand(tau.numel(), generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(kept_at, tau / density, 0.0)
