"""A person's own labelled texts from a CSV, TSV or JSON-lines file, checked before any work starts."""

from __future__ import annotations

from pathlib import Path

from sterna.demo.data import Row, listed
from sterna.errors import InvalidArgument, InvalidFile
from sterna.training.files import read_records


def read_rows(path: Path, text_column: str, label_column: str) -> list[Row]:
    """(text, label) of every row that has both; numbers as labels become their text.

    Raises:
        NotFound: no such file.
        InvalidArgument: a suffix other than .csv, .tsv, .jsonl, or a column that the file lacks; those it has are listed.
        InvalidFile: not readable as what the suffix says, or no row with a text and a label.
    """
    rows: list[Row] = []
    for where, record in read_records(path):
        for column in (text_column, label_column):
            if column not in record:
                raise InvalidArgument(f"{path.name} has no column {column!r} (line {where}): its columns are {listed(record, 20)}")
        text, label = record[text_column], record[label_column]
        if isinstance(text, dict | list) or isinstance(label, dict | list):
            raise InvalidFile(f"{path.name}, line {where}: text and label must be single values, not objects or lists")
        text, label = ("" if cell is None else str(cell).strip() for cell in (text, label))
        if text and label:
            rows.append((text, label))
    if not rows:
        raise InvalidFile(f"{path.name} has no row with both a text in {text_column!r} and a label in {label_column!r}")
    return rows
