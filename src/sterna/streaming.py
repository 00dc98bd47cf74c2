"""Reading a long vector chunk by chunk, on several threads, in order: what every pass over a task vector or a base is made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from sterna.codings import CHUNK, I64
from sterna.taskvector import F32, Piece

S = TypeVar("S")
T = TypeVar("T")

_MOST_THREADS = 8
"""Each works on chunks of its own, some 80 MB with what the allocator keeps: many more would break the bound on memory."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Flat entries start..stop-1 of a piece."""

    piece: Piece
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> F32:
        """The entries, in this thread's own memory until it reads the next chunk."""
        out = scratch.tau[: self.size]
        self.piece.read(self.start, self.stop, out)
        return out


def chunks_of(piece: Piece) -> list[Chunk]:
    return [Chunk(piece, start, min(start + CHUNK, piece.size)) for start in range(0, piece.size, CHUNK)]


class _Scratch(threading.local):
    """Memory that each thread fills again and again: fresh pages for every chunk would cost more than the work on them."""

    def __init__(self) -> None:
        self.tau: F32 = np.empty(CHUNK, np.float32)
        self.codes = np.empty(CHUNK, np.uint32)


scratch = _Scratch()


class Histogram:
    """Counts that each thread keeps for itself until the total is asked for."""

    def __init__(self, bins: int) -> None:
        self._bins = bins
        self._of_thread: dict[int, I64] = {}

    def mine(self) -> I64:
        me = threading.get_ident()
        if me not in self._of_thread:
            self._of_thread[me] = np.zeros(self._bins, np.int64)
        return self._of_thread[me]

    def total(self) -> I64:
        return sum(self._of_thread.values(), start=np.zeros(self._bins, np.int64))


def ordered(work: Callable[[S], T], chunks: Sequence[S]) -> Iterator[tuple[S, T]]:
    """(chunk, work(chunk)) in order, by torch's number of threads, with no more than a few results waiting."""
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    if threads == 1 or len(chunks) < 2:
        for chunk in chunks:
            yield chunk, work(chunk)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead = 2 * threads
        waiting = [pool.submit(work, chunk) for chunk in chunks[:ahead]]
        for i, chunk in enumerate(chunks):
            result = waiting.pop(0).result()
            if i + ahead < len(chunks):
                waiting.append(pool.submit(work, chunks[i + ahead]))
            yield chunk, result
