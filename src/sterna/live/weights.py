"""The tensors of a live model by the base's names, where each hangs, and which cannot be patched."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from sterna.errors import AlreadyTuned, PairingError, Unsupported, WrongModel
from sterna.sources.checkpoint import refuse_tensor
from sterna.sources.names import Alignment, align, plain, swap_prefix
from sterna.sources.stored import stored_names

Place = tuple[int, str]
"""A module's id and an attribute of it."""

TUNED = "_sterna_taps"
"""The attribute that marks modules whose parameters `sterna.tune` trains."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter or persistent buffer as it hangs in the model: `module.attribute is tensor`, unless a patch put another in its place."""

    name: str
    module: weakref.ref[torch.nn.Module]
    attribute: str
    tensor: torch.Tensor

    @property
    def owner(self) -> torch.nn.Module:
        module = self.module()
        if module is None:
            raise WrongModel(f"the module that held {self.name} is gone")
        return module

    @property
    def hung(self) -> torch.Tensor | None:
        """What hangs there now; None where the module is gone."""
        module = self.module()
        return None if module is None else module._parameters.get(self.attribute, module._buffers.get(self.attribute))

    @property
    def place(self) -> Place:
        return (id(self.module()), self.attribute)


_plain = lru_cache(maxsize=1 << 16)(plain)


def slots(model: torch.nn.Module, originals: Mapping[Place, torch.Tensor]) -> dict[str, Slot]:
    """Every parameter and persistent buffer by its plain name in files, shared ones under each. `originals` are what a patch has replaced."""
    hanging: dict[str, tuple[weakref.ref[torch.nn.Module], str, torch.Tensor]] = {}
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        reference = weakref.ref(module)
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and attribute not in module._non_persistent_buffers_set:
                if originals:
                    tensor = originals.get((id(module), attribute), tensor)
                hanging[prefix + attribute] = (reference, attribute, tensor)
        stack.extend((f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None)
    stored = stored_names(model, {name: tuple(tensor.shape) for name, (_, _, tensor) in hanging.items()})
    named = ((_plain(stored.get(name, name)), place) for name, place in hanging.items())
    return {name: Slot(name, *place) for name, place in named}


@dataclass(frozen=True, slots=True)
class LiveWeights:
    """A live model seen through a base's names. `of_base` has the slots of the base's tensors; `all` every slot by its own plain name."""

    all: dict[str, Slot]
    of_base: dict[str, Slot]
    alignment: Alignment

    def find(self, name: str, tuned_prefix: str) -> Slot | None:
        """The slot of a tensor that the base may lack, named as the tuned model names it."""
        return self.of_base.get(name) or self.all.get(name) or self.all.get(swap_prefix(name, tuned_prefix, self.alignment.other_prefix))


class _View:
    """A model's slots, and how bases' names fall on them: kept while the model is made of the same modules and tensors."""

    def __init__(self, model: torch.nn.Module, originals: Mapping[Place, torch.Tensor]) -> None:
        self.slots = slots(model, originals)
        self.aligned: dict[tuple[object, ...], LiveWeights] = {}
        self._modules = _modules(model)

    def holds(self, model: torch.nn.Module, originals: Mapping[Place, torch.Tensor]) -> bool:
        """Whether nothing was put in, taken out or replaced since, but by the patch that tells its `originals`."""
        if _modules(model) != self._modules:
            return False
        return all(slot.hung is slot.tensor or originals.get(slot.place) is slot.tensor for slot in self.slots.values())


_views: weakref.WeakKeyDictionary[torch.nn.Module, _View] = weakref.WeakKeyDictionary()


def _walk(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The module at every place in the tree; `modules()` takes some five times as long."""
    found = [model]
    for module in found:  # grows meanwhile
        found.extend(child for child in module._modules.values() if child is not None)
    return found


def _modules(model: torch.nn.Module) -> list[tuple[int, int, int]]:
    """Every place of a module in the tree, and how many tensors hang there."""
    return [(id(module), len(module._parameters), len(module._buffers)) for module in _walk(model)]


def live_weights(
    model: torch.nn.Module, names: tuple[str, ...], shapes: tuple[tuple[int, ...] | None, ...], originals: Mapping[Place, torch.Tensor]
) -> LiveWeights:
    """The model's slots by the base names `names`; `shapes` where the expert knows them. Raises WrongModel where nothing corresponds."""
    view = _views.get(model)
    if view is None or not view.holds(model, originals):
        view = _views[model] = _View(model, originals)
    known = view.aligned.get((names, shapes))
    if known is None:
        own = {name: tuple(slot.tensor.shape) for name, slot in view.slots.items()}
        try:
            alignment = align(dict(zip(names, shapes, strict=True)), own)
        except PairingError as error:
            raise WrongModel(f"the model ({type(model).__name__}) has no tensor of the expert's base: {error}") from error
        known = LiveWeights(view.slots, {base: view.slots[found] for base, found in alignment.to_other.items()}, alignment)
        view.aligned[names, shapes] = known
    return known


def refuse_quantized(model: torch.nn.Module) -> None:
    if getattr(model, "is_quantized", False) or getattr(getattr(model, "config", None), "quantization_config", None):
        raise Unsupported("the model is quantized; attach experts to plain float32, float16 or bfloat16 weights")


def refuse_tuned(model: torch.nn.Module) -> None:
    """Raise AlreadyTuned for a model that `sterna.tune` is training, in whole or in part."""
    if any(TUNED in module.__dict__ for module in _walk(model)):
        raise AlreadyTuned("the model is being tuned; call finish() or discard() of its tuning first")


def refuse_unpatchable(slot: Slot) -> None:
    """Raise Unsupported for a tensor that cannot be changed in place and restored to the bit."""
    hook = slot.owner.__dict__.get("_hf_hook")
    if hook is not None and getattr(hook, "offload", False):
        raise Unsupported(f"{slot.name} is offloaded by accelerate (its values are elsewhere); load the model without offloading")
    refuse_tensor(slot.name, slot.tensor)
    if slot.tensor.is_inference():
        raise Unsupported(f"{slot.name} was created under torch.inference_mode and cannot be changed outside it; load without that mode")
