"""What can go wrong with a training as a whole: a config with faults, and an interruption."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from sterna.errors import SternaError


class InvalidConfig(SternaError, ValueError):
    """A config with faults: all of them, one a line, each with its field, its value and what was expected."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Interrupted(SternaError, RuntimeError):
    """A training that was asked to stop. The message says how to go on."""


@dataclass(frozen=True, slots=True)
class Faults:
    """A list of faults that grows while a config is checked, so that all are told at once."""

    found: list[str] = field(default_factory=list)

    def add(self, where: str, message: str) -> None:
        fault = f"{where}: {' '.join(message.split())}"
        if fault not in self.found:
            self.found.append(fault)

    @contextlib.contextmanager
    def at(self, where: str) -> Iterator[None]:
        """An error of ours inside the block is a fault of that field, and the block ends there."""
        try:
            yield
        except SternaError as error:
            self.add(where, str(error))

    def concern(self, where: str) -> bool:
        """Whether the field, or something inside it, has a fault already."""
        return any(fault.startswith((f"{where}:", f"{where}.")) for fault in self.found)

    def stop(self) -> None:
        """Raise InvalidConfig if there is any fault."""
        if self.found:
            raise InvalidConfig(tuple(self.found))
