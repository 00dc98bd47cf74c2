"""Rows held against a base and what is to be run on it, as far as files can tell: the task, the examples, the classes in the head's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sterna.scoring.labels import generic, is_generic, numbered
from sterna.scoring.purpose import Purpose, task_by_data
from sterna.scoring.rows import classes_of_labels, examples_of, refuse_one_class
from sterna.training.data import Examples
from sterna.training.tables import Table
from sterna.training.tasks import TaskName


@dataclass(frozen=True, slots=True)
class Fitted:
    """`classes` are the head's, in the order that answers are numbered in, `names` the same in the words of the data; both empty without classes."""

    task: TaskName
    examples: Examples
    dropped: int
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def fitted(
    own: Purpose,
    wanted: Purpose | None,
    settings: Any,
    table: Table,
    *,
    task: TaskName | None = None,
    text: str | None = None,
    label: str | None = None,
    text_pair: str | None = None,
    target: str | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Fitted:
    """The rows of a table for a base (`own` is what it was made for, `settings` its configuration) and for what is `wanted` of it, if anything.

    Raises InvalidArgument for columns that are not there, one label only, and labels that are not the head's.
    """
    said = wanted or Purpose()
    chosen: TaskName = task or said.task or task_by_data(own, table, target)
    examples, dropped = examples_of(table, chosen, text, label, text_pair, target)
    if chosen != "classification":
        return Fitted(chosen, examples, dropped)
    classes = said.classes_with(settings) or (own.classes if own.classes and not is_generic(own.classes) else None) or ()
    labels = [str(label) for label in examples.answers or ()]
    if not classes:
        found = classes_of_labels(labels, own, table.source)
        classes = found if wanted is None else generic(len(found))  # heads whose classes nothing names
    refuse_one_class(labels, table.source)
    answers, names = numbered(labels, classes, table.source, warn)
    return Fitted(chosen, replace(examples, answers=answers), dropped, tuple(classes), names)
