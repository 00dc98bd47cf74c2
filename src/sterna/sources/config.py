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


def changed_config(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration fields in which the tuned model differs from its base."""
    changed: dict[str, Any] = {}
    for name, value in tuned.items():
        known = name in base
        if carries(name) and (base[name] != value if known else name in _NEW_FIELDS and value not in (None, False)):
            changed[name] = value
    labels = changed.get("id2label")
    if isinstance(labels, dict) and changed.get("label2id") == {label: int(i) for i, label in labels.items() if str(i).isdigit()}:
        del changed["label2id"]  # made again from its inverse
    elif "label2id" in tuned and labels is not None and "label2id" not in changed and carries("label2id"):
        inverse = {label: int(i) for i, label in labels.items() if str(i).isdigit()} if isinstance(labels, dict) else None
        if tuned["label2id"] != inverse:
            changed["label2id"] = tuned["label2id"]
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
