"""A base, rows and a metric made ready once: what is put on the base is run and scored there, always on the same rows."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sterna.errors import InvalidArgument, InvalidFile
from sterna.expert.expert import Expert
from sterna.expert.file import load
from sterna.live.patch import attached
from sterna.needs import needed, quiet
from sterna.progress import Progress, silent
from sterna.scoring.fitted import fitted
from sterna.scoring.labels import class_names, columns_in_order, is_generic
from sterna.scoring.metrics import Choice, measured, metric_of, writes
from sterna.scoring.outcome import Outcome as Outcome
from sterna.scoring.purpose import Purpose, of_adapter, of_expert, of_folder
from sterna.scoring.rows import Rows, table_of
from sterna.sources.adapter import is_adapter
from sterna.sources.checkpoint import open_checkpoint, resolve
from sterna.training.data import shuffled
from sterna.training.evaluation import Evaluation, Outputs, evaluation, outputs
from sterna.training.methods import head_names
from sterna.training.metrics import Metric
from sterna.training.models import DTYPES, length_limit, load_model, load_settings, load_tokenizer, model_folder
from sterna.training.plan import usual_length
from sterna.training.tasks import TaskName
from sterna.training.tokens import Lengths, collator, refuse_foreign

Candidate = Expert | str | os.PathLike[str] | torch.nn.Module | None
"""What a bench can run: an expert or its file, a tuned model's folder or hub id, a PEFT folder, a live model; None for the base alone."""


