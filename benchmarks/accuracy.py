"""Accuracy of PaFi and HiWi beside full fine-tuning, LoRA and their controls, on the encoder and four tasks, with trained and stored sizes.

For each method and task: three rates or more on a third of the training texts with seed 0, the best on validation taken; then three seeds at that
rate on all of them (1,500 texts at most, 2 epochs). Some twelve core-hours: each training is written down when it ends, and a later call goes on.

    python benchmarks/accuracy.py --minutes 60      trains what is missing, for about an hour
    python benchmarks/accuracy.py --tables          prints what is there; a cell that was not run stays empty and is named
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import harness
import tasks
from machine import machine
from sterna import HiWi, PaFi, Trainer, Tuning, tune
from sterna.demo.data import Sizes
from sterna.writing import whole_file

RESULT = harness.RESULTS / "accuracy.json"
SIZES = Sizes(train=1500, validation=500, test=1500)
EPOCHS, BATCH, SEEDS = 2, 16, (0, 1, 2)
MOST_RATES = 6
FEED_FORWARD_BIASES = ("*.intermediate.dense.bias", "*.[0-9].output.dense.bias")


@dataclass(frozen=True, slots=True)
class Method:
    """How a model is made ready: returns what is trained beside the head, in numbers, and what is stored beside it."""

    label: str
    ready: Callable[[Any], tuple[Any, Tuning | None, int, int]]
    rates: tuple[float, ...]


def _full(model: Any) -> tuple[Any, None, int, int]:
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier"))
    return model, None, count, count


def _head(model: Any) -> tuple[Any, None, int, int]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    return model, None, 0, 0


def _lora(model: Any) -> tuple[Any, None, int, int]:
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS"))
    count = sum(p.numel() for name, p in wrapped.named_parameters() if p.requires_grad and "lora_" in name)
    return wrapped, None, count, count


def _tuned(method: PaFi | HiWi) -> Callable[[Any], tuple[Any, Tuning, int, int]]:
    def ready(model: Any) -> tuple[Any, Tuning, int, int]:
        tuning = tune(model, method)
        stored = tuning.trained
        if isinstance(method, HiWi) and method.target == "bias":
            stored = sum(part.slots[0].tensor.numel() for part in tuning.parts)
        return model, tuning, tuning.trained, stored

    return ready


MASKED = BIASES = (5e-3, 1e-2, 2e-2)
METHODS = {
    "full": Method("full fine-tuning", _full, (2e-5, 5e-5, 1e-4)),
    "lora": Method("LoRA r=8, all linear layers", _lora, (5e-4, 1e-3, 2e-3)),
    "bitfit": Method("BitFit: all biases of the blocks", _tuned(PaFi(density=1, include=("*layer.*.bias",))), (2e-3, 5e-3, 1e-2)),
    "ff-biases": Method("feed-forward biases, directly", _tuned(PaFi(density=1, include=FEED_FORWARD_BIASES)), BIASES),
    "random": Method("random mask .005", _tuned(PaFi(density=0.005, order="random")), MASKED),
    "largest": Method("largest mask .005", _tuned(PaFi(density=0.005, order="largest")), MASKED),
    "pafi .001": Method("PaFi .001", _tuned(PaFi(density=0.001)), MASKED),
    "pafi .005": Method("PaFi .005", _tuned(PaFi(density=0.005)), MASKED),
    "pafi .02": Method("PaFi .02", _tuned(PaFi(density=0.02)), MASKED),
    "hiwi bias 4": Method("HiWi bias r=4", _tuned(HiWi(target="bias", rank=4)), BIASES),
    "hiwi bias 16": Method("HiWi bias r=16", _tuned(HiWi(target="bias", rank=16)), BIASES),
    "hiwi bias 64": Method("HiWi bias r=64", _tuned(HiWi(target="bias", rank=64)), BIASES),
    "hiwi bias relu": Method("HiWi bias r=16, ReLU", _tuned(HiWi(target="bias", rank=16, activation="relu")), BIASES),
    "hiwi weight": Method("HiWi weight r=4", _tuned(HiWi(target="weight", rank=4)), (1e-3, 3e-3, 1e-2)),
    "hiwi weight gelu": Method("HiWi weight r=4, GELU", _tuned(HiWi(target="weight", rank=4, activation="gelu")), (1e-3, 3e-3, 1e-2)),
    "head": Method("linear head alone", _head, (3e-3, 1e-2, 3e-2)),
}
FIRST = ("pafi .005", "full", "random", "hiwi bias 16", "hiwi bias relu", "ff-biases", "lora", "head", "largest", "bitfit", "pafi .02", "hiwi weight")
ORDER = (*FIRST, *(name for name in METHODS if name not in FIRST))


@dataclass(frozen=True, slots=True)
class Run:
    """One training. `share` is the part of the training texts, 3 for a third."""

    task: str
    method: str
    rate: float
    share: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.task}|{self.method}|{self.rate:g}|1/{self.share}|{self.seed}"


Results = dict[str, dict[str, Any]]


def wanted(results: Results) -> Iterator[Run]:
    """The trainings in the order of their worth: every method on a task with one seed, task by task; then the other seeds."""
    for seeds in (SEEDS[:1], SEEDS[1:]):
        for task in tasks.TASKS:
            for method in ORDER:
                yield from (Run(task, method, rate, 3, 0) for rate in swept(results, task, method))
                rate = chosen_rate(results, task, method)
                if rate is not None:
                    yield from (Run(task, method, rate, 1, seed) for seed in seeds)


def swept(results: Results, task: str, method: str) -> list[float]:
    """The rates of the sweep: doubled or halved beyond its ends, a few times, as long as the best one stands at an end."""
    rates = sorted(METHODS[method].rates)
    while len(rates) < MOST_RATES and all(Run(task, method, rate, 3, 0).key in results for rate in rates):
        best = _best(results, task, method, rates)
        if best not in (rates[0], rates[-1]):
            break
        rates = sorted([*rates, float(f"{2 * best if best == rates[-1] else best / 2:g}")])
    return rates


def chosen_rate(results: Results, task: str, method: str) -> float | None:
    """The rate of the sweep with the most right validation answers; of equals, the smallest. None before the sweep is done."""
    rates = swept(results, task, method)
    return _best(results, task, method, rates) if all(Run(task, method, rate, 3, 0).key in results for rate in rates) else None


def _best(results: Results, task: str, method: str, rates: Sequence[float]) -> float:
    return max(rates, key=lambda rate: results[Run(task, method, rate, 3, 0).key]["validation"])


def classifier(classes: int) -> Any:
    """The encoder with a new head."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(tasks.folder(), num_labels=classes, dtype=torch.float32)


