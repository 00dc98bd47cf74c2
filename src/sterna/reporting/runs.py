"""The run folder of `sterna train` -> the subject of a report: its expert, the model that it trained, and the rows that it held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sterna.errors import InvalidArgument, InvalidFile, NotFound
from sterna.expert.file import load
from sterna.reporting.measure import Subject
from sterna.reporting.subjects import opener
from sterna.training.config import TrainingConfig, parse, read_yaml
from sterna.training.data import Examples, load_data
from sterna.training.errors import Faults
from sterna.training.plan import Output
from sterna.training.runs import RunFolder


def subject_of_run(path: Path, base: str | None, data: Any, tuned: Any, options: dict[str, Any]) -> Subject:
    """The subject of a training. `base`, `data` and `tuned` take the place of what the run's config says.

    Raises InvalidArgument for a folder that is no run, NotFound for an expert or rows that are no longer there, InvalidConfig.
    """
    folder = RunFolder(path)
    if not folder.facts.is_file() or not folder.config.is_file():
        raise InvalidArgument(f"{path} is no run folder of sterna train, sterna search or sterna pilot; give one, or expert files")
    faults = Faults()
    config = parse(read_yaml(folder.config), faults)
    faults.stop()
    if base is None and config.model is None:
        raise InvalidFile(f"{folder.config} names no base; give one with --base")
    found = base or str(config.model)
    file = _expert(path, config)
    expert = load(file)
    task = expert.facts.metadata.get("task")
    trained = folder.trained.with_name("merged") if folder.trained.with_name("merged").is_dir() else folder.trained
    named = {name: getattr(config.data, name) for name in ("text", "text_pair", "label", "target")}
    rows, columns = (data, named) if data is not None else _held_out(config)
    chosen = {"task": config.task, "max_length": config.data.max_length, **columns} | {
        name: value for name, value in options.items() if value is not None
    }
    source = tuned or (trained if trained.is_dir() else None)
    return Subject(str(task or file.stem), opener(found, rows, [source or expert], chosen), expert, file.stem, source)


def _expert(path: Path, config: TrainingConfig) -> Path:
    """The expert that the run wrote: where its config says, or beside the run folder, if both were moved."""
    if not config.output:
        raise InvalidFile(f"{path} names no output; give its expert instead")
    said = Output.of(config.output).expert
    for place in (said, path.parent / said.name, path / said.name):
        if place.is_file():
            return place
    raise NotFound(f"{said}, the expert of {path}, is not there; give the expert instead of the run folder")


def _held_out(config: TrainingConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The test rows of a training, or the validation rows where it has no test; and the names of their columns."""
    faults = Faults()
    task = config.task or "classification"
    data = load_data(config.data, task, faults)
    faults.stop()
    assert data is not None
    split = data.test or data.validation
    if split is None:
        raise NotFound("the training held no rows out; give test rows with --data")
    answers = [data.classes[int(one)] for one in split.answers] if data.classes and split.answers else split.answers
    return _rows(split, answers), {"text": "text", "text_pair": "pair" if split.pairs else None, "label": None, "target": None}


def _rows(split: Examples, answers: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for place, text in enumerate(split.texts):
        row: dict[str, Any] = {"text": text}
        if split.pairs is not None:
            row["pair"] = split.pairs[place]
        if answers is not None:
            row["label"] = row["target"] = answers[place]
        rows.append(row)
    return rows
