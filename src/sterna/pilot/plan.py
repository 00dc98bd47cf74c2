"""The plan of a pilot: what a person's YAML may say, and every fault in it at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from sterna.errors import InvalidArgument, SternaError
from sterna.scoring.bench import purpose_of
from sterna.scoring.fitted import fitted
from sterna.scoring.metrics import metric_of
from sterna.scoring.purpose import Purpose, of_folder
from sterna.scoring.rows import examples_of, table_of
from sterna.sources.adapter import is_adapter
from sterna.sources.checkpoint import open_checkpoint, resolve
from sterna.sources.names import near
from sterna.sources.pairing import pair
from sterna.sources.trained import trained_expert
from sterna.training.config import Count, Fraction, Positive, Section
from sterna.training.errors import Faults
from sterna.training.models import load_settings, load_tokenizer, model_folder
from sterna.training.tasks import TaskName

DENSITIES = (0.3, 0.2, 0.1, 0.05, 0.02)
UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}


def _bytes(value: object) -> object:
    """A number of bytes, or text as 500K, 2 MB, 1.5GB."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if found is None or found[2].lower() not in UNITS:
        return value
    try:
        return round(float(found[1]) * UNITS[found[2].lower()])
    except ValueError:
        return value


Bytes = Annotated[Count, BeforeValidator(_bytes)]


def _several(value: object) -> object:
    return [value] if isinstance(value, str) else value


Files = Annotated[list[str], Field(min_length=1), BeforeValidator(_several)]


class TaskPlan(Section):
    """One task: the tuned model, or a config to train one with; rows for the gates, and rows (or a share of those) for the report alone."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    tuned: str | None = None
    train: dict[str, Any] | None = None
    data: Files
    test: Annotated[float, Field(gt=0, lt=1)] | Files = 0.5
    task: TaskName | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    target: str | None = None
    metric: str | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    target_max_length: Annotated[int, Field(ge=2)] = 64
    rows: Count | None = None
    test_rows: Count | None = None


class Gates(Section):
    """What every step has to keep to, each at most: loss of score against the tuned model in the metric's units (points of 100 for an accuracy),
    bytes on disk, inference time as a multiple of the base's, milliseconds to attach, bytes of memory beside the base. None: no such gate."""

    score: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    bytes: Bytes | None = None
    latency: Positive | None = None
    attach: Positive | None = None
    memory: Bytes | None = None


class PilotPlan(Section):
    """A pilot. The first task is the small one that goes before the others."""

    model: str
    tasks: Annotated[list[TaskPlan], Field(min_length=1)]
    steps: list[Fraction] = Field(list(DENSITIES), min_length=1)
    alpha: Literal["search", "formula"] | Positive = "search"
    head: Literal["exact", "fp16", "bf16", "int8"] = "exact"
    gates: Gates
    controls: bool = True
    repeats: Annotated[int, Field(ge=3)] = 15
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    language: Literal["en", "ja"] = "en"


def read_plan(raw: Mapping[str, Any]) -> PilotPlan:
    """The plan that a mapping says, held against the files that it names; nothing is loaded as a model.

    Raises InvalidConfig with every fault that could be found.
    """
    faults = Faults()
    try:
        plan = PilotPlan.model_validate(raw)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            faults.add(_place(fault["loc"]), _said(fault))
        faults.stop()
        raise AssertionError from error  # a validation error has a fault
    _check(plan, faults)
    faults.stop()
    return plan


