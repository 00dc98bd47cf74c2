"""docs/training.md against the code: its commands and configs run as they stand there, and its table has every field with its default."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import trainable
from sterna import commands
from sterna.training import config

DOCS = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    for kind, name in (("bert", "encoder"), ("llama", "language-model"), ("t5", "t5")):
        trainable.save_base(kind, folder / name)
    trainable.save_chatting(folder / "instructed", folder / "language-model")
    trainable.save_jsonl(folder / "answers.jsonl", [{"question": row["prompt"], "answer": row["completion"]} for row in trainable.completions(40)])
    trainable.save_jsonl(folder / "chats.jsonl", trainable.chats(40))
    trainable.save_csv(folder / "news.csv", 40)
    trainable.save_csv(folder / "test.csv", 10, seed=1)
    (folder / "dialogue.txt").write_text("\n".join(row["text"] for row in trainable.rows(40)))
    return folder


def fitted(example: str) -> str:
    """The tiny models take 16 tokens at most."""
    return re.sub(r"max_length: \d+", "max_length: 12", example)


def sterna(*words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sterna", *words])
    with pytest.raises(SystemExit) as left:
        commands.main()
    assert left.value.code == 0


@pytest.mark.parametrize("example", EXAMPLES, ids=[yaml.safe_load(example)["output"] for example in EXAMPLES])
def test_the_config_of_each_task(example: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    said = yaml.safe_load(example)
    Path("example.yaml").write_text(fitted(example))
    sterna("train", "example.yaml", monkeypatch=monkeypatch)
    for suffix in (".safetensors", ".metrics.json", ".yaml", ".run/checkpoints"):
        assert Path(said["output"] + suffix).exists()


def test_commands(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("classification.yaml").unlink(missing_ok=True)
    Path("classification.yaml").write_text(fitted(EXAMPLES[0]))
    lines = [line for line in DOCS.splitlines() if line.startswith("sterna ")]
    assert len(lines) == 2
    for line in lines:
        sterna(*shlex.split(line)[1:], monkeypatch=monkeypatch)


def fields() -> dict[str, Any]:
    """Dotted names and defaults of every field, of all kinds of method."""
    found: dict[str, Any] = {}
    sections: list[tuple[str, type[BaseModel]]] = [("", config.TrainingConfig), ("data.", config.Data), ("training.", config.Optimization)]
    sections += [("compress.", config.Compression), ("method.", config.HiWiMethod), ("method.", config.PaFiMethod)]
    for prefix, section in sections:
        found |= {prefix + name: field.default for name, field in section.model_fields.items() if not isinstance(field.default, BaseModel)}
    return found


def test_every_field_is_there_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (.*?) \|", DOCS.partition("## Every field")[2], re.MULTILINE))
    defaults = fields()
    assert set(rows) == set(defaults)
    for name, default in defaults.items():
        shown = {True: "true", False: "false"}.get(default, str(default)) if isinstance(default, bool) else str(default)
        assert default is None or rows[name] == shown, name
