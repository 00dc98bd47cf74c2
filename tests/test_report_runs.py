"""Reports of run folders: what sterna train held out, and what sterna search tried."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import sterna
import trainable
from sterna import commands


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    trainable.save_base("bert", folder / "base")
    trainable.save_csv(folder / "train.csv", 160)
    trainable.save_csv(folder / "select.csv", 60, seed=1)
    return folder


@pytest.mark.parametrize("kind", ["completions", "chats"])
def test_a_report_of_a_language_model_s_answers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainable.save_base("llama", tmp_path / "plain")
    trainable.save_chatting(tmp_path / "base", tmp_path / "plain")
    rows = trainable.completions(40) if kind == "completions" else trainable.chats(40)
    trainable.save_jsonl(tmp_path / "rows.jsonl", rows)
    words = ("--task", "causal-lm", "--method", "full", "--max-steps", "4", "--test", "0.3", "--set", "data.target_max_length=3")
    trained = run(tmp_path, monkeypatch, capsys, "train", "--model", "base", "--data", "rows.jsonl", *words, "-o", "answers")
    for metric in ("perplexity", "exact_match"):
        report = run(tmp_path, monkeypatch, capsys, "report", "answers.run", "--metric", metric, "--repeats", "3", "--no-controls", "-o", "r.html")
        (task,) = report["tasks"]
        assert (task["rows"], task["metric"]["name"]) == (12, metric)
        if metric == "perplexity":
            scores = {one["kind"]: one["score"]["value"] for one in task["candidates"]}
            assert scores["tuned"] == pytest.approx(trained["metrics"]["trained"]["test"]["perplexity"], rel=1e-4)
            assert scores["expert"] == pytest.approx(trained["metrics"]["expert"]["test"]["perplexity"], rel=1e-4)


def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """The JSON that a command prints."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["sterna", *words, "--json"])
    with pytest.raises(SystemExit) as left:
        commands.main()
    said = capsys.readouterr()
    assert not left.value.code, said.err
    return json.loads(said.out)


def test_reports_of_a_training_and_of_a_search(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def sterna_(*words: str) -> Any:
        return run(place, monkeypatch, capsys, *words)

    columns = ("--text-column", "text", "--label-column", "label")
    fields = ("--method", "full", "--learning-rate", "0.003", "--epochs", "2", "--validation", "0.1", "--test", "0.25", *columns)
    trained = sterna_("train", "--model", "base", "--data", "train.csv", *fields, "-o", "news")
    report = sterna_("report", "news.run", "--repeats", "3", "-o", "train.html")
    (task,) = report["tasks"]
    assert "16-bit delta, tuned scale" in {one["label"] for one in task["candidates"]}  # chosen on the validation rows
    scores = {one["kind"]: one["score"]["value"] for one in task["candidates"] if one["kind"] in ("tuned", "expert")}
    assert (task["name"], task["rows"]) == ("news", trained["rows"]["test"])
    assert scores["tuned"] == pytest.approx(100 * trained["metrics"]["trained"]["test"]["accuracy"])  # on the rows that training held out
    assert scores["expert"] == pytest.approx(100 * trained["metrics"]["expert"]["test"]["accuracy"])

    words = ("--data", "select.csv", *columns, "--within", "5", "--meta", "task=small")
    found = sterna_("search", "base", "news.run/trained", *words, "-o", "small.safetensors")
    report = sterna_("report", "small.search", "--repeats", "3", "-o", "search.html")
    (task,) = report["tasks"]
    assert "16-bit delta, tuned scale" in {one["label"] for one in task["candidates"]}  # chosen on the rows of the selection
    assert (task["name"], task["rows"], task["trail_rows"]) == ("small", found["test"]["rows"], found["selection"]["rows"])
    kept = ("density", "alpha", "bytes", "score")
    tried = [(*(one[name] for name in kept[:3]), one["score"]["value"]) for one in task["trail"]]
    assert tried == [tuple(one[name] for name in kept) for one in found["trials"]]
    assert sum(one["chosen"] for one in task["trail"]) == 1
    (expert,) = [one for one in task["candidates"] if one["kind"] == "expert"]
    assert expert["score"]["value"] == found["test"]["expert"]["value"]
    assert expert["bytes"] == (place / "small.safetensors").stat().st_size
    assert sterna.load(place / "small.safetensors").facts.density == expert["density"]

    words = ("--base", "base", "--tuned", "news.run/trained", "--data", "select.csv", *columns, "--repeats", "3")
    report = sterna_("report", "small.safetensors", *words, "-o", "file.html")
    (task,) = report["tasks"]
    whole = found["test"]["rows"] + found["selection"]["rows"]
    assert task["rows"] == round(0.8 * whole)
    assert ["small: rows kept apart", f"{whole - task['rows']}, for the scale of a control"] in report["inputs"]

    shutil.move(place / "news.safetensors", place / "away.safetensors")
    monkeypatch.setattr(sys, "argv", ["sterna", "report", "news.run"])
    with pytest.raises(SystemExit) as left:
        commands.main()
    assert left.value.code == 2
    assert "news.safetensors, the expert of news.run, is not there" in capsys.readouterr().err
