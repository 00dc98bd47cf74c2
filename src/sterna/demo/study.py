"""One trained task studied: the expert at several densities beside the controls of the method's section 1, all on the same test texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sterna
from sterna.demo.controls import prune_only, stc
from sterna.demo.evaluation import Score, Tokens, bag_of_words, climb, counter, evaluate
from sterna.demo.intervals import paired_difference
from sterna.demo.options import FACTORS, DemoOptions
from sterna.demo.product import Size, measured, saved
from sterna.demo.report import Row
from sterna.demo.subjects import Subject
from sterna.progress import Progress


@dataclass(frozen=True, slots=True)
class Study:
    """What is studied: the folder of the trained model or adapter, its movable task vector, and the tokenized splits."""

    name: str
    base: Path
    trained: Path
    subject: Subject
    tokenizer: Any
    train: Tokens
    validation: Tokens
    test: Tokens


@dataclass(frozen=True, slots=True)
class Findings:
    """The rows of the table, the files of the experts, and the one at the controls' density."""

    rows: tuple[Row, ...]
    files: tuple[Path, ...]
    expert: Path


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores dense vectors on the trained model itself, and experts on the live base that they are attached to."""

    study: Study
    live: torch.nn.Module
    progress: Progress

    def dense(self, tau: torch.Tensor, tokens: Tokens, what: str) -> Score:
        self.study.subject.put(tau)
        return self._evaluate(self.study.subject.model, tokens, what)

    def attached(self, expert: sterna.Expert, tokens: Tokens, what: str) -> Score:
        with sterna.attached(self.live, expert):
            return self._evaluate(self.live, tokens, what)

    def _evaluate(self, model: torch.nn.Module, tokens: Tokens, what: str) -> Score:
        return evaluate(model, tokens, counter(self.progress, f"{self.study.name}: {what}", len(tokens), "texts"))


@dataclass(frozen=True, slots=True)
class Made:
    """One expert with the alpha that validation chose, its file and its score on the test texts."""

    density: float
    alpha: float
    file: Path
    size: Size
    score: Score


def findings(study: Study, live: torch.nn.Module, options: DemoOptions, folder: Path, progress: Progress) -> Findings:
    """All rows for one task. Alphas and factors are chosen on the validation texts; each chosen method then sees the test texts once."""
    scorer = Scorer(study, live, progress)
    made: list[Made] = []
    for density in options.densities:
        made.append(_made(scorer, density, options.alphas, made[-1].alpha if made else 3.0, folder))
    chosen = next(one for one in made if one.density == options.control_density)
    full = scorer.dense(study.subject.tau, study.test, "uncompressed")
    rows = _controls(scorer, full, chosen)
    if chosen.alpha != 1:
        plain = scorer.attached(_expert(study, chosen.density, 1.0), study.test, "alpha 1")
        rows.append(_row("ComPEFT, alpha not tuned", plain, full, density=chosen.density, alpha=1.0, **_sizes(chosen.size)))
    rows += [_row("ComPEFT", one.score, full, density=one.density, alpha=one.alpha, **_sizes(one.size)) for one in made]
    return Findings(tuple(rows), tuple(one.file for one in made), chosen.file)


def _expert(study: Study, density: float, alpha: float) -> sterna.Expert:
    return sterna.compress(study.base, study.trained, density=density, alpha=alpha)


def _made(scorer: Scorer, density: float, alphas: tuple[float, ...], start: float, folder: Path) -> Made:
    study, what = scorer.study, f"alpha at density {density:g}"
    alpha = climb(alphas, start, lambda value: scorer.attached(_expert(study, density, value), study.validation, what))
    expert = _expert(study, density, alpha)
    file = saved(expert, folder, f"{study.name} d{density:g} a{alpha:g}")
    return Made(density, alpha, file, measured(expert), scorer.attached(sterna.load(file), study.test, f"density {density:g}"))


def _controls(scorer: Scorer, full: Score, chosen: Made) -> list[Row]:
    """What ComPEFT is to be held against, at the chosen expert's density."""
    study, tau, density, size = scorer.study, scorer.study.subject.tau, chosen.density, chosen.size
    factor = climb(FACTORS, 1.0, lambda value: scorer.dense(value * tau, study.validation, "scale of the uncompressed"))
    tuned = full if factor == 1 else scorer.dense(factor * tau, study.test, "uncompressed, tuned scale")
    alone = scorer.dense(torch.zeros_like(tau), study.test, "base alone")
    pruned = scorer.dense(prune_only(tau, density), study.test, "prune only")
    ternary = stc(tau, density)
    mean = float(ternary.abs().max() / tau.double().std())
    sparse = scorer.dense(ternary, study.test, "STC")
    study.subject.put(tau)
    return [
        Row("words alone", bag_of_words(study.tokenizer, study.train, study.test)),
        _row("base alone", alone, full, bytes=size.exact),
        _row("uncompressed", full, full, factor=1.0, **_dense_sizes(size, size.uncompressed)),
        _row("uncompressed, tuned scale", tuned, full, factor=factor, **_dense_sizes(size, size.uncompressed)),
        _row("prune only", pruned, full, density=density, factor=1.0, **_dense_sizes(size, size.pruned)),
        _row("STC, mean magnitude", sparse, full, density=density, alpha=mean, **_sizes(size)),
    ]


def _row(method: str, score: Score, full: Score, **columns: Any) -> Row:
    return Row(method, score.accuracy, None if score is full else paired_difference(score.right, full.right), **columns)


def _sizes(size: Size) -> dict[str, Any]:
    return {"bytes": size.bytes, "ratio": size.uncompressed / size.bytes, "bits": size.bits, "entropy": size.entropy}


def _dense_sizes(size: Size, total: int) -> dict[str, Any]:
    return {"bytes": total, "ratio": size.uncompressed / total, "bits": 8 * (total - size.exact) / size.parameters}
