"""Experts composed for a task that none of them knows: what the search finds with thirty labelled examples, beside the base, the best expert alone,
and fine-tuning on the same examples and on all of them.

Each of the library's tasks is left out in turn; the experts of the others are composed for it, by the library's search (40 trials, weights within
1.5, .05 times their mean magnitude as the penalty). Every side gets its head in the same way: ridge regression on the thirty examples. Compressed
experts are weighed by `sterna`'s pool, uncompressed task vectors by plain dense sums; exact PaFi experts by the pool. The model runs in bfloat16
(autocast). The test rows are looked at once.

    python benchmarks/lorahub.py                   goes on with what is missing, about an hour on one core
    python benchmarks/lorahub.py --minutes 20      stops after the task that is under way then
    python benchmarks/lorahub.py --tables          prints the tables of what is there; needs nothing else
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import experts as library
import harness
import tasks
from machine import machine
from merge_scores import Vector, expert, task_vector, tokenizer
from rendering import markdown
from sterna.composing.heads import fit_head
from sterna.composing.pool import Pool
from sterna.composing.search import Trial, best, search, trial_of
from sterna.expert.file import load as load_expert
from sterna.scoring.intervals import paired_difference, wilson
from sterna.training.config import Data
from sterna.training.data import TaskData, load_data
from sterna.training.errors import Faults
from sterna.training.evaluation import Evaluation, evaluation, outputs
from sterna.training.models import load_model
from sterna.training.tokens import Lengths, collator
from sterna.writing import whole_file

RESULT = harness.RESULTS / "lorahub.json"
SHOTS, TEST, SEED = 30, 300, 0
SIDES = ("compressed", "uncompressed")
TUNE_STEPS, TUNE_BATCH, TUNE_RATE = 40, 10, 5e-5
"""Of fine-tuning on the examples: thirteen passes over them."""
CONTENDERS = {"base": "base", "single": "best expert alone", "composed": "composed"}


class DensePool:
    """What `Pool` does, by plain sums of dense task vectors: the uncompressed side."""

    def __init__(self, model: Any, vectors: Sequence[Vector]) -> None:
        self._live = dict(model.base_model.named_parameters())
        self._vectors = vectors
        self._base = {name: self._live[name].detach().clone() for name in {name for vector in vectors for name in vector}}

    def weigh(self, weights: Sequence[float]) -> None:
        with torch.no_grad():
            for name, old in self._base.items():
                total = old.clone()
                for weight, vector in zip(weights, self._vectors, strict=True):
                    if weight and name in vector:
                        total.add_(vector[name], alpha=weight)
                self._live[name].copy_(total)

    def close(self) -> None:
        self.weigh([0.0] * len(self._vectors))


def read(task: str) -> TaskData:
    """The task's examples (each label in proportion) and test rows; the same for everything that is compared."""
    files: dict[str, Any] = {split: str(library.folder() / task / f"{split}.csv") for split in ("train", "test")}
    faults = Faults()
    data = load_data(Data(**files, validation=None, train_rows=SHOTS, test_rows=TEST, seed=SEED), "classification", faults)
    faults.stop()
    assert data is not None
    return data


class Bench:
    """One unseen task: the live base, its examples and its test rows."""

    def __init__(self, task: str) -> None:
        self.data = read(task)
        self.classes = len(self.data.classes)
        assert self.data.test is not None
        parts = (self.data.train, self.data.test)
        self.shots, self.test = (evaluation(tokenizer(), part, "classification", Lengths(tasks.MAX_LENGTH)) for part in parts)
        self.model = self.fresh()

    def fresh(self) -> Any:
        torch.manual_seed(SEED)
        return load_model(library.base(), "classification", tokenizer(), self.data.classes)

    def score(self) -> float:
        """Fit a head to the examples; minus its leave-one-out cross-entropy."""
        with torch.autocast("cpu", torch.bfloat16):
            return fit_head(self.model, self.shots, self.classes).score

    def right(self, model: Any = None) -> str:
        """Which test rows are right: a 0 or 1 each."""
        return right_of(model if model is not None else self.model, self.test)


def right_of(model: Any, rows: Evaluation) -> str:
    with torch.autocast("cpu", torch.bfloat16):
        logits = outputs(rows, model).logits
    assert logits is not None
    return "".join(map(str, (logits.argmax(1) == np.array(rows.examples.answers)).astype(int)))


