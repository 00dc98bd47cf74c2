"""Memory that ends at a page which nobody may touch: a kernel that reads one byte too far ends the process instead of going unnoticed."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from sterna.codings import PADDING, U8
from sterna.expert.container import parse
from sterna.expert.expert import Expert
from sterna.expert.file import from_container


class Guarded:
    """Room for files of up to `capacity` bytes; each is laid against the guard page, over the one before it."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        pages = -(-(capacity + PADDING) // mmap.PAGESIZE)
        self._map = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self._room = np.frombuffer(self._map, np.uint8)[: pages * mmap.PAGESIZE]
        guard = ctypes.c_void_p(self._room.ctypes.data + self._room.size)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")

    def lay(self, file: bytes) -> U8:
        """The file's bytes and their padding, right before the guard. They are valid until the next call."""
        data = self._room[self._room.size - len(file) - PADDING :]
        data[: len(file)] = np.frombuffer(file, np.uint8)
        data[len(file) :] = 0
        return data

    def expert(self, file: bytes) -> Expert:
        """The expert of a file's bytes, as `from_bytes` makes it, valid until the next call."""
        return from_container(parse(self.lay(file)))