@dataclass(frozen=True, eq=False)
class Bench:
    """Made by `open_bench`. `model` is live; `head_from` says whether the base wears its own head, a new one, or the one of the `lender`.

    `head` names the classes in the order that answers are numbered in, `classes` are the same in the words of the data; both empty where the task
    has none. `allow_narrower` where the base was loaded in a narrower dtype than it is stored in.
    """

    base: Path
    model: Any
    evaluation: Evaluation
    metric: Metric
    head: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    head_from: Literal["own", "new", "lent"] = "own"
    lender: Candidate = None
    source: str = ""
    dropped: int = 0
    dtype: torch.dtype = torch.float32
    allow_narrower: bool = False

    def __len__(self) -> int:
        return len(self.evaluation.rows)

    @property
    def task(self) -> TaskName:
        return self.evaluation.task

    def run(self, candidate: Candidate = None, *, head: str | None = None, metric: Metric | None = None, progress: Progress = silent) -> Outcome:
        """Put a candidate on the base, run and score it, and take it off again; a tuned model is loaded beside the base for as long as it runs.

        `head` chooses among the heads of a merged expert; `metric` is the bench's own by default.
        Raises what `attach` does, InvalidArgument for classes that do not fit the rows, InvalidFile, BadMetric.
        """
        return self.outcome(self.outputs(candidate, head=head, metrics=[metric] if metric is not None else None, progress=progress), metric)

    def run_live(self, model: Any = None, progress: Progress = silent) -> Outcome:
        """Score the live model as it is now, or another live model of the same task."""
        return self.outcome(self._outputs(self.model if model is None else model, "the model", None, progress))

    def loss(self, model: Any, place: int) -> torch.Tensor:
        """A live model's loss on one row, with its gradients: cross-entropy of the label or the mean one of the tokens, or the squared error."""
        found = self.evaluation
        device = next(model.parameters()).device
        batch = collator(found.tokenizer, self.task)([dict(found.rows[place])])
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        if self.task in ("causal-lm", "seq2seq"):
            return model(**inputs).loss.float()  # type: ignore[no-any-return]
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        if self.task == "regression":
            return torch.nn.functional.mse_loss(logits[:, 0], labels.float())
        order = self._columns(model, logits.shape[1], "the model")
        return torch.nn.functional.cross_entropy(logits if order is None else logits[:, order], labels)

    def outputs(
        self,
        candidate: Candidate = None,
        *,
        head: str | None = None,
        metrics: Sequence[Metric] | None = None,
        progress: Progress = silent,
        step: str | None = None,
    ) -> Outputs:
        """What a candidate gives for every row: to be scored with `outcome` by each of `metrics` (the bench's own), for which texts are written."""
        with self.wearing(candidate, head=head) as model:
            return self._outputs(model, name_of(candidate), metrics, progress, step)

    @contextlib.contextmanager
    def wearing(self, candidate: Candidate = None, *, head: str | None = None) -> Iterator[Any]:
        """A live model that is the candidate, inside the block."""
        opened = opened_candidate(candidate)
        if opened is None:
            yield self.model
        elif isinstance(opened, Expert):
            with attached(self.model, opened, head=head, allow_narrower=self.allow_narrower):
                yield self.model
        elif isinstance(opened, torch.nn.Module):
            yield opened
        else:
            yield self._loaded(opened)

    def outcome(self, found: Outputs, metric: Metric | None = None) -> Outcome:
        """Score what a model gave. Raises BadMetric."""
        chosen = metric or self.metric
        value = measured(chosen, self.evaluation, found, self.classes)
        return Outcome(chosen, chosen.factor * value.value, value.evidence, value.right)

    def rows(self, places: Sequence[int]) -> Bench:
        """The same on some of the rows, by their places; of plain text, its blocks. Raises InvalidArgument for none."""
        if not len(places):
            raise InvalidArgument("no row is chosen; expected one or more")
        return replace(self, evaluation=self.evaluation.taken(places))

    def split(self, share: float = 0.5, seed: int = 0) -> tuple[Bench, Bench]:
        """Two benches over disjoint rows, the first with `share` of them, each label in proportion; for selection and test.

        Raises InvalidArgument where one of them would be empty.
        """
        order = self.evaluation.shuffled(seed)
        first = round(share * len(order))
        if not 0 < first < len(order):
            raise InvalidArgument(f"{len(order)} rows cannot be split into {share:g} and the rest: one part would be empty; give more rows")
        return self.rows(sorted(order[:first])), self.rows(sorted(order[first:]))

    def _outputs(self, model: Any, who: str, metrics: Sequence[Metric] | None, progress: Progress, step: str | None = None) -> Outputs:
        found = outputs(self.evaluation, model, progress, step or f"evaluating {who}", write=any(map(writes, metrics or [self.metric])))
        if self.task != "classification":
            return found
        assert found.logits is not None
        order = self._columns(model, found.logits.shape[1], who)
        return found if order is None else replace(found, logits=found.logits[:, order])

    def _columns(self, model: Any, outputs: int, who: str) -> list[int] | None:
        config: Any = getattr(model, "config", None)
        names = class_names(config.to_dict()) if hasattr(config, "to_dict") else None
        return columns_in_order(names, self.head, outputs, who)

    def _loaded(self, folder: Path) -> Any:
        """The model of a tuned folder, or the base with a PEFT folder on it, on this bench's device and in its dtype."""
        tokenizer, device = self.evaluation.tokenizer, next(self.model.parameters()).device
        if not is_adapter(folder):
            return load_model(model_folder(str(folder)), self.task, tokenizer, None, self.dtype).to(device)
        base = load_model(self.base, self.task, tokenizer, self.head or None, self.dtype)
        with quiet():
            try:
                return needed("peft", "sterna[train]").PeftModel.from_pretrained(base, folder).to(device).eval()
            except (ValueError, KeyError, OSError, RuntimeError) as error:
                raise InvalidFile(f"{folder.name} does not load over {self.base.name}: {str(error).strip().splitlines()[0]}") from error


def name_of(candidate: Candidate) -> str:
    """What a candidate is called where nothing else names it."""
    if candidate is None:
        return "the base"
    if isinstance(candidate, Expert):
        return "an expert"
    return type(candidate).__name__ if isinstance(candidate, torch.nn.Module) else Path(candidate).name


def opened_candidate(candidate: Candidate) -> Expert | Path | torch.nn.Module | None:
    """An expert, a local folder, a live model or None. Raises NotFound, InvalidFile."""
    if candidate is None or isinstance(candidate, Expert | torch.nn.Module):
        return candidate
    path = resolve(candidate)
    return path if path.is_dir() else load(path)


def purpose_of(candidate: Candidate, head: str | None = None) -> Purpose:
    """What a candidate was made for, with `head` where it has several. Raises NotFound, InvalidFile, InvalidArgument (of `head`)."""
    opened = opened_candidate(candidate)
    if isinstance(opened, Expert):
        return of_expert(opened, head if opened.facts.heads else None)
    if isinstance(opened, Path):
        return of_adapter(opened) if is_adapter(opened) else of_folder(opened)
    return Purpose()


