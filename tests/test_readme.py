"""The README's own commands and example, run as they stand there, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
    """An empty folder but for `base`, `tuned`, `news.csv` and `legal.safetensors`."""
    torch.manual_seed(0)
    classifier = models.bert_classifier(labels=4)
    classifier.bert.save_pretrained(tmp_path / "base")
    trainable.tokenizer("bert").save_pretrained(tmp_path / "base")
    trainable.save_csv(tmp_path / "news.csv", 40)
    models.tuned(classifier).save_pretrained(tmp_path / "tuned")
    sterna.compress(classifier.bert, models.tuned(classifier, seed=2)).save(tmp_path / "legal.safetensors")
    return tmp_path


def test_commands(place: Path) -> None:
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith("sterna ")]
    assert {line.split()[1] for line in commands} == {"train", "compress", "inspect", "verify", "similarity", "recode", "merge", "apply"}
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
