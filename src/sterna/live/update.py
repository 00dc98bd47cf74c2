"""Updates of live tensors, in place, and their undo. Each step saves what it overwrites before it writes, and reverts as far as it got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from sterna.codings import Blocks
from sterna.expert.changes import Ternary
from sterna.live.kernels import BF16, FLOAT, FP16, add, restore

NATIVE = {torch.float32: (np.float32, FLOAT), torch.float64: (np.float64, FLOAT), torch.bfloat16: (np.uint16, BF16), torch.float16: (np.uint16, FP16)}
"""numpy's view of each live dtype, and how the kernels compute with it."""

_BATCH = 1 << 15
"""Non-zeros decoded at a time: their codes stay in the nearest cache."""
_THREAD = 1 << 20
"""Non-zeros from which another thread pays."""


class Step(Protocol):
    """A part of a patch. `revert` undoes whatever `apply` did, also where it failed or never ran."""

    undo_bytes: int
    updates: int  # entries given a new value that rounding could have swallowed
    swallowed: int  # those whose value is what it was

    def apply(self) -> None: ...

    def revert(self) -> None: ...


class SparseAdd:
    """Levels of many tensors of one dtype and one coding, decoded and added in cache-sized batches on the CPU."""

    def __init__(self, targets: Sequence[tuple[torch.Tensor, Ternary]]) -> None:
        self._tensors = [tensor for tensor, _ in targets]
        ternaries = [ternary for _, ternary in targets]
        self._coding, self._data = ternaries[0].coding, ternaries[0].data
        parts = [t.blocks for t in ternaries]
        lengths = [len(p) for p in parts]
        self._blocks = Blocks(*(np.concatenate([getattr(p, column) for p in parts]) for column in Blocks.__slots__))
        self._of_tensor = np.repeat(np.arange(len(ternaries)), lengths)
        self._scales = np.repeat(np.array([t.scale for t in ternaries], np.float32), lengths)
        self._like = np.empty(0, NATIVE[self._tensors[0].dtype][0])
        self._kind = NATIVE[self._tensors[0].dtype][1]
        ends = np.cumsum(self._blocks.count)
        self._saved_from = ends - self._blocks.count
        total = int(ends[-1]) if ends.size else 0
        self._undo = np.empty(total, self._like.dtype)
        self._batches = _batches(self._saved_from, total)
        self._done = np.zeros(max(len(self._batches) - 1, 1), np.uint8)
        self._swallowed = np.zeros_like(self._done, np.int64)
        spans = zip(self._batches, self._batches[1:], strict=False)
        self._room = int(max((ends[last - 1] - self._saved_from[first] for first, last in spans), default=0))
        self.undo_bytes = self._undo.nbytes
        self.updates = total
        self.swallowed = 0

    def apply(self) -> None:
        addresses = self._addresses()

        def work(batch: int, codes: np.ndarray) -> None:
            first, last = self._batches[batch], self._batches[batch + 1]
            self._coding.decode(self._data, self._blocks, first, last, codes)
            columns = (self._blocks.size, self._blocks.count, self._saved_from, self._scales)
            add(codes, first, last, addresses, *columns, self._undo, self._like, self._kind, self._done, self._swallowed, batch)

        try:
            self._run(work)
        finally:
            self._touched()
        self.swallowed = int(self._swallowed.sum())

    def revert(self) -> None:
        addresses = self._addresses()

        def work(batch: int, codes: np.ndarray) -> None:
            if self._done[batch]:
                first, last = self._batches[batch], self._batches[batch + 1]
                self._coding.decode(self._data, self._blocks, first, last, codes)
                restore(codes, first, last, addresses, self._blocks.size, self._blocks.count, self._saved_from, self._undo, self._done, batch)

        try:
            self._run(work)
        finally:
            self._touched()

    def _addresses(self) -> np.ndarray:
        start = np.array([t.data_ptr() for t in self._tensors], np.uint64)
        return start[self._of_tensor] + (self._blocks.start * self._like.itemsize).astype(np.uint64)

    def _run(self, work: Callable[[int, np.ndarray], None]) -> None:
        batches = range(len(self._batches) - 1)
        threads = max(min(torch.get_num_threads(), self.updates // _THREAD, len(batches)), 1)
        if threads == 1:
            codes = np.empty(self._room + 64, np.uint32)
            for batch in batches:
                work(batch, codes)
            return

        def share(worker: int) -> None:
            codes = np.empty(self._room + 64, np.uint32)
            for batch in batches[worker::threads]:
                work(batch, codes)

        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(share, worker) for worker in range(threads)]:
                future.result()

    def _touched(self) -> None:
        torch.autograd.graph.increment_version(self._tensors)  # autograd cannot see what numpy wrote


def _batches(saved_from: np.ndarray, total: int) -> list[int]:
    """Block numbers at which batches of about _BATCH non-zeros begin, and the number of blocks at the end."""
    if not saved_from.size:
        return []
    starts = np.searchsorted(saved_from, np.arange(0, max(total, 1), _BATCH), side="left")
    return [*dict.fromkeys([0, *starts.tolist()]), saved_from.size] if saved_from.size not in starts else [*dict.fromkeys([0, *starts.tolist()])]


class ScatteredAdd:
    """Levels of one tensor through torch operations: any device, any layout."""

    def __init__(self, tensor: torch.Tensor, ternary: Ternary) -> None:
        self._tensor = tensor.detach()
        self._ternary = ternary
        self._saved: torch.Tensor | None = None
        self.updates = ternary.count
        self.undo_bytes = self.updates * tensor.element_size()
        self.swallowed = 0

    def apply(self) -> None:
        index, negative = self._index()
        old = self._tensor[index]
        scale = torch.tensor(self._ternary.scale, dtype=torch.float32, device=old.device)
        new = (old.float() + torch.where(negative, -scale, scale)).to(old.dtype)
        self._saved = old
        self._tensor[index] = new
        self.swallowed = int((new == old).sum())

    def revert(self) -> None:
        if self._saved is not None:
            self._tensor[self._index()[0]] = self._saved
            self._saved = None

    def _index(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        codes = torch.from_numpy(self._ternary.codes()).to(self._tensor.device)
        return torch.unravel_index(codes >> 1, self._tensor.shape), (codes & 1).bool()


class Overwrite:
    """A whole tensor given new values: dense updates and exact tensors of the same shape."""

    def __init__(self, tensor: torch.Tensor, new: Callable[[torch.Tensor], torch.Tensor], counts: bool) -> None:
        self._tensor = tensor.detach()
        self._new = new
        self._counts = counts
        self._saved: torch.Tensor | None = None
        self.updates = 0
        self.undo_bytes = tensor.numel() * tensor.element_size()
        self.swallowed = 0

    def apply(self) -> None:
        new = self._new(self._tensor).to(self._tensor.device)
        self._saved = self._tensor.clone()
        self._tensor.copy_(new)
        if self._counts:
            moved = new != self._saved
            self.updates = int(moved.sum())
            self.swallowed = int((moved & (self._tensor == self._saved)).sum())

    def revert(self) -> None:
        if self._saved is not None:
            self._tensor.copy_(self._saved)
            self._saved = None


def sparse_adds(targets: Sequence[tuple[torch.Tensor, Ternary]]) -> list[Step]:
    """The steps that add coded levels to tensors of their shapes: batched kernels where a tensor is plain CPU memory, torch operations elsewhere."""
    steps: list[Step] = []
    groups: dict[tuple[object, ...], list[tuple[torch.Tensor, Ternary]]] = {}
    for tensor, ternary in targets:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and ternary.size:
            groups.setdefault((tensor.dtype, ternary.coding.name, id(ternary.data)), []).append((tensor, ternary))
        else:
            steps.append(ScatteredAdd(tensor, ternary))
    return [*(SparseAdd(group) for group in groups.values()), *steps]
