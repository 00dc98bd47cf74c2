"""A module's tensors under the names that its files give them: transformers 5 calls some classes' tensors otherwise in memory than on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch

_known: WeakKeyDictionary[torch.nn.Module, tuple[tuple[str, ...], dict[str, str]]] = WeakKeyDictionary()


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", model)
        if inner is model or not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def stored_names(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The file's name of each tensor that has another one in memory. `shapes` are those of all tensors, by their names in memory.

    Tensors that a file splits, joins or reorders have no counterpart there and are left out.
    """
    names = tuple(shapes)
    known = _known.get(model)
    if known is None or known[0] != names:
        known = _known[model] = (names, dict(_renamed(model, shapes)))
    return known[1]


def _renamed(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
    loading = sys.modules.get("transformers.core_model_loading")  # imported already where a model of theirs is at hand
    if loading is None:
        return
    for prefix, part in _pretrained(model, ""):
        inside = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name.startswith(prefix)}
        memory = {id(tensor): name for name, tensor in inside.items()}
        try:
            stored = loading.revert_weight_conversion(part, {name.removeprefix(prefix): tensor for name, tensor in inside.items()})
        except Exception:  # a class that cannot write itself as its files were has no other names than those in memory
            continue
        for name, tensor in stored.items():
            if id(tensor) in memory and memory[id(tensor)] != prefix + name:
                yield memory[id(tensor)], prefix + name


def _pretrained(module: torch.nn.Module, path: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """The outermost modules of transformers' classes, with their prefixes."""
    if hasattr(module, "save_pretrained") and hasattr(module, "base_model_prefix"):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _pretrained(child, f"{path}{name}.")
