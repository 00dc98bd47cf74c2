"""How good a live model is on the rows of a split: its outputs gathered as arrays, and the task's metrics over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.errors import InvalidArgument
from sterna.needs import quiet
from sterna.progress import Progress, silent
from sterna.training import metrics
from sterna.training.completions import Completion, completions
from sterna.training.data import Examples, shuffled
from sterna.training.tasks import TaskName
from sterna.training.tokens import IGNORED, Lengths, batches, completed, tokenized


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model gives for every row of a split, in the split's order, as far as the task has it.

    `logits` is fp32 [n, outputs]; `nats` and `tokens` [n] are each row's summed cross-entropy and predicted tokens; `texts` are generated, where they
    were asked for.
    """

    logits: NDArray[np.float32] | None = None
    nats: NDArray[np.float64] | None = None
    tokens: NDArray[np.int64] | None = None
    texts: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A split made ready once, to be run by as many models as one likes. `completions` are what a causal language model's rows were made of."""

    task: TaskName
    examples: Examples
    rows: Sequence[dict[str, Any]]
    tokenizer: Any
    lengths: Lengths
    batch: int = 64
    completions: Sequence[Completion] | None = None

    @property
    def packed(self) -> bool:
        """Whether rows are blocks of text, and not examples."""
        return self.task == "causal-lm" and self.examples.answers is None

    @property
    def writes(self) -> bool:
        """Whether a model can be asked for texts, which are held against wanted ones."""
        return self.task == "seq2seq" or self.completions is not None

    @property
    def wanted(self) -> list[str]:
        """The target texts; completions without outer white space and an end of text of their own."""
        answers = [str(answer) for answer in self.examples.answers or ()]
        if self.task != "causal-lm":
            return answers
        end = getattr(self.tokenizer, "eos_token", None) or ""
        return [answer.strip().removesuffix(end).strip() for answer in answers]

    def taken(self, places: Sequence[int]) -> Evaluation:
        """Some of the rows, by their places, in this order."""
        examples = self.examples if self.packed else self.examples.taken(places)
        parts = None if self.completions is None else [self.completions[place] for place in places]
        return replace(self, examples=examples, rows=[self.rows[place] for place in places], completions=parts)

    def shuffled(self, seed: int) -> list[int]:
        """The rows' places, shuffled by seed, each label in proportion."""
        return shuffled(self.examples.taken([0] * len(self.rows)) if self.packed else self.examples, self.task, seed)

    def scores(self, model: Any, progress: Progress = silent, step: str = "evaluation") -> dict[str, float]:
        """The task's metrics of the model, which is left in the mode and on the device that it was in.

        Of a causal language model these are perplexity and loss alone: writing texts would often take longer than the training.
        """
        return score(self, outputs(self, model, progress, step, write=self.task == "seq2seq"))


def evaluation(tokenizer: Any, examples: Examples, task: TaskName, lengths: Lengths, batch: int = 64) -> Evaluation:
    """Tokenize a split for evaluation. Raises InvalidArgument, as `tokenized` does."""
    if task == "causal-lm" and examples.answers is not None:
        found = completions(tokenizer, examples)
        return Evaluation(task, examples, completed(found, lengths), tokenizer, lengths, batch, found)
    return Evaluation(task, examples, tokenized(tokenizer, examples, task, lengths), tokenizer, lengths, batch)


def outputs(prepared: Evaluation, model: Any, progress: Progress = silent, step: str = "evaluation", *, write: bool = True) -> Outputs:
    """Run the model over the split, in evaluation mode and without gradients; it writes texts, token by token, unless `write` is false.

    Raises InvalidArgument where the model has too few positions for the texts.
    """
    task, tokenizer = prepared.task, prepared.tokenizer
    write = write and prepared.writes
    if write and prepared.completions is not None:
        _refuse_no_room(prepared.lengths)
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
            if write:
                if prepared.completions is None:
                    written = _generated(model, inputs, tokenizer, prepared.lengths.target)
                else:
                    written = _continued(model, [prepared.completions[place] for place in batch.places], tokenizer, prepared.lengths)
                texts.update(zip(batch.places, written, strict=True))
            done += len(batch.places)
            progress(step, done, len(prepared.rows), "rows")
    if task in ("classification", "regression"):
        return Outputs(logits=np.stack([logits[place] for place in range(len(prepared.rows))]))
    return Outputs(nats=nats, tokens=tokens, texts=tuple(texts[place] for place in range(len(prepared.rows))) if write else None)


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


def _refuse_no_room(lengths: Lengths) -> None:
    """Raise InvalidArgument where no token of a prompt fits before as many as are to be written."""
    if lengths.limit is not None and lengths.target >= lengths.limit:
        raise InvalidArgument(
            f"target_max_length is {lengths.target}, and the model takes {lengths.limit} tokens in all; expected fewer to be written"
        )


def _continued(model: Any, prompts: Sequence[Completion], tokenizer: Any, lengths: Lengths) -> list[str]:
    """What the model writes after each prompt, up to the end of text, without outer white space: its likeliest token each time.

    Prompts are padded on the left, so that all go on at the same place; a mask keeps the padding out, and positions count from the first real token.
    """
    room = lengths.text if lengths.limit is None else min(lengths.text, lengths.limit - lengths.target)
    cut = [prompt.prompt_within(room) for prompt in prompts]
    width = max(1, *map(len, cut))
    device = next(model.parameters()).device
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in cut], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in cut], device=device)
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}  # an instructed model's own may be others
    with quiet():
        given = {"input_ids": ids, "attention_mask": mask, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(ends) or None}
        written = model.generate(**given, max_new_tokens=lengths.target, do_sample=False, num_beams=1)
    return [text.strip() for text in tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)]


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
    return fluency if found.texts is None else {**metrics.generation(found.texts, prepared.wanted), **fluency}
