"""Records from a file of rows: CSV, TSV and JSON lines, with the line that each one stands in."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from sterna.errors import InvalidArgument, InvalidFile, NotFound

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".jsonl")


def read_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The line number and the cells by column of every row; a cell that is missing at the end of a CSV row is None.

    Raises:
        NotFound: no such file.
        InvalidArgument: a suffix other than .csv, .tsv, .jsonl.
        InvalidFile: not readable as what the suffix says.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidArgument(f"{path.name} ends in {suffix or 'nothing'}: expected {', '.join(SUFFIXES)}")
    try:
        yield from _json_lines(path) if suffix == ".jsonl" else _separated(path, DELIMITERS[suffix])
    except UnicodeDecodeError as error:
        raise InvalidFile(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read: {error.strerror or error}") from error


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
