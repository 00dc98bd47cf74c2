"""sterna evaluate: on tiny real models and files, by the command line and from Python; what is refused before work starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sterna
import trainable
from sterna import commands
from sterna.commands.scores import differing, figures, tables
from sterna.errors import InvalidArgument, NotFound, PairingError, SternaError, WrongBase, WrongModel
from sterna.scoring.evaluated import Entry, Evaluated, TaskScores
from sterna.scoring.intervals import Difference, mean_of
from sterna.scoring.metrics import BadMetric
from sterna.scoring.outcome import Outcome
from sterna.training.metrics import METRICS, Metric

STERNA = str(Path(sys.executable).with_name("sterna"))


TASKS = {"letters": "ab", "sorts": "xyz"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two tasks with a tuned model and an expert each, both merged, and rows."""
    folder = tmp_path_factory.mktemp("evaluate")
    trainable.save_base("bert", folder / "bert")
    trainable.save_base("llama", folder / "llama")
    trainable.save_experts(folder, TASKS)
    sterna.merge([folder / "letters.safetensors", folder / "sorts.safetensors"], "linear").save(folder / "both.safetensors")
    trainable.save_csv(folder / "letters.csv", 40)
    lines = ["text,label", *(f"{row['text']},{'xyz'[i % 3]}" for i, row in enumerate(trainable.rows(30, 1)))]
    (folder / "sorts.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "figures.py").write_text(
        "def hits(predicted, wanted):\n    return [p == w for p, w in zip(predicted, wanted)]\n"
        "hits.title = 'hits a row'\n"
        "def bad(predicted, wanted):\n    return float('nan')\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def run(*words: str, monkeypatch: pytest.MonkeyPatch | None = None) -> int:
    """The command line in this process; its exit code."""
    before = sys.argv
    sys.argv = ["sterna", "evaluate", *words]
    try:
        commands.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


ONE = ("bert", "letters.safetensors", "--data", "letters.csv")


def test_one_command_shows_base_tuned_and_expert(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ONE, "--tuned", "letters-tuned") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("40 rows of letters.csv; classification in 2 classes; base bert, with the head of letters-tuned")
    rows = [line.split()[0] for line in lines if line and not line.startswith(("40", "[", "letters against"))]
    assert rows == ["model", "base", "letters-tuned", "letters"]
    assert "against base" in out
    assert "against letters-tuned" in out
    assert "noise: the interval holds 0" in lines[-1]


def test_json_and_the_file_hold_every_number_and_are_the_python_result(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(*ONE, "--tuned", "letters-tuned", "--metric", "accuracy", "--metric", "macro_f1", "--json", "-o", str(tmp_path / "r.json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == told
    found = sterna.evaluate("bert", "letters.safetensors", data="letters.csv", tuned="letters-tuned", metric=["accuracy", "macro_f1"])
    assert found.to_dict()["tasks"] == told["tasks"]
    (task,) = told["tasks"]
    base, tuned, expert = task["models"]
    assert [base["bytes"], expert["bytes"]] == [None, Path("letters.safetensors").stat().st_size]
    assert tuned["bytes"] == Path("letters-tuned/model.safetensors").stat().st_size
    for metric in ("accuracy", "macro_f1"):
        against = expert["scores"][metric]["against"]
        assert set(against) == {"base", "letters-tuned"}
        wanted = expert["scores"][metric]["value"] - tuned["scores"][metric]["value"]
        assert against["letters-tuned"]["value"] == pytest.approx(wanted)
        assert against["letters-tuned"]["low"] <= wanted <= against["letters-tuned"]["high"]
    assert expert["scores"]["accuracy"]["against"]["base"]["test"] == "McNemar"
    assert found.tasks[0].difference("letters", "letters-tuned").value == pytest.approx(against_of(task, "letters", "letters-tuned"))


def against_of(task: Any, name: str, other: str) -> float:
    (model,) = (one for one in task["models"] if one["name"] == name)
    return float(model["scores"]["accuracy"]["against"][other]["value"])


def test_a_merged_expert_is_shown_beside_each_parent_on_its_own_task(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("bert", "both.safetensors", "letters.safetensors", "sorts.safetensors", "--data", "letters=letters.csv", "--data", "sorts=sorts.csv")
    assert run(*words, "--json") == 0
    letters, sorts = json.loads(capsys.readouterr().out)["tasks"]
    assert [model["name"] for model in letters["models"]] == ["base", "both", "letters"]
    assert [model["name"] for model in sorts["models"]] == ["base", "both", "sorts"]
    assert [letters["models"][1]["head"], sorts["models"][1]["head"]] == ["letters", "sorts"]
    assert [letters["reference"], sorts["reference"]] == ["letters", "sorts"]
    alone = sterna.evaluate("bert", "both.safetensors", data="sorts.csv", head="sorts").tasks[0]
    assert alone.entry("both").outcomes["accuracy"].value == sorts["models"][1]["scores"]["accuracy"]["value"]
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert "letters: 40 rows" in out
    assert "sorts: 30 rows" in out
    assert "both, head sorts" in out


def test_a_parent_is_known_by_the_task_of_its_metadata(tmp_path: Path) -> None:
    expert = sterna.compress("bert", "letters-tuned", density=0.5, metadata={"task": "letters"})
    expert.save(tmp_path / "other.safetensors")
    found = sterna.evaluate("bert", [tmp_path / "other.safetensors", "sorts.safetensors"], data={"letters": "letters.csv", "sorts": "sorts.csv"})
    assert [task.entries[1].name for task in found.tasks] == ["other", "sorts"]


def test_an_own_metric_by_its_import_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ONE, "--metric", "figures:hits", "--metric", "accuracy", "--json") == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    for model in task["models"]:
        assert 100 * model["scores"]["figures:hits"]["value"] == pytest.approx(model["scores"]["accuracy"]["value"])
    assert [metric["title"] for metric in task["metrics"]] == ["hits a row", "accuracy"]


def test_experts_in_memory_are_scored_as_their_files() -> None:
    found = sterna.evaluate("bert", [sterna.load("letters.safetensors")], data="letters.csv").tasks[0]
    beside = sterna.evaluate("bert", ["letters.safetensors"], data="letters.csv").tasks[0]
    assert found.entries[1].outcomes["accuracy"].value == beside.entries[1].outcomes["accuracy"].value
    assert found.entries[1].bytes == beside.entries[1].bytes


def test_the_base_alone_is_evaluated_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("letters-tuned", "--data", "letters.csv") == 0
    out = capsys.readouterr().out
    assert "against" not in out.splitlines()[1]
    assert run("llama", "--data", "letters.csv", "--task", "causal-lm", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["metrics"][0]["name"] == "perplexity"


@pytest.mark.parametrize("kind", ["prompts", "chats"])
def test_completions_are_learned_and_then_written(kind: str, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = trainable.save_chatting(tmp_path / "base", place / "llama")
    every = [f"w{number}" for number in range(4)]
    rows: list[Any] = [{"prompt": word, "completion": f"w{10 + number}"} for number, word in enumerate(every)] * 4
    if kind == "chats":
        rows = [
            {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}], "text": "w9"}
            for row in rows
        ]
    data = str(trainable.save_jsonl(tmp_path / "rows.jsonl", rows))
    expert = str(tmp_path / "expert.safetensors")
    words = ("--model", str(base), "--data", data, "--task", "causal-lm", "--validation", "0", "--method", "pafi", "--density", "1")
    before = sys.argv
    sys.argv = ["sterna", "train", *words, "--epochs", "100", "--learning-rate", "3e-2", "-o", expert]
    try:
        with pytest.raises(SystemExit) as left:
            commands.main()
    finally:
        sys.argv = before
    assert not left.value.code
    capsys.readouterr()
    metrics = ("--metric", "exact_match", "--metric", "figures:hits", "--metric", "perplexity", "--target-max-length", "4")
    assert run(str(base), expert, "--data", data, *metrics, "--json") == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    base_scores, scores = ({name: found["value"] for name, found in model["scores"].items()} for model in task["models"])
    assert scores["exact_match"] == 100
    assert scores["figures:hits"] == 1
    assert scores["perplexity"] < base_scores["perplexity"]
    assert base_scores["exact_match"] < 50
    assert run(str(base), expert, "--data", data) == 0
    assert capsys.readouterr().out.startswith("16 rows of rows.jsonl; causal-lm; base base")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("llama", "--data", "letters.csv", "--task", "causal-lm", "--metric", "exact_match"), "expected rows with a target (--target NAME"),
        (("llama", "--data", "letters.csv", "--task", "causal-lm", "--metric", "figures:hits"), "expected rows with a target (--target NAME"),
        (("llama", "--data", "letters.csv", "--target", "lable", "--task", "causal-lm"), "target: there is no column 'lable' (near: 'label')"),
        (("bert", "letters.safetensors"), "--data is missing"),
        (("bert", "letters.safetensors", "--data", "nowhere.csv"), "no file nowhere.csv"),
        (("nowhere", "letters.safetensors", "--data", "letters.csv"), "'nowhere' is neither"),
        (("bert", "nowhere.safetensors", "--data", "letters.csv"), "nowhere.safetensors"),
        (("bert", "letters-tuned", "--data", "letters.csv"), "letters-tuned is a folder; expected an expert file"),
        (("bert", "letters.safetensors", "letters.safetensors", "--data", "letters.csv"), "given twice"),
        (("llama", "letters.safetensors", "--data", "letters.csv"), "LlamaForSequenceClassification"),
        ((*ONE, "--tuned", "llama"), "agree"),
        ((*ONE, "--tuned", "sorts-tuned"), "has the classes|has 3 classes"),
        (("bert", "sorts.safetensors", "--data", "letters.csv"), "the labels do not fit: letters.csv has 2 ('a', 'b')"),
        ((*ONE, "--metric", "acuracy"), "did you mean 'accuracy'"),
        ((*ONE, "--metric", "figures:bad"), "figures:bad gives nan on 32 rows"),
        ((*ONE, "--metric", "figures:none"), "has no 'none'"),
        ((*ONE, "--task", "ranking"), "--task is 'ranking'"),
        ((*ONE, "--label", "lable"), "label: there is no column 'lable'"),
        ((*ONE, "--controls"), "controls are made of the tuned model"),
        ((*ONE, "-o", "no/such/folder/r.json"), "cannot be written"),
        ((*ONE, "--data", "sorts.csv"), "names no task"),
        ((*ONE, "--head", "x", "--data", "l=sorts.csv"), "names no task"),
        (("bert", "both.safetensors", "--data", "letters.csv"), "choose one of letters, sorts"),
        (("bert", "both.safetensors", "--data", "letters.csv", "--head-task", "letter"), "no head for 'letter'"),
        (("bert", "letters.safetensors", "--data", "letters=letters.csv", "--data", "sorts=sorts.csv"), "no expert is for the task 'sorts'"),
        (("bert", "letters.safetensors", "sorts.safetensors", "--data", "letters=letters.csv", "--data", "q=sorts.csv"), "sorts is for sorts"),
        (("bert", "both.safetensors", "--data", "letters=letters.csv", "--data", "letters=sorts.csv"), "given twice for the task 'letters'"),
        (
            ("bert", "both.safetensors", "--data", "letters=letters.csv", "--data", "sorts=sorts.csv", "--tuned", "letters-tuned"),
            "expected TASK=DIR for each",
        ),
    ],
)
def test_a_mistake_is_one_line_and_no_model_is_run(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sterna.scoring.evaluate._scores", lambda *_: pytest.fail("a model was run on all rows"))
    assert run(*words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1, shown.err
    assert any(part in shown.err for part in said.split("|")), shown.err


def test_python_raises_the_same_as_exceptions() -> None:
    cases: list[tuple[type[SternaError] | tuple[type[SternaError], ...], dict[str, Any]]] = [
        (InvalidArgument, {"data": {}}),
        (NotFound, {"data": "nowhere.csv"}),
        (BadMetric, {"data": "letters.csv", "metric": lambda p, w: 1 / 0}),
        ((PairingError, WrongModel, WrongBase), {"data": "letters.csv", "tuned": "llama"}),
        (InvalidArgument, {"data": "letters.csv", "tuned": {"other": "letters-tuned"}}),
    ]
    for error, words in cases:
        with pytest.raises(error):
            sterna.evaluate("bert", ["letters.safetensors"], **words)


def test_an_interrupt_says_so_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    trainable.save_csv(tmp_path / "many.csv", 20_000)
    (tmp_path / "marking.py").write_text("def hits(predicted, wanted):\n    open('probed', 'w').close()\n    return 1.0\n", encoding="utf-8")
    words = [str(place / "bert"), str(place / "letters.safetensors"), "--data", "many.csv", "--batch-size", "1", "-o", "r.json"]
    process = subprocess.Popen(
        [STERNA, "evaluate", *words, "--metric", "marking:hits"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / "probed").exists() and process.poll() is None:  # then the long work starts
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert err.strip() == "sterna: interrupted; nothing was written"
    assert not (tmp_path / "r.json").exists()


# What is shown


def evaluated(*shares: float, metric: Metric = METRICS["accuracy"]) -> Evaluated:
    """Models that have so large a share of 200 rows right, nested in one another."""
    import numpy as np

    entries = []
    for number, share in enumerate(shares):
        right = np.arange(200) < 200 * share
        outcome = Outcome(metric, 100 * float(right.mean()), mean_of(right), right if metric.name == "accuracy" else None)
        name = ["base", "a-tuned-model-of-a-long-name", "expert"][number]
        entries.append(Entry(name, "base" if not number else "expert", None if not number else 10**number, {metric.name: outcome}))
    task = TaskScores("", "rows.csv", "classification", 200, 0, ("a", "b"), "own", (metric,), tuple(entries), entries[1].name)
    return Evaluated("base", (task,), {}, 0.0)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_tables_fit_any_terminal_and_keep_every_number(width: int) -> None:
    console = Console(width=width, no_color=True, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for part in tables(evaluated(0.1, 0.9, 0.895), console):
        console.print(part)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    if width >= 60:
        for number in ("10.0", "90.0", "89.5", "+80.0", "-0.5", "noise", "p < .001", "10 bytes", "100 bytes"):
            assert number in text, text


def test_numbers_have_the_digits_that_their_size_asks_for() -> None:
    points, own = METRICS["accuracy"], METRICS["loss"]
    assert figures(points, 88.04, 7.55) == ["88.0", "7.5"] or figures(points, 88.04, 7.55) == ["88.0", "7.6"]
    assert figures(points, -0.01) == ["0.0"]
    assert figures(own, 1234.5) == ["1234.5"]
    assert figures(own, 1.23456) == ["1.235"]
    assert figures(own, 0.01234) == ["0.0123"]
    found = Difference(2.0, 1.0, 3.0, 0.0312, "McNemar", 100, 0.5)
    assert differing(found, points) == ("+2.0 [1.0, 3.0]", "p = .031")
    assert differing(Difference(2.0, -1.0, 3.0, 0.2, "McNemar", 100, 0.5), points)[1] == "noise"


def test_a_noisy_difference_says_how_many_rows_would_settle_it() -> None:
    console = Console(width=200, no_color=True, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for part in tables(evaluated(0.1, 0.9, 0.895), console):
        console.print(part)
    assert "a difference of 0.5 would show on about" in console.export_text()
    assert "would show" not in str(evaluated(0.1, 0.9, 0.9).to_dict())
