"""Readers and swaps exclude each other: any number of readers, or one writer; a waiting writer goes before new readers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from sterna.errors import PatchError


class ReadWriteLock:
    """A thread that reads may read again inside; a thread that reads may not write (it would wait for itself)."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: dict[int, int] = {}
        self._writer: int | None = None
        self._waiting = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._condition:
            if me not in self._readers and me != self._writer:
                self._condition.wait_for(lambda: self._writer is None and not self._waiting)
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._condition.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._condition:
            if me in self._readers or me == self._writer:
                raise PatchError("a swap or detach inside patch.reading(), in the same thread, would wait for itself; leave the block first")
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: self._writer is None and not self._readers)
            finally:
                self._waiting -= 1
                self._condition.notify_all()
            self._writer = me
        try:
            yield
        finally:
            with self._condition:
                self._writer = None
                self._condition.notify_all()
