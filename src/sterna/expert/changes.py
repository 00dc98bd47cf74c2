"""How an expert changes base tensors: nine kinds of change, all plain frozen data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from sterna.codings import CHUNK, I64, NO_BLOCKS, U8, U32, AnyCoding, Blocks, lossless
from sterna.errors import InvalidArgument
from sterna.expert.palette import Palette

if TYPE_CHECKING:
    import torch

    Exact = tuple[tuple[str, torch.Tensor], ...]
    """Tensors that a file holds as they are, under their names there."""

BATCH = 1 << 17

Role = Literal["head", "buffer", "rows", "untied", "saved", "tuned"]
Activation = Literal["relu", "gelu", "identity"]
Order = Literal["smallest", "largest", "random"]

VALUES = "sterna.values"
"""The file's name of a masked change's exact values."""
DIGEST = 16
"""Bytes kept of a tuned tensor's SHA-256."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Ternary:
    """One coded tensor of levels -1, 0, +1, worth `scale * level` (scale a float32 value).

    `data[start:stop]` (uint8, followed by at least `codings.PADDING` bytes) is the stream; `count` the non-zeros; `blocks` its parts, with offsets
    counted in `data` (none under a sequential coding).
    """

    shape: tuple[int, ...]
    scale: float
    coding: AnyCoding
    data: U8
    start: int
    stop: int
    count: int
    blocks: Blocks

    @classmethod
    def open(cls, shape: tuple[int, ...], scale: float, coding: AnyCoding, data: U8, start: int, stop: int) -> Ternary:
        """Read and check the stream's count or index; InvalidFile where it is not well-formed."""
        if coding.sequential is True:
            return cls(shape, scale, coding, data, start, stop, coding.count(data, start, stop, shape), NO_BLOCKS)
        blocks = coding.blocks(data, start, stop, math.prod(shape))
        return cls(shape, scale, coding, data, start, stop, int(blocks.count.sum()), blocks)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stream(self) -> U8:
        return self.data[self.start : self.stop]

    def batches(self) -> Iterator[I64]:
        """The codes, int64: flat index << 1 | negative, ascending, at most 2 * CHUNK at a time. Raises InvalidFile where the stream is damaged."""
        if self.coding.sequential is True:
            whole = self.coding.unpack(self.data, self.start, self.stop, self.shape)
            for first in range(0, self.count, 2 * CHUNK):
                yield whole[first : first + 2 * CHUNK]
            return
        ends = np.cumsum(self.blocks.count)
        many = min(self.count, 2 * CHUNK)  # any one block fits
        codes = np.empty(many + 8, np.uint32)
        first = done = 0
        while first < len(self.blocks):
            last = int(np.searchsorted(ends, done + many, side="right"))
            count = int(ends[last - 1]) - done
            self.coding.decode(self.data, self.blocks, first, last, codes)
            flat: I64 = codes[:count].astype(np.int64)
            flat += np.repeat(self.blocks.start[first:last] << 1, self.blocks.count[first:last])
            yield flat
            first, done = last, done + count

    def codes(self) -> I64:
        """int64[count]: flat index << 1 | negative, ascending. Raises InvalidFile where the stream is damaged."""
        return np.concatenate([np.empty(0, np.int64), *self.batches()])

    def levels(self) -> NDArray[np.int8]:
        """int8 array of the tensor's shape, -1, 0 and +1. Raises InvalidFile where the stream is damaged."""
        dense = np.zeros(self.size, np.int8)
        for codes in self.batches():
            dense[codes >> 1] = 1 - 2 * (codes & 1)
        return dense.reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """The blocks of many ternary tensors in one row, and the batches in which they are decoded: about BATCH non-zeros, whose codes stay in cache.

    Columns with a value for each block: `tensor` its number among `ternaries`, `scales`, and `saved_from`, the non-zeros before it.
    Batch i has the blocks batches[i]:batches[i + 1]; `room` is what the codes of one take.
    """

    ternaries: tuple[Ternary, ...]
    blocks: Blocks
    tensor: I64
    scales: NDArray[np.float32]
    saved_from: I64
    count: int
    batches: list[int]
    room: int

    @classmethod
    def of(cls, ternaries: Sequence[Ternary]) -> Joined:
        """Join tensors that lie in one buffer, under one block coding; ValueError otherwise."""
        if any(t.data is not ternaries[0].data or t.coding is not ternaries[0].coding or t.coding.sequential is True for t in ternaries):
            raise ValueError("ternary tensors are joined that do not lie in one buffer, under one block coding")
        lengths = [len(t.blocks) for t in ternaries]
        empty = np.empty(0, np.int64)
        blocks = Blocks(*(np.concatenate([empty, *(getattr(t.blocks, column) for t in ternaries)]) for column in Blocks.__slots__))
        ends = np.cumsum(blocks.count)
        saved_from = ends - blocks.count
        count = int(ends[-1]) if ends.size else 0
        starts = np.searchsorted(saved_from, np.arange(0, max(count, 1), BATCH)).tolist()
        batches = list(dict.fromkeys([0, *starts, len(blocks)]))
        room = 8 + max((int(ends[last - 1] - saved_from[first]) for first, last in pairwise(batches)), default=0)
        scales = np.repeat(np.array([t.scale for t in ternaries], np.float32), lengths)
        return cls(tuple(ternaries), blocks, np.repeat(np.arange(len(ternaries)), lengths), scales, saved_from, count, batches, room)

    def decode(self, batch: int, codes: U32) -> tuple[int, int]:
        """Write the batch's codes, counted in their blocks, and return its first block and the one after its last. Raises InvalidFile."""
        first, last = self.batches[batch], self.batches[batch + 1]
        coding = self.ternaries[0].coding
        assert coding.sequential is False  # `of` saw to it
        coding.decode(self.ternaries[0].data, self.blocks, first, last, codes)
        return first, last


