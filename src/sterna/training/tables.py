"""Tables of rows: from CSV, TSV, JSON lines, Parquet and plain text, and from data sets of a hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sterna.errors import InvalidArgument, InvalidFile, NotFound
from sterna.needs import needed, quiet
from sterna.training.config import Data
from sterna.training.files import SUFFIXES, read_records

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows as mappings from column to cell. `names` are the label names of columns whose cells are indices, as hubs have them."""

    source: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    names: Mapping[str, Sequence[str]]


def load_table(given: str | list[str], data: Data, split: str) -> Table:
    """The rows of files (.csv, .tsv, .jsonl, .parquet, .txt), of a folder of .txt files, or of a split of a hub's data set (`datasets`).

    Raises:
        NotFound: no such file, or no such data set.
        InvalidArgument: a suffix that is not known, or files of different columns.
        InvalidFile: not readable as what the suffix says, or without rows.
    """
    parts = [_load(one, data, split) for one in ([given] if isinstance(given, str) else given)]
    if not parts:
        raise InvalidArgument("an empty list; expected a file or more")
    table = parts[0]
    if len(parts) > 1:
        for other in parts[1:]:
            if set(other.columns) != set(table.columns):
                raise InvalidArgument(f"{other.source} has the columns {listed(other.columns)}, {table.source} has {listed(table.columns)}")
        table = replace(table, rows=[row for part in parts for row in part.rows])
    if not len(table.rows):
        raise InvalidFile(f"{table.source} has no rows")
    return table


def _load(given: str, data: Data, split: str) -> Table:
    path = Path(given).expanduser()
    suffix = path.suffix.lower()
    if suffix == ".txt" or (path.is_dir() and any(path.glob("*.txt"))):
        return _documents(path, data)
    if suffix in SUFFIXES:
        rows = [record for _, record in read_records(path)]
        columns = tuple(dict.fromkeys(column for row in rows for column in row))
        return Table(path.name, columns, rows, {})
    if suffix == ".parquet":
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
        return _loaded(path.name, "parquet", data_files=str(path), split="train")
    if path.is_file():
        raise InvalidArgument(f"{path.name} ends in {suffix or 'nothing'}; expected .csv, .tsv, .jsonl, .parquet or .txt")
    if split != "train" and isinstance(data.train, str) and _HUB_ID.fullmatch(given) and "/" not in given and not path.exists():
        given, wanted = data.train, given  # a split's name
    else:
        wanted = data.split if split == "train" else split
    if not Path(given).expanduser().is_dir() and not _HUB_ID.fullmatch(given):
        raise NotFound(f"{given} is no file; expected a .csv, .tsv, .jsonl, .parquet or .txt file, a folder, or a hub id")
    return _loaded(given, str(Path(given).expanduser()), data.name, revision=data.revision, split=wanted)


def _documents(path: Path, data: Data) -> Table:
    """One document a line of a file, or one a file of a folder, unless the config says otherwise."""
    if not path.exists():
        raise NotFound(f"there is no file {path}")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        texts = [file.read_text(encoding="utf-8-sig") for file in files]
    except UnicodeDecodeError as error:
        raise InvalidFile(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read: {error.strerror or error}") from error
    if (data.documents or ("file" if path.is_dir() else "line")) == "line":
        texts = [line for text in texts for line in text.splitlines()]
    return Table(path.name, ("text",), [{"text": text} for text in texts], {})


def _loaded(label: str, *words: Any, **fields: Any) -> Table:
    datasets = needed("datasets", "sterna[train]")
    bars = datasets.is_progress_bar_enabled() if hasattr(datasets, "is_progress_bar_enabled") else False
    try:
        if bars:
            datasets.disable_progress_bars()
        with quiet():
            rows = datasets.load_dataset(*words, **fields)
    except Exception as error:  # datasets, the hub's client and the readers below them each have their own
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotFound(f"{label} does not load as a data set: {said}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    names = {column: tuple(kind.names) for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    return Table(Path(label).name, tuple(rows.column_names), rows, names)


def listed(names: Iterable[Any], most: int = 12) -> str:
    names = list(names)
    shown = ", ".join(repr(name if len(str(name)) <= 40 else str(name)[:37] + "...") for name in names[:most])
    return (shown or "no columns") + (f" and {len(names) - most} more" if len(names) > most else "")
