"""Checkpoints of a Trainer that count only when they are whole: the last file that comes into one says what the others are."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sterna.writing import whole_file

MARK = "complete.json"
"""The file that is written last into a checkpoint; one without it, or whose files have other sizes, was cut short and does not count."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its folder, the steps behind it, and the seconds that they took where they were told."""

    folder: Path
    step: int
    seconds: float


def mark(folder: Path, seconds: float = 0.0) -> None:
    """Sync every file of a checkpoint, then write the mark that makes it count."""
    sizes = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    with whole_file(folder / MARK) as file:
        file.write(json.dumps({"seconds": round(seconds, 3), "files": sizes}).encode())


def checkpoints(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """The whole checkpoints in a Trainer's output folder, first steps first."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        seconds, step = _seconds(path), path.name.removeprefix("checkpoint-")
        if seconds is not None and step.isdigit():
            found.append(Checkpoint(path, int(step), seconds))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def last_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The last whole checkpoint in a Trainer's output folder, or None."""
    return next(reversed(checkpoints(folder)), None)


def remove_older(folder: str | os.PathLike[str], keep: int, best: str | None) -> None:
    """Remove all checkpoints but the last `keep` whole ones and the best; call it when the newest has its mark."""
    kept = {checkpoint.folder.resolve() for checkpoint in checkpoints(folder)[-keep:]} | ({Path(best).resolve()} if best else set())
    for path in Path(folder).glob("checkpoint-*"):
        if path.resolve() not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _seconds(folder: Path) -> float | None:
    """The seconds in a checkpoint's mark, if the mark is there and what it names is as long as it says."""
    try:
        facts = json.loads((folder / MARK).read_bytes())
        if all((folder / name).stat().st_size == size for name, size in facts["files"].items()):
            return float(facts["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
