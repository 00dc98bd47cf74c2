"""Experts of PaFi, of HiWi's biases and of (IA)3: all have numbers for the same entries; merging them is arithmetic on the differences to the base.

A *slot* is what such experts share: the entries of one mask, one tensor tuned as a whole, or the vector of (IA)3 that multiplies one (around 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sterna.errors import InvalidArgument
from sterna.expert.changes import Change, Masked, Multiply, Set
from sterna.expert.expert import Expert
from sterna.mask import choose, tensor_piece
from sterna.merging.emitting import How, rounded
from sterna.merging.products import saved_modules
from sterna.merging.registry import F64, Kinds
from sterna.merging.values import Share
from sterna.numbers.selection import kept_entries
from sterna.progress import Progress
from sterna.sources.adapter import is_feedforward
from sterna.sources.checkpoint import Checkpoint, Source, open_checkpoint
from sterna.verification import require_checkpoint

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
Slot = Masked | Set | Multiply


def slots_of(expert: Expert) -> dict[str, Slot]:
    """The slots of an expert, by the names of its changes."""
    return {c.name: c for c in expert.changes if isinstance(c, Masked | Multiply) or (isinstance(c, Set) and c.role == "tuned")}


def entries_of(slot: Change) -> int:
    """How many entries a slot has."""
    if isinstance(slot, Masked):
        return slot.rule.count
    return slot.size if isinstance(slot, Multiply) else slot.value.numel() if isinstance(slot, Set) else 0


def slot_fault(first: Slot, second: Slot) -> str | None:
    """Why two changes of one name are no common slot, or None."""
    if isinstance(first, Masked) and isinstance(second, Masked):
        return (
            None
            if first.rule == second.rule
            else f"masks differ: {first.rule.order}, {first.rule.count:,} and {second.rule.order}, {second.rule.count:,}"
        )
    if isinstance(first, Set) and isinstance(second, Set):
        return None if first.value.shape == second.value.shape else f"shapes differ: {tuple(first.value.shape)} and {tuple(second.value.shape)}"
    if isinstance(first, Multiply) and isinstance(second, Multiply):
        ours, theirs = ((tuple(each.vector.shape), each.axis, each.bias) for each in (first, second))
        return None if ours == theirs else f"vectors differ in shape, axis or bias: {ours} and {theirs}"
    return "one is under a mask, the other tuned as a whole or multiplied"


def merge_slots(
    parents: Sequence[Mapping[str, Slot]],
    expert: Expert,
    base: Source | None,
    weights: Mapping[str, F64],
    shares: Mapping[str, Sequence[Share]],
    how: How,
    seed: int,
    progress: Progress,
) -> list[Change]:
    """The parents' slots merged: new values, each rounded once. A parent without a slot leaves it at the base. `expert` is any parent.

    Raises WrongBase where `base` is not theirs, to the bit; InvalidArgument for values that float32 cannot hold.
    """
    found = {name: slot for parent in parents for name, slot in parent.items()}
    opened: Checkpoint | None = None
    own: dict[str, str] = {}
    if needing := [name for name, slot in sorted(found.items()) if not isinstance(slot, Multiply)]:
        opened = open_checkpoint(require_base_given(base, needing[0]))
        own, _, _ = require_checkpoint(expert, opened, False, progress)
    olds = {name: _old(slot, opened, own) for name, slot in sorted(found.items())}
    rows = {name: np.stack([_difference(parent.get(name), olds[name]) for parent in parents]) for name in olds}
    for number in range(len(parents)):
        _drop({name: values[number] for name, values in rows.items()}, {name: shares[name][number] for name in rows}, how, seed)
    made: list[Change] = []
    for name, slot in sorted(found.items()):
        values = rows[name]
        gram = values @ values.T if how.method.statistics else np.zeros((len(values), len(values)))
        merged = how.method(Kinds(values, weights[name], gram, how.semantics), how.options)
        new = torch.from_numpy(rounded(name, olds[name] + merged))
        if isinstance(slot, Multiply):
            made.append(Multiply(name, slot.key, new.reshape(tuple(slot.vector.shape)), slot.axis, slot.bias))
        elif isinstance(slot, Masked):
            made.append(Masked(slot.rule, new))
        else:
            made.append(Set(name, new.to(slot.value.dtype).reshape(slot.value.shape), "tuned"))
    return made


def vector_config(configs: Sequence[Mapping[str, Any]], slots: Sequence[Change]) -> dict[str, Any]:
    """The adapter_config.json of merged vectors: the first parent's, with all parents' modules where these differ."""
    config = dict(configs[0])
    keys = sorted(slot.key for slot in slots if isinstance(slot, Multiply))
    if any(other.get(field) != config.get(field) for other in configs for field in ("target_modules", "feedforward_modules", "exclude_modules")):
        config |= {"target_modules": keys, "feedforward_modules": [key for key in keys if any(is_feedforward(each, key) for each in configs)]}
        config.pop("exclude_modules", None)
    return config | saved_modules(configs)


def _old(slot: Slot, base: Checkpoint | None, own: Mapping[str, str]) -> F64:
    """The base's values in a slot, float64; of (IA)3 what is above 1, which is 0."""
    if isinstance(slot, Multiply):
        return np.zeros(slot.size)
    assert base is not None
    tensors = {name: base.read(own[name]) for name in (slot.rule.names if isinstance(slot, Masked) else (slot.name,))}
    if isinstance(slot, Set):
        return tensors[slot.name].detach().double().reshape(-1).numpy()
    positions = choose(slot.rule, [tensor_piece(name, tensors[name]) for name in slot.rule.names])
    parts = [tensors[name].detach().reshape(-1)[torch.from_numpy(places)].double() for name, places in zip(slot.rule.names, positions, strict=True)]
    return torch.cat(parts).numpy()


