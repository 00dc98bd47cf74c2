"""What a patch changes beside values: parameters replaced by others of another shape, the sizes that modules state, configuration fields."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sterna.live.weights import Place, Slot

_MISSING = object()

_SIZES: dict[str, tuple[int, ...]] = {
    "out_features": (0,), "in_features": (1,), "num_embeddings": (0,), "embedding_dim": (1,), "out_channels": (0,),
}  # fmt: skip
"""Attributes in which torch's modules state an axis of their weight."""


class Replace:
    """A tensor taken out of the model, under all the given slots, and a new one of another shape put in; the modules' stated sizes follow."""

    def __init__(self, slots: Sequence[Slot], new: Callable[[], torch.Tensor]) -> None:
        self._slots = slots
        self._new = new
        self._sizes: list[tuple[torch.nn.Module, str, int]] = []
        self._replaced: list[Slot] = []
        self.undo_bytes = slots[0].tensor.numel() * slots[0].tensor.element_size()
        self.updates = self.swallowed = 0

    @property
    def originals(self) -> dict[Place, torch.Tensor]:
        """What was there before, by place."""
        return {slot.place: slot.tensor for slot in self._slots}

    def apply(self) -> None:
        old = self._slots[0].tensor
        new = self._new().to(old.device, old.dtype)
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        for slot in self._slots:
            module = slot.owner
            self._replaced.append(slot)
            _hang(module, slot.attribute, new)
            if slot.attribute == "weight":
                for attribute, axes in _SIZES.items():
                    stated = module.__dict__.get(attribute)
                    if isinstance(stated, int) and axes[0] < new.dim() and stated == old.shape[axes[0]] != new.shape[axes[0]]:
                        self._sizes.append((module, attribute, stated))
                        setattr(module, attribute, new.shape[axes[0]])

    def revert(self) -> None:
        for module, attribute, stated in reversed(self._sizes):
            setattr(module, attribute, stated)
        for slot in reversed(self._replaced):
            if (owner := slot.module()) is not None:
                _hang(owner, slot.attribute, slot.tensor)
        self._sizes, self._replaced = [], []


def _hang(module: torch.nn.Module, attribute: str, tensor: torch.Tensor) -> None:
    held: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
    held[attribute] = tensor


class Configure:
    """Fields of the live configuration set to the tuned model's, and `num_labels` of the models that copied it."""

    def __init__(self, model: torch.nn.Module, fields: Mapping[str, Any]) -> None:
        self._model = weakref.ref(model)  # a patch does not keep its model alive
        self._fields = _live_fields(fields)
        self._before: list[tuple[Callable[[], object], str, object]] = []
        self.undo_bytes = self.updates = self.swallowed = 0

    def apply(self) -> None:
        model = self._model()
        config = getattr(model, "config", None)
        if model is None or config is None or isinstance(config, dict):
            return
        for name, value in self._fields.items():
            if not callable(getattr(type(config), name, None)):
                self._set(lambda: config, name, value)
        labels = self._fields.get("id2label")
        if labels is not None and isinstance(model.__dict__.get("num_labels"), int):
            self._set(self._model, "num_labels", len(labels))

    def _set(self, find: Callable[[], object], name: str, value: object) -> None:
        before = getattr(find(), name, _MISSING)
        if before != value:
            self._before.append((find, name, before))
            setattr(find(), name, value)

    def revert(self) -> None:
        for find, name, before in reversed(self._before):
            holder = find()
            if holder is None:  # the model is gone
                continue
            if before is not _MISSING:
                setattr(holder, name, before)
            elif hasattr(holder, name):
                delattr(holder, name)
        self._before = []


def _live_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as live configurations hold them: label numbers are integers, and label2id is the inverse where it is not given."""
    live = dict(fields)
    labels = live.get("id2label")
    if isinstance(labels, Mapping) and all(str(key).isdigit() for key in labels):
        live["id2label"] = {int(key): value for key, value in sorted(labels.items(), key=lambda item: int(item[0]))}
        live.setdefault("label2id", {value: key for key, value in live["id2label"].items()})
    return live
