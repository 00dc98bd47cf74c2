"""Labelled texts, split three ways: training, validation (from training rows that are not trained on) and test (never used for choosing)."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sterna.errors import InvalidArgument, InvalidFile

Row = tuple[str, str]  # text, label

SMALLEST = 30  # rows in all; fewer split into nothing that can be measured


@dataclass(frozen=True, slots=True)
class Sizes:
    """The largest number of rows that each split takes."""

    train: int = 4000
    validation: int = 1000
    test: int = 1500


@dataclass(frozen=True, slots=True)
class Split:
    """Texts and the index of each one's class."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class Task:
    """One classification task; `classes` are the label names in sorted order."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    def digest(self) -> str:
        """SHA-256 of what training sees: the class names and the training rows in order."""
        content = json.dumps([self.classes, self.train.texts, self.train.labels], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def newsgroups(folder: Path, sizes: Sizes, seed: int = 0) -> Task:
    """20 newsgroups as the package ships them: lower-cased posts, 20 classes, train and test separated by date."""
    train = [(cells[1], cells[0]) for cells in read_tab(folder / "20newsgroups-train.tab", quoted=False) if len(cells) > 1]
    test = [(cells[1], cells[0]) for cells in read_tab(folder / "20newsgroups-test.tab", quoted=False) if len(cells) > 1]
    order = random.Random(seed)
    order.shuffle(train)
    order.shuffle(test)
    return _task("20 newsgroups", train, test, sizes)


def tweets(folder: Path, sizes: Sizes, seed: int = 0) -> Task:
    """Which of the two candidates of 2016 wrote the tweet: retweets, links and signatures are dropped, since they give the author away."""
    table = read_tab(folder / "election-tweets-2016.tab", quoted=True)
    own = [cells for cells in table if len(cells) > 9 and cells[0] == "False"]
    rows = [(text, cells[7]) for cells in own if (text := clean_tweet(cells[9]))]
    random.Random(seed).shuffle(rows)
    held = min(sizes.test, len(rows) // 5)
    return _task("election tweets", rows[held:], rows[:held], sizes)


def clean_tweet(text: str) -> str:
    """Without links, HTML entities, and the name or initial after a dash that signs a tweet."""
    text = re.sub(r"https?://\S+", "", html.unescape(text))
    text = re.sub(r"(?:(?<=\s)-|\s*[\u2013\u2014])\s?\w{1,12}\s*$", "", text.rstrip(' "\u201d'))
    return " ".join(text.split())


def read_tab(path: Path, quoted: bool) -> list[list[str]]:
    """The rows below the three header lines (names, types, roles) of a tab-separated file; `quoted` where cells may be quoted."""
    with path.open(encoding="utf-8", newline="") as lines:
        # Unquoted, a quotation mark is a character like any other, and the csv module would limit the length of a cell.
        rows = list(csv.reader(lines, delimiter="\t")) if quoted else [line.rstrip("\r\n").split("\t") for line in lines]
    return rows[3:]


def split_rows(name: str, rows: Sequence[Row], sizes: Sizes, seed: int, test: Sequence[Row] | None = None) -> Task:
    """Split a person's own rows by seed, each label in proportion: 80/10/10, or 90/10 where test rows are given apart.

    Raises:
        InvalidFile: fewer than two labels, too few rows, too many labels for the rows, a test label that training never saw,
            or test texts that all occur in training.
        InvalidArgument: more labels than training rows asked for.
    """
    rows = _without_repeats(rows)
    _check(rows, sizes)
    ordered = _interleaved(rows, seed)
    tenth = len(rows) // 10
    # Every part of the order holds the labels in proportion, and the front holds them all, so training takes the front.
    if test is None:
        train, back = ordered[: -2 * tenth], ordered[-2 * tenth :]
        validation, test = back[:tenth], back[tenth:]
    else:
        train, validation = ordered[:-tenth], ordered[-tenth:]
        test = _interleaved(_without_repeats(test), seed)
        if unknown := sorted({label for _, label in test} - {label for _, label in rows}):
            raise InvalidFile(f"the test data has labels that the training data lacks: {listed(unknown)}; give every label training rows")
    task = _task(name, train[: sizes.train], test, sizes, validation)
    if not len(task.test):
        raise InvalidFile("every test text also occurs among the training texts: give test data that was not trained on")
    return task


def _check(rows: Sequence[Row], sizes: Sizes) -> None:
    counts = Counter(label for _, label in rows)
    if len(rows) < SMALLEST:
        raise InvalidFile(f"the data has {len(rows)} usable rows without repeats: at least {SMALLEST} are needed")
    if len(counts) < 2:
        raise InvalidFile(f"the data has one label only ({listed(counts)}): a classification task needs at least two")
    if 2 * len(counts) > len(rows):
        raise InvalidFile(f"the data has {len(counts)} labels in {len(rows)} rows ({listed(counts)}): check that this is the label column")
    if len(counts) > sizes.train:
        raise InvalidArgument(f"{len(counts)} labels need at least as many training rows, not {sizes.train}")


def _without_repeats(rows: Iterable[Row]) -> list[Row]:
    return list({text: (text, label) for text, label in reversed(list(rows))}.values())[::-1]


def _interleaved(rows: Sequence[Row], seed: int) -> list[Row]:
    """Shuffled by seed, then ordered so that every front part holds the labels in proportion, and the first rows hold each label once."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    totals = Counter(label for _, label in shuffled)
    seen: Counter[str] = Counter()
    keys = []
    for _, label in shuffled:
        keys.append(seen[label] / totals[label])
        seen[label] += 1
    return [shuffled[i] for i in sorted(range(len(shuffled)), key=lambda i: keys[i])]


def _task(name: str, train: Sequence[Row], test: Sequence[Row], sizes: Sizes, validation: Sequence[Row] | None = None) -> Task:
    """Take rows in order, and no text twice across the splits. Without validation rows, those that follow the training rows serve."""
    classes = sorted({label for _, label in train})
    index = {label: i for i, label in enumerate(classes)}
    seen: set[str] = set()

    def take(rows: Iterable[Row], most: int) -> Split:
        texts, labels = [], []
        for text, label in rows:
            if text in seen:
                continue
            seen.add(text)
            texts.append(text)
            labels.append(index[label])
            if len(texts) == most:
                break
        return Split(tuple(texts), tuple(labels))

    rows = iter(train)
    return Task(
        name,
        tuple(classes),
        train=take(rows, sizes.train),
        validation=take(rows if validation is None else validation, sizes.validation),
        test=take(test, sizes.test),
    )


def listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    shown = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
