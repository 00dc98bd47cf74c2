"""PaFi and HiWi in the demo's table: the exact experts that they trained, and PaFi's made ternary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

import sterna
from sterna.demo.evaluation import climb, counter
from sterna.demo.product import saved
from sterna.demo.report import Row
from sterna.demo.study import Findings, Scorer, Study, row_of
from sterna.demo.training import EXPERT
from sterna.progress import Progress

DENSITY = 0.3
ALPHAS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""For the ternary step over trained entries: they move more evenly than a full fine-tune's."""
_LABELS = {"pafi": "PaFi", "hiwi": "HiWi"}


def with_tunings(study: Study, live: torch.nn.Module, found: Findings, folders: Mapping[str, Path], folder: Path, progress: Progress) -> Findings:
    """The findings with rows for each tuning: its expert with exact values, and a ternary one whose alpha validation chose."""
    texts = len(folders) * (2 * len(study.test) + 4 * len(study.validation))  # a walk takes about four steps
    scorer = Scorer(study, live, counter(progress, f"evaluating tunings on {study.name}", texts, "texts"))
    reference = next(row.bytes * row.ratio for row in found.rows if row.method == "uncompressed" and row.bytes and row.ratio)
    rows: list[Row] = []
    files: list[Path] = []

    def add(label: str, expert: sterna.Expert, **columns: float) -> None:
        files.append(saved(expert, folder, f"{study.name} {label}"))
        size = sterna.inspect(files[-1]).bytes
        score = scorer.attached(sterna.load(files[-1]), study.test)
        rows.append(replace(row_of(label, score, found.uncompressed, **columns), bytes=size, ratio=reference / size))

    for kind, trained in folders.items():
        exact = sterna.load(trained / EXPERT)
        share = f" {exact.facts.mask.density:g}" if exact.facts.mask is not None and exact.facts.mask.density else ""
        label = f"{_LABELS[kind]}{share}"
        add(f"{label}, exact values", exact)

        def ternary(alpha: float, exact: sterna.Expert = exact) -> sterna.Expert:
            return sterna.compress(study.base, exact, density=DENSITY, alpha=alpha, head="fp16")

        alpha = climb(ALPHAS, 2.0, lambda value, make=ternary: scorer.attached(make(value), study.validation))  # type: ignore[misc]
        add(f"{label}, ternary, head in 16 bit", ternary(alpha), density=DENSITY, alpha=alpha)
    return replace(found, rows=(*found.rows, *rows), files=(*found.files, *files))
