"""The search: what it promises of sizes and scores, how few evaluations it takes, that it resumes, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import sterna
import trainable
from models import made, noise, same_state, state_of, tuned
from sterna.errors import CannotWrite, InvalidArgument
from sterna.scoring.metrics import BadMetric
from sterna.searching.candidates import Setting
from sterna.searching.result import Evaluated, Goal, frontier
from sterna.searching.search import choice
from sterna.searching.strategy import Explorer, Family, Spent, density_for
from sterna.summary import ternary_entropy

FAMILIES = [Family("scaled", 1, "int8"), Family("balanced", 1, "int8"), Family("global", 2, "int8")]
GRID = [(k, a) for k in (0.05, 0.1, 0.2, 0.3, 0.5) for a in (0.5, 1, 2, 3, 4, 5, 6, 8, 10)]


@dataclass
class Smooth:
    """Scores as measured ones run: they grow with density to a plateau, and fall by the square of ln(u) from a peak that moves with density."""

    peak: float = 0.4
    slope: float = -0.15
    curvature: float = 0.3
    half: float = 0.005
    noise: float = 0.0
    entries: int = 22_000_000
    base: float = 0.0
    tuned: float = 1.0
    asked: list[Setting] = field(default_factory=list)

    def bytes(self, setting: Setting) -> int:
        head = 31_000 if setting.head == "exact" else 8_000
        return int(7_000 + head + self.entries * ternary_entropy(setting.density) / 8 * (1.7 if setting.planes > 1 else 1.0))

    def best(self, density: float, allocation: str = "scaled") -> float:
        share = (density * (1.3 if allocation == "scaled" else 1.0)) ** 0.7
        return 1.02 * share / (share + self.half**0.7)

    def score(self, setting: Setting) -> float:
        self.asked.append(setting)
        place = math.log(setting.alpha * math.sqrt(setting.density)) - self.peak - self.slope * math.log(setting.density / 0.05)
        best = self.best(setting.density, setting.allocation)
        return best * (1 - self.curvature * place * place) + random.Random(str(setting)).gauss(0, self.noise)

    def smallest(self, wanted: float) -> float:
        """The smallest density whose best score reaches `wanted`, under `scaled`."""
        low, high = 1e-9, 1.0
        for _ in range(80):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.best(middle) >= wanted else (middle, high)
        return high


SHAPES: dict[str, dict[str, float]] = {
    "as the encoder": {},
    "small scales": {"peak": -0.3},
    "large scales": {"peak": 1.0},
    "no slope": {"slope": 0.0},
    "steep slope": {"slope": -0.35},
    "sharp": {"curvature": 1.5},
    "flat": {"curvature": 0.05},
    "learns from few": {"half": 3e-4},
    "noisy": {"noise": 0.004},
}


@pytest.mark.parametrize("within", [0.03, 0.1])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_smallest_within_a_loss_is_found_in_few_evaluations(shape: str, within: float) -> None:
    problem = Smooth(**SHAPES[shape])
    explorer = Explorer(problem, 24)
    with contextlib.suppress(Spent):
        explorer.smallest(FAMILIES, 1 - within)
    trials = list(explorer.trials.values())
    chosen, reached = choice(trials, Goal(within=within), None, problem.tuned)
    assert reached
    assert chosen.score >= 1 - within
    truth = problem.bytes(FAMILIES[0].at(problem.smallest(1 - within), 0.0))
    assert chosen.bytes <= (1.35 if shape == "noisy" else 1.25) * truth
    assert len(problem.asked) == len(set(problem.asked)) == len(trials)


@pytest.mark.parametrize("size", [40_000, 300_000, 2_000_000])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_best_under_a_size_is_found_in_a_third_of_the_grids_evaluations(shape: str, size: int) -> None:
    problem = Smooth(**SHAPES[shape])
    explorer = Explorer(problem, 15)
    with contextlib.suppress(Spent):
        explorer.best_under(FAMILIES, size)
    trials = list(explorer.trials.values())
    chosen, reached = choice(trials, Goal(max_bytes=size), size, problem.tuned)
    assert reached
    assert chosen.bytes <= size
    density = density_for(problem.bytes, FAMILIES[0], size)
    assert density is not None
    assert problem.bytes(FAMILIES[0].at(density, 0.0)) >= 0.9 * size
    assert chosen.score >= 0.97 * problem.best(density) - 3 * problem.noise


@pytest.mark.parametrize("shape", list(SHAPES))
def test_it_is_as_good_as_the_authors_grid_at_equal_bytes(shape: str) -> None:
    problem = Smooth(**SHAPES[shape])
    grid = [Setting(k, a) for k, a in GRID]
    best = max(grid, key=problem.score)
    wanted, size = problem.score(best), problem.bytes(best)
    problem.asked.clear()
    explorer = Explorer(problem, len(grid) // 3)
    with contextlib.suppress(Spent):
        explorer.best_under(FAMILIES, size)
    chosen, _ = choice(list(explorer.trials.values()), Goal(max_bytes=size), size, problem.tuned)
    assert len(problem.asked) <= 15
    assert chosen.bytes <= size
    assert chosen.score >= wanted - 0.005 - 3 * problem.noise


def test_it_stops_where_nothing_could_be_saved() -> None:
    """An expert of almost nothing is good enough: what is left is the head and the table."""
    problem = Smooth()
    explorer = Explorer(problem, 24)
    explorer.smallest(FAMILIES, -1.0)
    assert len(problem.asked) <= 8
    chosen, reached = choice(list(explorer.trials.values()), Goal(within=2.0), None, 1.0)
    assert reached
    assert chosen.bytes <= 1.1 * problem.bytes(FAMILIES[0].at(1e-9, 0.0))


def test_hopeless_densities_cost_one_evaluation() -> None:
    """With sharp knowledge of the peak, densities far below the goal are not climbed."""
    problem = Smooth(half=0.05, curvature=0.3, peak=0.25)
    explorer = Explorer(problem, 100)
    explorer.climb(FAMILIES[0], 0.3, math.inf)
    before = len(problem.asked)
    explorer.climb(FAMILIES[0], 0.0005, 0.9)
    assert len(problem.asked) == before + 1


def test_what_cannot_be_reached_ends_with_the_best() -> None:
    problem = Smooth(half=3.0)
    explorer = Explorer(problem, 40)
    explorer.smallest(FAMILIES, 0.99)
    trials = list(explorer.trials.values())
    chosen, reached = choice(trials, Goal(within=0.01), None, 1.0)
    assert not reached
    assert chosen.score == max(trial.score for trial in trials)


def test_the_frontier() -> None:
    trials = [
        Evaluated(Setting(0.1, alpha), size, score) for alpha, size, score in ((1, 10, 5.0), (2, 20, 4.0), (3, 30, 6.0), (4, 30, 5.5), (5, 5, 1.0))
    ]
    assert [trial.bytes for trial in frontier(trials, True)] == [5, 10, 30]
    assert [(trial.bytes, trial.score) for trial in frontier(trials, False)] == [(5, 1.0)]


# On live models


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    base = made("bert")
    after = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(noise(parameter, generator, 0.1))
    return base, after


class Likeness:
    """How near a model's answers are to the tuned one's, 0 (the base) to 1."""

    def __init__(self, base: torch.nn.Module, after: torch.nn.Module, stop_after: int | None = None) -> None:
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(0, 40, (32, 8), generator=generator)
        self.wanted = self.answers(after)
        self.whole = float((self.answers(base) - self.wanted).norm())
        self.calls, self.stop_after = 0, stop_after

    def answers(self, model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=self.ids, output_hidden_states=True).hidden_states[-1]

    def __call__(self, model: Any) -> float:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return 1 - float((self.answers(model) - self.wanted).norm()) / self.whole


def test_on_a_live_model_within_a_loss() -> None:
    base, after = pair()
    before, score = state_of(base), Likeness(base, after)
    result = sterna.search(base, after, score=score, within=0.4, metadata={"task": "legal"})
    assert same_state(base, before)
    assert result.reached
    assert result.selection is not None
    assert (result.selection.base, result.selection.tuned) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert score.calls == len(result.trials) + 2 == result.scored + 2
    with sterna.attached(base, result.expert):
        assert score(base) == result.score >= 0.6
    smaller = [trial for trial in result.trials if trial.bytes < result.bytes - 640]
    assert all(trial.score < 0.6 for trial in smaller)
    note = result.expert.facts.metadata["search"]
    assert result.expert.facts.metadata["task"] == "legal"
    assert (note["goal"], note["evaluations"], note["allocation"]) == ("within 0.4", len(result.trials), result.setting.allocation)
    assert (result.expert.facts.density, result.expert.facts.alpha) == (result.setting.density, result.setting.alpha)
    json.dumps(result.to_dict())


def test_base_and_tuned_model_swapped_are_noticed() -> None:
    base, after = pair()
    said: list[str] = []
    sterna.search(after, base, score=Likeness(base, after), within=0.4, evaluations=1, warn=said.append)
    assert [line for line in said if "worse than the base, 1: were the two swapped?" in line]
    said.clear()
    sterna.search(base, after, score=Likeness(base, after), within=0.4, evaluations=1, warn=said.append)
    assert said == []


def test_less_may_be_better() -> None:
    base, after = pair()
    likeness = Likeness(base, after)
    more = sterna.search(base, after, score=likeness, within=0.4)
    less = sterna.search(base, after, score=lambda model: 5 - likeness(model), within=0.4, higher_is_better=False)
    assert (less.setting, less.bytes) == (more.setting, pytest.approx(more.bytes, abs=80))
    assert less.score == pytest.approx(5 - (more.score or 0))


@pytest.mark.parametrize("coding", ["fast", "small"])
def test_under_a_size_the_file_keeps_it(coding: str, tmp_path: Path) -> None:
    base, after = pair()
    score = Likeness(base, after)
    for size in (2_950, 3_150, 3_400):
        result = sterna.search(base, after, score=score, max_bytes=size, coding=coding, evaluations=10)
        result.expert.save(tmp_path / "x.safetensors")
        assert result.bytes == (tmp_path / "x.safetensors").stat().st_size <= size
        assert result.reached
        assert len(result.trials) <= 10
        assert result.score == max(trial.score for trial in result.trials if trial.bytes <= size - 640)


def test_the_users_metadata_counts(tmp_path: Path) -> None:
    base, after = pair()
    result = sterna.search(base, after, max_bytes=5_000, metadata={"about": "x" * 1_800})
    result.expert.save(tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size == result.bytes <= 5_000
    with pytest.raises(InvalidArgument, match="max_bytes is 4,000"):
        sterna.search(base, after, max_bytes=4_000, metadata={"about": "x" * 1_800})


def test_a_tuned_folder_and_a_base_folder_are_loaded(tmp_path: Path) -> None:
    base, after = pair()
    base.bert.save_pretrained(tmp_path / "base")  # type: ignore[union-attr, operator]
    after.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    trainable.tokenizer("bert").save_pretrained(tmp_path / "base")
    score = Likeness(base, after)
    result = sterna.search(tmp_path / "base", tmp_path / "tuned", score=score, max_bytes=12_000, evaluations=4)
    assert result.selection is not None
    assert result.selection.tuned == pytest.approx(1, abs=1e-6)
    assert result.setting.head == "int8"


@pytest.mark.parametrize("stop_after", [0, 1, 2, 5, 9])
def test_an_interrupted_search_resumes_to_the_same_result(stop_after: int, tmp_path: Path) -> None:
    base, after = pair()
    whole = sterna.search(base, after, score=Likeness(base, after), within=0.4, run_dir=tmp_path / "whole")
    before = state_of(base)
    with pytest.raises(KeyboardInterrupt):
        sterna.search(base, after, score=Likeness(base, after, stop_after), within=0.4, run_dir=tmp_path / "run")
    assert same_state(base, before)
    again = Likeness(base, after)
    resumed = sterna.search(base, after, score=again, within=0.4, run_dir=tmp_path / "run")
    assert again.calls == len(whole.trials) + 2 - stop_after
    assert resumed.expert.digest == whole.expert.digest
    assert resumed.trials == whole.trials
    third = Likeness(base, after)
    assert sterna.search(base, after, score=third, within=0.4, run_dir=tmp_path / "run").expert.digest == whole.expert.digest
    assert third.calls == 0


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import sterna
from test_search import Likeness, pair
class Killed(Likeness):
    def __call__(self, model):
        value = super().__call__(model)
        if self.calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return value
Likeness.__call__, Killed.__qualname__ = Killed.__call__, "Likeness"
base, after = pair()
sterna.search(base, after, score=Likeness(base, after), within=0.4, run_dir=sys.argv[1])
"""


