"""How good a live model is on a split: predictions and loss, and the search for a scale on validation texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sterna.demo.data import Split
from sterna.needs import needed
from sterna.progress import Progress
from sterna.scoring import scales
from sterna.scoring.intervals import Estimate, wilson

BATCH = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """One padded batch: `inputs` are int64 [n, length], `index` the rows' places in the split."""

    inputs: dict[str, torch.Tensor]
    index: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """A split tokenized once: rows of ids for training, and batches sorted by length and padded to their own longest for evaluation."""

    ids: tuple[tuple[int, ...], ...]
    labels: torch.Tensor
    batches: tuple[Batch, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Score:
    """Which texts of a split were right (bool [n]), and the mean cross-entropy in nats."""

    right: np.ndarray
    loss: float

    @property
    def accuracy(self) -> Estimate:
        return wilson(int(self.right.sum()), self.right.size)

    @property
    def rank(self) -> tuple[int, float]:
        """Greater is better: more right answers first, then a smaller loss."""
        return int(self.right.sum()), -self.loss


def tokenized(tokenizer: Any, split: Split, max_length: int) -> Tokens:
    ids = tokenizer(list(split.texts), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        padded = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
        batches.append(Batch({"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}, torch.tensor(rows)))
    return Tokens(tuple(map(tuple, ids)), torch.tensor(split.labels), tuple(batches))


def evaluate(model: torch.nn.Module, tokens: Tokens, step: Callable[[int], None] = lambda rows: None) -> Score:
    """Run the model over the split in evaluation mode; `step` hears of every batch's rows."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    right, total = np.zeros(len(tokens), dtype=bool), 0.0
    with torch.inference_mode():
        for batch in tokens.batches:
            logits = model(**{name: value.to(device) for name, value in batch.inputs.items()}).logits.float().cpu()
            labels = tokens.labels[batch.index]
            right[batch.index.numpy()] = (logits.argmax(1) == labels).numpy()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            step(len(labels))
    model.train(was_training)
    return Score(right, total / len(tokens))


def counter(progress: Progress, step: str, total: int, unit: str) -> Callable[[int], None]:
    """A callable that adds up what it is told and passes it on as progress of one step."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done = min(done + more, total)
        progress(step, done, total, unit)

    progress(step, 0, total, unit)
    return count


def climb(grid: Sequence[float], start: float, score: Callable[[float], Score]) -> float:
    """The value of a sorted grid with the best score, found by walking uphill from the one nearest to `start`."""
    return scales.climb(grid, start, lambda value: score(value).rank)


def bag_of_words(tokenizer: Any, train: Tokens, test: Tokens) -> Estimate:
    """Tf-idf and logistic regression on the very tokens that the model sees: what the words alone can tell."""
    vectorizer = needed("sklearn.feature_extraction.text").TfidfVectorizer(sublinear_tf=True)
    regression = needed("sklearn.linear_model").LogisticRegression(max_iter=1000, C=10.0)
    seen, unseen = (tokenizer.batch_decode([list(row) for row in split.ids], skip_special_tokens=True) for split in (train, test))
    regression.fit(vectorizer.fit_transform(seen), train.labels.numpy())
    right = regression.predict(vectorizer.transform(unseen)) == test.labels.numpy()
    return wilson(int(right.sum()), right.size)