def train(run: Run, task: tasks.Task, tokenizer: Any) -> dict[str, Any]:
    rows = task.train.part(0, len(task.train) // run.share)
    transformers.set_seed(run.seed)
    model, tuning, trained, stored = METHODS[run.method].ready(classifier(len(task.classes)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=run.rate,
            seed=run.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=tasks.tokens(tokenizer, rows), processing_class=tokenizer, tuning=tuning)
        trainer.remove_callback(transformers.PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    found: dict[str, Any] = {"trained": trained, "stored": stored, "seconds": round(seconds, 1), "texts": len(rows)}
    found["validation"] = sum(tasks.right_answers(model, tokenizer, tasks.tokens(tokenizer, task.validation))) / len(task.validation)
    if run.share == 1:
        found["test"] = sum(tasks.right_answers(model, tokenizer, tasks.tokens(tokenizer, task.test))) / len(task.test)
    return found


def load() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"machine": machine(), "bag of words": {}, "rows": {}, "runs": {}}


def save(found: dict[str, Any]) -> None:
    with whole_file(RESULT) as file:
        file.write((json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


def go_on(minutes: float, only: list[str]) -> None:
    found = load()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tasks.folder())
    prepared = {name: make(SIZES) for name, make in tasks.TASKS.items() if not only or name in only}
    for name, task in prepared.items():
        found["rows"][name] = {"train": len(task.train), "validation": len(task.validation), "test": len(task.test), "classes": len(task.classes)}
        if name not in found["bag of words"]:
            found["bag of words"][name] = tasks.bag_of_words(tokenizer, task)
    save(found)
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        run = next((run for run in wanted(found["runs"]) if run.key not in found["runs"] and run.task in prepared), None)
        if run is None:
            harness.note("every cell is there")
            return
        outcome = train(run, prepared[run.task], tokenizer)
        found = load()  # another process may have written meanwhile
        found["runs"][run.key] = outcome
        save(found)
        harness.note(f"{run.key}: {outcome}")


def at_chosen_rate(results: Results, task: str, method: str) -> dict[int, dict[str, Any]]:
    """The trainings on all texts at the chosen rate, by seed."""
    rate = chosen_rate(results, task, method)
    keys = {seed: Run(task, method, rate, 1, seed).key for seed in SEEDS} if rate is not None else {}
    return {seed: results[key] for seed, key in keys.items() if key in results}


def tables() -> str:
    """All tasks beside each other, then one table a task: accuracy on the test texts, mean and range over seeds, with the sizes beside the head."""
    found = load()
    parts = [summary(found)]
    for task, rows in found["rows"].items():
        lines = [
            f"**{task}**: {rows['train']:,} training texts, {rows['test']:,} test texts, {rows['classes']} classes; "
            f"bag of words {100 * found['bag of words'][task]:.1f} %.",
            "",
            "| method | rate | trained | stored | test accuracy, % | seeds |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        missing = []
        for name, method in METHODS.items():
            runs = at_chosen_rate(found["runs"], task, name)
            left = [str(seed) for seed in SEEDS if seed not in runs]
            missing += [f"{method.label} (seed {' and '.join(left)})" if runs else method.label] if left else []
            if not runs:
                lines.append(f"| {method.label} | | | | | 0 |")
                continue
            scores = [100 * value["test"] for value in runs.values()]
            one = next(iter(runs.values()))
            rate = chosen_rate(found["runs"], task, name)
            spread = f" ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else ""
            lines.append(
                f"| {method.label} | {rate:g} | {one['trained']:,} | {one['stored']:,} | {statistics.mean(scores):.1f}{spread} | {len(scores)} |"
            )
        if missing:
            lines += ["", f"Not run: {'; '.join(missing)}."]
        parts.append("\n".join(lines))
    made = found["machine"]
    minutes = sum(run["seconds"] for run in found["runs"].values()) / 60
    parts.append(
        f"Accuracy is the mean over seeds with its range. Made by `python benchmarks/accuracy.py`, {len(found['runs'])} trainings in {minutes:.0f} "
        f"minutes altogether; begun at commit {made['commit']}, {made['date']}."
    )
    return "\n\n".join(parts)


def summary(found: dict[str, Any]) -> str:
    """Every method on every task: mean accuracy over the seeds that were run, and the mean over tasks where all of them are there."""
    names = list(found["rows"])
    lines = [f"| method | trained | stored | {' | '.join(names)} | mean |", "| --- " * (len(names) + 4) + "|"]
    rows: list[tuple[str, str, str, list[float | None]]] = [
        ("bag of words", "", "", [found["bag of words"][task] for task in names]),
        *((method.label, *_counts(found["runs"], name), [_mean(found["runs"], task, name) for task in names]) for name, method in METHODS.items()),
    ]
    for label, trained, stored, scores in rows:
        there = [score for score in scores if score is not None]
        cells = ["" if score is None else f"{100 * score:.1f}" for score in [*scores, statistics.mean(there) if len(there) == len(names) else None]]
        lines.append(f"| {label} | {trained} | {stored} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(results: Results, task: str, method: str) -> float | None:
    runs = at_chosen_rate(results, task, method)
    return statistics.mean(run["test"] for run in runs.values()) if runs else None


def _counts(results: Results, method: str) -> tuple[str, str]:
    """Numbers trained and stored beside the head: the same on every task."""
    run = next((run for key, run in results.items() if key.split("|")[1] == method), None)
    return (f"{run['trained']:,}", f"{run['stored']:,}") if run else ("", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10_000, help="stop after the training that is under way then")
    parser.add_argument("--only", action="append", default=[], choices=list(tasks.TASKS), help="a task; may be given again")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there")
    options = parser.parse_args()
    if options.tables:
        print(tables())
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(KeyboardInterrupt):
        go_on(options.minutes, options.only)


if __name__ == "__main__":
    main()
