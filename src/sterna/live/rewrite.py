"""Live tensors that become the tuned ones to the bit, and the base's again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sterna.expert.changes import Lossless
from sterna.live.update import entries_at
from sterna.lossless import rebuilt

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Rewrite:
    """Tensors that hold the base's values given the tuned ones, on any device, in the tuned dtype or a wider one."""

    def __init__(self, tensors: Sequence[torch.Tensor], changes: Sequence[Lossless]) -> None:
        self._tensors = tensors
        self._changes = changes
        self._saved: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []  # the tensor, which entries, their old values
        self.undo_bytes = 0
        self.updates = self.swallowed = 0

    def apply(self) -> None:
        for tensor, new in zip(self._tensors, rebuilt(list(zip(self._changes, self._tensors, strict=True))), strict=True):
            live = tensor.detach()
            wide = new.to(live.dtype).to(live.device)
            integers = _INTEGERS[live.element_size()]
            saved: tuple[torch.Tensor | None, torch.Tensor]
            places = (wide.view(integers) != live.contiguous().view(integers)).flatten().nonzero().flatten()
            size = torch.int32 if live.numel() < 1 << 31 else torch.int64
            if places.numel() * (size.itemsize + live.element_size()) < live.numel() * live.element_size():
                saved = places.to(size), live.reshape(-1)[places]
            else:
                saved = None, live.clone()
            self._saved.append((tensor, *saved))
            self.undo_bytes += sum(held.numel() * held.element_size() for held in saved if held is not None)
            live.copy_(wide)

    def revert(self) -> None:
        while self._saved:
            tensor, places, old = self._saved[-1]
            if places is None:
                tensor.detach().copy_(old)
            else:
                live, index = entries_at(tensor, places.long())
                live[index] = old
            self._saved.pop()
        self.undo_bytes = 0
