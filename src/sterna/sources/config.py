"""What a tuned model changed beside its weights: configuration fields and tokenizer additions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sterna.errors import InvalidFile
from sterna.expert.facts import carries
from sterna.sources.checkpoint import read_json

_NEW_FIELDS = frozenset({"id2label", "problem_type", "pad_token_id", "eos_token_id", "bos_token_id", "classifier_dropout", "vocab_size"})
"""Fields that matter where only the tuned configuration has them; the rest of such fields are defaults that a newer library writes out."""


def changed_config(base: Mapping[str, Any], tuned: Mapping[str, Any], has_head: bool) -> dict[str, Any]:
    """The configuration fields in which the tuned model differs from its base; with a head also its labels, which a live model may have otherwise."""
    changed: dict[str, Any] = {}
    for name, value in tuned.items():
        differs = base[name] != value if name in base else name in _NEW_FIELDS and value not in (None, False)
        if carries(name) and (differs or (has_head and name in ("id2label", "label2id"))):
            changed[name] = value
    labels = changed.get("id2label")
    if isinstance(labels, Mapping) and changed.get("label2id") == {label: int(number) for number, label in labels.items() if str(number).isdigit()}:
        del changed["label2id"]  # made again from its inverse
    return changed


def added_tokens(base: Path | None, tuned: Path | None) -> tuple[Mapping[str, Any], ...]:
    """The entries of the tuned tokenizer.json's added_tokens whose content the base's lacks."""
    entries: list[list[dict[str, Any]]] = []
    for folder in (base, tuned):
        if folder is None or not (folder / "tokenizer.json").is_file():
            return ()
        listed = read_json(folder / "tokenizer.json").get("added_tokens") or []
        if not isinstance(listed, list) or not all(isinstance(entry, dict) and "content" in entry for entry in listed):
            raise InvalidFile(f"{folder / 'tokenizer.json'} has added_tokens that are not a list of tokens")
        entries.append(listed)
    known = {entry["content"] for entry in entries[0]}
    return tuple(entry for entry in entries[1] if entry["content"] not in known)
