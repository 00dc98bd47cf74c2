"""Values of a few magnitudes added to a live tensor, in place, and their undo."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sterna.expert.changes import Joined
from sterna.expert.palette import Palette
from sterna.live.kernels import FLOAT, add_values, put_back
from sterna.live.update import NATIVE
from sterna.recoding import blockwise

_THREAD = 1 << 20
"""Non-zeros from which another thread pays."""


def add_palette(tensor: torch.Tensor, change: Palette) -> AddValues | ScatterValues:
    """The step that adds a palette's values: compiled loops where the tensor is plain CPU memory, torch operations elsewhere."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype in NATIVE
    return AddValues(tensor, change) if plain else ScatterValues(tensor, change)


class AddValues:
    """A palette added to one tensor in plain CPU memory, a batch of decoded blocks after another on several threads."""

    def __init__(self, tensor: torch.Tensor, change: Palette) -> None:
        self._tensor = tensor
        self._change = change
        self._joined = Joined.of(blockwise([change.levels]))
        self._words, self._kind = NATIVE[tensor.dtype]
        self._undo = np.empty(0, self._words)
        self._done: list[int] = []  # batches that are on
        self.updates = change.levels.count
        self.undo_bytes = self.updates * tensor.element_size()
        self.swallowed = 0

    def apply(self) -> None:
        numbers, magnitudes = self._change.numbers(0, self.updates), self._change.magnitudes.numpy()
        live = self._live()
        self._undo = np.empty(self.updates, self._words)

        def add(batch: int, codes: np.ndarray) -> int:
            counts, starts, part = self._decoded(batch, codes)
            lost = int(add_values(live, codes, counts, starts, numbers[part], magnitudes, self._undo[part], self._kind))
            self._done.append(batch)
            return lost

        self.swallowed = self._each(range(len(self._joined.batches) - 1), add)

    def revert(self) -> None:
        live = self._live()

        def put(batch: int, codes: np.ndarray) -> int:
            counts, starts, part = self._decoded(batch, codes)
            put_back(live, codes, counts, starts, self._undo[part])
            return 0

        self._each(self._done, put)
        self._done = []
        self._undo = self._undo[:0]

    def _decoded(self, batch: int, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, slice]:
        """A batch's codes, in `codes`; its blocks' counts and first positions; which non-zeros it has."""
        first, last = self._joined.decode(batch, codes)
        blocks, begin = self._joined.blocks, int(self._joined.saved_from[first])
        counts = blocks.count[first:last]
        return counts, blocks.start[first:last], slice(begin, begin + int(counts.sum()))

    def _each(self, batches: range | list[int], work: Callable[[int, np.ndarray], int]) -> int:
        """The sum of work(batch, codes), on as many threads as pay."""
        if not self.updates:
            return 0
        threads = max(min(torch.get_num_threads(), self.updates // _THREAD, len(batches)), 1)

        def share(number: int) -> int:
            codes = np.empty(self._joined.room, np.uint32)
            return sum(work(batch, codes) for batch in list(batches)[number::threads])

        try:
            if threads == 1:
                return share(0)
            with ThreadPoolExecutor(threads) as pool:
                return sum(pool.map(share, range(threads)))
        finally:
            torch.autograd.graph.increment_version([self._tensor])

    def _live(self) -> np.ndarray:
        tensor = self._tensor.detach()
        plain: np.ndarray = tensor.numpy() if self._kind == FLOAT else tensor.view(torch.int16).numpy().view(self._words)
        return plain.reshape(-1)


class ScatterValues:
    """A palette added to one tensor through torch operations: any device, any layout."""

    def __init__(self, tensor: torch.Tensor, change: Palette) -> None:
        self._tensor = tensor
        self._change = change
        self._saved: list[torch.Tensor] = []
        self.updates = change.levels.count
        self.undo_bytes = self.updates * tensor.element_size()
        self.swallowed = 0

    def apply(self) -> None:
        self._change.numbers(0, self.updates)  # all of them are looked at before anything is written
        lost = 0
        for positions, values in self._change.batches():
            live, index = self._entries(positions)
            old = live[index]
            new = (old.float() + torch.from_numpy(values).to(live.device)).to(live.dtype)
            self._saved.append(old)
            live[index] = new
            lost += int((new == old).sum())
        self.swallowed = lost

    def revert(self) -> None:
        for old, (positions, _) in zip(self._saved, self._change.batches(), strict=False):
            live, index = self._entries(positions)
            live[index] = old
        self._saved = []

    def _entries(self, positions: np.ndarray) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        live = self._tensor.detach()  # anew each time: `.to` and `.data =` put other memory under a parameter
        return live, torch.unravel_index(torch.from_numpy(positions).to(live.device), live.shape)