def test_a_killed_search_resumes_to_the_same_result(tmp_path: Path) -> None:
    base, after = pair()
    code = KILLED.replace("super().__call__(model)", "first(self, model)").replace("class Killed", "first = Likeness.__call__\nclass Killed")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), str(Path(__file__).parent), "6"], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    kept = list((tmp_path / "run" / "evaluations").glob("*.json"))
    assert len(kept) == 5  # the sixth was scored, and not kept
    whole = sterna.search(base, after, score=Likeness(base, after), within=0.4)
    again = Likeness(base, after)
    assert sterna.search(base, after, score=again, within=0.4, run_dir=tmp_path / "run").expert.digest == whole.expert.digest
    assert again.calls == len(whole.trials) + 2 - 5


def test_scores_of_another_function_or_model_are_not_taken(tmp_path: Path) -> None:
    base, after = pair()
    sterna.search(base, after, score=Likeness(base, after), max_bytes=9_000, evaluations=2, run_dir=tmp_path)
    other = copy.deepcopy(after)
    with torch.no_grad():
        next(other.parameters()).mul_(1.001)
    score = Likeness(base, other)
    assert sterna.search(base, other, score=score, max_bytes=9_000, evaluations=2, run_dir=tmp_path).scored == 2
    assert sterna.search(base, other, score=lambda model: 1.0, max_bytes=9_000, evaluations=2, run_dir=tmp_path).scored == 2
    for path in (tmp_path / "evaluations").glob("*.json"):
        path.write_text("{")  # damaged: made again
    assert sterna.search(base, other, score=Likeness(base, other), max_bytes=9_000, evaluations=2, run_dir=tmp_path).scored == 2


