"""What merging does to each task's score: six tasks of the encoder, trained by full fine-tuning, LoRA and PaFi, merged by every method.

Parents are compressed experts, merged by `sterna.merge`, or the uncompressed task vectors, merged by the methods' formulas on dense vectors (written
here anew; exact PaFi experts are merged by `sterna.merge` itself). Each method's lambda is climbed to on validation texts; then the test texts are
looked at once. A score is the accuracy with the task's own head, over that of the single uncompressed model. Needs what `experts.py` trains.

    python benchmarks/merge_scores.py               goes on with what is missing, about two hours on one core
    python benchmarks/merge_scores.py --tables      prints the tables of what is there; a cell that was not run is named
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

import experts as library
import harness
import sterna
import tasks
from machine import machine
from rendering import markdown
from sterna.expert.changes import Set
from sterna.expert.expert import Expert
from sterna.scoring.scales import climb
from sterna.training.config import Data
from sterna.training.data import load_data
from sterna.training.errors import Faults
from sterna.training.evaluation import Evaluation, evaluation
from sterna.training.models import load_model, load_tokenizer
from sterna.training.tokens import Lengths
from sterna.writing import whole_file

RESULT = harness.RESULTS / "merge_scores.json"
ROWS = {"validation": 80, "test": 300}
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
COMPRESSED = {"full": (0.1, 4.0), "lora": (0.2, 4.0), "pafi": (0.3, 2.0)}
"""Density and alpha of the compressed parents."""
LORA_RANK = 8 * len(library.TASKS)
"""Of merged LoRA experts: what stacking six of rank 8 gives."""
SIDES = ("compressed", "uncompressed")
NO_EMR = {"compressed": ("lora", "pafi"), "uncompressed": ("pafi",)}
"""Where there is none: it takes coded levels of whole tensors."""
Vector = dict[str, torch.Tensor]
"""A merged or single task vector by the base's names, fp32."""


@dataclass(frozen=True, slots=True)
class Method:
    """`parameters` as a recipe says them; `start` is where the climb over lambda begins, None where the method has no lambda."""

    parameters: dict[str, float]
    start: float | None
    dense: Callable[[list[torch.Tensor], float], torch.Tensor]


