"""A parameter that may differ from tensor to tensor: a number, a gradient over the layers, or values under filters, in mergekit's words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_FIRST = ("embed", "wte", "wpe")
"""What names tensors before the first layer."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Values under filters, the first that fits a tensor's name counts; "" fits every name. A value of several numbers is a gradient: from the first
    layer to the last, piecewise linear. Tensors outside all layers have its first number where their names say that they embed, else its last."""

    rules: tuple[tuple[str, tuple[float, ...]], ...]

    @classmethod
    def of(cls, value: float) -> Setting:
        return cls((("", (float(value),)),))

    @property
    def constant(self) -> float | None:
        """The one value that every tensor has, or None."""
        values = {number for _, numbers in self.rules for number in numbers}
        return values.pop() if len(values) == 1 and self.rules[-1][0] == "" else None

    def at(self, name: str, layers: int) -> float:
        """The value for a tensor of a model with that many layers."""
        numbers = next(numbers for text, numbers in self.rules if text in name)
        if len(numbers) == 1:
            return numbers[0]
        layer = _layer(name)
        place = 0.0 if any(word in name for word in _FIRST) else 1.0
        if layer is not None:
            place = layer / max(layers - 1, 1)
        scaled = place * (len(numbers) - 1)
        low = min(int(scaled), len(numbers) - 2)
        return numbers[low] + (numbers[low + 1] - numbers[low]) * (scaled - low)

    def plain(self) -> Any:
        """The setting as a recipe says it."""
        values = [(text, numbers[0] if len(numbers) == 1 else list(numbers)) for text, numbers in self.rules]
        if len(values) == 1:
            return values[0][1]
        return [{"filter": text, "value": value} if text else {"value": value} for text, value in values]


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def layers_of(names: Iterable[str]) -> int:
    """Layers of a model: one more than the largest number that stands alone between dots of its tensors' names."""
    return 1 + max((layer for name in names if (layer := _layer(name)) is not None), default=0)


def setting_fault(value: object) -> str | None:
    """What is wrong with a setting as a recipe says it, or None."""
    if _is_number(value):
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return f"{value!r} is no number, list of numbers (a gradient) or list of filters with values"
    if all(map(_is_number, value)):
        return None if len(value) > 1 else "a gradient has two numbers or more"
    for rule in value:
        if not isinstance(rule, Mapping) or not {"value"} <= set(rule) <= {"filter", "value"} or not isinstance(rule.get("filter", ""), str):
            return f"{rule!r} is no filter with a value ({{filter: attn, value: 0.5}})"
        numbers = rule["value"]
        gradient = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) > 1 and all(map(_is_number, numbers))
        if not gradient and not _is_number(numbers):
            return f"{numbers!r} is no number and no list of two or more (a gradient)"
    if value[-1].get("filter", "*") not in ("", "*"):
        return "the last rule has a filter, so some tensors have no value; end with {value: ...}"
    return None


def setting(value: Any) -> Setting:
    """The setting that a recipe says, which has no fault."""
    if _is_number(value):
        return Setting.of(value)
    if all(map(_is_number, value)):
        return Setting((("", tuple(map(float, value))),))
    rules = []
    for rule in value:
        text, numbers = rule.get("filter", ""), rule["value"]
        rules.append(("" if text == "*" else text, (float(numbers),) if _is_number(numbers) else tuple(map(float, numbers))))
    return Setting(tuple(rules))


def numbers_of(held: Setting) -> list[float]:
    return [number for _, numbers in held.rules for number in numbers]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
