"""How good a live model is on the rows of a split: its outputs gathered as arrays, and the task's metrics over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.needs import quiet
from sterna.progress import Progress, silent
from sterna.training import metrics
from sterna.training.data import Examples
from sterna.training.tasks import TaskName
from sterna.training.tokens import IGNORED, Lengths, batches, tokenized


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model gives for every row of a split, in the split's order, as far as the task has it.

    `logits` is fp32 [n, outputs]; `nats` and `tokens` [n] are each row's summed cross-entropy and predicted tokens; `texts` are generated.
    """

    logits: NDArray[np.float32] | None = None
    nats: NDArray[np.float64] | None = None
    tokens: NDArray[np.int64] | None = None
    texts: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A split made ready once, to be run by as many models as one likes."""

    task: TaskName
    examples: Examples
    rows: Sequence[dict[str, Any]]
    tokenizer: Any
    lengths: Lengths
    batch: int = 64

    def scores(self, model: Any, progress: Progress = silent, step: str = "evaluation") -> dict[str, float]:
        """The task's metrics of the model, which is left in the mode and on the device that it was in."""
        return score(self, outputs(self, model, progress, step))


def evaluation(tokenizer: Any, examples: Examples, task: TaskName, lengths: Lengths, batch: int = 64) -> Evaluation:
    """Tokenize a split for evaluation. Raises InvalidArgument, as `tokenized` does."""
    return Evaluation(task, examples, tokenized(tokenizer, examples, task, lengths), tokenizer, lengths, batch)


def outputs(prepared: Evaluation, model: Any, progress: Progress = silent, step: str = "evaluation") -> Outputs:
    """Run the model over the split, in evaluation mode and without gradients."""
    task, tokenizer = prepared.task, prepared.tokenizer
    device = next(model.parameters()).device
    logits: dict[int, NDArray[np.float32]] = {}
    texts: dict[int, str] = {}
    nats = np.zeros(len(prepared.rows))
    tokens = np.zeros(len(prepared.rows), dtype=np.int64)
    done = 0
    progress(step, 0, len(prepared.rows), "rows")
    with evaluating(model), torch.no_grad():
        for batch in batches(tokenizer, prepared.rows, task, prepared.batch):
            inputs = {name: value.to(device) for name, value in batch.inputs.items() if isinstance(value, torch.Tensor)}
            if task in ("classification", "regression"):
                inputs.pop("labels")
                rows = model(**inputs).logits.float().cpu().numpy()
                logits.update(zip(batch.places, rows, strict=True))
            else:
                given = {name: value for name, value in inputs.items() if name != "labels" or task == "seq2seq"}  # which makes its decoder's of them
                nats[batch.places], tokens[batch.places] = _entropies(model(**given).logits, inputs["labels"], shifted=task == "causal-lm")
            if task == "seq2seq":
                texts.update(zip(batch.places, _generated(model, inputs, tokenizer, prepared.lengths.target), strict=True))
            done += len(batch.places)
            progress(step, done, len(prepared.rows), "rows")
    if task in ("classification", "regression"):
        return Outputs(logits=np.stack([logits[place] for place in range(len(prepared.rows))]))
    written = tuple(texts[place] for place in range(len(prepared.rows))) if task == "seq2seq" else None
    return Outputs(nats=nats, tokens=tokens, texts=written)


def _entropies(logits: torch.Tensor, labels: torch.Tensor, *, shifted: bool) -> tuple[list[float], list[int]]:
    """The summed cross-entropy and the number of predicted tokens of each row of a batch, row by row: a whole batch in fp32 would be large."""
    logits = logits[:, -labels.shape[1] :]  # virtual tokens before the text have no labels
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    pairs = zip(logits, labels, strict=True)
    nats = [torch.nn.functional.cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="sum") for row, wanted in pairs]
    return torch.stack(nats).tolist(), labels.ne(IGNORED).sum(1).tolist()


def _generated(model: Any, inputs: dict[str, torch.Tensor], tokenizer: Any, length: int) -> list[str]:
    with quiet():
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(**given, max_new_tokens=length, do_sample=False, num_beams=1)
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside, and the modes of all modules as they were after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def score(prepared: Evaluation, found: Outputs) -> dict[str, float]:
    """The metrics of the task over what a model gave."""
    answers = prepared.examples.answers or ()
    if found.logits is not None:
        if prepared.task == "classification":
            return metrics.classification(found.logits, np.array(answers, dtype=np.int64))
        return metrics.regression(found.logits[:, 0], np.array(answers, dtype=np.float64))
    assert found.nats is not None
    assert found.tokens is not None
    fluency = metrics.language(found.nats, found.tokens)
    return fluency if found.texts is None else {**metrics.generation(found.texts, [str(text) for text in answers]), **fluency}
