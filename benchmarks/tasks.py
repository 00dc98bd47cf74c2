"""The four classification tasks of the accuracy tables: real texts, one split for all methods, the encoder's 64 tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sterna.demo import data
from sterna.demo.assets import asset_path
from sterna.demo.data import Sizes

MAX_LENGTH = 64
Text = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class Rows:
    texts: tuple[Text, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Rows:
        return Rows(self.texts[start:stop], self.labels[start:stop])


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    classes: tuple[str, ...]
    train: Rows
    validation: Rows
    test: Rows


def newsgroups(sizes: Sizes) -> Task:
    return _of(data.newsgroups(asset_path("texts"), sizes))


def tweets(sizes: Sizes) -> Task:
    return _of(data.tweets(asset_path("texts"), sizes))


def _of(task: data.Task) -> Task:
    return Task(task.name, task.classes, *(Rows(split.texts, split.labels) for split in (task.train, task.validation, task.test)))


def bbc(sizes: Sizes) -> Task:
    """Which of five topics a news story is on; headlines included, repeats dropped."""
    rows = {}
    for path in sorted(asset_path("bbc").rglob("*.txt")):
        rows[" ".join(path.read_text(encoding="utf-8", errors="replace").split())] = path.parent.name
    shuffled = list(rows.items())
    random.Random(0).shuffle(shuffled)
    held = len(shuffled) // 4
    texts, labels = zip(*shuffled, strict=True)
    classes = sorted(set(labels))
    whole = Rows(texts, tuple(classes.index(label) for label in labels))
    return Task("BBC news", tuple(classes), whole.part(3 * held // 2, len(whole)), whole.part(held, 3 * held // 2), whole.part(0, held))


def policy(sizes: Sizes) -> Task:
    """Whether a clause of a privacy policy answers a question; no question is in two splits."""
    lines = (asset_path("policy") / "test.jsonl").read_text(encoding="utf-8").splitlines()
    table = [json.loads(line) for line in lines if line.strip()]
    questions = sorted({row["question"] for row in table})
    random.Random(0).shuffle(questions)
    third = {question: place % 5 for place, question in enumerate(questions)}
    random.Random(0).shuffle(table)

    def rows(parts: set[int], most: int) -> Rows:
        found = [row for row in table if third[row["question"]] in parts][:most]
        return Rows(tuple((row["context"], row["question"]) for row in found), tuple(int(str(row["answer"]) == "True") for row in found))

    return Task("policy pairs", ("no", "yes"), rows({0, 1, 2}, sizes.train), rows({3}, sizes.validation), rows({4}, sizes.test))


TASKS: dict[str, Callable[[Sizes], Task]] = {"newsgroups": newsgroups, "tweets": tweets, "policy": policy, "bbc": bbc}


def tokens(tokenizer: object, rows: Rows) -> list[dict[str, list[int]]]:
    """What transformers' Trainer takes: token ids, segments where there are two texts, and the label."""
    pairs = isinstance(rows.texts[0], tuple)
    firsts = [text[0] if pairs else text for text in rows.texts]
    seconds = ([text[1] for text in rows.texts],) if pairs else ()
    encoded = tokenizer(firsts, *seconds, truncation=True, max_length=MAX_LENGTH)  # type: ignore[operator]
    kept = [key for key in ("input_ids", "token_type_ids") if key in encoded and (pairs or key == "input_ids")]
    return [{**{key: encoded[key][i] for key in kept}, "labels": label} for i, label in enumerate(rows.labels)]


def right_answers(model: torch.nn.Module, tokenizer: object, rows: Sequence[dict[str, list[int]]], batch: int = 64) -> list[bool]:
    """Which rows the model gets right, in evaluation mode, in batches of like length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    right = [False] * len(rows)
    was = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            inputs = tokenizer.pad([{k: v for k, v in rows[i].items() if k != "labels"} for i in part], return_tensors="pt")  # type: ignore[attr-defined]
            for i, guess in zip(part, model(**inputs).logits.argmax(1).tolist(), strict=True):
                right[i] = guess == rows[i]["labels"]
    model.train(was)
    return right


def bag_of_words(tokenizer: object, task: Task) -> float:
    """Accuracy of tf-idf and logistic regression on the very tokens that the model sees."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def words(rows: Rows) -> list[str]:
        return tokenizer.batch_decode([row["input_ids"] for row in tokens(tokenizer, rows)], skip_special_tokens=True)  # type: ignore[attr-defined]

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(max_iter=1000, C=10.0).fit(vectorizer.fit_transform(words(task.train)), task.train.labels)
    return float((model.predict(vectorizer.transform(words(task.test))) == task.test.labels).mean())


def folder() -> Path:
    return asset_path("encoder")
