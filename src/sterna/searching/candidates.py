"""Candidates: what a search tries. A setting says how to compress; a maker surveys the task vector once and makes experts of settings.

Levels follow from density, allocation and planes; alpha only scales them and the head's precision only stores the head, so of the settings that
share the former only the first is coded.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from sterna.codings import by_name, default_coding
from sterna.compeft import Survey, check_options, coded_levels, float32_scale, survey
from sterna.compression import Matched, exact_changes, expert_of
from sterna.errors import InvalidArgument
from sterna.expert.changes import Add, Change, Set, Ternary
from sterna.expert.expert import Expert, exact_bytes
from sterna.expert.facts import Scope
from sterna.expert.file import file_pieces
from sterna.expert.palette import Palette
from sterna.precision import HeadPrecision
from sterna.progress import Progress, silent
from sterna.recoding import recoded
from sterna.searching.allocation import AllocationName, allocated
from sterna.searching.planes import residual_planes
from sterna.streaming import chunks_of

_HELD = 4
"""Codings of one density that are kept for another alpha."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to compress: the share of entries that keep their sign (of each plane), their scale in standard deviations, and the rest."""

    density: float
    alpha: float
    allocation: AllocationName = "global"
    planes: int = 1
    head: HeadPrecision = "exact"

    def __str__(self) -> str:
        more = [f"{self.allocation} allocation"] if self.allocation != "global" else []
        more += [f"{self.planes} planes"] if self.planes > 1 else []
        more += [f"head {self.head}"] if self.head != "exact" else []
        return ", ".join([f"density {self.density:g}", f"alpha {self.alpha:g}", *more])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_NOTHING = Setting(1e-9, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """What the settings of one density, allocation and number of planes share.

    `units` are the pieces' scales for alpha = 1, float64; `levels` are coded, or `sums` of several planes, in units of the first.
    """

    units: tuple[float, ...]
    levels: tuple[Ternary, ...] = ()
    sums: tuple[Add | Palette, ...] = ()


class Maker:
    """Makes experts of settings for one base and tuned model. Raises as `compress` does.

    `fisher` gives F_t of the task vector's tensors, by names, at the tuned model; asked once, when a setting of that allocation is made.
    """

    def __init__(
        self, matched: Matched, coding: str, progress: Progress = silent, fisher: Callable[[Expert, Sequence[str]], Sequence[float]] | None = None
    ) -> None:
        self.matched = matched
        self._fisher = fisher
        self._coding = by_name(coding)
        self._block = default_coding() if self._coding.sequential is True else self._coding
        self._held: OrderedDict[tuple[object, ...], Levels] = OrderedDict()
        self._exact: dict[HeadPrecision, list[Set]] = {}
        total, done = sum(piece.size for piece in matched.task.pieces), 0

        def advance(entries: int) -> None:
            nonlocal done
            done += entries
            progress("survey", done, total, "parameters")

        self.surveys: list[Survey] = [survey([piece], advance) for piece in matched.task.pieces]

    @property
    def entries(self) -> int:
        """d, the length of the task vector."""
        return sum(found.entries for found in self.surveys)

    @property
    def norm(self) -> float:
        return math.sqrt(sum(found.squares for found in self.surveys))

    @property
    def head_bytes(self) -> int:
        """Bytes of the exact heads."""
        return sum(value.numel() * value.element_size() for change in self.exact("exact") if change.role == "head" for _, value in change.exact)

    @cached_property
    def fisher(self) -> Sequence[float]:
        """F_t of every tensor of the task vector."""
        if self._fisher is None or not self.of_whole_tensors:
            raise InvalidArgument("allocation is 'fisher'; expected another without rows to take gradients on, or of an adapter or masked values")
        return self._fisher(self.tuned(), [piece.name for piece in self.matched.task.pieces])

    @property
    def has_fisher(self) -> bool:
        return self._fisher is not None and self.of_whole_tensors

    @cached_property
    def of_whole_tensors(self) -> bool:
        """Whether the task vector is differences to whole tensors of the base, not adapters' factors or masked values; these alone carry planes."""
        return all(isinstance(change, Add) for change in self.expert(_NOTHING).changes if change.ternaries)

    def expert(self, setting: Setting, metadata: Mapping[str, Any] | None = None) -> Expert:
        """The expert of a setting. Under one plane and the allocation "global" or "tensor" it is what `compress` makes."""
        check_options(setting.density, setting.alpha)
        found = self._levels(setting)
        scales = [float32_scale(setting.alpha * unit) for unit in found.units]
        if found.sums:
            changes: Sequence[Change] = [_times(change, scale) for change, scale in zip(found.sums, scales, strict=True)]
        else:
            changes = self.matched.task.changes([replace(ternary, scale=scale) for ternary, scale in zip(found.levels, scales, strict=True)])
        scope: Scope = "global" if setting.allocation == "global" and setting.planes == 1 else "tensor"
        return expert_of(
            self.matched, changes, self.exact(setting.head), density=setting.density, alpha=setting.alpha, scope=scope, metadata=metadata or {}
        )

    def tuned(self) -> Expert:
        """The tuned model itself, as an expert in memory: every changed tensor whole."""
        if self.matched.before is not None:
            return self.matched.before
        changes = sorted([*self.matched.task.tuned(), *self.exact("exact")], key=lambda change: (change.name, isinstance(change, Set)))
        like = self.expert(_NOTHING)
        return replace(like, changes=tuple(changes), facts=replace(like.facts, method="exact", density=None, alpha=None, scope="global", scale=0.0))

    def bytes(self, setting: Setting) -> int:
        """Of the file."""
        return sum(len(piece) for piece in file_pieces(self.expert(setting)))

    def exact(self, head: HeadPrecision) -> list[Set]:
        if head not in self._exact:
            self._exact[head] = exact_changes(self.matched, head)
        return self._exact[head]

    def digest(self) -> str:
        """SHA-256 of the base's fingerprint, the task vector and the exact tensors: of all that an expert of a setting is made from."""
        sha = hashlib.sha256(self.matched.mark.hex.encode())
        for found in self.surveys:
            for piece in found.pieces:
                sha.update(f"{piece.name} {piece.shape}".encode())
                for chunk in chunks_of(piece):
                    sha.update(chunk.read())
        for change in self.exact("exact"):
            for name, tensor in change.exact:
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(exact_bytes(tensor))
        return sha.hexdigest()

    def _levels(self, setting: Setting) -> Levels:
        key = (setting.density, setting.allocation, setting.planes)
        if key not in self._held:
            self._held[key] = self._summed(setting) if setting.planes > 1 else self._coded(setting)
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def _coded(self, setting: Setting) -> Levels:
        fisher = self.fisher if setting.allocation == "fisher" else ()
        chosen = allocated(setting.allocation, self.surveys, setting.density, fisher)
        levels = self._recoded(coded_levels(chosen.budgets, self._block))
        return Levels(chosen.units, tuple(levels))

    def _summed(self, setting: Setting) -> Levels:
        if not self.of_whole_tensors or setting.allocation != "global":
            raise InvalidArgument(f"planes is {setting.planes}; expected 1 for {self.matched.task.source}, or an allocation other than 'global'")
        sums = residual_planes(self.surveys, setting.density, setting.planes, self._block)
        levels = self._recoded([change.levels for change in sums])
        units = allocated("global", self.surveys, setting.density).units
        return Levels(units, sums=tuple(replace(change, levels=ternary) for change, ternary in zip(sums, levels, strict=True)))

    def _recoded(self, levels: list[Ternary]) -> list[Ternary]:
        return recoded(levels, self._coding) if self._coding.sequential is True else levels


def _times(change: Add | Palette, scale: float) -> Add | Palette:
    """The change with values of that many times its own."""
    if isinstance(change, Palette):
        return replace(change, magnitudes=change.magnitudes * float(scale))
    return replace(change, levels=replace(change.levels, scale=float32_scale(scale * change.levels.scale)))
