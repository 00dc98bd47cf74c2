"""New values of the same entries, of PaFi and HiWi's biases, weighed: arithmetic on their differences to the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sterna.codings import I64
from sterna.composing.kernels import ordered_sums
from sterna.composing.unions import Weights
from sterna.expert.changes import Masked, Set
from sterna.expert.expert import refuse_count
from sterna.fingerprint import combine
from sterna.live.update import entries_at
from sterna.mask import mask_of


class WeighSlot:
    """One mask's entries, or one tensor tuned as a whole, of many experts: base + sum_i w_i (value_i - base), in float64, rounded to float32 and then
    to the live dtype, as merged experts are made and attached."""

    def __init__(
        self, changes: Sequence[Masked | Set | None], weights: Weights, tensors: Mapping[str, torch.Tensor], digests: Mapping[int, bytes]
    ) -> None:
        one = next(change for change in changes if change is not None)
        names = one.rule.names if isinstance(one, Masked) else (one.name,)
        self._weights = weights
        self._narrow = one.value.dtype if isinstance(one, Set) else torch.float32
        own = [tensors[name] for name in names]
        places = _places(one, own, {name: tensors[name] for name in names}, digests)
        self._parts = [(tensor, torch.from_numpy(part)) for tensor, part in zip(own, places, strict=True) if part.size]
        self._saved = [_entries(tensor, part) for tensor, part in self._parts]
        self._old = np.concatenate([np.empty(0), *(saved.cpu().double().numpy() for saved in self._saved)])
        rows = [_difference(change, self._old) for change in changes]
        self._differences = np.ascontiguousarray(np.stack(rows, 1))  # a row an entry
        self.updates = sum(int(np.count_nonzero(row)) for row in rows)
        words = sum(saved.nbytes for saved in self._saved) + sum(part.nbytes for _, part in self._parts)
        self.undo_bytes = self._differences.nbytes + self._old.nbytes + words
        self.swallowed = 0

    def apply(self) -> None:
        new = torch.from_numpy((self._old + ordered_sums(self._differences, self._weights)).astype(np.float32)).to(self._narrow)
        self._write(torch.split(new, [part.numel() for _, part in self._parts]))

    def revert(self) -> None:
        self._write(self._saved)

    def _write(self, values: Sequence[torch.Tensor]) -> None:
        for (tensor, part), new in zip(self._parts, values, strict=True):
            live, index = entries_at(tensor, part)
            live[index] = new.to(live.device, live.dtype)


def _places(one: Masked | Set, own: Sequence[torch.Tensor], named: Mapping[str, torch.Tensor], digests: Mapping[int, bytes]) -> Sequence[I64]:
    if isinstance(one, Set):
        return [np.arange(own[0].numel())]
    refuse_count(one.rule, list(own))
    return mask_of(combine(digests[id(tensor)] for tensor in own), one.rule, named.__getitem__)


def _entries(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    live, index = entries_at(tensor, places)
    return live[index].clone()


def _difference(change: Masked | Set | None, old: Weights) -> Weights:
    if change is None:
        return np.zeros_like(old)
    values = change.value if isinstance(change, Set) else change.values
    if isinstance(values, torch.Tensor):
        new: Weights = values.double().reshape(-1).numpy()
        return new - old
    levels: Weights = values.levels().astype(np.float64)
    return levels * values.scale