def composed(bench: Bench, training: str, side: str, others: Sequence[str]) -> dict[str, Any]:
    """Every contender's weights, score of the examples, and right test rows."""
    pool: Pool | DensePool
    if side == "uncompressed" and training != "pafi":
        pool = DensePool(bench.model, [task_vector(task, training) for task in others])
    else:
        exact = side == "uncompressed"
        pool = Pool(bench.model, [load_expert(library.Trained(t, training).tuned) if exact else expert(t, training) for t in others])
    started = time.perf_counter()

    def scored(weights: Sequence[float]) -> float:
        pool.weigh(weights)
        return bench.score()

    def told(trial: Trial) -> dict[str, Any]:
        scored(trial.weights)
        weights = {task: round(weight, 4) for task, weight in zip(others, trial.weights, strict=True)}
        return {"weights": weights, "score": trial.score, "right": bench.right()}

    try:
        alone = [trial_of([float(i == j) for j in range(len(others))], scored, 0.05) for i in range(len(others))]
        trials = search(len(others), scored, seed=SEED)
        found = {"base": told(trials[0]), "single": told(best(alone)), "composed": told(best([*trials, *alone]))}
    finally:
        pool.close()
    return {**found, "trials": len(trials) + len(alone), "seconds": round(time.perf_counter() - started)}


