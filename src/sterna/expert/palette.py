"""A change of a few magnitudes: coded positions and signs, and for each non-zero the number of its magnitude. What sums of ternary tensors are."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.errors import InvalidArgument, InvalidFile
from sterna.numbers import rans
from sterna.numbers.kinds import pack, packed, packed_bytes, unpack, width_of

if TYPE_CHECKING:
    from sterna.expert.changes import Add, Exact, Ternary

MOST = 1 << 16
"""Magnitudes of one tensor, at most."""
MOST_TASKS = 32
"""Tasks whose masks one palette has, at most."""

F32 = NDArray[np.float32]


class _Scratch(threading.local):
    """What reading numbers takes, however few they are."""

    def __init__(self) -> None:
        self.slots = np.empty(rans.TOTAL, np.uint16)
        self.numbers = np.empty(rans.BLOCK, np.uint16)


_scratch = _Scratch()


@dataclass(frozen=True, slots=True, eq=False)
class Palette:
    """base + sign * magnitude: non-zero i of `levels` (in the order of its positions; its scale is 1) has the magnitude of number i in `indices`.

    `magnitudes` is float32 [K], 2 <= K <= 65,536, finite, above 0 and ascending; `indices` uint8 [ceil(count * b / 8)] holds numbers of
    b = ceil(log2 K) bits one after another, the lowest bit first, the spare ones 0. (One magnitude is an `Add`.)

    Where several tasks can be had from one expert, `members` (int64 [K], bits 0 to T - 1) says for each magnitude whose mask it is in, and a task's
    values are those in its mask times its number in `scales` (float32 [T]): see `for_task`. K is then 1 or more; a magnitude may have several masks.
    """

    name: str
    levels: Ternary
    magnitudes: torch.Tensor
    indices: torch.Tensor
    members: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    _coded: list[NDArray[np.uint8]] = field(default_factory=list, init=False, repr=False)

    @property
    def coded(self) -> NDArray[np.uint8]:
        """The numbers as the file holds them; made once."""
        if not self._coded:
            self._coded.append(np.frombuffer(coded_numbers(self), np.uint8))
        return self._coded[0]

    @property
    def ternaries(self) -> tuple[Ternary, ...]:
        return (self.levels,)

    @property
    def exact(self) -> Exact:
        return ()

    @property
    def tasks(self) -> int:
        """How many tasks have masks; 0 where the values are for all."""
        return 0 if self.scales is None else self.scales.numel()

    @property
    def width(self) -> int:
        """Bits of an index."""
        return width_of(self.magnitudes.numel())

    def numbers(self, first: int, count: int) -> NDArray[np.uint16]:
        """The numbers of the magnitudes of non-zeros first..first + count - 1. Raises InvalidFile where one is beyond the last magnitude."""
        out = np.empty(count, np.uint16)
        if count and unpack(self.indices.numpy(), self.width, first, out) >= self.magnitudes.numel():
            raise InvalidFile(f"an index of {self.name} is beyond its {self.magnitudes.numel()} magnitudes")
        return out

    def batches(self) -> Iterator[tuple[NDArray[np.int64], F32]]:
        """Flat positions (int64, ascending) and values (float32), some at a time. Raises InvalidFile where the stream or an index is damaged."""
        magnitudes, done = self.magnitudes.numpy(), 0
        for codes in self.levels.batches():
            values: F32 = magnitudes[self.numbers(done, codes.size)]
            yield codes >> 1, np.where(codes & 1, -values, values)
            done += codes.size

    def dense(self) -> torch.Tensor:
        """float32 of the tensor's shape."""
        out = np.zeros(self.levels.size, np.float32)
        for positions, values in self.batches():
            out[positions] = values
        return torch.from_numpy(out.reshape(self.levels.shape))


def refuse_tasks(change: Palette) -> None:
    """Raise InvalidArgument for a palette that is worth another thing for each task."""
    if change.tasks:
        raise InvalidArgument(f"{change.name} has values for each of {change.tasks} tasks; choose one (head=..., sterna.with_head(expert, task))")


