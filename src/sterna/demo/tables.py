"""A person's own labelled texts from a CSV, TSV or JSON-lines file, checked before any work starts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from sterna.demo.data import Row, listed
from sterna.errors import InvalidArgument, InvalidFile, NotFound

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_rows(path: Path, text_column: str, label_column: str) -> list[Row]:
    """(text, label) of every row that has both; numbers as labels become their text.

    Raises:
        NotFound: no such file.
        InvalidArgument: a suffix other than .csv, .tsv, .jsonl, or a column that the file lacks; those it has are listed.
        InvalidFile: not readable as what the suffix says, or no row with a text and a label.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    suffix = path.suffix.lower()
    if suffix not in (*DELIMITERS, ".jsonl"):
        raise InvalidArgument(f"{path.name} ends in {suffix or 'nothing'}: the demo reads .csv, .tsv and .jsonl")
    records = _json_lines(path) if suffix == ".jsonl" else _separated(path, DELIMITERS[suffix])
    rows: list[Row] = []
    try:
        for where, record in records:
            for column in (text_column, label_column):
                if column not in record:
                    raise InvalidArgument(f"{path.name} has no column {column!r} (line {where}): its columns are {listed(record, 20)}")
            text, label = record[text_column], record[label_column]
            if isinstance(text, dict | list) or isinstance(label, dict | list):
                raise InvalidFile(f"{path.name}, line {where}: text and label must be single values, not objects or lists")
            text, label = ("" if cell is None else str(cell).strip() for cell in (text, label))
            if text and label:
                rows.append((text, label))
    except UnicodeDecodeError as error:
        raise InvalidFile(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read: {error.strerror or error}") from error
    if not rows:
        raise InvalidFile(f"{path.name} has no row with both a text in {text_column!r} and a label in {label_column!r}")
    return rows


def _separated(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, object]]]:
    limit = csv.field_size_limit(2**31 - 1)  # texts are longer than the module's 128 KB; its limit is the process's, so it is put back
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            for record in reader:
                yield reader.line_num, {column: cell for column, cell in record.items() if column is not None}
    except csv.Error as error:
        raise InvalidFile(f"{path.name}, after line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidFile(f"{path.name}, line {number} is not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise InvalidFile(f"{path.name}, line {number}: a JSON object is expected, not {type(record).__name__}")
            yield number, record
