"""A pilot from its plan to its report: tasks one after the other, each by steps behind gates; then all experts on one live model; then the page."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sterna.expert.expert import Expert
from sterna.expert.file import load
from sterna.pilot.climb import Climbed, climb
from sterna.pilot.folder import FORMAT, PilotFolder, begin, once, read
from sterna.pilot.plan import PilotPlan, TaskPlan, read_plan
from sterna.progress import Progress, silent
from sterna.reporting.measure import LivePart, Subject, TaskPart, expert_lines, live_part, report_of, task_part
from sterna.reporting.page import write_page
from sterna.reporting.report import Report
from sterna.scoring.bench import Bench, open_bench
from sterna.sources.checkpoint import resolve
from sterna.training.errors import Faults, Interrupted
from sterna.training.models import model_digest, model_folder


@dataclass(frozen=True, slots=True, eq=False)
class PilotResult:
    """What a pilot ends with: the report, its page, and the chosen expert files by task; a task without one passed no step."""

    report: Report
    page: Path
    experts: dict[str, Path]


def pilot(
    plan: Mapping[str, Any],
    run_dir: str | Path,
    *,
    restart: bool = False,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> PilotResult:
    """Run the pilot that a plan describes, or go on with it.

    Every part's result is kept in `run_dir` as soon as it is there: the same call goes on after a kill, and ends with the same decisions. The first
    task goes before the others: where it passes no step, they are not begun.

    Raises InvalidConfig with every fault of the plan; InvalidArgument or CannotWrite for the run folder; Interrupted on Ctrl-C; and what training,
    compressing and scoring raise.
    """
    checked, said = read_plan(plan), set[str]()

    def warn_once(message: str) -> None:
        if message not in said:
            said.add(message)
            warn(message)

    _check_trainings(checked, Path(run_dir))
    folder = PilotFolder(Path(run_dir).expanduser())
    begin(folder, _facts(checked), restart)
    try:
        return _run(checked, folder, warn_once, progress)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on") from None


def report_of_pilot(path: Path) -> Report | None:
    """The report of a finished pilot; None where the folder is none, or not yet."""
    from pydantic import TypeAdapter, ValidationError

    folder = PilotFolder(path)
    try:
        return TypeAdapter(Report).validate_python(read(folder.numbers)) if folder.facts.is_file() and folder.numbers.is_file() else None
    except ValidationError:
        return None


def _facts(plan: PilotPlan) -> dict[str, Any]:
    """What determines a pilot: its plan but for the page's language, and digests of the files that it names."""
    files: dict[str, str] = {"model": model_digest(model_folder(plan.model))}
    for task in plan.tasks:
        if task.tuned is not None:
            path = resolve(task.tuned)
            files[f"{task.name}: tuned"] = model_digest(path) if path.is_dir() else _digest([path])
        for name, rows in (("data", task.data), ("test", task.test)):
            if isinstance(rows, list):
                files[f"{task.name}: {name}"] = _digest([path for row in rows if (path := Path(row).expanduser()).is_file()])
    return {"format": FORMAT, "plan": plan.model_dump(mode="json", exclude={"language"}), "files": files}


