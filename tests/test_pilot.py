"""The pilot: steps behind gates, a kill at any point and the same end, faults of a plan all at once, hostile names, folders that are not ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import models
import reports
import sterna
import trainable
from sterna.errors import CannotWrite, InvalidArgument
from sterna.pilot.folder import slug
from sterna.pilot.plan import Gates, PilotPlan, TaskPlan, read_plan
from sterna.pilot.run import PilotResult, pilot, report_of_pilot
from sterna.training.errors import Interrupted, InvalidConfig
from sterna.training.run import train

DATA = {"text": "text", "label": "label"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, a model trained in full and a LoRA of other rows."""
    folder = tmp_path_factory.mktemp("place")
    trainable.save_base("bert", folder / "base")
    for name, count, seed in (("train", 160, 0), ("select", 60, 1), ("test", 40, 2)):
        trainable.save_csv(folder / f"{name}.csv", count, seed)
    rows = {"train": str(folder / "train.csv"), "validation": str(folder / "select.csv"), **DATA}
    for name, method, rate in (("full", "full", 3e-3), ("lora", "lora", 1e-2)):
        config = {"model": str(folder / "base"), "data": rows, "method": method, "output": str(folder / name)}
        train({**config, "training": {"learning_rate": rate, "num_train_epochs": 3}})
    return folder


def plan_of(place: Path, **fields: Any) -> dict[str, Any]:
    """Two tasks, three steps, and gates that depend on no clock."""
    rows = {"data": str(place / "select.csv"), "test": str(place / "test.csv"), **DATA}
    tasks = [{"name": name, "tuned": str(place / f"{name}.run" / "trained"), **rows} for name in ("full", "lora")]
    gates = {"score": 8, "bytes": "1MB"}
    plan = {"model": str(place / "base"), "tasks": tasks, "steps": [0.5, 0.2, 0.02], "gates": gates, "repeats": 3, "controls": False}
    return plan | fields


@pytest.fixture(scope="module")
def whole(place: Path) -> PilotResult:
    """A pilot that nothing stopped; how often it reported its progress is counted beside it."""
    heard: list[str] = []
    result = pilot(plan_of(place), place / "whole", progress=lambda step, *rest: heard.append(step))
    (place / "calls").write_text(str(len(heard)))
    return result


def decisions(result: PilotResult) -> Any:
    """Everything that does not depend on a clock."""
    report = result.report
    scores = [[(one.kind, one.bytes, one.score, one.to_tuned) for one in task.candidates] for task in report.tasks]
    digests = {name: sterna.load(path).digest for name, path in result.experts.items()}
    return report.gates, scores, digests, [task.trail for task in report.tasks], report.side_by_side and report.side_by_side.passed


def test_the_last_step_that_passes_is_chosen(place: Path, whole: PilotResult) -> None:
    for task in whole.report.tasks:
        steps = [step for step in whole.report.gates if step.task == task.name]
        assert [step.density for step in steps] == [0.5, 0.2, 0.02][: len(steps)]
        assert all(step.passed for step in steps[:-1])  # the first that fails ends the climb
        last = [step for step in steps if step.passed][-1]
        expert = sterna.load(whole.experts[task.name])
        assert (expert.facts.density, expert.facts.alpha) == (last.density, last.alpha)
        chosen = task.of("expert")
        assert chosen is not None
        assert chosen.bytes == whole.experts[task.name].stat().st_size == last.bytes
        assert [one.chosen for one in task.trail] == [step is last for step in steps]
        assert [gate.name for gate in steps[0].gates] == ["score", "bytes"]
        assert task.rows == 40
        assert task.trail_rows == 60
    assert whole.report.restored
    side = whole.report.side_by_side
    assert side is not None
    assert side.passed
    assert [one.alone for one in side.experts] == [task.of("expert").score for task in whole.report.tasks]  # type: ignore[union-attr]
    assert whole.page.read_text(encoding="utf-8").count('<section id="') == 12
    assert report_of_pilot(place / "whole") == whole.report


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45, 0.7, 0.95])
def test_a_killed_pilot_goes_on_to_the_same_end(place: Path, whole: PilotResult, tmp_path: Path, share: float) -> None:
    calls, moment = 0, 1 + int(share * int((place / "calls").read_text()))

    def stop(step: str, done: int, total: int, unit: str, note: str = "") -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command goes on"):
        pilot(plan_of(place), tmp_path / "run", progress=stop)
    assert not list(tmp_path.rglob("*.part"))
    again = pilot(plan_of(place), tmp_path / "run")
    assert decisions(again) == decisions(whole)


