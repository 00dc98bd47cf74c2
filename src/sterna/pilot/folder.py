"""The run folder of a pilot: each part's result, written whole when it is done, so that a killed pilot goes on after the last one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sterna.errors import CannotWrite, InvalidArgument
from sterna.training.runs import differing
from sterna.writing import whole_file

FACTS = "pilot.json"
FORMAT = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PilotFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def facts(self) -> Path:
        return self.path / FACTS

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def numbers(self) -> Path:
        return self.path / "report.json"

    def task(self, place: int, name: str) -> Path:
        """A task's own folder: numbered, since its name may hold anything."""
        return self.path / f"{place + 1:02d}-{slug(name)}"

    def expert(self, place: int, name: str) -> Path:
        """The chosen expert of a task."""
        return self.path / f"{slug(name)}-{place + 1:02d}.safetensors"


def slug(name: str) -> str:
    """Letters, digits, dots and dashes of a name, for a file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60] or "task"


def begin(folder: PilotFolder, facts: Mapping[str, Any], restart: bool) -> None:
    """Make the folder ready for a pilot of these facts, or go on with one.

    Raises InvalidArgument where it holds something else or another pilot, CannotWrite where it cannot be written.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise InvalidArgument(f"{path} is a file; expected a folder, or a new name")
    if path.is_dir() and any(path.iterdir()):
        if not folder.facts.is_file():
            raise InvalidArgument(f"{path} is a folder of something else (it has no {FACTS}); name another run folder")
        before = read(folder.facts)
        if not isinstance(before, dict) or before.get("format") != FORMAT:
            raise InvalidArgument(f"{folder.facts} cannot be read; name another run folder")
        changed = [name for name, _, _ in differing(before, dict(facts))]
        if changed and not restart and any(found.is_file() for found in path.rglob("*") if found != folder.facts):
            shown = ", ".join(changed[:6]) + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")
            raise InvalidArgument(f"{path} holds another pilot ({shown} differ); start over with --restart, or name another run folder")
        if restart:
            _clear(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be made: {error.strerror or error}; name another run folder") from error
    write(folder.facts, facts)


def _clear(folder: PilotFolder) -> None:
    """Remove what the pilot kept, but not its trainings, which its plan does not change."""
    for found in (*folder.path.rglob("*.json"), *folder.path.glob("*.safetensors")):
        if not any(part in ("training", "evaluations") for part in found.relative_to(folder.path).parts):
            found.unlink(missing_ok=True)


def write(path: Path, value: Any) -> None:
    """Plain data, or a dataclass, as JSON: whole or not at all. Raises CannotWrite."""
    plain = value if isinstance(value, dict | list) else dict(value) if isinstance(value, Mapping) else asdict(value)
    with whole_file(path) as file:
        file.write((json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read(path: Path) -> Any:
    """The JSON in a file; None where there is none, or no whole one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def once(path: Path, kind: type[T], make: Callable[[], T]) -> T:
    """What an earlier part of the pilot left in a file, else what `make` gives, which is left there."""
    from pydantic import TypeAdapter, ValidationError

    if (found := read(path)) is not None:
        try:
            return TypeAdapter(kind).validate_python(found)
        except ValidationError:
            pass  # of another version: made again
    result = make()
    write(path, result)
    return result
