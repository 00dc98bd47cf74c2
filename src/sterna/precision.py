"""In which precision a task's head is stored: the head of a small expert takes most of its bytes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from sterna.errors import InvalidArgument
from sterna.expert.changes import Set

HeadPrecision = Literal["exact", "fp16", "bf16", "int8"]
HEAD_PRECISIONS: tuple[HeadPrecision, ...] = ("exact", "fp16", "bf16", "int8")

_LARGEST = 127


def check_head(precision: str) -> None:
    if precision not in HEAD_PRECISIONS:
        raise InvalidArgument(f"head is {precision!r}; expected one of {', '.join(HEAD_PRECISIONS)}")


def stored(change: Set, precision: HeadPrecision) -> Set:
    """The change, a floating-point head in that precision: int8 has a scale for each row of a matrix, and keeps vectors in float16.

    Raises InvalidArgument for values that are not finite, or not finite any more.
    """
    if precision == "exact" or change.role != "head" or not change.tensor.is_floating_point():
        return change
    whole = change.tensor
    if precision == "int8" and whole.dim() > 1 and whole.numel():
        return _in_rows(change.name, whole.float())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    narrow = whole.to(dtype)
    _refuse_not_finite(change.name, narrow, precision)
    return dataclasses.replace(change, value=narrow, scales=None)


def _in_rows(name: str, whole: torch.Tensor) -> Set:
    """level = round_half_even(value / scale), scale = max |row| / 127; rows of zeros have the scale 0."""
    _refuse_not_finite(name, whole, "int8")
    rows = whole.reshape(whole.shape[0], -1)
    scales = rows.abs().amax(1) / _LARGEST
    levels = torch.where(scales[:, None] > 0, rows / scales[:, None], 0).round().clamp(-_LARGEST, _LARGEST)
    return Set(name, levels.to(torch.int8).reshape(whole.shape), "head", scales=scales)


def _refuse_not_finite(name: str, values: torch.Tensor, precision: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InvalidArgument(f"the head's {name} has values that are not finite in {precision}; head='exact' (--head exact) keeps them as they are")
