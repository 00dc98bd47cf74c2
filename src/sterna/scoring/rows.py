"""Rows to score a model on: from files, a hub or memory, as examples of a task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sterna.errors import InvalidArgument, InvalidFile
from sterna.scoring.purpose import Purpose
from sterna.training.config import Data
from sterna.training.data import Examples, find_columns, read_examples, sorted_labels
from sterna.training.errors import Faults
from sterna.training.tables import Table, load_table
from sterna.training.tasks import TaskName

Rows = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Sequence[Mapping[str, Any]]
"""A file, a folder or a hub id, several files, or rows as mappings from column to cell."""


def table_of(data: Rows) -> Table:
    """The rows as a table. Raises NotFound, InvalidFile, InvalidArgument."""
    if isinstance(data, str | os.PathLike):
        return load_table(os.fspath(data), Data(split="test"), "train")
    files = [os.fspath(part) for part in data if isinstance(part, str | os.PathLike)]
    cells = [part for part in data if isinstance(part, Mapping)]
    if cells and len(cells) == len(data):
        return Table("the given rows", tuple(dict.fromkeys(str(column) for row in cells for column in row)), cells, {})
    if files and len(files) == len(data):
        return load_table(files, Data(split="test"), "train")
    given = f"a list of {type(data[0]).__name__}" if len(data) else "an empty list"
    raise InvalidArgument(f"data is {given}; expected files, a hub id, or mappings from column to cell")


def examples_of(
    table: Table, task: TaskName, text: str | None = None, label: str | None = None, pair: str | None = None, target: str | None = None
) -> tuple[Examples, int]:
    """The rows with everything that the task needs, labels by name, and how many lack something. Raises InvalidArgument, InvalidFile."""
    faults = Faults()
    columns = find_columns(table, Data(text=text, label=label, text_pair=pair, target=target), task, faults)
    if columns is None:
        raise InvalidArgument("; ".join(fault.removeprefix("data.") for fault in faults.found))
    return read_examples(table, columns, task)


def classes_of_labels(labels: Sequence[str], own: Purpose, source: str) -> tuple[str, ...]:
    """The classes of a head that nothing names: the base's own count where it has one, else the labels themselves."""
    if own.classes:
        return own.classes
    found = sorted_labels(dict.fromkeys(labels, 1))
    if 2 * len(found) > len(labels):
        raise InvalidFile(f"{source} has {len(found)} labels in {len(labels)} rows: is this the column of the label, or is the task a regression?")
    return found


def refuse_one_class(labels: Sequence[str], source: str) -> None:
    """Raise InvalidFile where all rows have one label."""
    if len(set(labels)) < 2:
        raise InvalidFile(f"{source} has one label only ({labels[0]!r}): a classification is scored on two or more")