def for_task(changes: Sequence[Add | Palette], task: int) -> list[Add | Palette]:
    """What palettes with masks are for the task of that number: the non-zeros in its mask, worth magnitude * scale, rounded once to float32.

    Levels without masks (of tensors where no parent changed anything) stay as they are. All streams lie in one buffer.

    Raises InvalidFile where a stream is damaged.
    """
    from sterna.codings import PADDING, default_coding
    from sterna.expert.changes import Add, Ternary

    parts = [_part(change, task) for change in changes]
    data = np.frombuffer(b"".join([*(stream for stream, _, _ in parts), bytes(PADDING)]), np.uint8)
    made: list[Add | Palette] = []
    stop = 0
    for change, (stream, magnitudes, numbers) in zip(changes, parts, strict=True):
        start, stop = stop, stop + len(stream)
        scale = 1.0 if magnitudes.size > 1 else float(magnitudes[0]) if magnitudes.size else 0.0
        levels = Ternary.open(change.levels.shape, scale, default_coding(), data, start, stop)
        if magnitudes.size < 2:
            made.append(Add(change.name, levels))
        else:
            indices = torch.from_numpy(packed(numbers, width_of(magnitudes.size)))
            made.append(Palette(change.name, levels, torch.from_numpy(magnitudes), indices))
    return made


def _part(change: Add | Palette, task: int) -> tuple[bytes, F32, NDArray[np.uint16]]:
    """The stream, magnitudes and numbers of a change for one task."""
    from sterna.codings import default_coding
    from sterna.recoding import stream_of

    if not isinstance(change, Palette):
        magnitudes = np.array([change.levels.scale], np.float32)
        return stream_of(change.levels.codes(), change.levels.shape, default_coding()), magnitudes, np.zeros(change.levels.count, np.uint16)
    assert change.members is not None
    assert change.scales is not None
    values: F32 = (change.magnitudes.double() * change.scales[task].double()).float().numpy()
    inside = (change.members.numpy() >> task & 1).astype(bool) & (values > 0)
    magnitudes = np.unique(values[inside])
    renumbered = np.searchsorted(magnitudes, values).astype(np.uint16)
    codes, numbers, done = [np.empty(0, np.int64)], [np.empty(0, np.uint16)], 0
    for some in change.levels.batches():
        held = change.numbers(done, some.size)
        done += some.size
        codes.append(some[inside[held]])
        numbers.append(renumbered[held[inside[held]]])
    return stream_of(np.concatenate(codes), change.levels.shape, default_coding()), magnitudes, np.concatenate(numbers)


def palette_fault(change: Palette) -> str | None:
    """What is wrong with a palette, or None; indices beyond the magnitudes are found when they are read."""
    if fault := entries_fault(change.magnitudes, change.members, change.scales):
        return fault
    wanted = packed_bytes(change.levels.count, change.width)
    if change.indices.dtype != torch.uint8 or change.indices.shape != (wanted,):
        return f"has indices {change.indices.dtype} {tuple(change.indices.shape)}; expected {wanted} bytes for {change.levels.count} non-zeros"
    spare = 8 * wanted - change.levels.count * change.width
    if wanted and int(change.indices[-1]) >> (8 - spare):
        return "has indices with bits set beyond the last"
    if change.levels.scale != 1:
        return f"has levels of scale {change.levels.scale}; expected 1"
    return None