def tuned(bench: Bench) -> dict[str, Any]:
    """Fine-tuning of the whole base on the examples, with the head that ridge regression gave it, and its right test rows."""
    model = bench.model
    bench.score()
    head = {name: tensor.detach().clone() for name, tensor in model.classifier.state_dict().items()}
    fine = bench.fresh().train()
    fine.classifier.load_state_dict(head)
    pad = collator(tokenizer(), "classification")
    optimizer = torch.optim.AdamW(fine.parameters(), lr=TUNE_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / TUNE_STEPS)
    order = np.random.default_rng(SEED)
    for _ in range(TUNE_STEPS):
        batch = pad([dict(bench.shots.rows[place]) for place in order.choice(len(bench.shots.rows), TUNE_BATCH, replace=False)])
        with torch.autocast("cpu", torch.bfloat16):
            fine(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {"right": bench.right(fine.eval())}


def estimated(bench: Bench, others: Sequence[str]) -> dict[str, Any]:
    """What could narrow the choice of experts before a search: the first-order estimate of each one's gain, minus the gradient of the examples' loss
    at the base times its task vector; and its measured gain on the examples at weight 1. Beside them, its right test rows."""
    model = bench.model
    bench.score()
    model.zero_grad()
    model(**collator(tokenizer(), "classification")([dict(row) for row in bench.shots.rows])).loss.backward()
    gradient = {name: tensor.grad for name, tensor in model.base_model.named_parameters() if tensor.grad is not None}
    held = [expert(task, "full") for task in others]
    slopes = [-sum(float((gradient[name] * tau).sum()) for name, tau in one.task_vector().items() if name in gradient) for one in held]
    model.zero_grad()
    gains, right = [], []
    with Pool(model, held) as pool:
        start = bench.score()
        for number in range(len(others)):
            pool.weigh([float(number == other) for other in range(len(others))])
            gains.append(bench.score() - start)
            right.append(bench.right().count("1"))
    return {"experts": list(others), "slope": slopes, "gain": gains, "right": right}


def full(bench: Bench, task: str) -> dict[str, Any]:
    """The task's own full fine-tune on all of its training rows."""
    return {"right": right_of(load_model(library.Trained(task, "full").tuned, "classification", tokenizer(), bench.data.classes), bench.test)}


def wanted(there: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for training in methods:
        for side in SIDES:
            for task in there:
                yield training, side, task


def load() -> dict[str, Any]:
    if RESULT.exists():
        return json.loads(RESULT.read_text())
    return {"machine": machine(), "shots": SHOTS, "test": TEST, "tasks": list(library.TASKS), "cells": {}, "tuned": {}, "narrowed": {}}


def keep(kind: str, key: str, cell: Mapping[str, Any]) -> None:
    found = load()
    found.setdefault(kind, {})[key] = cell
    with whole_file(RESULT) as file:
        file.write((json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


def go_on(most: float) -> None:
    until = time.monotonic() + 60 * most
    names = list(library.TASKS)
    benches: dict[str, Bench] = {}
    for training, side, task in wanted(names, list(library.METHODS)):
        others = [other for other in names if other != task]
        key = f"{training}|{side}|{task}"
        if key in load()["cells"] or time.monotonic() > until:
            continue
        if missing := [other for other in others if not library.Trained(other, training).done]:
            harness.note(f"{key}: not trained yet: {', '.join(missing)} ({training})")
            continue
        bench = benches.setdefault(task, Bench(task))
        cell = composed(bench, training, side, others)
        keep("cells", key, cell)
        harness.note(f"{key}: {({name: cell[name]['right'].count('1') for name in CONTENDERS})} of {TEST}, {cell['seconds']} s")
    for task in names:
        if task in load()["tuned"] or time.monotonic() > until or not library.Trained(task, "full").done:
            continue
        bench = benches.setdefault(task, Bench(task))
        keep("tuned", task, {"examples": tuned(bench), "all": full(bench, task)})
    for task in names:
        others = [other for other in names if other != task]
        if task not in load().get("narrowed", {}) and time.monotonic() <= until and all(library.Trained(other, "full").done for other in others):
            keep("narrowed", task, estimated(benches.setdefault(task, Bench(task)), others))


def bits(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


def percent(right: np.ndarray) -> str:
    found = wilson(int(right.sum()), right.size)
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def points(right: np.ndarray, reference: np.ndarray) -> str:
    found = paired_difference(right, reference)
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def tables() -> str:
    """One table of means over tasks, a line a training method and side; and one by task."""
    found = load()
    lines, by_task, missing = [], [], []
    for training in library.METHODS:
        for side in SIDES:
            cells = {task: found["cells"].get(f"{training}|{side}|{task}") for task in found["tasks"]}
            missing += [f"{training} {side} {task}" for task, cell in cells.items() if cell is None]
            there = {task: cell for task, cell in cells.items() if cell is not None}
            if not there:
                continue
            rows = {name: np.concatenate([bits(cell[name]["right"]) for cell in there.values()]) for name in CONTENDERS}
            means = [f"{100 * rows[name].mean():.1f}" for name in CONTENDERS]
            lines.append([training, side, len(there), *means, points(rows["composed"], rows["base"]), points(rows["composed"], rows["single"])])
            by_task += [[training, side, task, *(percent(bits(cell[name]["right"])) for name in CONTENDERS)] for task, cell in there.items()]
    title = f"Composing for an unseen task with {found['shots']} examples: accuracy in % on {found['test']} test rows of each task, mean over tasks"
    columns = ["experts", "", "tasks", *CONTENDERS.values(), "composed minus base", "composed minus best alone"]
    parts = [f"**{title}** (`python benchmarks/lorahub.py`)", markdown(columns, lines)]
    if found["tuned"]:
        known = found["tuned"]
        told = [[task, percent(bits(cell["examples"]["right"])), percent(bits(cell["all"]["right"]))] for task, cell in known.items()]
        means = [f"{100 * statistics.mean(bits(cell[name]['right']).mean() for cell in known.values()):.1f}" for name in ("examples", "all")]
        columns = ["task", "on the examples", "on up to 1,500 rows"]
        parts += ["**Fine-tuning the base on the task itself**", markdown(columns, [["mean", *means], *told])]
    if narrowed := found.get("narrowed"):
        parts.append(_narrowing(narrowed))
    parts += ["**By task**", markdown(["experts", "", "unseen task", *CONTENDERS.values()], by_task)]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _narrowing(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How well what is known before a search ranks the experts by what they are worth alone on test rows."""
    lines = []
    for name, key in (("gradient at the base times task vector", "slope"), ("gain on the examples at weight 1", "gain")):
        ranks = [_spearman(cell[key], cell["right"]) for cell in found.values()]
        hits = sum(int(np.argmax(cell["right"])) in np.argsort(cell[key])[-2:] for cell in found.values())
        lines.append([name, f"{statistics.mean(ranks):+.2f} ({min(ranks):+.2f} to {max(ranks):+.2f})", f"{hits} of {len(found)}"])
    title = "What could narrow the choice of experts: rank correlation with their accuracy alone, mean over tasks (least to most)"
    return f"**{title}**\n\n" + markdown(["ranked by", "Spearman's rho", "best expert among its first two"], lines)


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after the task that is under way then")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there")
    options = parser.parse_args()
    if not options.tables:
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        go_on(options.minutes)
    print(tables())


if __name__ == "__main__":
    main()
