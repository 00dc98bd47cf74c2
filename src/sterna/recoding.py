"""The same levels under another coding: other bytes, the same content."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sterna.codings import CHUNK, ENTRIES_A_BYTE, I64, PADDING, AnyCoding, by_name, default_coding
from sterna.expert.changes import Change, Ternary
from sterna.expert.expert import Expert
from sterna.progress import Progress, silent
from sterna.streaming import ordered


def recode(expert: Expert | str | os.PathLike[str], coding: str, *, progress: Progress = silent) -> Expert:
    """The expert (or its file) under the coding of that name, "small" or "fast": `content_digest` stays, `digest` and sizes change.

    Tensors are coded on torch's number of threads. Raises InvalidArgument for an unknown coding, NotFound or InvalidFile for a file.
    """
    chosen = by_name(coding)
    if not isinstance(expert, Expert):
        from sterna.expert.file import load

        expert = load(expert)
    coded = iter(recoded(list(expert.ternaries), chosen, progress))
    changes = tuple(_with(change, [next(coded) for _ in change.ternaries]) for change in expert.changes)
    return replace(expert, changes=changes, file_digest=None, file_bytes=None)


def recoded(ternaries: Sequence[Ternary], coding: AnyCoding, progress: Progress = silent) -> list[Ternary]:
    """The tensors under a coding, in one new buffer. Raises InvalidFile where a stream is damaged."""
    total, done = sum(ternary.size for ternary in ternaries), 0
    streams: list[bytes] = []
    for ternary, stream in ordered(lambda ternary: stream_of(ternary.codes(), ternary.shape, coding), ternaries):
        streams.append(stream)
        done += ternary.size
        progress("recode", done, total, "parameters")
    if coding.sequential is True:
        _pad(streams, ternaries)
    data = np.frombuffer(b"".join([*streams, bytes(PADDING)]), np.uint8)
    stops = np.cumsum([len(stream) for stream in streams], dtype=np.int64).tolist()
    return [
        Ternary.open(ternary.shape, ternary.scale, coding, data, stop - len(stream), stop)
        for ternary, stream, stop in zip(ternaries, streams, stops, strict=True)
    ]


def blockwise(ternaries: Sequence[Ternary]) -> list[Ternary]:
    """The tensors under the default coding, which the kernels of attach read: as they are, or coded anew."""
    coding = default_coding()
    if any(ternary.coding is not coding for ternary in ternaries):
        return recoded(ternaries, coding)
    return list(ternaries)


def stream_of(codes: I64, shape: tuple[int, ...], coding: AnyCoding) -> bytes:
    """The stream of a whole tensor under a coding. `codes`, int64: flat index << 1 | negative, ascending."""
    if coding.sequential is True:
        return coding.pack(codes, shape)
    entries = math.prod(shape)
    starts = range(0, entries, CHUNK)
    cuts = [*np.searchsorted(codes, [start << 1 for start in starts]).tolist(), codes.size]
    records = (
        coding.encode((codes[first:last] - (start << 1)).astype(np.uint32), min(CHUNK, entries - start))
        for start, first, last in zip(starts, cuts, cuts[1:], strict=False)
    )
    return b"".join(records)


def _pad(streams: list[bytes], ternaries: Sequence[Ternary]) -> None:
    """Zeros after the last stream that holds non-zeros, where the bytes would not justify the time to decode them."""
    held = [number for number, ternary in enumerate(ternaries) if ternary.count]
    needed = -(-sum(ternaries[number].size for number in held) // ENTRIES_A_BYTE)
    if held:
        streams[held[-1]] += bytes(max(needed - sum(len(streams[number]) for number in held), 0))


def _with(change: Change, ternaries: list[Ternary]) -> Change:
    """The change with other ternary tensors in the places of its own."""
    if not ternaries:
        return change
    fields = [name for name in type(change).__slots__ if isinstance(getattr(change, name), Ternary)]
    return replace(change, **dict(zip(fields, ternaries, strict=True)))  # type: ignore[arg-type]
