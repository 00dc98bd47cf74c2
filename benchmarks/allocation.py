"""Can the same bytes be spent better than by one global threshold? Ten rules for what is kept and what it is worth, at equal bytes, on three tasks.

Dense formulas, independent of the product's code. A rule says which entries of the task vector keep their sign; a scale what those of tensor t are
worth. Sizes are the i.i.d. entropy of each tensor's levels, and every rule's density is chosen so that it has the bytes of ComPEFT at .01 and at .05.

    global          abs(tau) over one threshold, one scale: ComPEFT
    scaled          the same entries; a scale for each tensor: what is kept of it has its norm (times u)
    mean            the same entries; a scale for each tensor: the mean of abs(tau) of what is kept (times a number for all)
    balanced        abs(tau) / sqrt(std of its tensor); scales as "scaled"
    tensor          the same density in every tensor; scales as "scaled"
    error per bit   tensor by tensor the density at which one more bit takes equally much squared error away; scales as "mean"
    Fisher          abs(tau) * sqrt(F), F the mean squared gradient of 64 training rows; scales as "mean"
    Fisher^(1/2)    abs(tau) * F^(1/4); scales as "mean"
    Fisher, tensor  abs(tau) * sqrt(mean F of its tensor); scales as "scaled"
    .. selection    the same, F of 64 of the validation rows, which a search has
    .. root         abs(tau) * (mean F of its tensor, of validation rows)^(1/4): the allocation "fisher" of a search

u, the norm of what is kept over the norm of tau, is the best of three on validation rows; test rows are looked at for that one alone. A second call
goes on:

    python benchmarks/allocation.py             about half an hour a task on a core
    python benchmarks/allocation.py --tables    prints the table of what is there
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

import experts
import harness
from machine import machine
from rendering import markdown
from sterna.scoring.intervals import paired_difference
from sterna.writing import whole_file

RESULT = harness.RESULTS / "allocation.json"
TASKS = ("computers", "tweets", "science")
SIZES = (0.01, 0.05)
"""Densities of ComPEFT whose bytes all rules have."""
NORMS = (0.8, 1.2, 1.8)
VALIDATION, TEST, FISHER = 300, 500, 64
Tensors = dict[str, torch.Tensor]


def entropy(density: float) -> float:
    zeros = (1 - density) * math.log2(1 - density) if density < 1 else 0.0
    return -zeros - density * math.log2(density / 2) if density > 0 else 0.0


class Study:
    """A task's tuned model, its task vector, and its rows."""

    def __init__(self, task: str) -> None:
        import transformers
        from safetensors.torch import load_file

        one = experts.Trained(task, "full")
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(one.tuned, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(experts.base())
        base = load_file(experts.base() / "model.safetensors")
        self.live = dict(self.model.named_parameters())
        names = sorted(name for name in self.live if name.removeprefix("bert.") in base)
        self.base: Tensors = {name: base[name.removeprefix("bert.")].clone() for name in names}
        self.tau: Tensors = {name: self.live[name].detach() - self.base[name] for name in names}
        self.size = sum(value.numel() for value in self.tau.values())
        self.norm = math.sqrt(sum(float((value.double() ** 2).sum()) for value in self.tau.values()))
        self.std = {name: float(value.double().pow(2).mean().sqrt()) + 1e-12 for name, value in self.tau.items()}
        self.rows = {split: self._rows(one.data / f"{split}.csv", most) for split, most in (("validation", VALIDATION), ("test", TEST))}
        self.fisher = self._fisher(self._rows(one.data / "train.csv", FISHER))
        self.selection_fisher = self._fisher(self.rows["validation"][:FISHER])
        self.floor = 0.01 * sum(float(value.sum()) for value in self.fisher.values()) / self.size

    def _rows(self, path: Any, most: int) -> list[tuple[list[int], int]]:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))[:most]
        ids = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=64)["input_ids"]
        return [(one, self.model.config.label2id[row["label"]]) for one, row in zip(ids, rows, strict=True)]

    def _fisher(self, rows: list[tuple[list[int], int]]) -> Tensors:
        found = {name: torch.zeros_like(value) for name, value in self.tau.items()}
        for ids, label in rows:
            self.model.zero_grad(set_to_none=True)
            logits = self.model(input_ids=torch.tensor([ids])).logits
            torch.nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
            for name in found:
                if (gradient := self.live[name].grad) is not None:
                    found[name] += gradient**2 / len(rows)
        self.model.zero_grad(set_to_none=True)
        return found

    def scored(self, split: str) -> tuple[np.ndarray, float]:
        """Which rows are right, and the mean cross-entropy."""
        rows = self.rows[split]
        right, loss = np.zeros(len(rows), bool), 0.0
        order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
        with torch.inference_mode():
            for start in range(0, len(order), 64):
                part = order[start : start + 64]
                inputs = self.tokenizer.pad({"input_ids": [rows[place][0] for place in part]}, return_tensors="pt")
                labels = torch.tensor([rows[place][1] for place in part])
                logits = self.model(**inputs).logits
                right[part] = (logits.argmax(1) == labels).numpy()
                loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return right, loss / len(rows)

    def put(self, update: Callable[[str], torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.base.items():
                self.live[name].copy_(value + update(name))


def weighted(study: Study, weight: Callable[[str], torch.Tensor | float]) -> Callable[[float], Tensors]:
    """Masks of a density by one threshold over |tau| * weight."""
    scores = {name: value.abs() * weight(name) for name, value in study.tau.items()}
    ordered = torch.cat([value.flatten() for value in scores.values()]).sort(descending=True).values
    return lambda density: {name: value >= ordered[max(int(density * study.size), 1) - 1] for name, value in scores.items()}


def by_tensor(study: Study) -> Callable[[float], Tensors]:
    ordered = {name: value.abs().flatten().sort(descending=True).values for name, value in study.tau.items()}
    return lambda density: {n: v.abs() >= ordered[n][max(int(density * v.numel()), 1) - 1] for n, v in study.tau.items()}


def error_per_bit(study: Study) -> Callable[[float], Tensors]:
    """Of each tensor the c entries that maximise (sum of the c largest)^2 / c - price * bits(c): the error taken away, less its cost."""
    ordered = {name: value.abs().flatten().sort(descending=True).values for name, value in study.tau.items()}
    gains, bits = {}, {}
    for name, value in ordered.items():
        count = torch.arange(1, value.numel() + 1, dtype=torch.float64)
        share = (count / value.numel()).clamp(max=1 - 1e-12)
        gains[name] = value.double().cumsum(0) ** 2 / count
        bits[name] = -value.numel() * ((1 - share) * torch.log2(1 - share) + share * torch.log2(share / 2))

    def counts(price: float) -> dict[str, int]:
        worth = {name: gains[name] - price * bits[name] for name in gains}
        best = {name: int(value.argmax()) for name, value in worth.items()}
        return {name: place + 1 if worth[name][place] > 0 else 0 for name, place in best.items()}

    def masks(density: float) -> Tensors:
        low, high = -40.0, 0.0
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(counts(10**middle).values()) > density * study.size else (low, middle)
        kept = counts(10**high)
        return {n: v.abs() >= ordered[n][kept[n] - 1] if kept[n] else torch.zeros_like(v, dtype=torch.bool) for n, v in study.tau.items()}

    return masks


RULES: dict[str, tuple[Callable[[Study], Callable[[float], Tensors]], str]] = {
    "global": (lambda study: weighted(study, lambda name: 1.0), "one"),
    "scaled": (lambda study: weighted(study, lambda name: 1.0), "norm"),
    "mean": (lambda study: weighted(study, lambda name: 1.0), "mean"),
    "balanced": (lambda study: weighted(study, lambda name: study.std[name] ** -0.5), "norm"),
    "tensor": (by_tensor, "norm"),
    "error per bit": (error_per_bit, "mean"),
    "Fisher": (lambda study: weighted(study, lambda name: (study.fisher[name] + study.floor).sqrt()), "mean"),
    "Fisher^(1/2)": (lambda study: weighted(study, lambda name: (study.fisher[name] + study.floor) ** 0.25), "mean"),
    "Fisher, tensor": (lambda study: weighted(study, lambda name: float(study.fisher[name].mean()) ** 0.5 + 1e-12), "norm"),
    "Fisher, tensor, selection": (lambda study: weighted(study, lambda name: float(study.selection_fisher[name].mean()) ** 0.5 + 1e-12), "norm"),
    "Fisher, tensor, root": (lambda study: weighted(study, lambda name: float(study.selection_fisher[name].mean()) ** 0.25 + 1e-6), "norm"),
}


def scales(study: Study, masks: Tensors, how: str, norm: float) -> dict[str, float]:
    """What a kept entry of each tensor is worth, so that what is kept has `norm` times the norm of tau."""
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    if how == "one":
        found = dict.fromkeys(kept, 1.0)
    elif how == "norm":
        found = {name: float(study.tau[name].double().norm()) / math.sqrt(count) if count else 0.0 for name, count in kept.items()}
    else:
        found = {name: float(study.tau[name].abs()[masks[name]].mean()) if count else 0.0 for name, count in kept.items()}
    whole = math.sqrt(sum(count * found[name] ** 2 for name, count in kept.items()))
    return {name: norm * study.norm / whole * value for name, value in found.items()}


def size_of(masks: Tensors) -> float:
    return sum(mask.numel() * entropy(float(mask.sum()) / mask.numel()) / 8 for mask in masks.values())


def of_size(masks: Callable[[float], Tensors], size: float) -> Tensors:
    """The masks whose levels have that many bytes, to half a per cent."""
    low, high = 1e-5, 0.9
    while True:
        middle = math.sqrt(low * high)
        found = masks(middle)
        if abs(size_of(found) / size - 1) < 0.005 or high / low < 1.001:
            return found
        low, high = (middle, high) if size_of(found) < size else (low, middle)


def studied(study: Study, rule: str, size: float) -> dict[str, Any]:
    make, how = RULES[rule]
    masks = of_size(make(study), size)
    best: tuple[int, float, float] | None = None
    for norm in NORMS:
        worth = scales(study, masks, how, norm)
        study.put(lambda name, worth=worth: torch.where(masks[name], study.tau[name].sign() * worth[name], 0.0))  # type: ignore[misc]
        right, loss = study.scored("validation")
        best = max(best or (-1, 0.0, 0.0), (int(right.sum()), -loss, norm))
    assert best is not None
    worth = scales(study, masks, how, best[2])
    study.put(lambda name: torch.where(masks[name], study.tau[name].sign() * worth[name], 0.0))
    right, loss = study.scored("test")
    kept = sum(int(mask.sum()) for mask in masks.values()) / study.size
    shown = {"bytes": round(size_of(masks)), "density": kept, "u": best[2], "validation": best[0] / VALIDATION}
    return {**shown, "test": float(right.mean()), "loss": loss, "right": "".join(map(str, right.astype(int)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], choices=TASKS)
    parser.add_argument("--tables", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    if options.tables:
        print(tables())
        return
    torch.set_num_threads(1)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"tasks": {}}
    for task in options.only or TASKS:
        rows = found["tasks"].setdefault(task, {})
        study = cache(lambda task=task: Study(task))
        for density in SIZES:
            for rule in RULES:
                if f"{rule} {density}" in rows:
                    continue
                harness.note(f"{task}: {rule} at the bytes of {density:g}")
                one = study()
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # cached weights would be those of an earlier scale
                    rows[f"{rule} {density}"] = studied(one, rule, size_of(weighted(one, lambda name: 1.0)(density)))
                found["machine"] = machine()
                with whole_file(RESULT) as file:
                    file.write((json.dumps(found, indent=1) + "\n").encode())


def tables() -> str:
    """What is there, as Markdown."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"tasks": {}}
    rows: list[list[Any]] = []
    for density in SIZES:
        for rule in RULES:
            cells: list[Any] = []
            won = []
            for task in TASKS:
                one, plain = (found["tasks"].get(task, {}).get(f"{name} {density}") for name in (rule, "global"))
                if one is None or plain is None:
                    cells += ["", ""]
                    continue
                difference = paired_difference(*(np.array(list(row["right"])) == "1" for row in (one, plain)))
                won.append(one["test"] > plain["test"])
                against = f" ({100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}])" if rule != "global" else ""
                cells += [f"{100 * one['test']:.1f}{against}", f"{one['loss']:.3f}"]
            rows.append([f"{density:g}", rule, *cells, f"{sum(won)} of {len(won)}" if rule != "global" else ""])
    heads = [head for task in TASKS for head in (f"{task}, accuracy", "loss")]
    table = markdown(("bytes of ComPEFT at", "rule", *heads, "better"), rows)
    note = (
        f"{TEST} test rows; in brackets the difference to global with its paired 95 % interval, in points; u chosen on {VALIDATION} validation rows. "
        "All ran under bfloat16 autocast."
    )
    made = (
        f"Made by `python benchmarks/allocation.py`; commit {found['machine']['commit']}, {found['machine']['date']}." if "machine" in found else ""
    )
    return "\n\n".join(filter(None, (table, note, made)))


if __name__ == "__main__":
    main()
