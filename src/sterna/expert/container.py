"""A safetensors file as bytes: a strict reader that trusts nothing, and a writer whose output depends on its input alone.

The safetensors library orders metadata keys at random and lets repeated keys pass, so both ends are written out here; its own reader opens our files.
The last tensor holds SHA-256 of every byte before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from sterna.codings import PADDING, U8
from sterna.errors import InvalidArgument, InvalidFile, NotFound
from sterna.expert.facts import parse_json

T = TypeVar("T")

KEY = "sterna"
"""The one metadata key."""
CHECKSUM = "sterna.sha256"
HEADER_LIMIT = 4 << 20
"""Bytes of the header at most; an expert's is a few kilobytes. Parsing JSON takes up to some 25 times its size in memory."""
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file: its safetensors dtype, shape, and place in the file's bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Container:
    """`data` holds the whole file and PADDING more bytes; `digest` is SHA-256 of the file."""

    data: U8
    metadata: str
    entries: dict[str, Entry]
    digest: bytes


def read(path: str | os.PathLike[str]) -> Container:
    """Read a file whole and check its structure and checksum; what is no expert is refused before more than its header is read.

    Raises NotFound or InvalidFile.
    """
    name = os.fspath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its other end
        raise NotFound(f"{name} is a {'folder' if os.path.isdir(path) else 'pipe or device'}; expected an expert file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _refuse_header(file.read(9), size, name)
            file.seek(8)
            header = file.read(length)
            layout = _prefixed(name, lambda: _layout(header, size))
            file.seek(0)
            data = np.zeros(size + PADDING, np.uint8)
            got = file.readinto(memoryview(data)[:size])
    except FileNotFoundError:
        raise NotFound(f"{name} does not exist") from None
    except OSError as error:
        raise NotFound(f"{name} cannot be read: {error.strerror}") from error
    except MemoryError:
        raise InvalidFile(f"{name} has {size} bytes, more than there is memory for") from None
    if got != size or data[8 : 8 + length].tobytes() != header:
        raise InvalidFile(f"{name} changed while it was read")
    return _prefixed(name, lambda: _verified(data, *layout))


def is_expert(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a safetensors file with an expert's metadata, by its header alone."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(length)).get("__metadata__") if length <= HEADER_LIMIT else None
    except (OSError, ValueError, RecursionError, AttributeError):
        return False
    return isinstance(metadata, dict) and KEY in metadata


def _prefixed(name: str, step: Callable[[], T]) -> T:
    """The step's result; the file's name goes before the message where it raises InvalidFile."""
    try:
        return step()
    except InvalidFile as error:
        raise InvalidFile(f"{name}: {error}") from error


def _refuse_header(head: bytes, size: int, name: str) -> int:
    """Bytes of the header, once its first 9 bytes and the file's size make sense."""
    length = int.from_bytes(head[:8], "little")
    header = head[8:9] == b"{" and length <= HEADER_LIMIT  # a header of 640 bytes begins as a pickle does
    if not header and head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise InvalidFile(f"{name} is a pickle (or a zip of one), which can run code when opened; an expert is a safetensors file")
    if size == 0:
        raise InvalidFile(f"{name} is empty")
    if head[8:9] != b"{":
        raise InvalidFile(f"{name} is not a safetensors file: it does not begin with a header")
    if length > HEADER_LIMIT:
        raise InvalidFile(f"{name} states a header of {length} bytes; an expert's has at most {HEADER_LIMIT}")
    if length > size - 8:
        raise InvalidFile(f"{name} is cut short: it has {size} bytes, its header alone {length}")
    return length


def parse(data: U8) -> Container:
    """Check the safetensors structure of `data` (the file, then PADDING bytes), and the checksum."""
    size = data.size - PADDING
    length = _refuse_header(data[: min(9, size)].tobytes(), size, "the file")
    return _verified(data, *_layout(data[8 : 8 + length].tobytes(), size))


def _layout(text: bytes, size: int) -> tuple[str, dict[str, Entry]]:
    """The metadata's text and the tensors' places, from the header of a file of `size` bytes; they fill it without a hole."""
    header = parse_json(text, "the header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {KEY} or not isinstance(metadata[KEY], str):
        raise InvalidFile(f"a safetensors file, but not an expert: expected metadata with the one key {KEY!r}")
    at = 8 + len(text)
    entries = {name: _entry(name, value, at) for name, value in header.items()}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise InvalidFile(f"the header's tensors leave a hole or overlap at {name[:80]!r}")
        at = entry.stop
    if at != size:
        raise InvalidFile(f"the file has {size} bytes, its header tells of {at}: it is cut short or has something appended")
    last = entries.get(CHECKSUM)
    if last is None or (last.dtype, last.shape, last.stop) != ("U8", (32,), size):
        raise InvalidFile(f"the file does not end with the tensor {CHECKSUM!r} of 32 bytes")
    return metadata[KEY], entries


def _verified(data: U8, metadata: str, entries: dict[str, Entry]) -> Container:
    """The container, once its checksum holds."""
    last = entries[CHECKSUM]
    sha = hashlib.sha256(memoryview(data)[: last.start])
    if sha.digest() != data[last.start : last.stop].tobytes():
        raise InvalidFile("the checksum does not match: the file is damaged")
    sha.update(memoryview(data)[last.start : last.stop])
    return Container(data, metadata, entries, sha.digest())


def _entry(name: str, value: Any, origin: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InvalidFile(f"the header's entry {name[:80]!r} is not a tensor")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        shown = repr(dtype[:80]) if isinstance(dtype, str) else f"a {type(dtype).__name__}"
        raise InvalidFile(f"the header's tensor {name[:80]!r} has dtype {shown}; known: {', '.join(ITEM_BYTES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise InvalidFile(f"the header's tensor {name[:80]!r} has a shape or offsets that are not lists of at most 8 counts below 2^48")
    if math.prod(max(n, 1) for n in shape) > 1 << 48:  # an empty tensor's other axes count too: strides are made of them
        raise InvalidFile(f"the header's tensor {name[:80]!r} has a shape {shape} of more than 2^48 entries")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise InvalidFile(f"the header's tensor {name[:80]!r} of shape {shape} does not fill its bytes {offsets}")
    return Entry(dtype, tuple(shape), origin + offsets[0], origin + offsets[1])


Part = tuple[str, str, tuple[int, ...], Callable[[], Iterator[Any]]]
"""A tensor to write: name, safetensors dtype, shape, and its bytes in pieces."""


def pieces(metadata: str, parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    """An expert file's bytes, piece by piece: header, the parts in their order, checksum."""
    sha = hashlib.sha256()
    checksum: Part = (CHECKSUM, "U8", (32,), lambda: iter([sha.digest()]))
    for i, piece in enumerate(safetensors_pieces({KEY: metadata}, [*parts, checksum])):
        if i == 0 and len(piece) - 8 > HEADER_LIMIT:
            raise InvalidArgument(f"the expert's header takes {len(piece) - 8} bytes; at most {HEADER_LIMIT} fit: it has {len(parts)} tensors")
        yield piece  # the checksum is asked for last, after all that it covers
        sha.update(piece)


def safetensors_pieces(metadata: Mapping[str, str], parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file with the parts in their order; each part's content is asked for when its turn comes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape, _ in parts:
        length = math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, _, _, content in parts:
        yield from content()
