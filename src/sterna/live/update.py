"""Updates of live tensors, in place, and their undo. Each step saves what it overwrites before it writes, and reverts as far as it got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike

from sterna.codings import I64
from sterna.codings.fast import FAST, not_sound
from sterna.expert.changes import Factors, Joined, Masked, Product, Ternary
from sterna.expert.expert import masked_parts, masked_value, thin_matrices
from sterna.live.device import AddMasks
from sterna.live.kernels import BF16, FLOAT, FP16, add_factors, add_product, write_blocks

NATIVE = {torch.float32: (np.float32, FLOAT), torch.float64: (np.float64, FLOAT), torch.bfloat16: (np.uint16, BF16), torch.float16: (np.uint16, FP16)}
"""numpy's view of each live dtype, and how the kernels compute with it."""

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
    """Levels of many tensors of one dtype, in the fast coding, decoded and added block by block on the CPU."""

    def __init__(self, tensors: Sequence[torch.Tensor], joined: Joined) -> None:
        self._tensors = tensors
        self._joined = joined
        dtype, self._kind = NATIVE[tensors[0].dtype]
        groups = -(-joined.blocks.count // 8)
        self._saved_from = 8 * (np.cumsum(groups) - groups)  # words are saved in groups of eight
        self._undo = _aligned(8 * int(groups.sum()), dtype)
        self._done = np.zeros(len(joined.blocks), np.uint8)
        self.undo_bytes = joined.count * self._undo.itemsize
        self.updates = joined.count
        self.swallowed = 0

    def apply(self) -> None:
        self.swallowed = self._run(restoring=False)

    def revert(self) -> None:
        self._run(restoring=True)

    def _run(self, restoring: bool) -> int:
        """Add, or restore, whatever is not yet; returns how many words stayed what they were."""
        joined, blocks = self._joined, self._joined.blocks
        columns = (blocks.size, blocks.count, blocks.offset, blocks.length, blocks.parameter)
        start = np.array([tensor.data_ptr() for tensor in self._tensors], np.uint64)
        addresses = start[joined.tensor] + (blocks.start * self._undo.itemsize).astype(np.uint64)
        threads = max(min(torch.get_num_threads(), self.updates // _THREAD, len(blocks)), 1)
        edges = np.searchsorted(joined.saved_from, np.arange(threads) * (self.updates // threads)).tolist()

        def share(first: int, last: int) -> int:
            where = (np.uint64(joined.ternaries[0].data.ctypes.data), first, last, columns, addresses, self._saved_from, joined.scales)
            bad, same = write_blocks(*where, self._undo, self._kind, self._done, restoring)
            if bad >= 0:
                raise not_sound(bad)
            return int(same)

        shares = list(pairwise([*edges, len(blocks)]))
        try:
            if threads == 1:
                return share(*shares[0]) if shares else 0
            with ThreadPoolExecutor(threads) as pool:
                futures = [pool.submit(share, *edge) for edge in shares]
                return sum(future.result() for future in futures)
        finally:
            self._touched()

    def _touched(self) -> None:
        torch.autograd.graph.increment_version(self._tensors)  # autograd cannot see what numpy wrote


def _aligned(count: int, dtype: DTypeLike) -> np.ndarray:
    """An empty array that begins where 64 bytes do."""
    room = np.empty(count * np.dtype(dtype).itemsize + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + room.size - 64].view(dtype)


class ScatteredAdd:
    """Levels of one tensor through torch operations: any device, any layout."""

    def __init__(self, tensor: torch.Tensor, ternary: Ternary) -> None:
        self._tensor = tensor
        self._ternary = ternary
        self._saved: torch.Tensor | None = None
        self.updates = ternary.count
        self.undo_bytes = self.updates * tensor.element_size()
        self.swallowed = 0

    def apply(self) -> None:
        index, negative = self._index()
        live = self._tensor.detach()  # anew each time: `.to` and `.data =` put other memory under a parameter
        old = live[index]
        scale = torch.tensor(self._ternary.scale, dtype=torch.float32, device=old.device)
        new = (old.float() + torch.where(negative, -scale, scale)).to(old.dtype)
        self._saved = old
        live[index] = new
        self.swallowed = int((new == old).sum())

    def revert(self) -> None:
        if self._saved is not None:
            self._tensor.detach()[self._index()[0]] = self._saved
            self._saved = None

    def _index(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        codes = torch.from_numpy(self._ternary.codes()).to(self._tensor.device)
        return torch.unravel_index(codes >> 1, self._tensor.shape), (codes & 1).bool()


class AddProduct:
    """The product of a LoRA's factors added to one tensor in plain CPU memory, row by row, without making the product."""

    def __init__(self, tensor: torch.Tensor, change: Product) -> None:
        self._tensor = tensor
        self._change = change
        self._saved: torch.Tensor | None = None
        self.updates = 0
        self.undo_bytes = tensor.numel() * tensor.element_size()
        self.swallowed = 0

    @staticmethod
    def fits(tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype in NATIVE and tensor.dtype != torch.float64

    def apply(self) -> None:
        words, kind = NATIVE[self._tensor.dtype]
        tensor = self._tensor.detach()
        live = tensor.view(torch.int16).numpy().view(words) if kind != FLOAT else tensor.numpy()
        self._saved = tensor.clone()
        self.updates, self.swallowed = self._added(live, kind)
        torch.autograd.graph.increment_version([self._tensor])

    def _added(self, live: np.ndarray, kind: int) -> tuple[int, int]:
        change = self._change
        if not isinstance(change, Factors) or change.ranks is not None:
            left, right = thin_matrices(change)
            updates, swallowed = add_factors(live.reshape(left.shape[0], -1), right, left, kind)
            return updates, swallowed
        A = change.A.levels().reshape(change.A.shape[0], -1)
        B = change.B.levels().reshape(change.B.shape[0], -1)
        if change.transposed:
            A, B = np.ascontiguousarray(B.T), np.ascontiguousarray(A.T)
        scale = np.float32(change.A.scale * change.B.scale * change.scaling)
        updates, swallowed = add_product(live.reshape(B.shape[0], -1), A, B, scale, kind)
        return updates, swallowed

    def revert(self) -> None:
        if self._saved is not None:
            self._tensor.detach().copy_(self._saved)
            self._saved = None


class Overwrite:
    """A whole tensor given new values: dense updates and exact tensors of the same shape."""

    def __init__(self, tensor: torch.Tensor, new: Callable[[torch.Tensor], torch.Tensor], counts: bool) -> None:
        self._tensor = tensor
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
            self._tensor.detach().copy_(self._saved)
            self._saved = None


class WriteMasked:
    """The masked entries of many tensors given new values, through torch operations: any device, any layout.

    `positions` gives the mask of the tensors as they are when it is asked: it may have to be made of them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], change: Masked, positions: Callable[[], Sequence[I64]]) -> None:
        self._tensors = tensors
        self._change = change
        self._positions = positions
        self._saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        entries = sum(ternary.count for ternary in change.ternaries) if change.ternaries else change.rule.count
        self.updates = entries if change.ternaries else 0
        self.undo_bytes = entries * (8 + max(tensor.element_size() for tensor in tensors))
        self.swallowed = 0

    def apply(self) -> None:
        self.swallowed = 0
        for tensor, (places, part) in zip(self._tensors, masked_parts(self._change, self._positions()), strict=True):
            if not len(places):
                continue
            live, index = entries_at(tensor, places)
            old = live[index]
            new = masked_value(self._change, old, part)
            self._saved.append((tensor, places, old))
            live[index] = new
            self.swallowed += int((new == old).sum()) if self.updates else 0

    def revert(self) -> None:
        while self._saved:
            tensor, places, old = self._saved[-1]
            live, index = entries_at(tensor, places)
            live[index] = old
            self._saved.pop()


def entries_at(tensor: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A view of the tensor and what indexes it at flat places."""
    live, places = tensor.detach(), places.to(tensor.device)
    return (live.view(-1), (places,)) if live.is_contiguous() else (live, torch.unravel_index(places, live.shape))


def sparse_adds(tensors: Sequence[torch.Tensor], adds: Joined) -> list[Step]:
    """The steps that add coded levels to tensors of their shapes: kernels where a tensor is plain CPU memory, torch operations elsewhere."""
    groups: dict[torch.dtype, list[int]] = {}
    steps: list[Step] = []
    for number, (tensor, ternary) in enumerate(zip(tensors, adds.ternaries, strict=True)):
        if tensor.device.type != "cpu":
            steps.append(AddMasks(tensor, ternary))
        elif tensor.is_contiguous() and ternary.coding is FAST:
            groups.setdefault(tensor.dtype, []).append(number)
        else:
            steps.append(ScatteredAdd(tensor, ternary))
    for numbers in groups.values():
        part = adds if len(numbers) == len(adds.ternaries) else Joined.of([adds.ternaries[number] for number in numbers])
        steps.append(SparseAdd([tensors[number] for number in numbers], part))
    return steps
