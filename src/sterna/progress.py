"""How long work reports itself: a callable that is told a step's name, how much is done, how much there is, in which unit, and perhaps a note."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def __call__(self, step: str, done: int, total: int, unit: str, note: str = "") -> None: ...


def silent(step: str, done: int, total: int, unit: str, note: str = "") -> None:
    """The default: say nothing."""