def test_what_was_decided_is_not_decided_again(place: Path, whole: PilotResult) -> None:
    heard: list[str] = []
    again = pilot(plan_of(place), place / "whole", progress=lambda step, *rest: heard.append(step))
    assert not [step for step in heard if "evaluating" in step or "timing" in step]
    assert again.report == whole.report


def test_another_plan_does_not_go_on(place: Path, whole: PilotResult) -> None:
    with pytest.raises(InvalidArgument, match=r"another pilot \(plan.steps differ\)"):
        pilot(plan_of(place, steps=[0.4]), place / "whole")
    assert pilot(plan_of(place, language="ja"), place / "whole").report == whole.report  # the page alone differs
    assert '<html lang="ja">' in whole.page.read_text(encoding="utf-8")


def test_restart_takes_the_steps_again(place: Path, tmp_path: Path) -> None:
    one = plan_of(place)["tasks"][:1]
    pilot(plan_of(place, tasks=one, steps=[0.5]), tmp_path / "run")
    again = pilot(plan_of(place, tasks=one, steps=[0.4]), tmp_path / "run", restart=True)
    assert [step.density for step in again.report.gates] == [0.4]
    assert sterna.load(again.experts["full"]).facts.density == 0.4


def test_where_the_first_task_fails_the_others_are_not_begun(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = pilot(plan_of(place, gates={"bytes": 10}), tmp_path / "run", warn=said.append)
    assert result.experts == {}
    assert [step.task for step in result.report.gates] == ["full"]
    assert "full passed no step; the other task is not begun" in said
    assert "No step of compression passed its gates for full." in result.page.read_text(encoding="utf-8")


def test_every_gate_is_measured_and_kept(place: Path, tmp_path: Path) -> None:
    gates = {"score": 100, "bytes": "1G", "latency": 1000, "attach": 10000, "memory": "1 GB"}
    result = pilot(plan_of(place, tasks=plan_of(place)["tasks"][:1], steps=[0.5], alpha="formula", gates=gates, controls=True), tmp_path / "run")
    (step,) = result.report.gates
    limits = {"score": 100, "bytes": 10**9, "latency": 1000, "attach": 10000, "memory": 10**9}
    assert {gate.name: gate.limit for gate in step.gates} == limits
    assert step.passed
    labels = {one.label for one in result.report.tasks[0].candidates if one.kind == "control"}
    assert {"16-bit delta, tuned scale", "prune only", "STC, mean magnitude", "BitDelta", "DARE", "8 bits, scales by row"} <= labels
    kept = json.loads((tmp_path / "run" / "01-full" / "step-0.5.json").read_text(encoding="utf-8"))
    assert [gate["value"] for gate in kept["step"]["gates"]] == [gate.value for gate in step.gates]


def test_a_pilot_trains_where_its_plan_says_so(place: Path, tmp_path: Path) -> None:
    data = {"train": str(place / "train.csv"), "validation": None, **DATA}
    task = {"name": "pafi", "data": str(place / "select.csv"), **DATA}
    training = {"method": {"name": "pafi", "density": 0.05}, "data": data, "training": {"max_steps": 12, "learning_rate": 1e-2}}
    result = pilot(plan_of(place, tasks=[{**task, "train": training}], steps=[0.9], gates={"bytes": "1M"}), tmp_path / "run")
    assert sterna.load(result.experts["pafi"]).facts.source == "pafi"
    assert result.report.tasks[0].rows == 30  # half of the rows, which the gates did not see
    assert [run.score is None for run in result.report.dtypes] == [False, True, True]  # PaFi's mask is the base's own


def test_hostile_names(place: Path, tmp_path: Path) -> None:
    names = ["../../etc/<b>&\u202e", "\u304a\u5ba2\u69d8"]
    tasks = [{**task, "name": name} for task, name in zip(plan_of(place)["tasks"], names, strict=True)]
    result = pilot(plan_of(place, tasks=tasks[1:], steps=[0.5]), tmp_path / "run")
    assert list(result.experts) == names[1:]
    assert {path.parent for path in result.experts.values()} == {tmp_path / "run"}
    with pytest.raises(InvalidConfig, match=r"tasks\[0\].name.*control characters"):
        read_plan(plan_of(place, tasks=tasks))
    assert slug("../../etc") == "etc"
    assert slug(reports.HOSTILE).isascii()
    assert slug("\u304a") == "task"


def test_every_fault_is_told_at_once(place: Path) -> None:
    rows = {"data": str(place / "select.csv")}
    tasks = [
        {"name": "a", "tuned": str(place / "absent"), **rows},
        {"name": "a", "tuned": str(place / "full.safetensors"), "data": str(place / "absent.csv")},
        {"name": "b", **rows, "train": {"model": "x"}, "tuned": "y"},
        {"name": "c", **rows},
    ]
    with pytest.raises(InvalidConfig) as caught:
        read_plan(plan_of(place, tasks=tasks, steps=[0.1, 0.2], gates={}))
    told = "\n".join(caught.value.faults)
    for says in (
        "gates: empty",
        "steps: [0.1, 0.2] is not valid",
        "tasks[0].tuned:",
        "tasks[1].name: 'a' is given twice",
        "tasks[1].tuned:",
        "tasks[1].data:",
        "tasks[2]: both of tuned and train are given",
        "tasks[3]: neither of tuned and train is given",
    ):
        assert says in told


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gate": {}}, "gate: there is no field 'gate'; did you mean gates?"),
        ({"tasks": []}, "tasks:"),
        ({"tasks": [{"name": "", "data": []}]}, r"tasks\[0\].data"),
        ({"steps": [1.5]}, r"steps\[0\]: 1.5 is not valid"),
        ({"gates": {"score": -1}}, "gates.score: -1 is not valid"),
        ({"gates": {"bytes": "many"}}, "gates.bytes: 'many' is not valid"),
        ({"alpha": "guess"}, "alpha: 'guess' is not valid"),
        ({"model": "/no/such/model"}, "model: .*no/such/model"),
        ({"language": "de"}, "language: 'de' is not valid"),
    ],
)
def test_a_fault_names_its_field(place: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfig, match=says):
        read_plan(plan_of(place, **change))


