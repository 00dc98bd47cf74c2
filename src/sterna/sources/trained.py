"""The task vector of an exact PaFi or HiWi expert: its new values minus the base's, at the entries that it has values for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from sterna.errors import InvalidArgument, PairingError
from sterna.expert.changes import Add, Change, Folded, Masked, Set, Ternary, is_tuned
from sterna.expert.container import is_expert
from sterna.expert.expert import Expert, folded_update, refuse_count, refuse_shape
from sterna.expert.file import load
from sterna.mask import choose, tensor_piece
from sterna.progress import Progress
from sterna.sources.checkpoint import Checkpoint, Source
from sterna.sources.finetune import difference
from sterna.taskvector import Piece, TaskVector, float32
from sterna.verification import require_checkpoint


def trained_expert(tuned: Source | Expert) -> Expert | None:
    """The expert that `tuned` is or whose file it names, None where it is no expert. Raises InvalidArgument for one that is ternary already."""
    if isinstance(tuned, str | os.PathLike) and is_expert(tuned):
        tuned = load(tuned)
    if not isinstance(tuned, Expert):
        return None
    if tuned.facts.method != "exact":
        raise InvalidArgument(f"the tuned model is an expert of method {tuned.facts.method!r}; expected an exact one, as PaFi and HiWi leave it")
    return tuned


def trained(base: Checkpoint, expert: Expert, exclude: Sequence[str], progress: Progress) -> TaskVector:
    """Hold the base against the expert, and describe the expert's differences to it. Raises WrongBase, PairingError or InvalidArgument."""
    if exclude:
        raise InvalidArgument("exclude does not apply to an expert: tell the training what to tune instead")
    own, _, _ = require_checkpoint(expert, base, False, progress)
    tuned = [change for change in expert.changes if is_tuned(change)]
    if not tuned:
        raise PairingError("the expert tunes nothing that could be compressed")

    @lru_cache(maxsize=2)  # read chunk after chunk; two threads may stand on either side of a border
    def update(change: Folded) -> torch.Tensor:
        return folded_update(change, base.read(own[change.name])).float().reshape(-1)

    def piece(change: Change) -> Piece:
        if isinstance(change, Masked):
            return _masked(change, base, own)
        tensor = base.read(own[change.name])
        refuse_shape(change, {change.name: tensor})
        shape = tuple(tensor.shape)
        if isinstance(change, Folded):
            return Piece(change.name, shape, lambda start, stop, out: np.copyto(out, float32(update(change)[start:stop])))
        assert isinstance(change, Set)
        return difference(change.name, shape, tensor, change.value)

    def changes(levels: Sequence[Ternary]) -> list[Change]:
        return [
            Masked(change.rule, coded) if isinstance(change, Masked) else Add(change.name, coded) for change, coded in zip(tuned, levels, strict=True)
        ]

    def moved(values: Sequence[torch.Tensor]) -> list[Change]:
        made: list[Change] = []
        for change, value in zip(tuned, values, strict=True):
            if isinstance(change, Masked):
                made.append(Masked(change.rule, torch.cat(_entries(change, base, own)).float() + value))
            else:
                made.append(Set(change.name, base.read(own[change.name]).float() + value, "tuned"))
        return made

    kept = [change for change in expert.changes if isinstance(change, Set) and not is_tuned(change)]
    return TaskVector(expert.facts.source, [piece(change) for change in tuned], changes, lambda: list(tuned), moved, kept)


def _masked(change: Masked, base: Checkpoint, own: Mapping[str, str]) -> Piece:
    """The differences at the mask, one piece of rule.count entries."""
    assert isinstance(change.values, torch.Tensor)
    return difference(change.name, (change.rule.count,), torch.cat(_entries(change, base, own)), change.values)


def _entries(change: Masked, base: Checkpoint, own: Mapping[str, str]) -> list[torch.Tensor]:
    """The base's values at the mask, tensor by tensor."""
    tensors = [base.read(own[name]).detach() for name in change.rule.names]
    refuse_count(change.rule, tensors)
    positions = choose(change.rule, list(map(tensor_piece, change.rule.names, tensors)))
    return [tensor.reshape(-1)[torch.from_numpy(places).to(tensor.device)] for tensor, places in zip(tensors, positions, strict=True)]
