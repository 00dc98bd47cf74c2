"""The heads of an expert that was merged: each parent's goes along under its task's name, and one of them is chosen where the expert is used."""

from __future__ import annotations

from dataclasses import replace

from sterna.errors import InvalidArgument
from sterna.expert.changes import Add, Change, Set
from sterna.expert.expert import Expert
from sterna.expert.palette import Palette, for_task


def tasks(expert: Expert) -> tuple[str, ...]:
    """The tasks whose heads the expert carries by name, sorted; none for an expert that was not merged."""
    return tuple(sorted(expert.facts.heads))


def with_head(expert: Expert, task: str | None = None) -> Expert:
    """The expert with the head, configuration and class of one of its tasks, and its mask and scale where the expert has some, as if for it alone.

    Without `task`, of the only one there is; an expert without heads by name is returned as it is.
    Raises InvalidArgument, with the tasks that there are, for a task that the expert has no head for, or where none is chosen among several.
    """
    there = tasks(expert)
    if task is None and len(there) < 2:
        if not there:
            return expert
        task = there[0]
    if task not in there:
        listed = ", ".join(there)
        if not there:
            raise InvalidArgument(f"the head of {task!r} is wanted, but the expert has no heads by name: it was not merged, or its parents had none")
        told = f"the expert has no head for {task!r}" if task is not None else f"the expert has the heads of {len(there)} tasks"
        raise InvalidArgument(f"{told}; choose one of {listed} (head=..., --head-task ...)")
    chosen = expert.facts.heads[task]
    facts = replace(
        expert.facts,
        config={**expert.facts.config, **chosen.get("config", {})},
        architecture=chosen.get("architecture", expert.facts.architecture),
        prefixes=(expert.facts.prefixes[0], chosen.get("prefix", expert.facts.prefixes[1])),
        dropped=tuple(chosen.get("dropped", expert.facts.dropped)),
        heads={},
    )
    masked = any(isinstance(change, Palette) and change.tasks for change in expert.changes)
    leveled = [change for change in expert.changes if isinstance(change, Add | Palette)] if masked else []
    chosen_values = {change.name: change for change in for_task(leveled, there.index(task))}
    kept = (change for change in expert.changes if not isinstance(change, Set) or change.task in ("", task))
    changes = tuple(_own(chosen_values.get(change.name, change) if isinstance(change, Add | Palette) else change) for change in kept)
    return replace(expert, facts=facts, changes=changes, file_digest=None, file_bytes=None)


def _own(change: Change) -> Change:
    return replace(change, task="") if isinstance(change, Set) else change
