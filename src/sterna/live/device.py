"""Levels added to a tensor on an accelerator, from masks that are held in its own memory."""

from __future__ import annotations

import weakref

import torch

from sterna.bitmasks import Masks
from sterna.expert.changes import Ternary
from sterna.numbers.bits import WORD
from sterna.numbers.torch_bits import unpacked

_PART = 1 << 24
"""Entries worked on at a time; a multiple of 64."""

_held: weakref.WeakKeyDictionary[Ternary, dict[torch.device, Masks]] = weakref.WeakKeyDictionary()


def masks_on(ternary: Ternary, device: torch.device) -> Masks:
    """The masks of a coded tensor on a device: moved there once, and held for as long as the expert is."""
    held = _held.setdefault(ternary, {})
    if device not in held:
        held[device] = Masks.of(ternary).to(device)
    return held[device]


class AddMasks:
    """Levels of one tensor, unpacked from its masks on the tensor's device, a part at a time; any device, any layout.

    What is overwritten is saved in the order of the positions, which the masks tell again: no position is kept.
    """

    def __init__(self, tensor: torch.Tensor, ternary: Ternary) -> None:
        self._tensor = tensor
        self._ternary = ternary
        self._saved: list[torch.Tensor] = []
        self.updates = ternary.count
        self.undo_bytes = self.updates * tensor.element_size()
        self.swallowed = 0

    def apply(self) -> None:
        masks = masks_on(self._ternary, self._tensor.device)
        live = self._live()
        lost = torch.zeros((), dtype=torch.int64, device=live.device)
        for start in range(0, masks.size, _PART):
            levels, places = _part(masks, start)
            index = self._index(live, places)
            old = live[index]
            new = (old.float() + levels * masks.scale).to(old.dtype)
            self._saved.append(old)
            live[index] = new
            lost += (new == old).sum()
        self.swallowed = int(lost)

    def revert(self) -> None:
        masks = masks_on(self._ternary, self._tensor.device)
        live = self._live()
        while self._saved:
            _, places = _part(masks, (len(self._saved) - 1) * _PART)
            live[self._index(live, places)] = self._saved[-1]
            self._saved.pop()

    def _live(self) -> torch.Tensor:
        """The tensor's memory as it is now (`.to` and `.data =` put other memory under a parameter), flat where it can be."""
        live = self._tensor.detach()
        return live.view(-1) if live.is_contiguous() else live

    def _index(self, live: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (places,) if live.dim() == 1 and live.is_contiguous() else torch.unravel_index(places, live.shape)


def _part(masks: Masks, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels (float32) that are not 0 from flat position `start` on, _PART positions of them, and their flat positions (int64)."""
    levels = unpacked(masks.words[:, start // WORD : (start + _PART) // WORD])
    places = levels.nonzero().squeeze(1)
    return levels[places].float(), places + start
