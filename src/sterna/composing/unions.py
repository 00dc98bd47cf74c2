"""Levels of many experts as unions, block by block, and the step that weighs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.codings import CHUNK, I64, U32
from sterna.composing.kernels import BLOCK, put_back, save, union_of_block, weigh
from sterna.errors import Unsupported
from sterna.expert.changes import Add, Ternary
from sterna.expert.palette import Palette
from sterna.live.update import NATIVE, Step
from sterna.progress import Progress
from sterna.recoding import blockwise
from sterna.streaming import ordered

Weights = NDArray[np.float64]
Leveled = Add | Palette
Rows = Sequence[Leveled | None]
"""One tensor's changes, in the order of the experts."""

_THREAD = 1 << 20
"""Look-ups and sums from which another thread pays."""


@dataclass(frozen=True, slots=True, eq=False)
class Unions:
    """What experts have in the blocks of some tensors; see `kernels`. Of block k: its tensor and first position there, and where its part begins in
    the columns `positions` and `kinds` (union), `run_class` (run); of run r, where its part of `members` begins (member).
    Class c is `value`[c], signed, of expert `expert`[c]."""

    tensor: I64
    start: I64
    union: I64
    kind_count: I64
    run: I64
    run_class: NDArray[np.int32]
    member: I64
    positions: NDArray[np.uint16]
    kinds: NDArray[np.uint16]
    members: NDArray[np.uint16]
    expert: I64
    value: NDArray[np.float64]
    nonzeros: int

    @property
    def bytes(self) -> int:
        return sum(column.nbytes for name in self.__slots__ if isinstance(column := getattr(self, name), np.ndarray))


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Positions start..start + size - 1 of a tensor."""

    tensor: int
    start: int
    size: int


class _Block:
    """One block's columns, on their way to the others'."""

    __slots__ = ("chunk", "kind_count", "kinds", "members", "nonzeros", "positions", "runs", "start")

    def __init__(self, chunk: _Chunk, start: int, codes: U32, classes: NDArray[np.int32]) -> None:
        size = min(BLOCK, chunk.start + chunk.size - start)
        positions, kinds = np.empty(size, np.uint16), np.empty(size, np.uint16)
        runs, members = np.empty((2, codes.size), np.int32), np.empty(codes.size, np.uint16)
        count, self.kind_count, run_count, member_count = union_of_block(codes, classes, size, positions, kinds, runs, members)
        self.chunk, self.start, self.nonzeros = chunk, start, codes.size
        self.positions, self.kinds, self.runs = positions[:count].copy(), kinds[:count].copy(), runs[:, :run_count].copy()
        self.members = members[:member_count].copy()


def unions(rows: Sequence[Rows], progress: Progress) -> Unions:
    """The unions of some tensors, a row of changes for each. Raises InvalidFile where a stream or an index is damaged."""
    held: list[list[tuple[int, Leveled, Ternary, int]]] = []  # by tensor: the expert, its change, its levels blockwise, its first class
    expert: list[I64] = []
    value: list[NDArray[np.float64]] = []
    classes = 0
    coded = iter(blockwise([change.levels for row in rows for change in row if change is not None]))
    for row in rows:
        held.append([])
        for number, change in enumerate(row):
            if change is None:
                continue
            magnitudes = np.array([change.levels.scale]) if isinstance(change, Add) else change.magnitudes.numpy().astype(np.float64)
            held[-1].append((number, change, next(coded), classes))
            expert.append(np.full(2 * magnitudes.size, number))
            value.append(np.stack([magnitudes, -magnitudes], 1).reshape(-1))
            classes += 2 * magnitudes.size
    chunks = [
        _Chunk(tensor, start, min(CHUNK, parts[0][2].size - start))
        for tensor, parts in enumerate(held)
        for start in range(0, parts[0][2].size, CHUNK)
    ]
    total, done = sum(chunk.size for chunk in chunks), 0
    blocks: list[_Block] = []
    for chunk, found in ordered(lambda chunk: list(_blocks(chunk, held[chunk.tensor])), chunks):
        blocks += found
        done += chunk.size
        progress("pool", done, total, "parameters")
    return _joined(blocks, np.concatenate([np.empty(0, np.int64), *expert]), np.concatenate([np.empty(0), *value]))


def _blocks(chunk: _Chunk, parts: Sequence[tuple[int, Leveled, Ternary, int]]) -> Iterator[_Block]:
    """The blocks of a chunk that an expert changes."""
    decoded = [_decoded(chunk, change, levels, first) for _, change, levels, first in parts]
    starts = np.arange(0, chunk.size + BLOCK, BLOCK)
    cuts = [np.searchsorted(codes, starts.astype(np.uint64) << np.uint64(1)) for codes, _ in decoded]
    for block, start in enumerate(starts[:-1].tolist()):
        parts_of = [slice(cut[block], cut[block + 1]) for cut in cuts]
        codes = np.concatenate([codes[part] for (codes, _), part in zip(decoded, parts_of, strict=True)])
        if codes.size:
            classes = np.concatenate([classes[part] for (_, classes), part in zip(decoded, parts_of, strict=True)])
            yield _Block(chunk, chunk.start + start, codes - np.uint32(start << 1), classes)


def _decoded(chunk: _Chunk, change: Leveled, levels: Ternary, first_class: int) -> tuple[U32, NDArray[np.int32]]:
    """One expert's codes in a chunk, counted from its start, and the class of each but for its sign."""
    blocks = levels.blocks
    first, last = np.searchsorted(blocks.start, [chunk.start, chunk.start + chunk.size]).tolist()
    count = int(blocks.count[first:last].sum())
    codes = np.empty(count + 8, np.uint32)
    assert levels.coding.sequential is False
    levels.coding.decode(levels.data, blocks, first, last, codes)
    codes = codes[:count]
    codes += np.repeat((blocks.start[first:last] - chunk.start << 1).astype(np.uint32), blocks.count[first:last])
    if isinstance(change, Add):
        return codes, np.full(count, first_class, np.int32)
    return codes, (first_class + 2 * change.numbers(int(blocks.count[:first].sum()), count).astype(np.int32)).astype(np.int32)


