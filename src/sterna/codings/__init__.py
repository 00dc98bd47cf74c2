"""Codings: how the non-zeros of one ternary tensor become bytes and back.

A block coding cuts a tensor into blocks that decode alone, a sequential one codes it as a whole. Everything outside this folder sees only
`Coding`, `Blocks`, `Sequential` and *codes*: a uint32 a non-zero, `position in its block << 1 | negative`, positions ascending.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sterna.errors import InvalidArgument, InvalidFile

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

CHUNK = 1 << 20
"""Entries that are encoded at a time; every block lies inside one chunk."""

DEFAULT = "fast"
"""The name of `default_coding`."""

ENTRIES_A_BYTE = 2048
"""A file has at least a byte for so many entries of sequential codings, so that the time to decode them is bounded by its size."""

PADDING = 16
"""Bytes that must follow a stream in memory, so that a kernel may load a whole word at its end."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The parts of one stream (or of many, concatenated) that decode alone: a column of int64 for each fact, a row a block that holds non-zeros."""

    start: I64  # first entry, counted in the tensor
    size: I64  # entries
    count: I64  # non-zeros
    offset: I64  # first byte, counted in the buffer that holds the stream
    length: I64  # bytes
    parameter: I64  # the coding's own

    def __len__(self) -> int:
        return int(self.start.size)


NO_BLOCKS = Blocks(*(np.empty(0, np.int64) for _ in Blocks.__slots__))


class Coding(Protocol):
    """One way to store ternary tensors. A stream is the records of its tensor's chunks, one after another."""

    name: str
    number: int  # in the file's table; never reused
    sequential: Literal[False]

    def encode(self, codes: U32, entries: int) -> bytes:
        """The record of one chunk of `entries` (CHUNK, or what is left at the end); `codes` count positions from the chunk's start."""

    def blocks(self, data: U8, start: int, stop: int, entries: int) -> Blocks:
        """Read and check the block indices of the stream data[start:stop] of a tensor with `entries` entries.

        Raises InvalidFile unless the blocks fill the stream and their counts fit. Memory stays in proportion to the stream's bytes.
        """

    def decode(self, data: U8, blocks: Blocks, first: int, last: int, codes: U32) -> None:
        """Write the codes of blocks[first:last] one after another; `codes` has room for 8 more. Raises InvalidFile where one leaves its bounds."""


class Sequential(Protocol):
    """A coding that can only be read from a tensor's beginning to its end: smaller and slower. In memory its tensors become a block coding's."""

    name: str
    number: int
    sequential: Literal[True]  # tells the two apart; isinstance takes ten microseconds with a protocol

    def pack(self, codes: I64, shape: tuple[int, ...]) -> bytes:
        """The stream of a whole tensor. `codes`, int64: flat index << 1 | negative, ascending."""

    def count(self, data: U8, start: int, stop: int, shape: tuple[int, ...]) -> int:
        """Non-zeros of the stream data[start:stop]. Raises InvalidFile where the tensor cannot have so many, or the bytes do not justify them."""

    def unpack(self, data: U8, start: int, stop: int, shape: tuple[int, ...]) -> I64:
        """The codes. Raises InvalidFile where the stream does not decode; memory stays in proportion to its bytes, time to the tensor's entries."""


AnyCoding = Coding | Sequential

_REGISTERED: dict[str, AnyCoding] = {}

C = TypeVar("C", Coding, Sequential)


def register(coding: C) -> C:
    """Make a coding known by its name and number."""
    if any(coding.name == other.name or coding.number == other.number for other in _REGISTERED.values()):
        raise ValueError(f"a coding named {coding.name!r} or numbered {coding.number} is registered already")
    _REGISTERED[coding.name] = coding
    return coding


def by_name(name: str) -> AnyCoding:
    """The coding of that name; InvalidArgument with the known names otherwise."""
    _load()
    try:
        return _REGISTERED[name]
    except KeyError:
        raise InvalidArgument(f"no coding named {name!r}; known: {', '.join(sorted(_REGISTERED))}") from None


def default_coding() -> Coding:
    """The block coding that experts are written with, and that any other becomes in memory before it is attached."""
    coding = by_name(DEFAULT)
    assert coding.sequential is False
    return coding


def by_number(number: int) -> AnyCoding:
    """The coding that a file names by number; InvalidFile for one that this version does not know."""
    _load()
    for coding in _REGISTERED.values():
        if coding.number == number:
            return coding
    known = ", ".join(f"{c.number} ({c.name})" for c in _REGISTERED.values())
    raise InvalidFile(f"the file uses coding {number}, which this version of Sterna does not know (known: {known}); a newer Sterna may read it")


def _load() -> None:
    from sterna.codings import fast, rice, small  # noqa: F401  (they register themselves)
