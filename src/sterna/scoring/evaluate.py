"""sterna.evaluate: the base, the tuned model and experts on the same rows, each with its interval, each difference paired."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sterna.compression import ALPHA, DENSITY
from sterna.errors import InvalidArgument, Unsupported
from sterna.expert.expert import Expert
from sterna.expert.file import load
from sterna.progress import Progress, silent
from sterna.scoring.bench import Bench, Candidate, open_bench, purpose_of
from sterna.scoring.evaluated import Entry, Evaluated, Kind, TaskScores
from sterna.scoring.labels import columns_in_order
from sterna.scoring.metrics import Choice, measured, metric_of
from sterna.scoring.rows import Rows
from sterna.sources.adapted import adapted
from sterna.sources.adapter import is_adapter, read_adapter
from sterna.sources.checkpoint import open_checkpoint, resolve
from sterna.sources.pairing import pair
from sterna.summary import inspect
from sterna.training.metrics import Metric
from sterna.training.plan import versions
from sterna.training.tasks import TaskName

SELECTION = 0.2
"""The share of rows that is kept apart where controls are asked for."""

PROBED = 32
"""Rows on which a person's own metric is tried before the long work starts."""

ExpertSource = Expert | str | os.PathLike[str]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What is to be evaluated beside the base: an expert, or the folder of a tuned model or a PEFT adapter."""

    name: str
    kind: Kind
    source: Expert | Path
    bytes: int

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(self.source.facts.heads) if isinstance(self.source, Expert) else ()

    @property
    def task(self) -> str:
        """The name of its task: what its metadata say, else its file's."""
        said = self.source.facts.metadata.get("task") if isinstance(self.source, Expert) else None
        return said if isinstance(said, str) and said else self.name

    @property
    def merged(self) -> bool:
        return isinstance(self.source, Expert) and self.source.facts.method == "merge"


