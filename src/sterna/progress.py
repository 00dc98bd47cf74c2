"""How long work reports itself: a callable that is told a step's name, how much is done, how much there is, and in which unit."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def __call__(self, step: str, done: int, total: int, unit: str) -> None: ...


def silent(step: str, done: int, total: int, unit: str) -> None:
    """The default: say nothing."""
