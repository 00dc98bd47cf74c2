"""Files and folders that appear whole or not at all: written under a temporary name beside their target, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sterna.errors import CannotWrite


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and leaves nothing when it does not. Its mode follows the umask."""
    target = Path(path)
    temporary = _beside(target)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise CannotWrite(f"{target} could not be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends well. `path` must not exist, or be an empty folder."""
    target = Path(path)
    refuse_existing(target)
    temporary = _beside(target)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise CannotWrite(f"{target} could not be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Raise CannotWrite where a folder that is to be written holds something already."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CannotWrite(f"{target} exists already and is not empty; name a new folder")


def _beside(target: Path) -> Path:
    if not target.name or not target.parent.is_dir():
        raise CannotWrite(f"{target.parent} is not a folder; create it first")
    return target.with_name(f".sterna-{secrets.token_hex(6)}.part")  # not longer than a name may be


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