def _joined(blocks: Sequence[_Block], expert: I64, value: NDArray[np.float64]) -> Unions:
    def ends(sizes: Sequence[int] | I64) -> I64:
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def joined(name: str) -> NDArray[np.uint16]:
        return np.concatenate([np.empty(0, np.uint16), *(getattr(block, name) for block in blocks)])

    runs = np.concatenate([np.empty((2, 0), np.int32), *(block.runs for block in blocks)], 1)
    return Unions(
        tensor=np.array([block.chunk.tensor for block in blocks], np.int64),
        start=np.array([block.start for block in blocks], np.int64),
        union=ends([block.positions.size for block in blocks]),
        kind_count=np.array([block.kind_count for block in blocks], np.int64),
        run=ends([block.runs.shape[1] for block in blocks]),
        run_class=runs[0],
        member=ends(runs[1].astype(np.int64)),
        positions=joined("positions"),
        kinds=joined("kinds"),
        members=joined("members"),
        expert=expert,
        value=value,
        nonzeros=sum(block.nonzeros for block in blocks),
    )


class WeighLevels:
    """The weighted levels of many experts in tensors of one dtype. Their base words are saved once: the union of positions stays the same.

    Tensors outside plain CPU memory are weighed in a copy there, which is copied to them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], unions: Unions, weights: Weights) -> None:
        self._tensors = tensors
        self._unions = unions
        self._weights = weights
        self._staged = [None if _plain(tensor) else tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors]
        words, self._kind = NATIVE[tensors[0].dtype]
        self._base = np.empty(unions.positions.size, words)
        self.updates = unions.nonzeros
        self.swallowed = 0
        staged = sum(copy.numel() * copy.element_size() for copy in self._staged if copy is not None)
        self.undo_bytes = unions.bytes + self._base.nbytes + staged
        self._each(lambda first, last, address: save(first, last, address, unions.union, unions.positions, self._base))

    def apply(self) -> None:
        u = self._unions
        values = self._weights[u.expert] * u.value
        starts, columns = (u.union, u.kind_count, u.run, u.run_class, u.member), (u.positions, u.kinds, u.members)
        self._each(lambda first, last, address: weigh(first, last, address, *starts, values, *columns, self._base, self._kind))
        self._touched()

    def revert(self) -> None:
        u = self._unions
        self._each(lambda first, last, address: put_back(first, last, address, u.union, u.positions, self._base))
        self._touched()

    def _each(self, work: Callable[[int, int, NDArray[np.uint64]], object]) -> None:
        """work(first block, last block, addresses) on as many threads as pay."""
        u = self._unions
        plain = [tensor.data_ptr() if copy is None else copy.data_ptr() for tensor, copy in zip(self._tensors, self._staged, strict=True)]
        address = np.array(plain, np.uint64)[u.tensor] + (u.start * self._base.itemsize).astype(np.uint64)
        cost = u.union[1:] + u.member[u.run[1:]]  # up to the end of each block
        total = int(cost[-1]) if cost.size else 0
        threads = max(min(torch.get_num_threads(), total // _THREAD, cost.size), 1)
        edges = [0, *np.searchsorted(cost, np.arange(1, threads) * (total // threads)).tolist(), cost.size]
        if threads == 1:
            work(0, cost.size, address)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda edge: work(edge[0], edge[1], address), pairwise(edges)))

    def _touched(self) -> None:
        for tensor, copy in zip(self._tensors, self._staged, strict=True):
            if copy is not None:
                tensor.detach().copy_(copy)
        plain = [tensor for tensor, copy in zip(self._tensors, self._staged, strict=True) if copy is None]
        torch.autograd.graph.increment_version(plain)  # autograd cannot see what compiled loops wrote


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def weigh_levels(levels: Mapping[str, tuple[torch.Tensor, Rows]], weights: Weights, progress: Progress) -> list[Step]:
    """The steps that weigh tensors' levels, one a dtype. Raises Unsupported for dtypes that are not floats of 16 to 64 bits."""
    groups: dict[torch.dtype, list[str]] = {}
    for name, (tensor, _) in levels.items():
        if tensor.dtype not in NATIVE:
            raise Unsupported(f"{name} is {tensor.dtype}; expected float32, float16 or bfloat16")
        groups.setdefault(tensor.dtype, []).append(name)
    return [
        WeighLevels([levels[name][0] for name in names], unions([levels[name][1] for name in names], progress), weights) for names in groups.values()
    ]
