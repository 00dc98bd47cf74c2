"""A merged expert whose head is no parent's, but was fitted to examples: its record says so, and a replay of the merge takes the head over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sterna.expert.changes import Change, Set
from sterna.expert.expert import Expert

_FITTED = "fitted"


def with_fitted(expert: Expert, head: Sequence[Set], **facts: Any) -> Expert:
    """The merged expert with that head in the place of its parents', and the facts that go with it (`config`, `architecture`, `prefixes`)."""
    changes = sorted([*filter(lambda change: not _is_head(change), expert.changes), *head], key=lambda change: (change.name, _is_head(change)))
    told = replace(expert.facts, **facts, heads={}, merge={**expert.facts.merge, "head": _FITTED})
    return replace(expert, facts=told, changes=tuple(changes), file_digest=None, file_bytes=None)


def is_fitted(expert: Expert) -> bool:
    return expert.facts.merge.get("head") == _FITTED


def with_fitted_of(expert: Expert, other: Expert) -> Expert:
    """The merged expert with the head that was fitted for another."""
    facts = {name: getattr(other.facts, name) for name in ("config", "architecture", "prefixes", "dropped")}
    return with_fitted(expert, [change for change in other.changes if isinstance(change, Set) and change.role == "head"], **facts)


def _is_head(change: Change) -> bool:
    return isinstance(change, Set) and change.role == "head"