def _digest(paths: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _check_trainings(plan: PilotPlan, run_dir: Path) -> None:
    """Faults of the trainings' configs are faults of the plan."""
    from sterna.training.errors import InvalidConfig
    from sterna.training.plan import make_plan

    faults = Faults()
    for place, task in enumerate(plan.tasks):
        if task.train is not None:
            try:
                make_plan({**task.train, "model": plan.model, "output": "expert"})
            except InvalidConfig as error:
                for fault in error.faults:
                    faults.add(f"tasks[{place}].train", fault)
    faults.stop()


def _run(plan: PilotPlan, folder: PilotFolder, warn: Callable[[str], None], progress: Progress) -> PilotResult:
    subjects: list[Subject] = []
    climbs: list[Climbed] = []
    benches: dict[str, _Benches] = {}
    for place, task in enumerate(plan.tasks):
        own = folder.task(place, task.name)
        own.mkdir(parents=True, exist_ok=True)
        tuned = _tuned(plan, task, own, warn, progress)
        benches[task.name] = here = _Benches(plan, task, tuned, warn)
        climbed = climb(plan, task, tuned, here.for_gates, own, folder.expert(place, task.name), warn, progress)
        label = "" if climbed.expert is None else f"density {climbed.expert.facts.density:g}, alpha {climbed.expert.facts.alpha:g}"
        rows = climbed.results[0].rows if climbed.results else 0
        more: dict[str, Any] = {"controls": plan.controls, "choose": here.for_gates, "trail": climbed.trail, "trail_rows": rows}
        subjects.append(Subject(task.name, here.for_report, climbed.expert, label, tuned, **more))
        climbs.append(climbed)
        if place == 0 and climbed.expert is None and len(plan.tasks) > 1:
            others = len(plan.tasks) - 1
            warn(f"{task.name} passed no step; the other {f'{others} tasks are' if others > 1 else 'task is'} not begun")
            break
        here.release()
    parts = [_part(subject, folder.task(place, subject.name), benches[subject.name], progress) for place, subject in enumerate(subjects)]
    live = _live(plan, subjects, benches, folder, progress)
    report = once(folder.numbers, Report, lambda: _report(plan, subjects, climbs, parts, live))
    write_page(report, folder.report, plan.language)
    experts = {subject.name: folder.expert(place, subject.name) for place, subject in enumerate(subjects) if subject.expert is not None}
    return PilotResult(report, folder.report, experts)


class _Benches:
    """A task's benches for the gates and for the report, on one model, loaded when they are first wanted."""

    def __init__(self, plan: PilotPlan, task: TaskPlan, tuned: Path | Expert, warn: Callable[[str], None]) -> None:
        self._plan, self._task, self._tuned, self._warn = plan, task, tuned, warn
        self._both: tuple[Bench, Bench] | None = None

    def for_gates(self) -> Bench:
        return self._opened()[0]

    def for_report(self) -> Bench:
        return self._opened()[1]

    def _opened(self) -> tuple[Bench, Bench]:
        if self._both is None:
            task = self._task
            options: dict[str, Any] = {
                name: getattr(task, name) for name in ("task", "text", "text_pair", "label", "target", "metric", "max_length", "target_max_length")
            }
            options |= {"like": self._tuned, "seed": self._plan.seed, "warn": self._warn}
            first = open_bench(self._plan.model, task.data, rows=task.rows, **options)
            if isinstance(task.test, float):
                self._both = first.split(1 - task.test, self._plan.seed)
            else:
                held = open_bench(self._plan.model, task.test, rows=task.test_rows, **{**options, "task": first.task})
                self._both = first, replace(held, model=first.model)
        return self._both

    def release(self) -> None:
        """Let the model go; it is loaded again where it is wanted again."""
        self._both = None


def _tuned(plan: PilotPlan, task: TaskPlan, own: Path, warn: Callable[[str], None], progress: Progress) -> Path | Expert:
    """The tuned model's folder, a PEFT folder, or an exact expert; trained now where the plan says so, from its last checkpoint on."""
    if task.tuned is not None:
        path = resolve(task.tuned)
        return path if path.is_dir() else load(path)
    from sterna.training.run import train

    assert task.train is not None
    place = own / "training"
    place.mkdir(exist_ok=True)
    ready = place / "expert.metrics.json"
    if not ready.is_file():
        train({**task.train, "model": plan.model, "output": str(place / "expert"), "run_dir": str(place / "run")}, warn=warn, progress=progress)
    for found in (place / "run" / "merged", place / "run" / "trained", place / "expert"):
        if found.is_dir():
            return found
    return load(place / "expert.safetensors")


def _part(subject: Subject, own: Path, benches: _Benches, progress: Progress) -> TaskPart:
    part = once(own / "measured.json", TaskPart, lambda: task_part(subject, subject.open(), progress))
    benches.release()
    return part


def _live(plan: PilotPlan, subjects: Sequence[Subject], benches: Mapping[str, _Benches], folder: PilotFolder, progress: Progress) -> LivePart | None:
    if all(subject.expert is None for subject in subjects):
        return None

    def make() -> LivePart:
        opened: list[Bench] = []
        for subject in subjects:
            bench = subject.open()
            opened.append(replace(bench, model=opened[0].model) if opened else bench)
            benches[subject.name].release()
        found = live_part(subjects, opened, plan.repeats, progress)
        assert found is not None
        return found

    return once(folder.path / "live.json", LivePart, make)


def _report(
    plan: PilotPlan,
    subjects: Sequence[Subject],
    climbs: Sequence[Climbed],
    parts: Sequence[TaskPart],
    live: LivePart | None,
) -> Report:
    gates = tuple(result.step for climbed in climbs for result in climbed.results)
    asked = ", ".join(
        f"{name} {f'{value:,}' if isinstance(value, int) else f'{value:g}'}" for name, value in plan.gates.model_dump().items() if value is not None
    )
    inputs = [("gates", asked), ("steps", ", ".join(f"{step:g}" for step in plan.steps)), ("alpha", f"{plan.alpha}"), ("head", plan.head)]
    for task in plan.tasks[: len(subjects)]:
        test = f"{task.test:g} of them" if isinstance(task.test, float) else ", ".join(task.test)
        inputs.append((f"{task.name}: tuned, rows, test rows", f"{task.tuned or 'trained by the pilot'}; {', '.join(task.data)}; {test}"))
    return report_of(model_folder(plan.model), parts, live, gates=gates, inputs=(*inputs, *expert_lines(subjects)))
