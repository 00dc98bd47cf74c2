"""Examples for a task: the columns of its tables found, cleaned, split by seed. Training and evaluation share this."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sterna.errors import InvalidArgument, InvalidFile, SternaError
from sterna.sources.names import near
from sterna.training.chats import Chat, read_chat
from sterna.training.config import Data
from sterna.training.errors import Faults
from sterna.training.tables import Table, listed, load_table
from sterna.training.tasks import TaskName

TEXTS = ("text", "sentence", "content", "document", "dialogue", "article", "review", "message", "input", "source", "question", "prompt")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"), ("question", "sentence"))
LABELS = ("label", "labels", "class", "category", "topic", "score")
TARGETS = ("target", "summary", "output", "answer", "headline", "response", "completion", "translation")
"""Column names that are taken, in this order, where the config names none."""
COMPLETIONS, MESSAGES = ("prompt", "completion"), "messages"
"""TRL's names for rows whose answer a causal language model learns: those of a prompt and a completion, and that of a chat."""

Answers = tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns a task reads: a text, perhaps a second one, and the answer (a label, a number or a target text), if the task has one.

    `chat` where their cells are lists of messages; then the answer may be the last one in the column of the text.
    """

    text: str
    pair: str | None = None
    answer: str | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True)
class Examples:
    """The rows of one split. `answers` are class indices, numbers or target texts; None for language modelling of plain text.

    `pairs` are the second texts. `chats` are whole conversations: their last messages are the answers, and `texts` those before them.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None = None
    answers: Answers | None = None
    chats: tuple[Chat, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def taken(self, order: Sequence[int]) -> Examples:
        """The rows of these places, in this order."""
        pairs, answers, chats = self.pairs, self.answers, self.chats
        return Examples(
            tuple(self.texts[i] for i in order),
            None if pairs is None else tuple(pairs[i] for i in order),
            None if answers is None else tuple(answers[i] for i in order),  # type: ignore[arg-type]
            None if chats is None else tuple(chats[i] for i in order),
        )


@dataclass(frozen=True, slots=True)
class TaskData:
    """The splits of one task. `classes` are the label names of a classification by index; `dropped` counts rows without a text or an answer."""

    task: TaskName
    columns: Columns
    classes: tuple[str, ...]
    train: Examples
    validation: Examples | None
    test: Examples | None
    dropped: int = 0

    def digest(self) -> str:
        """SHA-256 of the class names and of every row in order."""
        whole = hashlib.sha256(json.dumps([self.task, self.classes]).encode())
        for split in (self.train, self.validation, self.test):
            content = None if split is None else [split.texts, split.pairs, split.answers, *([split.chats] if split.chats else [])]
            whole.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return whole.hexdigest()


def guessed_task(data: Data) -> TaskName:
    """Plain text is for language modelling; anything else is taken for a classification."""
    first = data.train if isinstance(data.train, str) or not data.train else data.train[0]
    path = Path(first).expanduser() if isinstance(first, str) else None
    plain = path is not None and (path.suffix.lower() == ".txt" or (path.is_dir() and any(path.glob("*.txt"))))
    return "causal-lm" if plain else "classification"


def load_data(data: Data, task: TaskName, faults: Faults) -> TaskData | None:
    """The splits that the config describes; what is wrong is told to `faults`, each with its field, and the result is then None."""
    before = len(faults.found)
    if not data.train:
        faults.add("data.train", "missing; expected a .csv, .tsv, .jsonl, .parquet or .txt file, a folder of .txt files, or a hub id")
        return None
    tables: dict[str, Table] = {}
    with faults.at("data.train"):
        tables["train"] = load_table(data.train, data, "train")
    for split, given in (("validation", data.validation), ("test", data.test)):
        if isinstance(given, float):
            if not 0 <= given < 1:
                faults.add(f"data.{split}", f"{given:g} is not valid; expected a file, a split's name, or a fraction below 1 to hold out")
        elif given is not None:
            with faults.at(f"data.{split}"):
                tables[split] = load_table(given, data, split)
    if "train" not in tables:
        return None
    columns = find_columns(tables["train"], data, task, faults)
    if columns is None:
        return None
    read: dict[str, tuple[Examples, int]] = {}
    classes: tuple[str, ...] = ()
    for split, table in tables.items():
        with faults.at(f"data.{split}"):
            examples, dropped, names = _examples(table, columns, task, classes if split != "train" else None)
            classes = names or classes
            read[split] = examples, dropped
    if len(faults.found) > before:
        return None
    try:
        return _split(data, task, columns, classes, {name: part for name, (part, _) in read.items()}, sum(n for _, n in read.values()))
    except SternaError as error:
        faults.add("data", str(error))
        return None


def find_columns(table: Table, data: Data, task: TaskName, faults: Faults) -> Columns | None:
    """The columns that the config names or that go by usual names; a fault lists those that there are."""
    before = len(faults.found)
    there = f"{table.source} has {listed(table.columns)}"
    wanted: dict[str, str | None] = {"text": data.text, "text_pair": data.text_pair, "label": data.label, "target": data.target}
    answer = "label" if task in ("classification", "regression") else "target"
    for field, column in wanted.items():
        if column is None:
            continue
        if field in ("label", "target") and field != answer:
            faults.add(f"data.{field}", f"{column!r} is not used: {task} has a {answer}")
        elif field == "text_pair" and task in ("causal-lm", "seq2seq"):
            faults.add("data.text_pair", f"{column!r} is not used: {task} has one text")
        elif column not in table.columns:
            alike = near(column, table.columns)
            faults.add(f"data.{field}", f"there is no column {column!r}{f' (near: {alike[0]!r})' if alike else ''}; {there}")
    text, pair, found = data.text, data.text_pair, wanted[answer]
    if task == "causal-lm":
        text, found = _of_language(table, text, found)
    if text is None and pair is None and task in ("classification", "regression"):
        text, pair = next(((a, b) for a, b in PAIRS if a in table.columns and b in table.columns), (None, None))
    if text is None:
        text = next((name for name in TEXTS if name in table.columns and (task != "causal-lm" or name != found)), None)
    if text is None:
        faults.add("data.text", f"no column goes by a usual name for a text; name one; {there}")
    if found is None and task != "causal-lm":
        usual = LABELS if answer == "label" else TARGETS
        found = next((name for name in usual if name in table.columns and name not in (text, pair)), None)
        if found is None:
            faults.add(f"data.{answer}", f"no column goes by a usual name for a {answer}; name one; {there}")
    if task == "causal-lm" and text is not None and text == found:
        faults.add("data.target", f"{found!r} is the column of the text too; expected another one")
    if len(faults.found) > before or text is None:
        return None
    return Columns(text, pair, found, chat=task == "causal-lm" and _holds_lists(table, text))


def completes(table: Table) -> bool:
    """Whether the table has a prompt and a completion, or a chat, by the names that these usually go by."""
    return all(name in table.columns for name in COMPLETIONS) or (MESSAGES in table.columns and _holds_lists(table, MESSAGES))


def _of_language(table: Table, text: str | None, target: str | None) -> tuple[str | None, str | None]:
    """The columns of prompt and completion; as they are given, where one of them is or the table has neither these nor a chat."""
    if text is None and target in (None, COMPLETIONS[1]) and all(name in table.columns for name in COMPLETIONS):
        return COMPLETIONS
    if text is None and target is None and completes(table):
        return MESSAGES, None
    return text, target


def _holds_lists(table: Table, column: str) -> bool:
    """Whether the first cell of a column that holds anything holds a list."""
    return isinstance(next((cell for row in table.rows if (cell := row.get(column)) is not None), None), list | tuple)


def _examples(table: Table, columns: Columns, task: TaskName, known: tuple[str, ...] | None) -> tuple[Examples, int, tuple[str, ...]]:
    """The rows that have a text and an answer, how many have not, and the class names. `known` are the classes of the training rows."""
    read, dropped = read_examples(table, columns, task)
    if task != "classification":
        return read, dropped, ()
    counts = Counter(str(label) for label in read.answers or ())
    names = table.names.get(columns.answer or "")
    classes = known if known is not None else tuple(names) if names else sorted_labels(counts)
    if known is None:
        _check_labels(counts, len(read), table.source, columns.answer or "")
    index = {label: i for i, label in enumerate(classes)}
    if strange := [label for label in counts if label not in index]:
        raise InvalidFile(f"{table.source} has labels that the training rows lack: {listed(strange)}")
    return replace(read, answers=tuple(index[str(label)] for label in read.answers or ())), dropped, classes


def read_examples(table: Table, columns: Columns, task: TaskName) -> tuple[Examples, int]:
    """The rows that have a text and an answer, labels by name, and how many have not.

    Raises InvalidArgument for a column that the table lacks, and InvalidFile for cells that are not what the task needs, or where no row is left.
    """
    for column in (columns.text, columns.pair, columns.answer):
        if column is not None and column not in table.columns:
            raise InvalidArgument(f"{table.source} has no column {column!r}, which the training rows have; it has {listed(table.columns)}")
    if columns.chat or (task == "causal-lm" and columns.answer is not None):
        return _read_completions(table, columns)
    texts: list[str] = []
    pairs: list[str] = []
    answers: list[Any] = []
    dropped = 0
    names = table.names.get(columns.answer or "")
    for number, row in enumerate(table.rows, 1):
        text = _cell(row, columns.text, table, number)
        pair = "" if columns.pair is None else _cell(row, columns.pair, table, number)
        answer: Any = None if columns.answer is None else _answer(row.get(columns.answer), task, names, table, number, columns.answer)
        if not text or (columns.pair is not None and not pair) or (columns.answer is not None and answer is None):
            dropped += 1
            continue
        texts.append(text)
        pairs.append(pair)
        answers.append(answer)
    _refuse_none(texts, table, columns)
    values = None if columns.answer is None else tuple(answers)
    return Examples(tuple(texts), tuple(pairs) if columns.pair is not None else None, values), dropped


def _read_completions(table: Table, columns: Columns) -> tuple[Examples, int]:
    """Prompts and completions as they stand in the cells, outer white space too: it is what joins them."""
    chats: list[Chat] = []
    texts: list[str] = []
    answers: list[str] = []
    used = [column for column in (columns.text, columns.answer) if column is not None]
    for number, row in enumerate(table.rows, 1):
        if columns.chat:
            chat = read_chat([row.get(column) for column in used], f"{table.source}, row {number}: {' and '.join(map(repr, used))}")
            if chat is not None:
                chats.append(chat)
                texts.append(chat[-2]["content"])
                answers.append(chat[-1]["content"])
        else:
            text, answer = (_whole_cell(row, column, table, number) for column in used)
            if text.strip() and answer.strip():
                texts.append(text)
                answers.append(answer)
    _refuse_none(texts, table, columns)
    return Examples(tuple(texts), None, tuple(answers), tuple(chats) if columns.chat else None), len(table.rows) - len(texts)


def _refuse_none(texts: Sequence[str], table: Table, columns: Columns) -> None:
    if not texts:
        raise InvalidFile(
            f"{table.source} has no row with everything that is needed: {listed(filter(None, (columns.text, columns.pair, columns.answer)))}"
        )


def _cell(row: Mapping[str, Any], column: str, table: Table, number: int) -> str:
    return _whole_cell(row, column, table, number).strip()


def _whole_cell(row: Mapping[str, Any], column: str, table: Table, number: int) -> str:
    value = row.get(column)
    if isinstance(value, dict | list):
        raise InvalidFile(f"{table.source}, row {number}: {column!r} holds a {type(value).__name__}, expected a single value")
    text = "" if value is None else str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, and no tokenizer takes it
        raise InvalidFile(f"{table.source}, row {number}: {column!r} holds a lone surrogate at character {error.start}, expected Unicode") from error
    return text


def _answer(value: Any, task: TaskName, names: Sequence[str] | None, table: Table, number: int, column: str) -> str | float | None:
    if isinstance(value, dict | list):
        raise InvalidFile(f"{table.source}, row {number}: {column!r} holds a {type(value).__name__}, expected a single value")
    if names is not None and isinstance(value, int) and task == "classification":
        return names[value] if 0 <= value < len(names) else None  # -1 stands for a label that is withheld
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    if task != "regression":
        return text
    try:
        figure = float(text)
    except ValueError:
        figure = math.nan
    if not math.isfinite(figure):
        raise InvalidFile(f"{table.source}, row {number}: {column!r} is {text[:40]!r}, expected a finite number")
    return figure


def sorted_labels(labels: Mapping[str, int]) -> tuple[str, ...]:
    """By number where every label is a whole number, or else by name."""
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def _check_labels(counts: Mapping[str, int], rows: int, source: str, column: str) -> None:
    if len(counts) < 2:
        raise InvalidFile(f"{source} has one label only in {column!r} ({listed(counts)}): a classification needs at least two")
    if 2 * len(counts) > rows:
        raise InvalidFile(
            f"{source} has {len(counts)} labels in {rows} rows ({listed(counts)}): is {column!r} the label, or is the task a regression?"
        )


def _split(data: Data, task: TaskName, columns: Columns, classes: tuple[str, ...], read: Mapping[str, Examples], dropped: int) -> TaskData:
    """Hold out the fractions that are asked for, each label in proportion, and keep as many rows as are wanted.

    Raises InvalidArgument or InvalidFile where too few rows are left.
    """
    train = read["train"]
    order = shuffled(train, task, data.seed)
    parts: dict[str, Examples | None] = {name: read.get(name) for name in ("validation", "test")}
    for name in ("test", "validation"):
        fraction = getattr(data, name)
        if isinstance(fraction, float) and fraction > 0:
            held = max(1, round(fraction * len(train)))
            if held >= len(order):
                raise InvalidArgument(f"{name} is {fraction:g}, but too few of the {len(train)} rows of {data.train} are left to train on")
            parts[name], order = train.taken(order[-held:]), order[:-held]
    if data.train_rows is not None:
        order = order[: data.train_rows]
    if task == "classification" and len(set(train.taken(order).answers or ())) < 2:
        raise InvalidFile("the rows left to train on have one label only: hold out fewer, or take more")
    for name, most in (("validation", data.validation_rows), ("test", data.test_rows)):
        part = parts[name]
        if part is not None and most is not None and most < len(part):
            parts[name] = part.taken(shuffled(part, task, data.seed)[:most])
    return TaskData(task, columns, classes, train.taken(order), parts["validation"], parts["test"], dropped)


def shuffled(examples: Examples, task: TaskName, seed: int) -> list[int]:
    """Places shuffled by seed; of a classification so that every front part holds the labels in proportion, and the first rows each label once."""
    places = list(range(len(examples)))
    random.Random(seed).shuffle(places)
    if task != "classification" or examples.answers is None:
        return places
    totals = Counter(examples.answers)
    seen: Counter[int | float | str] = Counter()
    keys: dict[int, float] = {}
    for place in places:
        label = examples.answers[place]
        keys[place] = seen[label] / totals[label]
        seen[label] += 1
    return sorted(places, key=keys.__getitem__)