def fails_at(which: str, how: Callable[[], float]) -> Callable[[Any], float]:
    """A score that goes wrong at its first, second or third model."""
    calls = iter(range(100))
    return lambda model: how() if next(calls) == {"base": 0, "tuned": 1, "a setting": 2}[which] else 0.5


def raises() -> float:
    raise RuntimeError("out of cheese")


@pytest.mark.parametrize("which", ["base", "tuned", "a setting"])
@pytest.mark.parametrize(
    ("how", "said"), [(raises, "raises RuntimeError .*out of cheese"), (lambda: math.nan, "gives nan"), (lambda: math.inf, "inf")]
)
def test_a_score_that_fails_ends_the_search(which: str, how: Callable[[], float], said: str, tmp_path: Path) -> None:
    base, after = pair()
    before = state_of(base)
    with pytest.raises(BadMetric, match=said):
        sterna.search(base, after, score=fails_at(which, how), within=0.1, run_dir=tmp_path)
    assert same_state(base, before)
    scores = [json.loads(path.read_text())["score"] for path in (tmp_path / "evaluations").glob("*.json")]
    assert scores == [0.5] * {"base": 0, "tuned": 1, "a setting": 2}[which]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no goal": ({"score": len}, "goal is missing"),
    "two goals": ({"score": len, "within": 1, "max_bytes": 5}, "both given"),
    "score and data": ({"score": len, "data": "x.csv", "within": 1}, "score and data are both given"),
    "within without a score": ({"within": 1}, "without a score or data"),
    "negative loss": ({"score": len, "within": -0.1}, "within is -0.1"),
    "loss that is no number": ({"score": len, "within": math.nan}, "within is nan"),
    "no bytes": ({"score": len, "max_bytes": 0}, "max_bytes is 0"),
    "too few bytes": ({"score": len, "max_bytes": 900}, "max_bytes is 900, and an expert of the head alone takes some"),
    "no evaluations": ({"score": len, "within": 1, "evaluations": 0}, "evaluations is 0"),
    "unknown coding": ({"score": len, "within": 1, "coding": "zip"}, "zip"),
    "rows with a score": ({"score": len, "within": 1, "label": "x"}, "label is given; expected it with data"),
    "a live base with data": ({"data": [{"text": "a", "label": "b"}], "within": 1}, "expected a model folder"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_arguments_are_refused(name: str) -> None:
    options, said = WRONG[name]
    with pytest.raises(InvalidArgument, match=said):
        sterna.search(*pair(), **options)


def test_a_tuned_model_that_is_the_base_is_refused() -> None:
    base, _ = pair()
    with pytest.raises(InvalidArgument, match="equals the base"):
        sterna.search(base, copy.deepcopy(base), score=lambda model: 1.0, within=0.1)


def test_a_run_folder_that_cannot_be_written_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot be written"):
        sterna.search("no such base", "no such model", score=lambda model: 1.0, within=0.1, run_dir=tmp_path / "file")


def test_without_data_the_closed_form_chooses() -> None:
    base, after = pair()
    plain = sterna.search(base, after)
    assert (plain.setting.density, plain.setting.alpha) == (0.1, 4.1)
    assert plain.trials == ()
    assert plain.selection is None
    small = sterna.search(base, after, max_bytes=3_100)
    assert 2_400 <= small.bytes <= 3_100
    assert small.expert.facts.metadata["search"]["chosen"] == "by formula"


# On rows, from the command line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, what a few steps of training made of it, and rows."""
    folder = tmp_path_factory.mktemp("rows")
    base = trainable.save_base("bert", folder / "base")
    trainable.save_csv(folder / "data.csv", 160, seed=1)
    trainable.save_csv(folder / "test.csv", 60, seed=2)
    import transformers

    torch.manual_seed(0)
    tokenizer = trainable.tokenizer("bert")
    config = {"num_labels": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, **config)
    rows = trainable.rows(256, seed=3)
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    labels = torch.tensor(["ab".index(row["label"]) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "tuned")
    return folder


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command line in the folder of the rows; a process of its own would cost seconds of imports each time."""
    from sterna.commands import main

    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sterna", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        return Done(int(left.value.code or 0), *capsys.readouterr())

    return run


def test_the_command_chooses_and_tests_on_rows_that_selection_never_saw(place: Path, command: Callable[..., Done]) -> None:
    done = command("search", "base", "tuned", "--data", "data.csv", "--within", "2", "-o", "one.safetensors", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (place / "one.safetensors").stat().st_size == found["bytes"]
    assert (found["selection"]["rows"], found["test"]["rows"]) == (80, 80)
    assert found["selection"]["tuned"]["value"] > found["selection"]["base"]["value"] + 10
    assert found["selection"]["expert"]["value"] >= found["selection"]["tuned"]["value"] - 2
    for part in ("selection", "test"):
        for who in ("base", "tuned", "expert"):
            assert found[part][who]["low"] <= found[part][who]["value"] <= found[part][who]["high"] + 1e-9
    again = command("search", "base", "tuned", "--data", "data.csv", "--within", "2", "-o", "one.safetensors")
    assert again.code == 0, again.err
    assert f"{found['evaluations']} settings scored, 0 of them now" in again.out
    assert "selection, 80 rows" in again.out
    own = command("search", "base", "tuned", "--data", "data.csv", "--test", "test.csv", "--max-bytes", "9K", "-o", "two", "--json")
    assert own.code == 0, own.err
    found = json.loads(own.out)
    assert (found["selection"]["rows"], found["test"]["rows"]) == (160, 60)
    assert (place / "two").stat().st_size == found["bytes"] <= 9_000
    scored = command("evaluate", "base", "two", "--data", "test.csv", "--json")
    assert f"{found['test']['expert']['value']}" in scored.out


def test_selection_and_test_share_no_row(place: Path) -> None:
    """The scores of the test say nothing of the choice: other test rows leave it as it is."""
    results = [
        sterna.search(place / "base", place / "tuned", data=place / "data.csv", test=place / f"{name}.csv", within=2.0) for name in ("data", "test")
    ]
    assert results[0].trials == results[1].trials
    assert results[0].setting == results[1].setting
    split = sterna.search(place / "base", place / "tuned", data=place / "data.csv", within=2.0, seed=4)
    assert split.selection is not None
    assert split.test is not None
    assert (split.selection.rows or 0) + (split.test.rows or 0) == 160


BAD: dict[str, tuple[list[str], str]] = {
    "no rows to measure by": (["--within", "1"], "--data"),
    "no goal": (["--data", "data.csv"], "goal is missing"),
    "no such rows": (["--data", "none.csv", "--within", "1"], "none.csv"),
    "one class": (["--data", "one.csv", "--within", "1"], "one label only"),
    "no label": (["--data", "plain.csv", "--within", "1"], "label"),
    "nothing put aside": (["--data", "data.csv", "--within", "1", "--test", "0"], "test is 0"),
    "a part that is empty": (["--data", "data.csv", "--within", "1", "--test", "0.999"], "cannot be split"),
    "a size that is none": (["--data", "data.csv", "--max-bytes", "small"], "--max-bytes is 'small'"),
    "a size too small": (["--data", "data.csv", "--max-bytes", "1K"], "max_bytes is 1,000"),
    "unknown metric": (["--data", "data.csv", "--within", "1", "--metric", "speed"], "metric is 'speed'"),
    "a metric that raises": (["--data", "data.csv", "--within", "1", "--metric", "builtins:sum"], "raises"),
    "no folder for the file": (["--data", "data.csv", "--within", "1", "-o", "nowhere/x.safetensors"], "cannot be written"),
    "out of reach": (
        ["--data", "data.csv", "--within", "0", "--evaluations", "1", "--run-dir", "far", "--metric", "loss"],
        "none of 1 settings is within",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line(name: str, place: Path, command: Callable[..., Done]) -> None:
    rows = trainable.rows(40)
    (place / "one.csv").write_text("text,label\n" + "".join(f"{row['text']},a\n" for row in rows))
    (place / "plain.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    words, said = BAD[name]
    done = command("search", "base", "tuned", *([] if "-o" in words else ["-o", "bad.safetensors"]), *words)
    assert (done.code, done.out) == (2, ""), done.err
    lines = [line for line in done.err.splitlines() if line.startswith("sterna:")]
    assert said in lines[-1]
    assert "Traceback" not in done.err
    assert not (place / "bad.safetensors").exists()
    assert not (place / "bad.search").exists()


def test_the_loss_that_would_do_does(place: Path, command: Callable[..., Done]) -> None:
    words = ("search", "base", "tuned", "--data", "data.csv", "--metric", "loss", "--evaluations", "1", "-o", "near.safetensors")
    done = command(*words, "--within", "0")
    (loss,) = re.findall(r"--within (\S+) takes it", done.err)
    assert command(*words, "--within", loss).code == 0


def test_a_search_by_what_a_language_model_writes(tmp_path: Path) -> None:
    import transformers

    base = trainable.save_base("llama", tmp_path / "base")
    tuned(transformers.AutoModelForCausalLM.from_pretrained(base), size=0.1).save_pretrained(tmp_path / "tuned")
    rows = trainable.completions(24)
    found = sterna.search(
        base, tmp_path / "tuned", data=rows, metric="exact_match", max_bytes=4_000, evaluations=3, target_max_length=2, run_dir=tmp_path / "run"
    )
    assert found.metric is not None
    assert found.metric.name == "exact_match"
    assert len(found.trials) <= 3
    assert found.selection is not None
    assert found.test is not None
    assert (found.selection.rows, found.test.rows) == (12, 12)
    by_hand = sterna.evaluate(base, found.expert, data=rows, metric="exact_match", target_max_length=2).tasks[0].entries[1]
    assert (found.selection.expert + found.test.expert) / 2 == pytest.approx(by_hand.outcomes["exact_match"].value)