@dataclass(frozen=True, slots=True)
class Add:
    """base + scale * level, for full fine-tunes."""

    name: str
    levels: Ternary

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.levels,)

    @property
    def exact(self) -> Exact:
        return ()


@dataclass(frozen=True, slots=True)
class Factors:
    """base + scaling * (B @ A), for LoRA.

    `A` is [r, in] and `B` is [out, r] as PEFT stores them (convolutions: the trailing axes are flattened by the product);
    `transposed` says that the product is transposed before it is added (embeddings, and Conv1D weights stored [in, out]).
    `embedding` says that PEFT stores them as an embedding's. `key` is the module path inside the adapter file, without `base_model.model.`.
    `ranks`, float32 [r], are scales of the single ranks, B @ diag(ranks) @ A: what several LoRA experts are in one.
    """

    name: str
    key: str
    A: Ternary
    B: Ternary
    scaling: float
    transposed: bool = False
    embedding: bool = False
    ranks: torch.Tensor | None = None

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.A, self.B)

    @property
    def exact(self) -> Exact:
        return () if self.ranks is None else ((f"{self.name}.ranks", self.ranks),)


@dataclass(frozen=True, slots=True)
class LowRank:
    """base + B @ A, for merged LoRA experts whose factors are numbers: both float32, of the shapes that `Factors` has, as are the other fields."""

    name: str
    key: str
    A: torch.Tensor
    B: torch.Tensor
    transposed: bool = False
    embedding: bool = False

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return ()

    @property
    def exact(self) -> Exact:
        return ((f"{self.name}.A", self.A), (f"{self.name}.B", self.B))


Product = Factors | LowRank
"""What adds a product of two thin matrices."""


@dataclass(frozen=True, slots=True)
class Multiply:
    """base * (1 + scale * level) along one axis, for (IA)3; a tensor (float32) in the place of levels holds the numbers that are added to 1.

    `vector` has the shape in which PEFT stores it; `axis` is the axis of the base tensor that the vector runs along. Outside feed-forward layers
    the module's bias is scaled with its weight: `bias` is then its name. `key` is the module path inside the adapter file.
    """

    name: str
    key: str
    vector: Ternary | torch.Tensor
    axis: int
    bias: str | None = None

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.vector,) if isinstance(self.vector, Ternary) else ()

    @property
    def exact(self) -> Exact:
        return () if isinstance(self.vector, Ternary) else ((f"{self.name}.vector", self.vector),)

    @property
    def size(self) -> int:
        """Numbers of the vector."""
        return math.prod(self.vector.shape)