def test_a_tuned_model_of_another_base_is_a_fault(place: Path, tmp_path: Path) -> None:
    models.llama_classifier().save_pretrained(tmp_path / "llama")
    task = {**plan_of(place)["tasks"][0], "tuned": str(tmp_path / "llama")}
    with pytest.raises(InvalidConfig, match=r"tasks\[0\].tuned"):
        read_plan(plan_of(place, tasks=[task]))


def test_labels_of_another_task_are_a_fault_before_any_task_is_begun(place: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("text,label\n" + "".join(f"{row['text']},{'mno'[place % 3]}\n" for place, row in enumerate(trainable.rows(30))))
    tasks = plan_of(place)["tasks"]
    said = {"data": "the labels do not fit: foreign.csv has 3", "test": "the labels do not fit: foreign.csv has 3"}
    for field, message in said.items():
        with pytest.raises(InvalidConfig, match=rf"tasks\[1\]\.{field}: {message}"):
            pilot(plan_of(place, tasks=[tasks[0], {**tasks[1], field: str(foreign)}]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_which_nothing_was_done_takes_another_plan(place: Path, tmp_path: Path) -> None:
    def stop(step: str, *rest: Any) -> None:
        raise KeyboardInterrupt

    one = plan_of(place)["tasks"][:1]
    with pytest.raises(Interrupted):
        pilot(plan_of(place, tasks=one), tmp_path / "run", progress=stop)
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["pilot.json"]
    done = pilot(plan_of(place, tasks=one, steps=[0.5], alpha="formula"), tmp_path / "run")
    assert [step.density for step in done.report.gates] == [0.5]
    assert ("gates", "score 8, bytes 1,000,000") in done.report.inputs


def test_the_plan_in_the_docs_is_one() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "pilot.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", docs, re.DOTALL)
    plan = PilotPlan.model_validate(yaml.safe_load(text))
    assert (plan.gates.bytes, plan.gates.memory) == (2_000_000, 20_000_000)
    for field in (*TaskPlan.model_fields, *Gates.model_fields, *PilotPlan.model_fields):
        assert re.search(rf"\b{field}\b", docs), field


def file_in_the_way(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "run"


def someone_elses(folder: Path) -> Path:
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize(("make", "error"), [(file_in_the_way, CannotWrite), (someone_elses, InvalidArgument)])
def test_a_folder_that_cannot_be_used_is_refused_before_any_work(
    place: Path, tmp_path: Path, make: Callable[[Path], Path], error: type[Exception]
) -> None:
    heard: list[str] = []
    with pytest.raises(error):
        pilot(plan_of(place), make(tmp_path), progress=lambda step, *rest: heard.append(step))
    assert heard == []
