"""Where a search's scores come from: a person's function of a live model, or rows that are scored on a bench."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sterna.errors import InvalidArgument
from sterna.expert.expert import Expert
from sterna.live.patch import attached
from sterna.progress import Progress
from sterna.scoring.bench import Bench
from sterna.scoring.metrics import BadMetric, writes
from sterna.scoring.outcome import Outcome
from sterna.searching.candidates import Maker, Setting
from sterna.searching.ledger import Ledger

BASE, TUNED = "base", "tuned"


class Scorer(Protocol):
    """Scores an expert on the base, or the base alone (None); `about` says what determines the scores beside the expert."""

    @property
    def about(self) -> dict[str, Any]: ...

    def __call__(self, expert: Expert | None, name: str) -> float: ...


@dataclass(frozen=True, slots=True)
class OfFunction:
    """A function of the live model. Raises BadMetric where it raises, or gives no finite number."""

    function: Callable[[Any], float]
    model: torch.nn.Module

    @property
    def about(self) -> dict[str, Any]:
        return {"metric": named(self.function)}

    def __call__(self, expert: Expert | None, name: str) -> float:
        if expert is None:
            return self._score(name)
        with attached(self.model, expert):
            return self._score(name)

    def _score(self, name: str) -> float:
        who = named(self.function).partition(" ")[0]
        try:
            value = float(self.function(self.model))
        except Exception as error:  # a function of somebody else's may raise anything
            raise BadMetric(f"the score {who} raises {type(error).__name__} on {name}: {error}") from error
        if not math.isfinite(value):
            raise BadMetric(f"the score {who} gives {value} on {name}; expected a finite number")
        return value


@dataclass(frozen=True, slots=True)
class OfRows:
    """The bench's metric on its rows. What was scored in this process is kept in `outcomes`, so that it can be compared."""

    bench: Bench
    progress: Progress
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        metric = self.bench.metric
        own = f" {_source(metric.function)}" if metric.function is not None else ""
        return {"metric": f"{metric.name}{own}", "rows": rows_digest(self.bench)}

    def __call__(self, expert: Expert | None, name: str) -> float:
        return self.outcome(expert, name).value

    def outcome(self, expert: Expert | None, name: str) -> Outcome:
        if name not in self.outcomes:
            self.outcomes[name] = self.bench.run(expert, progress=self.progress)
        return self.outcomes[name]


@dataclass
class Scored:
    """The problem that a strategy sees: a maker's candidates by a scorer, kept in a ledger. Greater is better: `sign` is -1 where less is."""

    maker: Maker
    scorer: Scorer
    ledger: Ledger
    sign: int
    made: int = 0

    def __post_init__(self) -> None:
        self.base = self.sign * self.value(BASE, lambda: None)
        self.tuned = self.sign * self.value(TUNED, self.maker.tuned)

    def bytes(self, setting: Setting) -> int:
        return self.maker.bytes(setting)

    def score(self, setting: Setting) -> float:
        before = self.ledger.get(setting.to_dict())
        if before is None:
            self.made += 1
            before = self.scorer(self.maker.expert(setting), str(setting))
            self.ledger.put(setting.to_dict(), before)
        return self.sign * before

    def value(self, name: str, expert: Callable[[], Expert | None]) -> float:
        """The score of the base or the tuned model."""
        before = self.ledger.get(name)
        if before is None:
            before = self.scorer(expert(), f"the {name} model")
            self.ledger.put(name, before)
        return before


def named(function: Callable[..., Any]) -> str:
    """A function's name, and a digest of its source where it has one."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name} {_source(function)}".strip()


def _source(function: Callable[..., Any]) -> str:
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def rows_digest(bench: Bench) -> str:
    """SHA-256 of what a bench scores on: tokens, answers, classes, task, dtype, and which head the base wears."""
    found = bench.evaluation
    about = [found.task, found.batch, bench.head, bench.classes, bench.head_from, str(bench.dtype), found.examples.answers]
    about += [found.lengths.target] if writes(bench.metric) else []
    sha = hashlib.sha256(json.dumps(about, default=str).encode())
    for row in found.rows:
        sha.update(json.dumps(row, sort_keys=True, default=str).encode())
    return sha.hexdigest()


def live_model(base: object, like: Expert) -> torch.nn.Module:
    """The live base for a function's score: the given module, or the folder loaded for what the tuned model is for. Raises InvalidArgument."""
    if isinstance(base, torch.nn.Module):
        return base
    if not isinstance(base, str) and not hasattr(base, "__fspath__"):
        raise InvalidArgument(f"base is a {type(base).__name__}; expected a live model or a model folder, for a score of a live model")
    from sterna.scoring.purpose import of_expert
    from sterna.training.models import load_model, load_settings, load_tokenizer, model_folder

    folder = model_folder(str(base))
    purpose = of_expert(like)
    if purpose.task is None:
        raise InvalidArgument(f"nothing says what class of model {folder.name} is to be loaded as; give the live base instead of its folder")
    torch.manual_seed(0)  # before a head is drawn
    model: torch.nn.Module = load_model(folder, purpose.task, load_tokenizer(folder), purpose.classes_with(load_settings(folder)))
    return model