def _difference(slot: Slot | None, old: F64) -> F64:
    if slot is None:
        return np.zeros_like(old)
    held = slot.value if isinstance(slot, Set) else slot.vector if isinstance(slot, Multiply) else slot.values
    if isinstance(held, torch.Tensor):
        return held.double().reshape(-1).numpy() - old
    levels: F64 = held.levels().reshape(-1).astype(np.float64) * held.scale
    return levels


def _drop(values: Mapping[str, F64], shares: Mapping[str, Share], how: How, seed: int) -> None:
    """Set to 0, in one parent's rows, what the method drops; rescale what stays of a random choice."""
    kind, paper = how.method.drop, how.semantics == "paper"
    least = 0.0
    if kind == "magnitude" and paper:
        whole = np.abs(np.concatenate(list(values.values())))
        kept = kept_entries(next(iter(shares.values())).density, whole.size)
        least = float(np.partition(whole, whole.size - kept)[whole.size - kept]) if kept else np.inf
    for name, row in values.items():
        share, size = shares[name], np.abs(row)
        if kind == "random":
            before, stays = float(size.sum()), _drawn(row.size, share.density, seed, share.task, name)
            row *= stays / (share.density if not how.by_norm else 1)
            if how.by_norm and (after := float(np.abs(row).sum())) >= 1e-7 and before >= 1e-7:
                row *= before / after
        elif kind == "magnitude" and paper:
            row[size < least] = 0
        elif kind is not None and not (share.density >= 1 and (kind == "magnitude" or not paper)):
            row[~_ranked(size, share, kind == "outliers", how.semantics)] = 0


def _ranked(size: F64, share: Share, outliers: bool, semantics: str) -> np.ndarray:
    """Which entries stay by their rank; see `sterna.merging.parents` on ties."""
    wanted, top = int(share.density * size.size), int(share.gamma * size.size) if outliers else 0
    if semantics == "paper":
        ordered = np.sort(size)
        above = size.size - np.searchsorted(ordered, size, "left")
        greater = size.size - np.searchsorted(ordered, size, "right")
        stays: np.ndarray = (above > top) & (greater < top + wanted)
        return stays
    if semantics == "mergekit" and not outliers:
        wanted = max(wanted, 1)
    last = size.size - max(0, size.size - wanted - top)
    stays = np.zeros(size.size, bool)
    stays[np.argsort(-size, kind="stable")[last - wanted : last]] = True
    return stays


def _drawn(count: int, density: float, seed: int, task: str, name: str) -> np.ndarray:
    """The mask that `sterna.merging.parents.dropped` tells of, for entries 0 to count - 1."""
    state = np.uint64(int.from_bytes(hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()[:8], "little"))
    z = state + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    kept: np.ndarray = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) < np.uint64(min(round(density * (1 << 53)), 1 << 53))
    return kept


def require_base_given(base: Source | None, name: str) -> Source:
    if base is None:
        raise InvalidArgument(f"{name} is held as new values, whose differences need the base: give it (--base, base=...)")
    return base
