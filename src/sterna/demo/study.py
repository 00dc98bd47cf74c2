"""One trained task studied: the expert at several densities beside the controls of the method's section 1, all on the same test texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sterna
from sterna.demo.evaluation import Score, Tokens, bag_of_words, climb, counter, evaluate
from sterna.demo.options import DemoOptions
from sterna.demo.product import Size, measured, saved
from sterna.demo.report import Row
from sterna.demo.subjects import Subject
from sterna.progress import Progress
from sterna.scoring.dense import mean_in_std, prune_only, stc
from sterna.scoring.intervals import paired_difference
from sterna.scoring.scales import FACTORS


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
    """The rows of the table, the files of the experts, the one at the controls' density, and what the uncompressed model got right."""

    rows: tuple[Row, ...]
    files: tuple[Path, ...]
    expert: Path
    uncompressed: Score


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores dense vectors on the trained model itself, and experts on the live base that they are attached to.

    `count` hears of every batch's texts.
    """

    study: Study
    live: torch.nn.Module
    count: Callable[[int], None]

    def dense(self, tau: torch.Tensor, tokens: Tokens) -> Score:
        self.study.subject.put(tau)
        return evaluate(self.study.subject.model, tokens, self.count)

    def attached(self, expert: sterna.Expert, tokens: Tokens) -> Score:
        with sterna.attached(self.live, expert):
            return evaluate(self.live, tokens, self.count)


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
    choices, methods = 4 * len(options.densities) + 4, len(options.densities) + 6  # a walk takes about four steps
    count = counter(progress, f"evaluating on {study.name}", choices * len(study.validation) + methods * len(study.test), "texts")
    scorer = Scorer(study, live, count)
    made: list[Made] = []
    for density in reversed(options.densities):  # fewer entries want larger ones, so each walk starts no lower than the last one ended
        made.insert(0, _made(scorer, density, options.alphas, made[0].alpha if made else 0.0, folder))
    chosen = next(one for one in made if one.density == options.control_density)
    full = scorer.dense(study.subject.tau, study.test)
    rows = _controls(scorer, full, chosen)
    if chosen.alpha != 1:
        plain = scorer.attached(_expert(study, chosen.density, 1.0), study.test)
        rows.append(row_of("ComPEFT with alpha 1", plain, full, density=chosen.density, alpha=1.0, **_sizes(chosen.size)))
    rows += [row_of("ComPEFT", one.score, full, density=one.density, alpha=one.alpha, **_sizes(one.size)) for one in made]
    return Findings(tuple(rows), tuple(one.file for one in made), chosen.file, full)


def _expert(study: Study, density: float, alpha: float) -> sterna.Expert:
    return sterna.compress(study.base, study.trained, density=density, alpha=alpha)


def _made(scorer: Scorer, density: float, alphas: tuple[float, ...], least: float, folder: Path) -> Made:
    study = scorer.study
    start = max(least, 1.5 * mean_in_std(study.subject.tau, density))  # the least-squares scale is too small for what the dropped entries did
    alpha = climb(alphas, start, lambda value: scorer.attached(_expert(study, density, value), study.validation))
    expert = _expert(study, density, alpha)
    file = saved(expert, folder, f"{study.name} d{density:g} a{alpha:g}")
    return Made(density, alpha, file, measured(expert), scorer.attached(sterna.load(file), study.test))


def _controls(scorer: Scorer, full: Score, chosen: Made) -> list[Row]:
    """What ComPEFT is to be held against, at the chosen expert's density."""
    study, tau, density, size = scorer.study, scorer.study.subject.tau, chosen.density, chosen.size
    factor = climb(FACTORS, 1.0, lambda value: scorer.dense(value * tau, study.validation))
    tuned = full if factor == 1 else scorer.dense(factor * tau, study.test)
    alone = scorer.dense(torch.zeros_like(tau), study.test)
    pruned = scorer.dense(prune_only(tau, density), study.test)
    sparse = scorer.dense(stc(tau, density), study.test)
    study.subject.put(tau)
    return [
        Row("words alone", bag_of_words(study.tokenizer, study.train, study.test)),
        row_of("base alone", alone, full, bytes=size.exact),
        row_of("uncompressed", full, full, factor=1.0, **_dense_sizes(size, size.uncompressed, 16)),
        row_of("uncompressed with tuned scale", tuned, full, factor=factor, **_dense_sizes(size, size.uncompressed, 16)),
        row_of("prune only", pruned, full, density=density, factor=1.0, **_dense_sizes(size, size.pruned, size.pruned_bits)),
        row_of("STC with mean magnitude", sparse, full, density=density, alpha=mean_in_std(tau, density), **_sizes(size)),
    ]


def row_of(method: str, score: Score, full: Score, **columns: Any) -> Row:
    return Row(method, score.accuracy, None if score is full else paired_difference(score.right, full.right), **columns)


def _sizes(size: Size) -> dict[str, Any]:
    return {"bytes": size.bytes, "ratio": size.uncompressed / size.bytes, "bits": size.bits, "entropy": size.entropy}


def _dense_sizes(size: Size, total: int, bits: float) -> dict[str, Any]:
    return {"bytes": total, "ratio": size.uncompressed / total, "bits": bits}
