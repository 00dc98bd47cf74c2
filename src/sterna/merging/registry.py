"""Merge methods by name: a decorator, entry points of other packages, and the parameters that a function's signature tells of."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from sterna.errors import InvalidArgument

F64 = NDArray[np.float64]
Semantics = Literal["paper", "peft", "mergekit"]
SEMANTICS: tuple[Semantics, ...] = ("paper", "peft", "mergekit")
Drop = Literal["magnitude", "outliers", "random"]

GROUP = "sterna.merge_methods"
"""The entry-point group under which other packages name modules whose import registers methods."""


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """What the parents have at one tensor's positions: n parents, k kinds (distinct combinations of their values; not every one need occur).

    `values` is float64[n, k], after trimming, dropping and rescaling, before weights; `weights` float64[n]. For methods that ask for `statistics`,
    `gram` is float64[n, n], the inner products of the parents over the whole tensor (after trimming); it is zeros for the others.
    """

    values: F64
    weights: F64
    gram: F64
    semantics: Semantics = "paper"


@dataclass(frozen=True, slots=True)
class Option:
    """A parameter of a method: one number, choice or switch for the whole recipe."""

    name: str
    kind: type | None
    choices: tuple[str, ...]
    default: Any

    def fault(self, value: object) -> str | None:
        """What is wrong with a value, or None."""
        if self.choices:
            return None if value in self.choices else f"{value!r} is not one of {', '.join(self.choices)}"
        if self.kind is bool:
            return None if isinstance(value, bool) else f"{value!r} is neither true nor false"
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)) or not math.isfinite(value):
            return f"{value!r} is no finite {'integer' if self.kind is int else 'number'}"
        return None


@dataclass(frozen=True, slots=True, eq=False)
class MergeMethod:
    """A registered method. `function` maps Kinds (and its own parameters) to the merged value of each kind, float64[k].

    `drop` says which of a parent's non-zeros stay, by the parent's `density`: those of largest "magnitude", the same without the `gamma` share of
    "outliers", or each with that probability ("random"). `semantics` lists whose choices it can follow; `parents` how many it takes. `linear` says
    that the merged value is a sum of the parents' values, each times a number that follows from weights, options and `gram` alone: then LoRA's
    products are merged exactly. `recovers` says that the result keeps, for each parent, a mask of the entries whose merged value has its sign, and
    the scale that gives what is inside the parent's L1 norm: so each parent's task can be had from it.
    """

    name: str
    function: Callable[..., F64]
    drop: Drop | None
    statistics: bool
    semantics: tuple[Semantics, ...]
    parents: tuple[int, int | None]
    options: Mapping[str, Option] = field(default_factory=dict)
    linear: bool = False
    recovers: bool = False

    def __call__(self, kinds: Kinds, options: Mapping[str, Any]) -> F64:
        merged: F64 = self.function(kinds, **{_attribute(name, self.function): value for name, value in options.items()})
        if merged.shape != kinds.values.shape[1:]:
            raise InvalidArgument(f"the merge method {self.name} gave values of shape {merged.shape} for {kinds.values.shape[1]} kinds")
        return merged


_REGISTERED: dict[str, MergeMethod] = {}


def merge_method(
    name: str,
    *,
    drop: Drop | None = None,
    statistics: bool = False,
    semantics: Sequence[Semantics] = ("paper",),
    parents: tuple[int, int | None] = (1, None),
    linear: bool = False,
    recovers: bool = False,
) -> Callable[[Callable[..., F64]], Callable[..., F64]]:
    """Register a function of Kinds as a merge method. Its keyword-only parameters (bool, int, float or a Literal of texts, with defaults) are
    what a recipe's `parameters` may say; one underscore at a name's end is left out there (`lambda_`). ValueError for a name that is taken, or for
    a linear method that drops."""

    def register(function: Callable[..., F64]) -> Callable[..., F64]:
        if name in _REGISTERED:
            raise ValueError(f"a merge method named {name!r} is registered already")
        if linear and drop is not None:
            raise ValueError(f"the merge method {name!r} drops single values, so it is not linear")
        _REGISTERED[name] = MergeMethod(name, function, drop, statistics, tuple(semantics), parents, _options(function), linear, recovers)
        return function

    return register


def by_name(name: object) -> MergeMethod:
    """The method of that name; InvalidArgument with the near ones otherwise."""
    _load()
    if isinstance(name, str) and name in _REGISTERED:
        return _REGISTERED[name]
    near = difflib.get_close_matches(str(name), _REGISTERED, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known())}"
    raise InvalidArgument(f"no merge method is named {name!r}; {meant}")


def known() -> list[str]:
    """The names of all methods, sorted."""
    _load()
    return sorted(_REGISTERED)


@cache
def _load() -> None:
    from sterna.merging.methods import averages, consensus, emr, geometry, ties  # noqa: F401  (they register themselves)

    for entry in entry_points(group=GROUP):
        entry.load()


def _options(function: Callable[..., F64]) -> dict[str, Option]:
    hints = get_type_hints(function)
    found: dict[str, Option] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if parameter.default is inspect.Parameter.empty or not (choices or hint in (bool, int, float)):
            raise ValueError(f"the parameter {name} of a merge method is not a bool, int, float or Literal of texts with a default")
        found[name.removesuffix("_")] = Option(name.removesuffix("_"), None if choices else hint, choices, parameter.default)
    return found


@cache
def _attribute(name: str, function: Callable[..., F64]) -> str:
    return name if name in inspect.signature(function).parameters else f"{name}_"