def open_bench(
    base: str | os.PathLike[str],
    data: Rows,
    *,
    task: TaskName | None = None,
    metric: Choice | None = None,
    text: str | None = None,
    label: str | None = None,
    text_pair: str | None = None,
    target: str | None = None,
    rows: int | None = None,
    max_length: int | None = None,
    target_max_length: int = 64,
    batch: int = 64,
    like: Candidate | list[Candidate] | tuple[Candidate, ...] = None,
    head: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    warn: Callable[[str], None] = lambda message: None,
) -> Bench:
    """Load a base (a model folder or hub id) for a task and make rows ready for it: files, a hub id, or mappings from column to cell.

    `like` are experts, tuned models or PEFT folders that are to be run: they say the task, the classes and their order, and lend the base a head
    where it has none that fits (`head`, where one of them has several). Else the base's own configuration says so, else the data. `rows` keeps as
    many, each label in proportion, by `seed`.

    Raises NotFound, InvalidFile and InvalidArgument before the model is loaded, as far as files can tell.
    """
    if dtype not in DTYPES:
        raise InvalidArgument(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if rows is not None and rows < 1:
        raise InvalidArgument(f"rows is {rows}; expected 1 or more")
    folder = model_folder(str(base))
    settings, tokenizer = load_settings(folder), load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        raise InvalidArgument(f"the tokenizer of {folder.name} has neither a padding token nor an end of text; give it one and save it")
    given = like if isinstance(like, list | tuple) else (like,)
    candidates: list[Candidate] = [one for one in given if one is not None]
    purposes = [purpose_of(one, head) for one in candidates]
    wanted = next((purpose for purpose in purposes if purpose.task or purpose.head), Purpose())
    table = table_of(data)
    own = of_folder(folder)
    columns: dict[str, Any] = {"text": text, "label": label, "text_pair": text_pair, "target": target}
    fit = fitted(own, wanted if candidates else None, settings, table, task=task, warn=warn, **columns)
    chosen, examples, classes = fit.task, fit.examples, fit.classes
    if rows is not None and rows < len(examples):
        examples = examples.taken(shuffled(examples, chosen, seed)[:rows])
    scored_by = metric_of(metric, chosen, answered=examples.answers is not None)
    length, limit = (length_limit(folder, tokenizer, wanted) for wanted in (max_length or usual_length(chosen, examples), sys.maxsize))
    lengths = Lengths(length, target_max_length, limit=limit)
    prepared = evaluation(tokenizer, examples, chosen, lengths, batch)
    refuse_foreign(prepared.rows, settings)
    torch.manual_seed(seed)  # before a head is drawn
    fits = own.classes is not None and (set(own.classes) == set(classes) or (len(own.classes) == len(classes) and is_generic(own.classes)))
    model = load_model(folder, chosen, tokenizer, (own.classes if fits and own.classes else classes) or None, DTYPES[dtype])
    stored = {info.dtype for info in open_checkpoint(folder).tensors.values() if info.dtype.is_floating_point}
    head_from, lender = _lend_head(model, folder, chosen, fits, zip(candidates, purposes, strict=True))
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    narrower = any(torch.promote_types(kind, DTYPES[dtype]) != DTYPES[dtype] for kind in stored)
    return Bench(folder, model, prepared, scored_by, classes, fit.names, head_from, lender, table.source, fit.dropped, DTYPES[dtype], narrower)


def _lend_head(
    model: Any, folder: Path, task: TaskName, fits: bool, lenders: Iterable[tuple[Candidate, Purpose]]
) -> tuple[Literal["own", "new", "lent"], Candidate]:
    """Give a base without a fitting head that of the first candidate that has one, in place; returns whose head it is."""
    names = head_names(model) if task in ("classification", "regression") else set()
    live = dict(model.named_parameters())
    stored = open_checkpoint(folder).shapes_by_any_name
    if not names or ((fits or task == "regression") and all(stored.get(name) == tuple(live[name].shape) for name in names)):
        return "own", None
    for candidate, purpose in lenders:
        if all(name in purpose.head and purpose.head[name].shape == live[name].shape for name in names):
            with torch.no_grad():
                for name in names:
                    live[name].copy_(purpose.head[name])
            return "lent", candidate
    return "new", None
