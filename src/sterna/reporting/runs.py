"""The run folder of `sterna train` or `sterna search` -> the subject of a report: the expert, the tuned model, and the rows that were held out."""

from __future__ import annotations

import json
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
    rows, columns = (data, named) if data is not None else _held_out(config)
    lengths = {"max_length": config.data.max_length, "target_max_length": config.data.target_max_length}
    chosen = {"task": config.task, **lengths, **columns} | {name: value for name, value in options.items() if value is not None}
    source = tuned or (trained if trained.is_dir() else None)
    return Subject(str(task or file.stem), opener(found, rows, [source or expert], chosen), expert, file.stem, source, controls=controls)


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

    def opened() -> Bench:
        fields = {"like": [given, expert], "seed": said["seed"], **settings}
        rows = data if data is not None else said["test"] if isinstance(said["test"], str) else said["data"]
        whole = open_bench(base or said["base"], rows, **fields)
        return whole if data is not None or isinstance(said["test"], str) else whole.split(1 - said["test"], said["seed"])[1]

    trail = tuple(_trial(trial, chosen) for trial in trials)
    name, stem = str(expert.facts.metadata.get("task") or Path(found["file"]).stem), Path(found["file"]).stem
    rows = (found["selection"] or {}).get("rows") or 0
    return Subject(name, opened, expert, stem, given, controls=controls, trail=trail, trail_rows=rows)


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
    if split.chats is not None:
        return [{"chat": chat} for chat in split.chats], {"text": "chat", "text_pair": None, "label": None, "target": None}
    target = "target" if task == "causal-lm" and split.answers is not None else None
    return _rows(split, answers), {"text": "text", "text_pair": "pair" if split.pairs else None, "label": None, "target": target}


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
