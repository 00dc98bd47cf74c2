"""Weighted sums of task vectors."""

from __future__ import annotations

from sterna.errors import InvalidArgument
from sterna.merging.methods.sums import total
from sterna.merging.registry import F64, Kinds, merge_method


@merge_method("linear", semantics=("paper", "peft", "mergekit"), linear=True)
def linear(kinds: Kinds, *, normalize: bool = True) -> F64:
    """sum_i w_i t_i / sum_i w_i (without the divisor where `normalize` is false): the average of models (Wortsman et al., arXiv 2203.05482).

    mergekit: the same. peft: its "linear" never divides; that is `normalize: false` here, and the default under `semantics: peft`.
    """
    summed = total(kinds.weights[:, None] * kinds.values)
    if not normalize or kinds.semantics == "peft":
        return summed
    divisor = float(kinds.weights.sum())
    if abs(divisor) < 1e-8:
        raise InvalidArgument("the weights add up to 0, which linear cannot divide by; expected another sum, or normalize: false")
    return summed / divisor


@merge_method("task_arithmetic", semantics=("paper", "peft", "mergekit"), linear=True)
def task_arithmetic(kinds: Kinds, *, lambda_: float = 1.0) -> F64:
    """lambda * sum_i w_i t_i (Ilharco et al., arXiv 2212.04089). All semantics are the same."""
    return lambda_ * total(kinds.weights[:, None] * kinds.values)


@merge_method("dare_linear", drop="random", semantics=("paper", "peft", "mergekit"))
def dare_linear(kinds: Kinds, *, lambda_: float = 1.0) -> F64:
    """lambda * sum_i w_i d_i (Yu et al., arXiv 2311.03099): d_i keeps each non-zero of t_i with probability `density` and is rescaled.

    paper, peft: by 1 / density. mergekit: by the ratio of L1 norms of the tensor before and after.
    """
    return lambda_ * total(kinds.weights[:, None] * kinds.values)


@merge_method("breadcrumbs", drop="outliers", semantics=("paper", "mergekit"))
def breadcrumbs(kinds: Kinds, *, lambda_: float = 1.0) -> F64:
    """lambda * sum_i w_i b_i (Davari and Belilovsky, arXiv 2312.06795): b_i is t_i, tensor by tensor, without the `gamma` share of largest magnitude,
    and of the rest the `density` share of largest magnitude."""
    return lambda_ * total(kinds.weights[:, None] * kinds.values)