def _total(taus: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(taus).sum(0)


def _disjoint(taus: list[torch.Tensor]) -> torch.Tensor:
    """Of one tensor: the mean over those that have the sign of the sum; 0 where the sum is 0."""
    x = torch.stack(taus)
    agree = (x.sign() == x.sum(0).sign()) & (x != 0)
    return torch.where(agree, x, 0).sum(0) / agree.sum(0).clamp(min=1)


def _consensus(taus: list[torch.Tensor]) -> torch.Tensor:
    total = _total(taus)
    votes = sum(((tau.abs() >= 0.4 * (total - tau).abs()) & (tau != 0)).int() for tau in taus)
    return torch.where(votes >= 2, total, 0)


def _model_stock(taus: list[torch.Tensor]) -> torch.Tensor:
    flat = torch.stack([tau.flatten() for tau in taus]).double()
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
    n = len(taus)
    c = float(((unit @ unit.T).sum() - unit.square().sum()) / (n * (n - 1)))
    return (n * c / (1 + (n - 1) * c) * flat.mean(0)).float().view(taus[0].shape)


def _breadcrumbs(taus: list[torch.Tensor]) -> torch.Tensor:
    """Of each: without the 1 % of largest magnitude of the tensor, and of the rest the largest .85."""
    parts = []
    for tau in taus:
        order = tau.abs().flatten().argsort(descending=True)
        top = int(0.01 * tau.numel())
        mask = torch.zeros(tau.numel(), dtype=torch.bool)
        mask[order[top : top + int(0.85 * tau.numel())]] = True
        parts.append(torch.where(mask.view(tau.shape), tau, 0))
    return _total(parts)


def _unified(taus: list[torch.Tensor]) -> torch.Tensor:
    """EMR's: of those that have the sign of the sum, the largest."""
    x = torch.stack(taus)
    agree = x.sign() == x.sum(0).sign()
    return x.sum(0).sign() * torch.where(agree, x.abs(), 0).amax(0)


METHODS = {
    "linear": Method({}, None, lambda taus, scale: _total(taus) / len(taus)),
    "task_arithmetic": Method({}, 0.3, lambda taus, scale: scale * _total(taus)),
    "ties": Method({"density": 0.2}, 1.0, lambda taus, scale: scale * _disjoint(taus)),
    "dare_linear": Method({"density": 0.5}, 0.3, lambda taus, scale: scale * _total(taus)),
    "dare_ties": Method({"density": 0.5}, 1.0, lambda taus, scale: scale * _disjoint(taus)),
    "breadcrumbs": Method({"density": 0.85, "gamma": 0.01}, 0.3, lambda taus, scale: scale * _breadcrumbs(taus)),
    "consensus": Method({}, 0.3, lambda taus, scale: scale * _consensus(taus)),
    "model_stock": Method({}, None, lambda taus, scale: _model_stock(taus)),
    "emr": Method({}, None, lambda taus, scale: _unified(taus)),
}
SINGLE, BASE = "single", "base alone"


def trimmed(tau: Vector, density: float) -> Vector:
    """TIES's trim: the density share of largest magnitude over the whole vector."""
    flat = torch.cat([part.flatten() for part in tau.values()]).abs()
    least = flat.kthvalue(flat.numel() - int(density * flat.numel()) + 1).values
    return {name: torch.where(part.abs() >= least, part, 0) for name, part in tau.items()}


def dropped(tau: Vector, density: float, seed: int) -> Vector:
    """DARE's drop at random, with the rest rescaled."""
    generator = torch.Generator().manual_seed(seed)
    return {name: part * (torch.rand(part.shape, generator=generator) < density) / density for name, part in tau.items()}


@cache
def task_vector(task: str, method: str) -> Vector:
    """What full fine-tuning or LoRA learned, uncompressed: differences to the base, or the scaled products of the factors."""
    from peft import PeftModel

    one = library.Trained(task, method)
    model = load_model(library.base(), "classification", tokenizer(), None)
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items() if tensor.is_floating_point()}
    if method == "lora":
        classes = len(head(task, method)[1])
        model = load_model(library.base(), "classification", tokenizer(), [str(i) for i in range(classes)])
        after = PeftModel.from_pretrained(model, one.tuned).merge_and_unload().base_model.state_dict()
    else:
        after = load_model(one.tuned, "classification", tokenizer(), None).base_model.state_dict()
    return {name: after[name].float() - tensor for name, tensor in before.items() if not torch.equal(after[name], tensor)}