def _place(parts: tuple[int | str, ...]) -> str:
    """tasks[0].data, without the names that pydantic gives to the members of a union."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part in FIELDS:
            text += f".{part}" if text else part
    return text or str(parts[0])


FIELDS = {name for section in (PilotPlan, TaskPlan, Gates) for name in section.model_fields}


def _said(fault: Any) -> str:
    if fault["type"] == "missing":
        return "missing"
    if fault["type"] == "extra_forbidden":
        section = _section(fault["loc"])
        alike = near(str(fault["loc"][-1]), list(section.model_fields))
        fields = ", ".join(section.model_fields)
        return f"there is no field {fault['loc'][-1]!r}; {f'did you mean {alike[0]}?' if alike else f'the fields here are {fields}'}"
    given = fault["input"]
    shown = repr(given) if isinstance(given, str | int | float | bool | None) else f"a {type(given).__name__}"
    return f"{shown} is not valid; expected {str(fault['msg']).removeprefix('Input should be ')}"


def _section(parts: tuple[int | str, ...]) -> type[BaseModel]:
    return TaskPlan if "tasks" in parts[:-1] else Gates if "gates" in parts[:-1] else PilotPlan


def _check(plan: PilotPlan, faults: Faults) -> None:
    """Everything that files can tell before a model is loaded."""
    if all(value is None for value in plan.gates.model_dump().values()):
        faults.add("gates", f"empty; expected one or more of {', '.join(Gates.model_fields)}")
    if sorted(set(plan.steps), reverse=True) != plan.steps:
        faults.add("steps", f"{plan.steps} is not valid; expected densities, each smaller than the one before")
    base: Path | None = None
    settings: Any = None
    with faults.at("model"):
        base = model_folder(plan.model)
        settings = load_settings(base)
        load_tokenizer(base)
    seen: set[str] = set()
    for place, task in enumerate(plan.tasks):
        where = f"tasks[{place}]"
        if task.name in seen:
            faults.add(f"{where}.name", f"{task.name!r} is given twice")
        if not all(letter.isprintable() for letter in task.name):
            faults.add(f"{where}.name", f"{task.name!r} holds control characters; expected text that can be printed")
        seen.add(task.name)
        purpose = _check_tuned(task, where, base, faults)
        _check_rows(task, where, base, settings, purpose, faults)


def _check_tuned(task: TaskPlan, where: str, base: Path | None, faults: Faults) -> Purpose | None:
    """What the tuned model was made for; None where there is none yet, or a wrong one."""
    if (task.tuned is None) == (task.train is None):
        faults.add(
            where, f"{'neither' if task.tuned is None else 'both'} of tuned and train {'is' if task.tuned is None else 'are'} given; expected one"
        )
    elif task.tuned is not None:
        with faults.at(f"{where}.tuned"):
            path = resolve(task.tuned)
            if path.is_file() and trained_expert(path) is None:
                raise InvalidArgument(f"{task.tuned} is a file; expected a model folder, a PEFT folder, or an exact expert")
            if path.is_dir() and not is_adapter(path) and base is not None:
                pair(open_checkpoint(base), open_checkpoint(path))
            return purpose_of(path)
    elif task.train is not None:
        for field in ("model", "output", "run_dir"):
            if field in task.train:
                faults.add(f"{where}.train.{field}", "not here; the pilot sets it")
    return None


def _check_rows(task: TaskPlan, where: str, base: Path | None, settings: Any, purpose: Purpose | None, faults: Faults) -> None:
    """Columns and metric; and labels, where there is a head that they belong to."""
    kind, answered = task.task, True
    columns: dict[str, Any] = {"text": task.text, "label": task.label, "text_pair": task.text_pair, "target": task.target}
    for field, files in (("data", task.data), ("test", task.test)):
        if isinstance(files, list):
            with faults.at(f"{where}.{field}"):
                table = table_of(files)
                if purpose is not None and base is not None and settings is not None:
                    fit = fitted(of_folder(base), purpose, settings, table, task=kind, **columns)
                    kind, answered = fit.task, fit.examples.answers is not None
                elif kind is not None:
                    examples, _ = examples_of(table, kind, task.text, task.label, task.text_pair, task.target)
                    answered = examples.answers is not None
    if task.metric is not None and (kind is not None or ":" in task.metric):
        try:
            metric_of(task.metric, kind or "classification", answered=answered)
        except SternaError as error:
            faults.add(f"{where}.metric", str(error))
