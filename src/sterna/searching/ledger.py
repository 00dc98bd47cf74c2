"""Evaluations that outlast the process: one small file each, under a name that says all that determines its value."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sterna.errors import CannotWrite
from sterna.writing import whole_file

FOLDER = "evaluations"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Ledger:
    """Scores kept in `folder`/evaluations (None: nowhere). `about` determines them all: digests of base, tuned model and rows, and the metric."""

    folder: Path | None
    about: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> Ledger:
        """Check that the folder can be written, or made; it is made for the first score. Raises CannotWrite."""
        if folder is None:
            return cls(None, about)
        path = Path(folder).expanduser()
        try:
            there = path / FOLDER
            while not there.exists():
                there = there.parent
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise CannotWrite(f"{path} cannot be written: {error.strerror or error}; name another run folder") from error
        return cls(path, about)

    def get(self, what: object) -> float | None:
        """The score of a setting (or "base", "tuned"), if it is there."""
        path = self._path(what)
        if path is None:
            return None
        try:
            score = json.loads(path.read_text(encoding="utf-8"))["score"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or not whole: it is made again
        return float(score) if isinstance(score, int | float) and math.isfinite(score) else None

    def put(self, what: object, score: float) -> None:
        """Keep a score. Raises CannotWrite."""
        path = self._path(what)
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CannotWrite(f"{path.parent} cannot be made: {error.strerror or error}; name another run folder") from error
            with whole_file(path) as file:
                file.write(json.dumps({"format": FORMAT, "of": what, "score": score, **self.about}, sort_keys=True).encode())

    def _path(self, what: object) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps([FORMAT, what, dict(self.about)], sort_keys=True)
        return self.folder / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
