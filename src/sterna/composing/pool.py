"""A pool of experts on a live model: their weighted sum is on it, and other weights take time in their non-zeros, not in the model.

pool = Pool(model, experts)
pool.weigh([0.5, -0.2, 1.0])       # the model is base + .5 t_1 - .2 t_2 + 1.0 t_3: what attaching their merged expert would make of it
pool.close()                       # the base again, to the bit
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch

from sterna.composing.products import WeighProducts
from sterna.composing.slots import WeighSlot
from sterna.composing.unions import Weights, weigh_levels
from sterna.errors import InvalidArgument, PatchError, Unsupported, WrongBase
from sterna.expert.changes import Add, Change, Masked, Product, Set, touched
from sterna.expert.expert import Expert
from sterna.expert.palette import Palette, refuse_tasks
from sterna.live.patch import hold
from sterna.live.update import Step
from sterna.live.weights import Slot
from sterna.merging.exact import slot_fault
from sterna.progress import Progress, silent


class Pool:
    """Experts of full fine-tunes, PaFi, HiWi's biases, LoRA, and merged ones, decoded once and held in memory, on a live model. Heads are left out.

    Weights are 0 at first: the model is the base. Made of experts for one base, each of which `attach` would take; their numbers are in its order.
    Raises WrongBase for different bases or another one than the model's; InvalidArgument for no expert, one given twice, or one that holds a mask for
    each of several tasks; Unsupported for changes that cannot be weighed; and as `attach` does.
    """

    def __init__(self, model: torch.nn.Module, experts: Sequence[Expert], progress: Progress = silent) -> None:
        bare = [headless(expert) for expert in experts]
        refuse_parents(bare)
        self._weights: Weights = np.zeros(len(bare))

        def steps(slots: Mapping[str, Slot], digests: Mapping[int, bytes]) -> list[Step]:
            return _steps(bare, self._weights, slots, digests, progress)

        self._patch = hold(model, bare, steps)
        self._plan_steps = list(self._patch.steps)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights that are on the model now."""
        return tuple(self._weights.tolist())

    @property
    def bytes(self) -> int:
        """Memory held: positions, kinds, values, factors, and what the base's changed words are."""
        return sum(step.undo_bytes for step in self._plan_steps)

    @property
    def nonzeros(self) -> int:
        """Entries of all experts that are not zero; of LoRA, those of the factors."""
        return sum(step.updates for step in self._plan_steps)

    def weigh(self, weights: Sequence[float]) -> None:
        """Put base + sum_i weights[i] * expert i onto the model. Raises InvalidArgument for weights that are not a finite number an expert,
        PatchError after `close`, and where somebody else changed the model's weights."""
        if len(weights) != len(self._weights) or not all(math.isfinite(weight) for weight in weights):
            raise InvalidArgument(f"the weights are {list(weights)} for {len(self._weights)} experts; expected a finite number each")
        before = self._weights.copy()
        self._weights[:] = weights
        try:
            self._patch.renew()
        except PatchError:
            self._weights[:] = before
            raise

    def close(self) -> None:
        """Restore the base to the bit. A second call does nothing."""
        if self._patch.attached:
            self._patch.detach()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def headless(expert: Expert) -> Expert:
    """The expert without heads and without what goes with them."""
    changes = tuple(change for change in expert.changes if not (isinstance(change, Set) and change.role == "head"))
    return replace(expert, facts=replace(expert.facts, config={}, heads={}), changes=changes, file_digest=None, file_bytes=None)


def refuse_parents(experts: Sequence[Expert]) -> None:
    """Raise for experts (without heads) that cannot be weighed together."""
    if not experts:
        raise InvalidArgument("there are no experts; expected one or more for the same base")
    first = experts[0].facts.base
    for number, expert in enumerate(experts):
        base = expert.facts.base
        if base.fingerprint != first.fingerprint:
            told = f"expert {number + 1} is for the base {base.name}, fingerprint {base.fingerprint[:12]}, and expert 1 for {first.name}"
            raise WrongBase(f"{told}, {first.fingerprint[:12]}; only experts for the same base can be weighed")
        for change in expert.changes:
            if isinstance(change, Palette):
                refuse_tasks(change)
            if not isinstance(change, Add | Palette | Masked | Product) and not (isinstance(change, Set) and change.role == "tuned"):
                kind = f"{type(change).__name__.lower()}{f' ({change.role})' if isinstance(change, Set) else ''}"
                told = f"expert {number + 1} changes {change.name} by {kind}, which cannot be weighed"
                raise Unsupported(f"{told}; expected experts of full fine-tunes, LoRA, PaFi or HiWi's biases")
    for count, digests in ((c, d) for d, c in Counter(expert.content_digest for expert in experts).items() if c > 1):
        numbers = [str(number + 1) for number, expert in enumerate(experts) if expert.content_digest == digests]
        raise InvalidArgument(f"experts {', '.join(numbers)} have the same content: one expert is given {count} times")
    _refuse_mixed(experts)


def _kind(change: Change) -> str:
    return "levels" if isinstance(change, Add | Palette) else "a product" if isinstance(change, Product) else "new values"


def _refuse_mixed(experts: Sequence[Expert]) -> None:
    """Raise Unsupported where experts change one tensor in different ways, or under different masks: merging could not make them one."""
    seen: dict[str, tuple[str, int]] = {}
    slots: dict[str, tuple[Masked | Set, int]] = {}
    for number, expert in enumerate(experts, 1):
        for change in expert.changes:
            for name in touched(change):
                kind, before = seen.setdefault(name, (_kind(change), number))
                if kind != _kind(change):
                    told = f"expert {before} changes {name} by {kind}, expert {number} by {_kind(change)}"
                    raise Unsupported(f"{told}: they cannot be weighed together")
            if isinstance(change, Masked | Set):
                slot, before = slots.setdefault(change.name, (change, number))
                if fault := slot_fault(slot, change):
                    raise Unsupported(f"{change.name}: {fault}, in experts {before} and {number}")
    masks = sorted(name for name, (slot, _) in slots.items() if isinstance(slot, Masked))
    if len(masks) > 1:
        raise Unsupported(f"the experts have masks over different tensors ({', '.join(masks[:3])}); only one mask can be weighed")


def _steps(experts: Sequence[Expert], weights: Weights, slots: Mapping[str, Slot], digests: Mapping[int, bytes], progress: Progress) -> list[Step]:
    """What weighs every tensor."""
    tensors = {name: slot.tensor for name, slot in slots.items()}
    levels: dict[str, list[Add | Palette | None]] = {}
    values: dict[str, list[Masked | Set | None]] = {}
    products: dict[str, list[Product | None]] = {}
    for number, expert in enumerate(experts):
        for change in expert.changes:
            if isinstance(change, Add | Palette):
                levels.setdefault(change.name, [None] * len(experts))[number] = change
            elif isinstance(change, Masked | Set):
                values.setdefault(change.name, [None] * len(experts))[number] = change
            elif isinstance(change, Product):
                products.setdefault(change.name, [None] * len(experts))[number] = change
    made: list[Step] = [WeighSlot(row, weights, tensors, digests) for row in values.values()]
    made += weigh_levels({name: (tensors[name], row) for name, row in levels.items()}, weights, progress)
    made += [WeighProducts(tensors[name], row, weights) for name, row in products.items()]
    return made