@dataclass(frozen=True, slots=True)
class Set:
    """An exact tensor that takes the place of the live one.

    `role` says why it is exact: a task `head`; a `buffer`; `rows` that an embedding gained, appended after the base's `first_row` rows;
    an `untied` copy of a tensor that the base ties; a module `saved` beside an adapter; a parameter `tuned` as a whole, of the base's shape.
    A head may be stored in 8 bit: `value` is then int8 [out, ...] and `scales` float32 [out]. Use `tensor`, not `value`, for what it is worth.
    A merged expert's heads have the name of their `task`; see `sterna.expert.heads`.
    """

    name: str
    value: torch.Tensor
    role: Role
    first_row: int = 0
    scales: torch.Tensor | None = None
    task: str = ""

    @property
    def tensor(self) -> torch.Tensor:
        """What takes the place: `value`, or value * scales by row in float32."""
        if self.scales is None:
            return self.value
        return self.value.float() * self.scales.reshape(-1, *[1] * (self.value.dim() - 1))

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return ()

    @property
    def exact(self) -> Exact:
        name = exact_name(self.name, self.task)
        return ((name, self.value),) if self.scales is None else ((name, self.value), (f"{name}.scales", self.scales))


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Which entries of a base PaFi trains: `count` of those of the tensors `names` (the base's, sorted), by `order`; see `sterna.mask`.

    `seed` counts for the random order only, 0 to 2^53 - 1. Raises InvalidArgument for names that are not sorted and distinct.
    """

    order: Order
    count: int
    names: tuple[str, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.names or any(not first < second for first, second in pairwise(self.names)):
            raise InvalidArgument(f"a mask is chosen from {list(self.names[:4])}; expected names of tensors, sorted and distinct")
        if not 0 <= self.seed < 1 << 53:
            raise InvalidArgument(f"a mask's seed is {self.seed}; expected an integer below 2^53, 0 or more")


@dataclass(frozen=True, slots=True)
class Masked:
    """New values for the entries of many tensors that the base's own magnitudes choose, for PaFi.

    `values` is [rule.count], in the order of the mask: tensors of rule.names in order, ascending flat index in each. A tensor (float32, float16 or
    bfloat16) holds the new values themselves; a Ternary says base + scale * level. No other change touches one of rule.names.
    """

    rule: MaskRule
    values: torch.Tensor | Ternary

    @property
    def name(self) -> str:
        """Its place among an expert's changes."""
        return self.rule.names[0]

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.values,) if isinstance(self.values, Ternary) else ()

    @property
    def exact(self) -> Exact:
        return () if isinstance(self.values, Ternary) else ((VALUES, self.values),)


@dataclass(frozen=True, slots=True)
class Folded:
    """W + scale * act(W D) U, for HiWi's weights. D is [n, r] and U is [r, n], float32, float16 or bfloat16; W is [m, n].

    `transposed` says that it acts on the transpose: W is then [n, m]. gelu is the exact one, by erf.
    """

    name: str
    D: torch.Tensor
    U: torch.Tensor
    activation: Activation
    scale: float
    transposed: bool = False

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return ()

    @property
    def exact(self) -> Exact:
        return ((f"{self.name}.D", self.D), (f"{self.name}.U", self.U))


@dataclass(frozen=True, slots=True, eq=False)
class Lossless:
    """The tuned tensor to the bit: the base's bit patterns in `dtype` (float32, float16 or bfloat16), and what was added to `count` of them.

    `data[start:stop]` (uint8) is the stream, which decodes with the base's tensor alone; see `sterna.lossless`. `digest` is the first DIGEST bytes of
    SHA-256 of the tuned tensor's bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    digest: bytes
    data: U8
    start: int
    stop: int
    count: int

    @classmethod
    def open(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, digest: bytes, data: U8, start: int, stop: int) -> Lossless:
        """Read and check the stream's counts; InvalidFile where they do not fit."""
        return cls(name, shape, dtype, digest, data, start, stop, sum(band.count for band in lossless.bands(data, start, stop, shape)))

    @property
    def stream(self) -> U8:
        return self.data[self.start : self.stop]

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return ()

    @property
    def exact(self) -> Exact:
        return ()


Change = Add | Factors | LowRank | Multiply | Set | Masked | Folded | Lossless | Palette


def exact_name(name: str, task: str) -> str:
    """What a file calls an exact tensor: by its name, and the task's where it is the head of one of several."""
    return f"{task}:{name}" if task else name


def touched(change: Change) -> tuple[str, ...]:
    """The names of all tensors that a change changes."""
    if isinstance(change, Masked):
        return change.rule.names
    if isinstance(change, Multiply) and change.bias is not None:
        return (change.name, change.bias)
    return (change.name,)


def streams(change: Change) -> tuple[U8, ...]:
    """A change's coded bytes, in the file's order."""
    if isinstance(change, Palette):
        return change.levels.stream, change.coded
    return (change.stream,) if isinstance(change, Lossless) else tuple(ternary.stream for ternary in change.ternaries)


def coded_shapes(change: Change) -> tuple[tuple[int, ...], ...]:
    """The shapes of what `streams` codes."""
    return (change.shape,) if isinstance(change, Lossless) else tuple(ternary.shape for ternary in change.ternaries)


def is_tuned(change: Change) -> bool:
    """Whether a change is what training in place left of tensors that the base has: what can be made ternary."""
    return isinstance(change, Masked | Folded) or (isinstance(change, Set) and change.role == "tuned")


def needs_base(change: Change) -> bool:
    """Whether a change gives a tensor of the base new values as a whole, so that the base must have it, and alone."""
    return is_tuned(change) or isinstance(change, Lossless)
