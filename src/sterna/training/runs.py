"""The run folder: what the run is of, its checkpoints, and the trained model. A run goes on only where everything that determines it is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sterna.errors import CannotWrite, InvalidArgument
from sterna.training.config import TrainingConfig
from sterna.writing import whole_file

FACTS = "run.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def facts(self) -> Path:
        return self.path / FACTS

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def trained(self) -> Path:
        return self.path / "trained"


def run_facts(config: TrainingConfig, data: str, base: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """What determines a run: its config but for where results go, the digests of rows and base, and the versions of what computes."""
    said = {name: value for name, value in config.to_dict().items() if name not in ("output", "run_dir", "metadata")}
    return {"format": FORMAT, "config": said, "data": data, "base": base, "versions": dict(versions)}


def check_run(folder: RunFolder, facts: Mapping[str, Any], restart: bool) -> list[str]:
    """Whether a run of these facts can begin or go on in the folder; returns what a user should know.

    Raises InvalidArgument where the folder holds something else, or (unless `restart`) a run that differs.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise InvalidArgument(f"{folder.path} is a file; expected a folder, or a new name")
    if not folder.path.is_dir() or not any(folder.path.iterdir()):
        return []
    if not folder.facts.is_file():
        raise InvalidArgument(f"{folder.path} is a folder of something else (it has no {FACTS}); name another by run_dir")
    if restart:
        return []
    try:
        before = json.loads(folder.facts.read_text(encoding="utf-8"))
        if not isinstance(before, dict) or before.get("format") != FORMAT:
            raise ValueError
    except (OSError, ValueError):
        raise InvalidArgument(f"{folder.facts} cannot be read: start over with --restart, or name another run_dir") from None
    changed = [f"{name} was {_short(old)}, now {_short(new)}" for name, old, new in differing(before["config"], facts["config"])]
    if before["data"] != facts["data"]:
        changed.append("the rows of the data are others")
    if before["base"] != facts["base"]:
        changed.append("the base's files are others")
    if changed:
        more = f"; and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise InvalidArgument(f"{folder.path} holds another run: {'; '.join(changed[:6])}{more}. Start over with --restart, or name another run_dir")
    newer = [f"{name} {old} then, {new} now" for name, old, new in differing(before["versions"], facts["versions"])]
    return [f"the run began with other versions ({'; '.join(newer)}): its result may differ in the last bits"] if newer else []


def begin_run(folder: RunFolder, facts: Mapping[str, Any], config: TrainingConfig, restart: bool) -> None:
    """Make the folder ready: empty of an earlier run where that is asked for, with the facts in it. Call `check_run` before. Raises CannotWrite."""
    try:
        if restart and folder.facts.is_file():
            for path in (folder.checkpoints, folder.trained):
                shutil.rmtree(path, ignore_errors=True)
            folder.facts.unlink()
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"{folder.path} cannot be written: {error.strerror or error}") from error
    for path, content in ((folder.config, config.to_yaml()), (folder.facts, json.dumps(facts, indent=2, ensure_ascii=False))):
        if not (path == folder.facts and path.is_file()):
            with whole_file(path) as file:
                file.write(content.encode())


def differing(before: Any, now: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names whose values differ between two trees of plain data."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [*before, *(name for name in now if name not in before)]
        return [found for name in names for found in differing(before.get(name), now.get(name), f"{where}.{name}" if where else str(name))]
    return [] if before == now else [(where, before, now)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
