"""`sterna merge --recompress --data`: what making the merged expert ternary again costs in score, beside `sterna evaluate` on the two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sterna
import trainable
from sterna.commands import app

TASKS = {"letters": "ab", "sorts": "xyz"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, experts of two tasks of 2 and 3 classes, and rows of both."""
    folder = tmp_path_factory.mktemp("scores")
    trainable.save_base("bert", folder / "bert")
    trainable.save_experts(folder, TASKS)
    for seed, (name, labels) in enumerate(TASKS.items(), 1):
        lines = ["text,label", *(f"{row['text']},{labels[i % len(labels)]}" for i, row in enumerate(trainable.rows(30, seed)))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, words)])


def test_every_task_is_scored_before_and_after(place: Path, tmp_path: Path) -> None:
    experts = [place / "letters.safetensors", place / "sorts.safetensors"]
    words = [*experts, "--method", "linear", "--recompress", "0.05,2", "--base", place / "bert"]
    words += ["--data", f"letters={place / 'letters.csv'}", "--data", f"sorts={place / 'sorts.csv'}"]
    told = run(*words, "-o", tmp_path / "both.safetensors")
    assert told.exit_code == 0, told.output
    assert all(f"{name}, head {task}" in told.output for name in ("merged", "recompressed") for task in ("letters", "sorts"))
    ours = json.loads(run(*words, "-o", tmp_path / "again.safetensors", "--json").stdout)["scores"]
    sterna.merge(experts, "linear").save(tmp_path / "merged.safetensors")
    data = {name: place / f"{name}.csv" for name in ("letters", "sorts")}
    wanted = sterna.evaluate(place / "bert", [tmp_path / "merged.safetensors", tmp_path / "both.safetensors"], data=data)
    for found, task in zip(ours["tasks"], wanted.tasks, strict=True):
        values = [model["scores"]["accuracy"]["value"] for model in found["models"]]
        assert values == [entry.outcomes["accuracy"].value for entry in task.entries]
        assert "merged" in found["models"][2]["scores"]["accuracy"]["against"]
    assert sterna.load(tmp_path / "both.safetensors").content_digest == sterna.load(tmp_path / "again.safetensors").content_digest


@pytest.mark.parametrize("left_out", ["--recompress", "--base"])
def test_data_needs_both(left_out: str, place: Path, tmp_path: Path) -> None:
    given = {"--recompress": "0.1", "--base": str(place / "bert"), "--data": str(place / "letters.csv")}
    words = [word for name, value in given.items() if name != left_out for word in (name, value)]
    told = run(place / "letters.safetensors", "--method", "linear", *words, "-o", tmp_path / "out.safetensors")
    assert told.exit_code != 0
    assert "--data shows what --recompress loses over --base" in f"{told.output}{told.exception}"
    assert not (tmp_path / "out.safetensors").exists()
