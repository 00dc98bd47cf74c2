"""The README's own commands and example, run as they stand there, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
import sterna
import trainable

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [text for named, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if named == language]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder but for `base`, `tuned`, rows and `legal.safetensors`."""
    torch.manual_seed(0)
    classifier: Any = models.bert_classifier(labels=4)
    classifier.config.id2label = dict(enumerate("abcd"))
    classifier.config.label2id = {label: number for number, label in enumerate("abcd")}
    classifier.bert.save_pretrained(tmp_path / "base")
    for seed, (name, count) in enumerate({"news": 40, "legal": 40, "eval": 80, "test": 60, "few": 16}.items()):
        lines = [f"{row['text']},{'abcd'[number % 4]}" for number, row in enumerate(trainable.rows(count, seed))]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    models.tuned(classifier).save_pretrained(tmp_path / "tuned")
    for folder in ("base", "tuned"):
        trainable.tokenizer("bert").save_pretrained(tmp_path / folder)
    sterna.compress(classifier.bert, models.tuned(classifier, seed=2)).save(tmp_path / "legal.safetensors")
    return tmp_path


def test_commands(place: Path) -> None:
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith("sterna ")]
    made = {"train", "compress", "inspect", "verify", "similarity", "recode", "merge", "apply"}
    assert {line.split()[1] for line in commands} == made | {"search", "report", "evaluate", "compose"}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for line in commands:
        done = subprocess.run(line, shell=True, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout


def test_python_example(place: Path) -> None:
    example, _ = blocks("python")
    assert len(example.splitlines()) <= 20
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", example], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, again, digest = done.stdout.splitlines()
    assert first == "4 classes"
    assert again.startswith("2 classes again")
    assert re.fullmatch(r"[0-9a-f]{12} [\d,]+ bytes to undo it", digest)


def test_training_example(place: Path) -> None:
    _, example = blocks("python")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", example], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[\d,]+ values trained; [\d,]+ bytes\n", done.stdout)


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
