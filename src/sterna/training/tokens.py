"""Examples as tokens: rows of ids for a Trainer, and batches of like length, padded to their own longest, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

from sterna.errors import InvalidArgument
from sterna.needs import needed
from sterna.training.completions import Completion, completions
from sterna.training.data import Examples
from sterna.training.tasks import TaskName

IGNORED = -100
"""The label of positions that no loss is taken at: padding, and what has no next token."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens at most: of a text (or a packed block, or a prompt with its completion), and of a target, or of what is generated.

    `limit` is how many positions a model that generates has, where that is known.
    """

    text: int
    target: int = 64
    truncation: bool = True
    limit: int | None = None


def tokenized(tokenizer: Any, examples: Examples, task: TaskName, lengths: Lengths) -> list[Row]:
    """One row an example, or one a packed block for language modelling of plain text: `input_ids`, what else the tokenizer gives but the mask, and
    `labels`.

    Raises InvalidArgument where rows are longer than the limit and `truncation` is off, where nothing is left to predict, and where a chat cannot be
    rendered.
    """
    if task == "causal-lm":
        if examples.answers is None:
            return packed(tokenizer, examples.texts, lengths.text)
        return completed(completions(tokenizer, examples), lengths)
    pairs = [] if examples.pairs is None else [list(examples.pairs)]
    fields = tokenizer(list(examples.texts), *pairs, truncation=lengths.truncation, max_length=lengths.text if lengths.truncation else None)
    if not lengths.truncation:
        _refuse_long(fields["input_ids"], lengths.text)
    columns = {name: values for name, values in fields.items() if name != "attention_mask"}
    labels: Sequence[Any] = examples.answers or ()
    if task == "seq2seq":
        labels = tokenizer(text_target=[str(text) for text in labels], truncation=True, max_length=lengths.target)["input_ids"]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def packed(tokenizer: Any, texts: Sequence[str], length: int) -> list[Row]:
    """Documents one after the other, each closed by the end of text, cut into blocks of `length`; the last block may be shorter."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for row in tokenizer(list(texts))["input_ids"]:
        ids += row if end and row[-1:] == end else [*row, *end]
    blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
    rows = [{"input_ids": block, "labels": list(block)} for block in blocks if len(block) > 1]  # one token alone predicts nothing
    if not rows:
        raise InvalidArgument("the texts hold fewer than two tokens in all")
    return rows


def completed(found: Sequence[Completion], lengths: Lengths) -> list[Row]:
    """A row each, cut to the limit; its labels are the completion's ids, and IGNORED on the prompt. Raises InvalidArgument as `tokenized` does."""
    if not lengths.truncation:
        _refuse_long(found, lengths.text)
    cut = [one.within(lengths.text) for one in found]
    return [{"input_ids": [*one.prompt, *one.completion], "labels": [*[IGNORED] * len(one.prompt), *one.completion]} for one in cut]


def _refuse_long(ids: Sequence[Sized], limit: int) -> None:
    long = [len(row) for row in ids if len(row) > limit]
    if long:
        raise InvalidArgument(
            f"{len(long)} of {len(ids)} rows are longer than max_length = {limit} tokens (up to {max(long)}): set truncation, or a longer limit"
        )


def refuse_foreign(rows: Sequence[Row], settings: Any) -> None:
    """Raise InvalidArgument where the tokenizer gives ids that the model of these settings has no embedding for."""
    largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    size = getattr(settings, "vocab_size", None)
    if size is not None and largest >= size:
        raise InvalidArgument(f"the tokenizer gives the id {largest}, and the model has {size} embeddings: they do not belong together")


def collator(tokenizer: Any, task: TaskName) -> Any:
    """A callable that pads rows to the longest of their batch; labels that are sequences are padded with IGNORED."""
    transformers = needed("transformers", "sterna[train]")
    if task in ("classification", "regression"):
        return transformers.DataCollatorWithPadding(tokenizer)
    return transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


@dataclass(frozen=True, slots=True)
class Batch:
    """One padded batch, its labels in it, and the places of its rows in the split."""

    inputs: dict[str, torch.Tensor]
    places: list[int]


def batches(tokenizer: Any, rows: Sequence[Row], task: TaskName, size: int) -> Iterator[Batch]:
    """The rows sorted by length, so that little is padded."""
    collate = collator(tokenizer, task)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield Batch(dict(collate([dict(rows[place]) for place in places])), places)
