"""Attach, swap, detach: an expert on a live model, in place, and off it again to the bit."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from sterna.errors import AlreadyAttached, PatchError, Unsupported, WrongBase, WrongModel
from sterna.expert.changes import Add, Change, Factors, Folded, Lossless, LowRank, Masked, Multiply, Product, Set, coded_shapes, needs_base, touched
from sterna.expert.expert import Expert, folded_shape, new_value, refuse_count
from sterna.expert.heads import with_head
from sterna.expert.palette import Palette
from sterna.fingerprint import LiveDigests, combine, require_base
from sterna.live.head import Configure, Replace
from sterna.live.lock import ReadWriteLock
from sterna.live.palettes import add_palette
from sterna.live.rewrite import Rewrite
from sterna.live.update import NATIVE, AddProduct, Overwrite, Step, WriteMasked, sparse_adds
from sterna.live.weights import LiveWeights, Place, Slot, live_weights, refuse_quantized, refuse_tuned, refuse_unpatchable
from sterna.mask import mask_of
from sterna.sources.names import some
from sterna.sources.stored import unwrap

_patches: weakref.WeakKeyDictionary[torch.nn.Module, Patch] = weakref.WeakKeyDictionary()
_patched: dict[int, weakref.ref[_Plan]] = {}  # by id, tensors under a plan that holds them: a part of a patched model is not patched again
_digests = LiveDigests()
_attaching = threading.Lock()


def attach(
    model: torch.nn.Module, expert: Expert | str | os.PathLike[str], *, head: str | None = None, allow_narrower: bool = False
) -> Patch:
    """Put an expert (or its file) onto a live model, in place: same modules, same state_dict keys, no hook; on any device, in any float dtype.

    `head` is the task whose head an expert merged of several is to bring; without it, the only one. `allow_narrower` accepts a model loaded in a
    narrower dtype than the expert's base.
    Raises WrongBase, WrongModel, Unsupported, AlreadyAttached, InvalidFile, or InvalidArgument (of `head`), with the model as it was.
    """
    root = unwrap(model)
    refuse_tuned(root)
    loaded = with_head(_loaded(expert), head)
    with _attaching:
        _refuse_attached(root)
        patch = Patch(root, _plan(root, loaded, allow_narrower, None))
        _patches[root] = patch
    return patch


Steps = Callable[[Mapping[str, Slot], Mapping[int, bytes]], Sequence[Step]]
"""Makes steps of the live slots by base name and of their tensors' digests by id."""


def hold(model: torch.nn.Module, experts: Sequence[Expert], steps: Steps, *, allow_narrower: bool = False) -> Patch:
    """Put steps that write what many experts change onto a live model, whose base is each expert's: checked as `attach` does, and raises the same.

    The patch's `renew` takes the steps again, once what they write has changed; `detach` restores the base.
    """
    root = unwrap(model)
    refuse_tuned(root)
    with _attaching:
        _refuse_attached(root)
        slots: dict[str, Slot] = {}
        digests: dict[int, bytes] = {}
        for expert in experts:
            _, touched_slots, known = _checked(root, expert, allow_narrower, None)
            slots.update(touched_slots)
            digests.update(known)
        with _plainly(slot.tensor for slot in slots.values()):
            made = steps(slots, digests)
        patch = Patch(root, _Plan(None, made, slots.values(), digests))
        _patches[root] = patch
    return patch


def _refuse_attached(root: torch.nn.Module) -> None:
    if root in _patches:
        raise AlreadyAttached("the model carries an expert already; swap it, detach it, or merge the two experts first")


@contextlib.contextmanager
def attached(
    model: torch.nn.Module, expert: Expert | str | os.PathLike[str], *, head: str | None = None, allow_narrower: bool = False
) -> Iterator[Patch]:
    """`attach` for the length of a with block, `detach` after it (whatever was swapped in meanwhile)."""
    patch = attach(model, expert, head=head, allow_narrower=allow_narrower)
    try:
        yield patch
    finally:
        if patch.attached:
            patch.detach()