def entries_fault(values: torch.Tensor, members: torch.Tensor | None, scales: torch.Tensor | None) -> str | None:
    """What is wrong with a palette's magnitudes, masks and scales, or None."""
    many, least = values.numel(), 2 if scales is None else 1
    if values.dtype != torch.float32 or values.dim() != 1 or not least <= many <= MOST:
        return f"has magnitudes {values.dtype} {tuple(values.shape)}; expected {least} to {MOST} in float32"
    plain = values.numpy()
    if not (np.isfinite(plain).all() and plain[0] > 0 and (np.diff(plain) >= 0).all()):
        return "has magnitudes that are not finite, above 0 and ascending"
    if members is None or scales is None:
        return None if members is scales and (np.diff(plain) > 0).all() else "has magnitudes that are not finite, above 0 and ascending"
    if scales.dtype != torch.float32 or scales.dim() != 1 or not 1 <= scales.numel() <= MOST_TASKS:
        return f"has scales {scales.dtype} {tuple(scales.shape)}; expected those of 1 to {MOST_TASKS} tasks in float32"
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        return "has scales of tasks that are not finite, 0 or more"
    if float(plain[-1]) * float(scales.max()) > float(np.finfo(np.float32).max):
        return "has values of tasks that float32 cannot hold"
    if members.dtype != torch.int64 or members.shape != values.shape or not bool(((members >= 0) & (members < 1 << scales.numel())).all()):
        return f"has masks {members.dtype} {tuple(members.shape)}; expected {many} of {scales.numel()} tasks"
    twice = (np.diff(plain) == 0) & (np.diff(members.numpy()) <= 0)
    return "has magnitudes of which two have one mask, or masks that are not ascending" if twice.any() else None


def coded_numbers(change: Palette) -> bytes:
    """The numbers of a palette's magnitudes as the file holds them: frequencies, then block by block; nothing where there is nothing to tell."""
    if not change.levels.count or change.magnitudes.numel() == 1:
        return b""
    total = change.levels.count
    counts = np.zeros(change.magnitudes.numel(), np.int64)
    starts = range(0, total, rans.BLOCK)
    for first in starts:
        counts += np.bincount(change.numbers(first, min(rans.BLOCK, total - first)), minlength=counts.size)
    frequency = rans.frequencies(counts)
    start = np.cumsum(frequency) - frequency
    out = bytearray()
    for value in frequency.tolist():
        _put(out, value)
    room = np.empty(3 * rans.BLOCK, np.uint8)
    for first in starts:
        at = int(rans.encode(change.numbers(first, min(rans.BLOCK, total - first)), frequency, start, room))
        _put(out, room.size - at)
        out += room[at:].tobytes()
    return bytes(out)


def decoded_numbers(data: NDArray[np.uint8], first: int, stop: int, count: int, many: int, name: str) -> torch.Tensor:
    """A palette's `indices` from the bytes data[first:stop] of its numbers. Raises InvalidFile where they are not well-formed."""
    if not count or many == 1:
        if stop > first:
            raise InvalidFile(f"the numbers of {name} have {stop - first} bytes; expected none for {count} non-zeros of {many} magnitudes")
        return torch.zeros(packed_bytes(count, width_of(many)), dtype=torch.uint8)
    if stop - first < many:  # before a list is made for them
        raise InvalidFile(f"the numbers of {name} are not well-formed")
    frequency = np.empty(many, np.int64)
    at = first
    for j in range(many):
        frequency[j], at = _varint(data, at, stop, name)
    if int(frequency.sum()) != rans.TOTAL:
        raise InvalidFile(f"the frequencies of {name} add up to {int(frequency.sum())}; expected {rans.TOTAL}")
    start, width = np.cumsum(frequency) - frequency, width_of(many)
    rans.fill(frequency, _scratch.slots)
    out = np.zeros(packed_bytes(count, width), np.uint8)
    for begin in range(0, count, rans.BLOCK):
        length, at = _varint(data, at, stop, name)
        part = _scratch.numbers[: min(rans.BLOCK, count - begin)]
        if length > stop - at or not rans.decode(data, at, at + length, frequency, start, _scratch.slots, part):
            raise InvalidFile(f"the numbers of {name} are not well-formed")
        pack(part, width, begin * width, out)
        at += length
    if at != stop:
        raise InvalidFile(f"the numbers of {name} are {stop - at} bytes longer than their blocks")
    return torch.from_numpy(out)


def _varint(data: NDArray[np.uint8], at: int, stop: int, name: str) -> tuple[int, int]:
    """A varint of at most 3 bytes, at most 2^20, and the place after it."""
    value = 0
    for shift in (0, 7, 14):
        if at >= stop:
            break
        byte = int(data[at])
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise InvalidFile(f"the numbers of {name} are not well-formed")


def _put(out: bytearray, value: int) -> None:
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