def evaluate(
    base: str | os.PathLike[str],
    experts: ExpertSource | Sequence[ExpertSource] = (),
    *,
    data: Rows | Mapping[str, Rows],
    tuned: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    metric: Choice | Sequence[Choice] | None = None,
    task: TaskName | None = None,
    head: str | None = None,
    controls: bool = False,
    text: str | None = None,
    label: str | None = None,
    text_pair: str | None = None,
    target: str | None = None,
    rows: int | None = None,
    max_length: int | None = None,
    target_max_length: int = 64,
    batch: int = 64,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "fp32",
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> Evaluated:
    """Score a base, the tuned model and experts on the same rows: every score with its 95 % interval, every difference paired (docs/evaluation.md).

    `base` and `tuned` are model folders or hub ids; `tuned` may also be a PEFT folder or an exact expert. `data` are rows: files (.csv, .tsv, .jsonl,
    .parquet, .txt), a hub id, or mappings from column to cell. Several tasks at once are a mapping from name to rows, and `tuned` then one too: a
    merged expert is run on each with the head of that name, every other expert on the task that its metadata or its file is named for.
    `metric` is one or more: a name, an import path "package.module:function", a function of (predicted, wanted). `head` is which head of a merged
    expert is used. `controls` adds other ways to store the tuned model, each scored as read from a file (`sterna.scoring.controls`); a fifth of the
    rows is then kept apart, to choose a scale on. `text`, `label`, `text_pair` and `target` name columns; `rows` keeps as many, chosen by `seed`;
    `dtype` is what the base is loaded in: "fp32", "bf16" or "fp16".

    Raises NotFound, InvalidFile, InvalidArgument, PairingError, WrongBase, WrongModel or BadMetric before any model is run.
    """
    started = time.perf_counter()
    parts: dict[str, Rows] = dict(data) if isinstance(data, Mapping) else {"": data}
    if not parts:
        raise InvalidArgument("data is empty; expected rows, or a mapping from a task's name to its rows")
    given: list[ExpertSource] = [experts] if isinstance(experts, Expert | str | os.PathLike) else list(experts)
    models = named_models([("expert", source) for source in given])
    tuned_of = tuned_by_task(tuned, list(parts))
    chosen = models_by_task(models, list(parts), head)
    metrics = [metric] if metric is None or isinstance(metric, str | Metric) or callable(metric) else list(metric)
    if controls and (missing := [name for name in parts if name not in tuned_of]):
        raise InvalidArgument(
            f"controls are made of the tuned model, and none is given{f' for {missing[0]}' if missing[0] else ''}; add tuned= (--tuned)"
        )
    columns = {"text": text, "label": label, "text_pair": text_pair, "target": target}
    options = {"rows": rows, "max_length": max_length, "target_max_length": target_max_length, "batch": batch, "seed": seed, "device": device}
    plans = [
        _Plan(
            base, name, part, _apart([*tuned_of.get(name, []), *chosen[name]]), metrics, task, head, controls, {**columns, **options, "dtype": dtype}
        )
        for name, part in parts.items()
    ]
    if len(plans) > 1:  # all tasks are looked at before the first is run
        for plan in plans:
            _check(plan, _open(plan, lambda message: None))
    found = []
    for plan in plans:
        bench = _open(plan, warn)
        if len(plans) == 1:
            _check(plan, bench)
        found.append(_scores(plan, bench, warn, progress))
    return Evaluated(Path(base).name, tuple(found), versions(), time.perf_counter() - started)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """One task: its rows, the models that are run on them, and how."""

    base: str | os.PathLike[str]
    name: str
    data: Rows
    models: Sequence[Model]
    metrics: Sequence[Choice | None]
    task: TaskName | None
    head: str | None
    controls: bool
    options: Mapping[str, Any]

    def head_of(self, model: Model) -> str | None:
        """Which of a merged expert's heads is for this task."""
        if not model.heads:
            return None
        return self.name if self.name in model.heads else self.head


def named_models(sources: Sequence[tuple[Kind, ExpertSource]]) -> list[Model]:
    """Open what is given and name it: by its file, with folders before it where two have one name. Raises NotFound, InvalidFile, InvalidArgument."""
    found: list[Model] = []
    for number, (kind, source) in enumerate(sources, 1):
        if isinstance(source, Expert):
            found.append(Model(f"expert {number}", kind, source, inspect(source).bytes))
            continue
        path = resolve(source)
        if kind == "expert" and path.is_dir():
            raise InvalidArgument(f"{source} is a folder; expected an expert file (a tuned model or a PEFT folder is given by tuned=, --tuned)")
        size = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size
        found.append(Model(path.stem if path.is_file() else path.name, kind, path if path.is_dir() else load(path), size))
    names = [model.name for model in found]
    for place, (model, (_, source)) in enumerate(zip(found, sources, strict=True)):
        if names.count(model.name) > 1 and not isinstance(source, Expert):
            name = os.fspath(source)
            if [os.fspath(other) for _, other in sources if not isinstance(other, Expert)].count(name) > 1:
                raise InvalidArgument(f"{name} is given twice")
            found[place] = replace(model, name=name)
    return found


def _apart(models: Sequence[Model]) -> list[Model]:
    """A name of its own for each: the tuned model and an expert may be called alike, and one of them "base"."""
    names = ["base", *(model.name for model in models)]
    return [replace(model, name=f"{model.name} ({model.kind})") if names.count(model.name) > 1 else model for model in models]


def tuned_by_task(tuned: Any, tasks: Sequence[str]) -> dict[str, list[Model]]:
    """The tuned model of each task that has one. Raises InvalidArgument for a task without rows, or several tasks and one model."""
    if tuned is None:
        return {}
    if not isinstance(tuned, Mapping):
        if len(tasks) > 1:
            raise InvalidArgument(f"one tuned model is given for {len(tasks)} tasks; expected TASK=DIR for each ({', '.join(tasks)})")
        tuned = {tasks[0]: tuned}
    if strange := [name for name in tuned if name not in tasks]:
        raise InvalidArgument(f"a tuned model is given for the task {strange[0]!r}; the tasks of the data are {', '.join(tasks)}")
    return {name: named_models([("tuned", source)]) for name, source in tuned.items()}


def models_by_task(models: Sequence[Model], tasks: Sequence[str], head: str | None) -> dict[str, list[Model]]:
    """Which experts are run on which task. Raises InvalidArgument for an expert without a task, and a task without an expert."""
    if len(tasks) == 1:
        return {tasks[0]: list(models)}
    if head is not None:
        raise InvalidArgument(f"head is {head!r}, for one task; with the tasks {', '.join(tasks)} each takes the head of its name")
    found: dict[str, list[Model]] = {task: [] for task in tasks}
    for model in models:
        own = model.heads or (tuple(tasks) if model.merged else (model.task,))
        its = [task for task in own if task in found]
        if not its:
            raise InvalidArgument(f"{model.name} is for {', '.join(own)}; the tasks of the data are {', '.join(tasks)}: name them alike (TASK=FILE)")
        for task in its:
            found[task].append(model)
    if idle := [task for task, chosen in found.items() if not chosen and models]:
        there = ", ".join(dict.fromkeys(name for model in models for name in model.heads or (model.task,)))
        raise InvalidArgument(f"no expert is for the task {idle[0]!r}; the experts are for {there}")
    return found


def _open(plan: _Plan, warn: Callable[[str], None]) -> Bench:
    like: list[Candidate] = [model.source for model in plan.models]
    head = next((chosen for model in plan.models if (chosen := plan.head_of(model)) is not None), plan.head)
    metric = plan.metrics[0] if plan.metrics else None
    return open_bench(plan.base, plan.data, task=plan.task, metric=metric, like=like, head=head, warn=warn, **plan.options)


def _check(plan: _Plan, bench: Bench) -> None:
    """Everything that can be wrong before a model is run on all rows."""
    metrics = _metrics(plan, bench)
    for model in plan.models:
        if isinstance(model.source, Expert):
            with bench.wearing(model.source, head=plan.head_of(model)):
                pass
        else:
            _refuse_stranger(bench.base, model.source)
        purpose = purpose_of(model.source, plan.head_of(model))
        if bench.task == "classification" and purpose.classes is not None:
            columns_in_order(purpose.classes, bench.head, len(purpose.classes), model.name)
    if own := [metric for metric in metrics if metric.function is not None]:
        few = bench.rows(bench.evaluation.shuffled(0)[:PROBED])
        found = few.outputs(metrics=own)
        for metric in own:
            measured(metric, few.evaluation, found, few.classes)


def _refuse_stranger(base: Path, folder: Path) -> None:
    """Raise PairingError where a tuned model or an adapter was not made of the base."""
    if not is_adapter(folder):
        pair(open_checkpoint(base), open_checkpoint(folder))
        return
    with contextlib.suppress(Unsupported):  # an adapter that PEFT alone can read
        adapted(open_checkpoint(base), read_adapter(folder), ())


def _metrics(plan: _Plan, bench: Bench) -> tuple[Metric, ...]:
    answered = bench.evaluation.examples.answers is not None
    return tuple({metric.name: metric for metric in (metric_of(given, bench.task, answered=answered) for given in plan.metrics)}.values())


def _scores(plan: _Plan, bench: Bench, warn: Callable[[str], None], progress: Progress) -> TaskScores:
    if bench.dropped:
        warn(f"{bench.dropped} rows of {bench.source} lack a text or an answer and are left out")
    metrics = _metrics(plan, bench)
    name = plan.name or bench.source
    selection, bench = bench.split(SELECTION, int(plan.options["seed"])) if plan.controls else (None, bench)

    def run(model: Model | None) -> Entry:
        head = plan.head_of(model) if model is not None else None
        called = "base" if model is None else model.name
        found = bench.outputs(model.source if model else None, head=head, metrics=metrics, progress=progress, step=f"{name}: {called}")
        outcomes = {metric.name: bench.outcome(found, metric) for metric in metrics}
        detail = {"head": head} if head is not None else {}
        return Entry(called, "base" if model is None else model.kind, None if model is None else model.bytes, outcomes, detail)

    entries = [run(None), *(run(model) for model in plan.models)]
    entries += _controls(plan, bench, selection, metrics, name, progress) if selection is not None else []
    own = [model.name for model in plan.models if not model.merged] or [model.name for model in plan.models]
    lender = next((model.name for model in plan.models if model.source is bench.lender), bench.head_from)
    return TaskScores(
        name=plan.name,
        data=bench.source,
        task=bench.task,
        rows=len(bench),
        dropped=bench.dropped,
        classes=bench.classes,
        head_from=lender,
        metrics=metrics,
        entries=tuple(entries),
        reference=own[0] if own else None,
        selection=len(selection) if selection is not None else 0,
        packed=bench.evaluation.packed,
    )


def _controls(plan: _Plan, bench: Bench, selection: Bench, metrics: Sequence[Metric], name: str, progress: Progress) -> Iterator[Entry]:
    """The controls of the tuned model, at the density of the first ternary expert; ComPEFT itself is among them where no expert is given."""
    from sterna.scoring.controls import TITLES, TunedVector, controls

    tuned = next(model.source for model in plan.models if model.kind == "tuned")
    facts = [model.source.facts for model in plan.models if isinstance(model.source, Expert) and model.kind == "expert"]
    density = next((found.density for found in facts if found.density is not None), DENSITY)

    def rank(expert: Expert) -> float:
        found = selection.outputs(expert, metrics=metrics[:1], progress=progress, step=f"{name}: choosing a scale")
        value = selection.outcome(found, metrics[0]).value
        return value if metrics[0].higher_is_better else -value

    vector = TunedVector.of(bench.base, tuned, progress)
    with tempfile.TemporaryDirectory(prefix="sterna-") as folder:
        wanted = [control for control in TITLES if control != "compeft" or not facts]
        for control in controls(vector, folder, density=density, alpha=ALPHA, names=wanted, rank=rank):
            found = bench.outputs(control.expert, metrics=metrics, progress=progress, step=f"{name}: {control.title}")
            yield Entry(
                control.title, "control", control.bytes, {metric.name: bench.outcome(found, metric) for metric in metrics}, dict(control.detail)
            )
