"""The run folder of `sterna train` or `sterna search` -> the subject of a report: the expert, the tuned model, and the rows that were held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sterna.errors import InvalidArgument, InvalidFile, NotFound, SternaError
from sterna.expert.file import load
from sterna.reporting.measure import Subject
from sterna.reporting.report import Candidate
from sterna.reporting.subjects import opener
from sterna.scoring.bench import Bench, open_bench
from sterna.scoring.intervals import Estimate
from sterna.sources.checkpoint import resolve
from sterna.training.config import TrainingConfig, parse, read_yaml
from sterna.training.data import Examples, load_data
from sterna.training.errors import Faults
from sterna.training.plan import Output
from sterna.training.runs import RunFolder

SEARCH = "search.json"


def subject_of_run(path: Path, base: str | None, data: Any, tuned: Any, controls: bool, options: dict[str, Any]) -> Subject:
    """The subject of a training or a search. `base`, `data` and `tuned` take the place of what the run says.

    Raises InvalidArgument for a folder that is no run, NotFound for an expert or rows that are no longer there, InvalidConfig.
    """
    if (path / SEARCH).is_file():
        return _of_search(path / SEARCH, base, data, tuned, controls, options)
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
    held, columns = ([data], named) if data is not None else _held_out(config)
    lengths = {"max_length": config.data.max_length, "target_max_length": config.data.target_max_length}
    chosen = {"task": config.task, **lengths, **columns} | {name: value for name, value in options.items() if value is not None}
    source = tuned or (trained if trained.is_dir() else None)
    test, *more = [opener(found, rows, [source or expert], chosen) for rows in held]
    return Subject(str(task or file.stem), test, expert, file.stem, source, controls=controls, choose=more[0] if more else None)


def _of_search(file: Path, base: str | None, data: Any, tuned: Any, controls: bool, options: dict[str, Any]) -> Subject:
    """The subject of a finished search; its trials are the trail."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        said, trials, chosen = found["arguments"], found["trials"], found["setting"]
        expert = load(found["file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, SternaError):
            raise
        raise InvalidFile(f"{file} cannot be read ({type(error).__name__}); run the search again, or give its expert") from error
    settings = {name: value for name, value in said["options"].items() if value is not None}
    settings |= {name: value for name, value in options.items() if value is not None}
    source = resolve(str(tuned or said["tuned"]))
    given = source if source.is_dir() else load(source)

    own_test = isinstance(said["test"], str)  # rows of their own, all of which the search took

    def whole(source: Any, **fields: Any) -> Bench:
        return open_bench(base or said["base"], source, **{"like": [given, expert], "seed": said["seed"], **settings, **fields})

    @cache
    def parts() -> tuple[Bench, Bench]:
        """Selection and test, where the search split its rows: both are wanted, and the base is loaded once."""
        return whole(said["data"]).split(1 - said["test"], said["seed"])

    def opened() -> Bench:
        if data is not None:
            return whole(data)
        return whole(said["test"], rows=options.get("rows")) if own_test else parts()[1]

    def selection() -> Bench:
        return whole(said["data"]) if own_test else parts()[0]

    trail = tuple(_trial(trial, chosen) for trial in trials)
    name, stem = str(expert.facts.metadata.get("task") or Path(found["file"]).stem), Path(found["file"]).stem
    rows = (found["selection"] or {}).get("rows") or 0
    return Subject(name, opened, expert, stem, given, controls=controls, choose=selection, trail=trail, trail_rows=rows)


def _trial(trial: dict[str, Any], chosen: dict[str, Any]) -> Candidate:
    """A trial of a search; it keeps no interval."""
    score = Estimate(trial["score"], trial["score"], trial["score"])
    more = [trial["allocation"]] * (trial["allocation"] != "global") + [f"{trial['planes']} planes"] * (trial["planes"] > 1)
    is_chosen = all(trial[name] == value for name, value in chosen.items())
    return Candidate("expert", ", ".join(more), trial["bytes"], score, density=trial["density"], alpha=trial["alpha"], chosen=is_chosen)


def _expert(path: Path, config: TrainingConfig) -> Path:
    """The expert that the run wrote: where its config says, or beside the run folder, if both were moved."""
    if not config.output:
        raise InvalidFile(f"{path} names no output; give its expert instead")
    said = Output.of(config.output).expert
    for place in (said, path.parent / said.name, path / said.name):
        if place.is_file():
            return place
    raise NotFound(f"{said}, the expert of {path}, is not there; give the expert instead of the run folder")


def _held_out(config: TrainingConfig) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """The test rows of a training and its validation rows, of which there may be only one, and the names of their columns."""
    faults = Faults()
    task = config.task or "classification"
    data = load_data(config.data, task, faults)
    faults.stop()
    assert data is not None
    splits = [split for split in (data.test, data.validation) if split is not None]
    if not splits:
        raise NotFound("the training held no rows out; give test rows with --data")
    first = splits[0]
    columns = {"text": "text" if first.chats is None else "chat", "text_pair": "pair" if first.pairs is not None else None, "label": None}
    answered = task == "causal-lm" and first.chats is None and first.answers is not None
    return [_rows(split, data.classes) for split in splits], {**columns, "target": "target" if answered else None}


def _rows(split: Examples, classes: Sequence[str]) -> list[dict[str, Any]]:
    if split.chats is not None:
        return [{"chat": chat} for chat in split.chats]
    rows: list[dict[str, Any]] = []
    for place, text in enumerate(split.texts):
        row: dict[str, Any] = {"text": text}
        if split.pairs is not None:
            row["pair"] = split.pairs[place]
        if split.answers is not None:
            answer = split.answers[place]
            row["label"] = row["target"] = classes[int(answer)] if classes else answer
        rows.append(row)
    return rows