@cache
def head(task: str, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained classifier's weight and bias, as the expert keeps them."""
    heads = [change for change in expert(task, method).changes if isinstance(change, Set) and change.role == "head"]
    found = {name: tensor for change in heads for name, tensor in change.exact}
    weight = next(tensor for name, tensor in found.items() if name.endswith("weight"))
    return weight, next(tensor for name, tensor in found.items() if name.endswith("bias"))


@cache
def expert(task: str, method: str) -> Expert:
    """The compressed parent."""
    one = library.Trained(task, method)
    density, alpha = COMPRESSED[method]
    return sterna.compress(library.base(), one.tuned, density=density, alpha=alpha, metadata={"task": task})


@cache
def tokenizer() -> Any:
    return load_tokenizer(library.base())


@cache
def rows(task: str, split: str) -> Evaluation:
    """The first rows of a split, ready to be run; the same for everything that is scored."""
    files = {name: str(library.folder() / task / f"{name}.csv") for name in library.SPLITS}
    faults = Faults()
    data = load_data(Data(**files), "classification", faults)
    faults.stop()
    assert data is not None
    examples = getattr(data, split)
    return evaluation(tokenizer(), examples.taken(range(min(len(examples), ROWS[split]))), "classification", Lengths(tasks.MAX_LENGTH))


@dataclass(frozen=True)
class Live:
    """One encoder that everything is put on."""

    model: Any = field(default_factory=lambda: load_model(library.base(), "classification", tokenizer(), None))

    def accuracy(self, task: str, split: str) -> float:
        """As the model now is; products in bfloat16, which takes a third of the time."""
        with torch.autocast("cpu", torch.bfloat16):
            return rows(task, split).scores(self.model)["accuracy"]

    def of_expert(self, merged: Expert | Callable[[str], Expert], split: str) -> dict[str, float]:
        """Accuracy by task with an expert that has every task's head, or with each task's own."""
        found = {}
        for task in library.TASKS:
            one, named = (merged, task) if isinstance(merged, Expert) else (merged(task), None)
            with sterna.attached(self.model, one, head=named):
                found[task] = self.accuracy(task, split)
        return found

    def of_vector(self, vector: Vector | Callable[[str], Vector], method: str, split: str) -> dict[str, float]:
        """Accuracy by task of base + vector with each task's head, by plain tensors."""
        parameters = dict(self.model.base_model.named_parameters())
        found = {}
        before = self.model.classifier
        for task in library.TASKS:
            tau = vector if isinstance(vector, dict) else vector(task)
            saved = {name: parameters[name].detach().clone() for name in tau}
            weight, bias = head(task, method)
            self.model.classifier = torch.nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                self.model.classifier.weight.copy_(weight)
                self.model.classifier.bias.copy_(bias)
                for name, part in tau.items():
                    parameters[name] += part
            try:
                found[task] = self.accuracy(task, split)
            finally:
                self.model.classifier = before
                with torch.no_grad():
                    for name, tensor in saved.items():
                        parameters[name].copy_(tensor)
        return found


def merged_expert(training: str, name: str, scale: float, exact: bool) -> Expert:
    """The parents' experts merged by the library."""
    method = METHODS[name]
    parents = [sterna.load(library.Trained(task, training).tuned) if exact else expert(task, training) for task in library.TASKS]
    parameters: dict[str, Any] = dict(method.parameters) | ({} if method.start is None else {"lambda": scale})
    if training == "lora" and name not in ("linear", "task_arithmetic", "model_stock"):  # entries of products have no small rank; the others stack
        parameters |= {"lora": "svd", "rank": LORA_RANK}
    density = parameters.pop("density", None)
    gamma = parameters.pop("gamma", None)
    return sterna.merge(parents, name, tasks=list(library.TASKS), density=density, gamma=gamma, parameters=parameters, base=str(library.base()))


@cache
def prepared(training: str, kind: str) -> tuple[Vector, ...]:
    """The uncompressed vectors as a method takes them: whole, trimmed, or with entries dropped."""
    taus = [task_vector(task, training) for task in library.TASKS]
    if kind == "ties":
        return tuple(trimmed(tau, METHODS["ties"].parameters["density"]) for tau in taus)
    if kind.startswith("dare"):
        return tuple(dropped(tau, METHODS[kind].parameters["density"], seed) for seed, tau in enumerate(taus))
    return tuple(taus)


def merged_vector(training: str, name: str, scale: float) -> Vector:
    taus = prepared(training, "dare_linear" if name.startswith("dare") else "ties" if name == "ties" else "")
    return {key: METHODS[name].dense([tau[key] for tau in taus], scale) for key in taus[0]}


def recovered(training: str, task: str) -> Vector:
    """EMR's vector of one task: the unified one where it agrees in sign, times sum |tau| / sum |those entries|."""
    unified, own = merged_vector(training, "emr", 1.0), task_vector(task, training)
    masked = {name: torch.where(own[name] * part > 0, part, 0) for name, part in unified.items()}
    total = sum(float(part.abs().sum(dtype=torch.float64)) for part in own.values())
    scale = total / sum(float(part.abs().sum(dtype=torch.float64)) for part in masked.values())
    return {name: scale * part for name, part in masked.items()}


def scored(live: Live, training: str, side: str, name: str, scale: float, split: str) -> dict[str, float]:
    if side == "compressed" or training == "pafi":
        return live.of_expert(merged_expert(training, name, scale, exact=side == "uncompressed"), split)
    if name == "emr":
        return live.of_vector(lambda task: recovered(training, task), training, split)
    return live.of_vector(merged_vector(training, name, scale), training, split)


def single(live: Live, training: str, side: str, split: str) -> dict[str, float]:
    if side == "compressed":
        return live.of_expert(lambda task: expert(task, training), split)
    if training == "pafi":
        return live.of_expert(lambda task: sterna.load(library.Trained(task, training).tuned), split)
    return live.of_vector(lambda task: task_vector(task, training), training, split)


def climbed(start: float, score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The best lambda of the grid, walking uphill from `start`, and all that were tried."""
    seen: dict[float, float] = {}

    def kept(value: float) -> float:
        seen[value] = score(value)
        return seen[value]

    return climb(LAMBDAS, start, kept), seen


def wanted(trainings: list[str]) -> Iterator[tuple[str, str, str]]:
    for training in trainings:
        for name in (BASE, SINGLE, *METHODS):
            for side in SIDES:
                if not (name == BASE and side == "compressed") and not (name == "emr" and training in NO_EMR.get(side, ())):
                    yield training, side, name


def run_one(live: Live, training: str, side: str, name: str) -> dict[str, Any]:
    started = time.perf_counter()
    if name == BASE:
        return {"test": live.of_vector({}, training, "test"), "seconds": round(time.perf_counter() - started)}
    if name == SINGLE:
        return {"test": single(live, training, side, "test"), "seconds": round(time.perf_counter() - started)}
    start = METHODS[name].start
    found: dict[str, Any] = {}
    if start is not None:
        scale, seen = climbed(start, lambda value: statistics.mean(scored(live, training, side, name, value, "validation").values()))
        found = {"lambda": scale, "tried": {f"{value:g}": mean for value, mean in sorted(seen.items())}}
    found["test"] = scored(live, training, side, name, found.get("lambda", 1.0), "test")
    return {**found, "seconds": round(time.perf_counter() - started)}


def load() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"machine": machine(), "rows": ROWS, "tasks": list(library.TASKS), "cells": {}}


def go_on(trainings: list[str], most: float) -> None:
    live, until = Live(), time.monotonic() + 60 * most
    for training, side, name in wanted(trainings):
        key = f"{training}|{side}|{name}"
        if key in load()["cells"] or time.monotonic() > until:
            continue
        cell = run_one(live, training, side, name)
        found = load()
        found["cells"][key] = cell
        with whole_file(RESULT) as file:
            file.write((json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
        harness.note(f"{key}: {cell}")


def tables() -> str:
    """One table a training method: the mean over tasks of accuracy relative to the single models, by method and side; and by task."""
    found = load()
    parts = []
    for training in library.METHODS:
        cells = {(side, name): found["cells"].get(f"{training}|{side}|{name}") for side in SIDES for name in (BASE, SINGLE, *METHODS)}
        reference = cells["uncompressed", SINGLE]
        if reference is None:
            parts.append(f"**{training}**: not run.")
            continue
        lines, missing = [], []
        for name in (BASE, SINGLE, *METHODS):
            line = [name]
            for side in reversed(SIDES):
                cell = cells[side, name]
                if cell is None:
                    line += ["", ""]
                    missing += [] if name == BASE else [f"{name}, {side}"]
                    continue
                ratio = statistics.mean(cell["test"][task] / reference["test"][task] for task in found["tasks"])
                line += [f"{100 * statistics.mean(cell['test'].values()):.1f} ({ratio:.3f})", f"{cell['lambda']:g}" if "lambda" in cell else ""]
            best = cells["compressed", name] or cells["uncompressed", name]
            line += [f"{100 * best['test'][task]:.0f}" if best else "" for task in found["tasks"]]
            lines.append(line)
        columns = ["", "uncompressed", "lambda", "compressed", "lambda", *found["tasks"]]
        parts.append(f"**{training}**\n\n{markdown(columns, lines)}" + (f"\n\nNot run: {'; '.join(missing)}." if missing else ""))
    made = found["machine"]
    parts.append(
        f"Mean accuracy over {len(found['tasks'])} tasks in % (in parentheses: mean ratio to the single uncompressed models), on at most "
        f"{found['rows']['test']} test texts each; the last columns are the tasks' accuracies with compressed parents (of the base: with the "
        f"heads alone). Lambda was chosen on {found['rows']['validation']} validation texts a task; the models ran under bfloat16 autocast. "
        f"Made by `python benchmarks/merge_scores.py`; "
        f"begun at commit {made['commit']}, {made['date']}."
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there")
    parser.add_argument("--minutes", type=float, default=10_000, help="begin no cell after that")
    parser.add_argument("--training", action="append", default=[], choices=list(library.METHODS), help="of one training method; may be given again")
    options = parser.parse_args()
    if options.tables:
        print(tables())
        return
    torch.set_num_threads(1)
    go_on(options.training or list(library.METHODS), options.minutes)


if __name__ == "__main__":
    main()