def forget_base(model: torch.nn.Module) -> None:
    """Let the next expert find the base's fingerprint anew, as the first one on a loaded model does: to time it."""
    for tensor in (*model.parameters(), *model.buffers()):
        _digests.forget(tensor)


def attached_to(model: torch.nn.Module) -> Patch | None:
    """The patch that is on the model now, or None. `attached_to(model).expert` is the expert."""
    return _patches.get(unwrap(model))


class Patch:
    """An expert that is on a live model. Made by `attach`."""

    def __init__(self, root: torch.nn.Module, plan: _Plan) -> None:
        self._root = weakref.ref(root)
        self._lock = ReadWriteLock()
        self._on: _Plan | None = None
        _apply(plan)
        self._on = plan

    def __repr__(self) -> str:
        if self._on is None:
            return "<sterna.Patch: detached>"
        return f"<sterna.Patch: {self._on.expert.facts.base.name!r} expert>" if self._on.expert else "<sterna.Patch: a pool of experts>"

    @property
    def attached(self) -> bool:
        """Whether the expert is still on the model."""
        return self._on is not None

    @property
    def expert(self) -> Expert:
        """The expert that is on the model now. Raises PatchError after detach, and where a pool of experts is on."""
        expert = self._now().expert
        if expert is None:
            raise PatchError("a pool of experts is on the model, not one expert")
        return expert

    @property
    def steps(self) -> Sequence[Step]:
        """What was done to put it on."""
        return self._now().steps

    @property
    def undo_bytes(self) -> int:
        """Bytes held to restore the base: a word for each touched entry, whole tensors for dense updates and heads."""
        return sum(step.undo_bytes for step in self._now().steps)

    @property
    def swallowed(self) -> float:
        """Share of the updated entries whose value rounding to the live dtype left as it was, 0 to 1."""
        steps = self._now().steps
        return sum(step.swallowed for step in steps) / max(sum(step.updates for step in steps), 1)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Run inference inside: a swap or detach from another thread waits until it is left, and it waits while one is under way."""
        with self._lock.reading():
            self._now()
            yield

    def swap(self, expert: Expert | str | os.PathLike[str], *, head: str | None = None, allow_narrower: bool = False) -> None:
        """Take the expert off and put another on; no reader sees anything between. On any failure the first one stays on."""
        other = with_head(_loaded(expert), head)
        with self._lock.writing():
            old = self._now()
            root = self._live_root()
            _refuse_changed(old)
            new = _plan(root, other, allow_narrower, old)
            try:
                _revert(old)
                _apply(new)
            except BaseException:
                _revert(old)  # what is left of it, where that was what failed
                _apply(old)
                raise
            self._on = new

    def renew(self) -> None:
        """Take the steps again, over what they wrote; no reader sees anything between. Raises PatchError where somebody else wrote meanwhile."""
        with self._lock.writing():
            plan = self._now()
            _refuse_changed(plan)
            with _plainly(plan.touched):
                try:
                    for step in plan.steps:
                        step.apply()
                finally:
                    _settle(plan)

    def detach(self, *, force: bool = False) -> None:
        """Restore the base to the bit.

        Raises PatchError where somebody else changed the weights meanwhile; `force` restores what was saved all the same. A model that is now of
        another dtype, device or layout must be moved back in any case.
        """
        with self._lock.writing():
            old = self._now()
            _refuse_changed(old, force or self._root() is None)
            _revert(old)
            self._on = None
            root = self._root()
            if root is not None:
                _patches.pop(root, None)

    def _now(self) -> _Plan:
        if self._on is None:
            raise PatchError("the patch is detached; attach the expert again")
        return self._on

    def _live_root(self) -> torch.nn.Module:
        root = self._root()
        if root is None:
            raise PatchError("the model is gone")
        return root


class _Plan:
    """Everything that attaching one expert to one model does, worked out before anything is changed."""

    def __init__(self, expert: Expert | None, steps: Sequence[Step], slots: Iterable[Slot], digests: Mapping[int, bytes]) -> None:
        self.expert = expert  # None: the steps are of many
        self.steps = steps
        self.slots = list({id(slot.tensor): slot for slot in slots}.values())
        self.touched = [slot.tensor for slot in self.slots]
        known = {position: digests.get(id(tensor)) for position, tensor in enumerate(self.touched)}
        self.base_digests = {position: digest for position, digest in known.items() if digest is not None}
        self.state: list[_State] = []

    @property
    def originals(self) -> dict[Place, torch.Tensor]:
        return {place: tensor for step in self.steps if isinstance(step, Replace) for place, tensor in step.originals.items()}


class _State(NamedTuple):
    """What a touched tensor was when our own writes ended, and what hung in its place in the model."""

    layout: tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]
    address: int
    version: int
    hung: torch.Tensor | None

    @classmethod
    def of(cls, slot: Slot) -> _State:
        tensor = slot.tensor
        return cls((tensor.dtype, tensor.device, tensor.shape, tensor.stride()), tensor.data_ptr(), tensor._version, slot.hung)


def _apply(plan: _Plan) -> None:
    try:
        with _plainly(plan.touched):
            for step in plan.steps:
                step.apply()
        _patched.update(dict.fromkeys(map(id, plan.touched), weakref.ref(plan)))
        _settle(plan)
    except BaseException:
        _revert(plan)
        raise


def _revert(plan: _Plan) -> None:
    """Undo whatever of the plan is on the model."""
    try:
        with _plainly(plan.touched):
            for step in reversed(plan.steps):
                step.revert()
        for tensor in plan.touched:
            _patched.pop(id(tensor), None)
    finally:
        _settle(plan)  # an interrupted undo can then be taken up again


@contextlib.contextmanager
def _plainly(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Without autograd, inference tensors or autocast, whatever the caller has switched on."""
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in {tensor.device.type for tensor in tensors}:
            if torch.amp.is_autocast_available(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


def _settle(plan: _Plan) -> None:
    """Note what our own writes left, and that the base beneath is still the one that was hashed."""
    plan.state = [_State.of(slot) for slot in plan.slots]
    for position, digest in plan.base_digests.items():
        _digests.remember(plan.touched[position], digest)


def _refuse_changed(plan: _Plan, force: bool = False) -> None:
    """Raise PatchError where somebody else changed a touched tensor; `force` lets new values pass, and has them hashed again."""
    for position, (slot, state) in enumerate(zip(plan.slots, plan.state, strict=True)):
        now = _State.of(slot)
        if now.layout != state.layout:
            was, became = (", ".join(map(str, layout)) for layout in (state.layout, now.layout))
            raise PatchError(f"{slot.name} went from ({was}) to ({became}) while an expert was on the model: move it back, then detach")
        if (now.address, now.version) == (state.address, state.version) and now.hung is state.hung:
            continue
        if not force:
            raise PatchError(
                f"{slot.name} was changed under the expert (training, load_state_dict, a cast there and back?); "
                "detach(force=True) restores what was saved"
            )
        plan.base_digests.pop(position, None)


def _is_patched(tensor: torch.Tensor, under: _Plan | None) -> bool:
    """Whether a tensor is under a plan other than `under`."""
    plan = _patched.get(id(tensor), lambda: None)()
    return plan is not None and plan is not under and any(tensor is touched for touched in plan.touched)


def _loaded(expert: Expert | str | os.PathLike[str]) -> Expert:
    if isinstance(expert, Expert):
        return expert
    from sterna.expert.file import load

    return load(expert)


def _plan(root: torch.nn.Module, expert: Expert, allow_narrower: bool, under: _Plan | None) -> _Plan:
    """Check everything and work out the steps; `under` is the plan that is on the model now, and will be off before."""
    live, slots, digests = _checked(root, expert, allow_narrower, under)
    adds = [change.name for change in expert.changes if isinstance(change, Add)]
    steps: list[Step] = [_masked(change, slots, digests) for change in expert.changes if isinstance(change, Masked)]  # first: it reads the base
    steps += sparse_adds([slots[name].tensor for name in adds], expert.adds)
    lossless = [change for change in expert.changes if isinstance(change, Lossless)]
    if lossless:
        steps.append(Rewrite([slots[change.name].tensor for change in lossless], lossless))
    others = [change for change in expert.changes if not isinstance(change, Add | Masked | Lossless)]
    for change in sorted(others, key=lambda change: isinstance(change, Set) and change.role == "untied"):  # after what replaces all that are tied
        steps.extend(_steps_of(change, slots, live))
    if expert.facts.config:
        steps.append(Configure(root, expert.facts.config))
    return _Plan(expert, steps, slots.values(), digests)


def _checked(
    root: torch.nn.Module, expert: Expert, allow_narrower: bool, under: _Plan | None
) -> tuple[LiveWeights, dict[str, Slot], dict[int, bytes]]:
    """The model's weights by base name, the slots that an expert changes, and digests by id; raises where the expert cannot be put on."""
    names = expert.fingerprint.names
    known = {change.name: coded_shapes(change)[0] for change in expert.changes if isinstance(change, Add | Lossless | Palette)}
    live = live_weights(root, names, tuple(known.get(name) for name in names), under.originals if under else {})
    refuse_quantized(root)
    slots = _touched_slots(root, expert, live)
    if any(_is_patched(slot.tensor, under) for slot in slots.values()):
        raise AlreadyAttached("a part of the model, or a model that contains it, carries an expert already; detach it first")
    digests = _check_base(expert, live, allow_narrower)
    _refuse_ties(expert, slots)
    unknown = [slot.tensor for slot in slots.values() if slot.tensor.dtype in NATIVE and id(slot.tensor) not in digests]
    digests.update(zip(map(id, unknown), _digests.of(unknown), strict=True))
    return live, slots, digests


def _touched_slots(root: torch.nn.Module, expert: Expert, live: LiveWeights) -> dict[str, Slot]:
    """The live slot of every tensor that the expert changes. Raises WrongModel where one is missing or has another shape."""
    found: dict[str, Slot] = {}
    missing: list[str] = []
    tuned_prefix = expert.facts.prefixes[1]
    for change in expert.changes:
        for name in touched(change):
            slot = live.of_base.get(name) if needs_base(change) else live.find(name, tuned_prefix)
            if slot is None:
                missing.append(name)
                continue
            found[name] = slot
            refuse_unpatchable(slot)
            if isinstance(change, Masked | Folded | Lossless) and slot.tensor.dtype not in NATIVE:
                raise Unsupported(f"{slot.name} is {slot.tensor.dtype}; expected float32, float16 or bfloat16")
            if isinstance(change, Lossless) and torch.promote_types(slot.tensor.dtype, change.dtype) != slot.tensor.dtype:
                live_dtype, tuned = (str(dtype).removeprefix("torch.") for dtype in (slot.tensor.dtype, change.dtype))
                raise WrongBase(f"{slot.name} is {live_dtype}, which cannot hold the expert's {tuned} to the bit: load the base in {tuned} or wider")
            wanted = _shape_wanted(change, name, slot)
            if wanted is not None and slot.tensor.shape != wanted:
                raise WrongModel(f"{slot.name} has shape {tuple(slot.tensor.shape)} in the model, {wanted} in the expert: {_load_hint(root, expert)}")
    if missing:
        raise WrongModel(f"the model ({type(root).__name__}) has no {some(missing)}, which the expert changes: {_load_hint(root, expert)}")
    return found


def _refuse_ties(expert: Expert, slots: Mapping[str, Slot]) -> None:
    """Raise WrongModel where one live tensor would be changed twice, under two names."""
    first: dict[int, str] = {}
    for change in expert.changes:
        for name in touched(change) if isinstance(change, Add | Palette) or needs_base(change) else ():
            other = first.setdefault(id(slots[name].tensor), name)
            if other != name:
                raise WrongModel(f"the model ties {other} and {name}, which the expert's base holds apart: load it with tie_word_embeddings=False")


def _masked(change: Masked, slots: Mapping[str, Slot], digests: Mapping[int, bytes]) -> WriteMasked:
    """The step that writes at the mask, which is made of the base: not now, when another expert may still be on the model."""
    tensors = {name: slots[name].tensor for name in change.rule.names}
    refuse_count(change.rule, list(tensors.values()))
    base = combine(digests[id(tensor)] for tensor in tensors.values())  # of these very values: a file could lie about its base's fingerprint
    return WriteMasked(list(tensors.values()), change, lambda: mask_of(base, change.rule, tensors.__getitem__))


def _shape_wanted(change: Change, name: str, slot: Slot) -> tuple[int, ...] | None:
    """The shape that the live tensor must have; None where any will do."""
    shape = tuple(slot.tensor.shape)
    match change:
        case Add() | Palette():
            return change.levels.shape
        case Folded():
            return folded_shape(change, shape)
        case Lossless():
            return change.shape
        case Factors() | LowRank():
            out, inner = change.B.shape[0], math.prod(change.A.shape[1:])
            flat = (inner, out) if change.transposed else (out, inner)
            agrees = shape == flat or (not change.transposed and shape[:1] == (out,) and slot.tensor.numel() == out * inner)
            return shape if agrees else flat
        case Multiply():
            along = shape[change.axis] if name == change.name and change.axis < len(shape) else shape[0] if shape else 0
            return shape if along == change.size else (change.size,)
        case Set(role="rows"):
            return (change.first_row, *change.value.shape[1:])
        case Set(role="buffer" | "tuned"):
            return tuple(change.value.shape)
    return None


def _load_hint(root: torch.nn.Module, expert: Expert) -> str:
    wanted = expert.facts.architecture
    return f"load the base as {wanted}" if wanted and wanted != type(root).__name__ else "is this the model that the expert was made for?"


def _check_base(expert: Expert, live: LiveWeights, allow_narrower: bool) -> dict[int, bytes]:
    """Raise WrongBase unless the live tensors are the expert's base; returns their digests by id."""
    replaced = {change.name for change in expert.changes if isinstance(change, Set) and change.role not in ("rows", "tuned")}
    names = [name for name in expert.fingerprint.names if name in live.of_base and name not in replaced and live.of_base[name].tensor.dtype in NATIVE]
    tensors = [live.of_base[name].tensor for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.is_meta:
            raise Unsupported(f"{name} is on the meta device (offloaded or not loaded); load the whole model first")
    digests = _digests.of(tensors)
    found = {name: (digest, tensor.dtype) for name, digest, tensor in zip(names, digests, tensors, strict=True)}
    masked = any(isinstance(change, Masked) for change in expert.changes)
    require_base(expert.fingerprint, expert.facts.base.name, found, allow_narrower, masked, expert.lossless)
    return {id(tensor): digest for tensor, digest in zip(tensors, digests, strict=True)}


def _steps_of(change: Product | Multiply | Folded | Set | Palette, slots: dict[str, Slot], live: LiveWeights) -> list[Step]:
    slot = slots[change.name]
    if isinstance(change, Palette):
        return [add_palette(slot.tensor, change)]
    if isinstance(change, Set):
        sharing = [other for other in live.all.values() if other.tensor is slot.tensor]
        alone = change.role == "untied" and len(sharing) > 1
        if alone or change.role == "rows" or slot.tensor.shape != change.value.shape:
            return [Replace([slot] if alone else sharing, partial(new_value, change, slot.tensor))]
        return [Overwrite(slot.tensor, partial(new_value, change), counts=False)]
    if isinstance(change, Product) and AddProduct.fits(slot.tensor):
        return [AddProduct(slot.tensor, change)]
    counts = not isinstance(change, Folded)  # whose new value is rounded already
    return [Overwrite(slots[name].tensor, partial(new_value, change), counts) for name in touched(change)]
