"""A tuned tensor to the bit from its base, and back: the coding of bits over torch tensors, band by band, on several threads."""

from __future__ import annotations

import hashlib
import math
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sterna.codings import PADDING, U8, lossless
from sterna.codings.lossless import Band, Words
from sterna.compeft import no_room
from sterna.errors import InvalidFile
from sterna.expert.changes import DIGEST, Lossless
from sterna.progress import Progress
from sterna.streaming import ordered

_LAYOUT: dict[torch.dtype, tuple[torch.dtype, type[Any], int]] = {
    torch.float32: (torch.int32, np.uint32, 0x7FC00000),
    torch.bfloat16: (torch.int16, np.uint16, 0x7FC0),
    torch.float16: (torch.int16, np.uint16, 0x7E00),
}
"""torch's integers of a float's size, numpy's words, and the pattern of NaN."""


@dataclass(frozen=True, slots=True)
class Both:
    """A tensor of the base, and the tuned one, of which the first entries count where it has more: float32, bfloat16 or float16 each."""

    name: str
    shape: tuple[int, ...]
    base: torch.Tensor
    tuned: torch.Tensor


def patterns(values: torch.Tensor, dtype: torch.dtype) -> Words:
    """The bit patterns of the values in `dtype`, flat, in memory of their own.

    Values of another dtype are rounded to nearest even, and NaN becomes the one quiet NaN: its bits would depend on the machine.
    """
    integers, words, nan = _LAYOUT[dtype]
    flat = values.detach().reshape(-1).cpu()
    same = flat.dtype == dtype
    found: Words = (flat if same else flat.float().to(dtype)).view(integers).numpy().view(words).copy()
    if not same:
        found[torch.isnan(flat).numpy()] = nan
    return found


def coded(pairs: Sequence[Both], progress: Progress) -> list[Lossless]:
    """The changes that make the tuned tensors of the base's; none where the two are equal, dtype included.

    Streams go to a temporary file that has no name. Raises CannotWrite where the disk is full.
    """
    total, done = sum(math.prod(pair.shape) for pair in pairs), 0
    placed: list[tuple[Both, bytes, int, int]] = []
    with tempfile.TemporaryFile() as file:
        results = ordered(_encoded, [(pair, *extent) for pair in pairs for extent in lossless.extents(pair.shape)])
        try:
            for pair in pairs:
                sha, start, equal = hashlib.sha256(), file.tell(), pair.base.dtype == pair.tuned.dtype
                for _ in lossless.extents(pair.shape):
                    (_, first, last), (record, words) = next(results)
                    sha.update(memoryview(words).cast("B"))
                    equal &= record == b"\0"
                    file.write(record)
                    done += last - first
                    progress("compress", done, total, "parameters")
                if equal:
                    file.seek(start)
                    file.truncate()
                else:
                    placed.append((pair, sha.digest()[:DIGEST], start, file.tell()))
            file.write(bytes(PADDING))
            file.flush()
        except OSError as error:
            raise no_room(error) from error
        data: U8 = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return [Lossless.open(pair.name, pair.shape, pair.tuned.dtype, digest, data, start, stop) for pair, digest, start, stop in placed]


def rebuilt(changes: Sequence[tuple[Lossless, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """The tuned tensors, one after another, in CPU memory and their own dtype; each change comes with the base's tensor, on any device.

    A base tensor is not read any more once its tuned one was given. Raises InvalidFile where a stream does not decode to what its digest says.
    """
    bands = [lossless.bands(change.data, change.start, change.stop, change.shape) for change, _ in changes]
    results = ordered(_decoded, [(*each, band) for each, parts in zip(changes, bands, strict=True) for band in parts])
    for (change, _), parts in zip(changes, bands, strict=True):
        integers, words, _ = _LAYOUT[change.dtype]
        whole = np.empty(math.prod(change.shape), words)
        sha = hashlib.sha256()
        for band in parts:
            _, whole[band.start : band.stop] = next(results)
            sha.update(memoryview(whole[band.start : band.stop]).cast("B"))
        if sha.digest()[:DIGEST] != change.digest:
            raise InvalidFile(f"{change.name} does not become what the expert says of it: the file is damaged, or made for other values of the base")
        yield torch.from_numpy(whole.view(np.int16 if integers is torch.int16 else np.int32)).view(change.dtype).reshape(change.shape)


def _encoded(job: tuple[Both, int, int]) -> tuple[bytes, Words]:
    """The record of a band, and its tuned patterns."""
    pair, start, stop = job
    base, tuned = (patterns(side.detach().reshape(-1)[start:stop], pair.tuned.dtype) for side in (pair.base, pair.tuned))
    return lossless.encode(base, tuned, pair.shape), tuned


def _decoded(job: tuple[Lossless, torch.Tensor, Band]) -> Words:
    change, base, band = job
    words = patterns(base.detach().reshape(-1)[band.start : band.stop], change.dtype)
    lossless.decode(change.data, band, words, change.shape)
    return words
