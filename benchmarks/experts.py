"""A library of experts to merge, compose and compare: six tasks of the encoder, each by full fine-tuning, LoRA and PaFi, trained as a user would.

Each task's rows lie as CSV files in the cache (the texts are other people's: nothing of them is in the repository), and every training is a run of
`sterna train` with at most 1,500 texts of 64 tokens and 2 epochs: <cache>/benchmarks/experts/<task>/<method>/ holds the run (its `trained` folder is
the tuned model or the PEFT folder) and `expert.safetensors`, whose metadata names the task. Fifty minutes on one core; a second call goes on.

    python benchmarks/experts.py             trains what is missing
    python benchmarks/experts.py --list      what is there, with its scores
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import harness
import tasks
from sterna.demo.assets import asset_path, cache_folder
from sterna.demo.data import Sizes, read_tab
from sterna.writing import whole_file

SIZES = Sizes(train=1500, validation=500, test=1000)
SPLITS = ("train", "validation", "test")
Row = tuple[str, str, str]
"""text, second text (empty where the task has one), label"""


def _subject(prefixes: tuple[str, ...]) -> dict[str, list[Row]]:
    """The groups of 20 newsgroups that begin with one of the prefixes; train and test are apart by date."""
    found: dict[str, list[Row]] = {}
    for part in ("train", "test"):
        cells = read_tab(asset_path("texts") / f"20newsgroups-{part}.tab", quoted=False)
        rows = {line[1]: (line[1], "", line[0]) for line in cells if len(line) > 1 and line[0].startswith(prefixes)}
        found[part] = list(rows.values())
        random.Random(0).shuffle(found[part])
    seen = {row[0] for row in found["train"]}
    train, test = found["train"], [row for row in found["test"] if row[0] not in seen]
    return {"train": train[: SIZES.train], "validation": train[SIZES.train :][: SIZES.validation], "test": test[: SIZES.test]}


def _of(task: tasks.Task) -> dict[str, list[Row]]:
    found = {}
    for split in SPLITS:
        rows: tasks.Rows = getattr(task, split)
        texts = [text if isinstance(text, tuple) else (text, "") for text in rows.texts]
        found[split] = [(first, second, task.classes[label]) for (first, second), label in zip(texts, rows.labels, strict=True)]
    return found


TASKS: dict[str, Callable[[], dict[str, list[Row]]]] = {
    "computers": lambda: _subject(("comp.",)),
    "recreation": lambda: _subject(("rec.",)),
    "science": lambda: _subject(("sci.",)),
    "tweets": lambda: _of(tasks.tweets(SIZES)),
    "bbc": lambda: _of(tasks.bbc(SIZES)),
    "policy": lambda: _of(tasks.policy(SIZES)),
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"name": "full"}, "training": {"learning_rate": 5e-5}, "compress": {"density": 0.1, "alpha": 4.0}},
    "lora": {
        "method": {"name": "lora", "r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
        "training": {"learning_rate": 1e-3},
        "compress": {"density": 0.2, "alpha": 2.0},
    },
    "pafi": {"method": {"name": "pafi", "density": 0.005}, "training": {"learning_rate": 1e-2}},
}
"""As `sterna train` reads them; the rates are those that most sweeps of accuracy.py end at."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One training of the library. `tuned` is what compression starts from: a model folder, a PEFT folder, or the exact PaFi expert."""

    task: str
    method: str

    @property
    def data(self) -> Path:
        return folder() / self.task

    @property
    def run(self) -> Path:
        return folder() / self.task / self.method

    @property
    def expert(self) -> Path:
        return self.run / "expert.safetensors"

    @property
    def tuned(self) -> Path:
        return self.expert if self.method == "pafi" else self.run / "trained"

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.run / "expert.metrics.json").read_text())

    @property
    def done(self) -> bool:
        return self.expert.is_file() and self.tuned.exists()


LIBRARY = tuple(Trained(task, method) for method in METHODS for task in TASKS)


def folder() -> Path:
    return cache_folder() / "benchmarks" / "experts"


def base() -> Path:
    return asset_path("encoder")


def write_rows(task: str) -> None:
    """The splits of a task as CSV files in the cache, unless they are there."""
    where = folder() / task
    if all((where / f"{split}.csv").is_file() for split in SPLITS):
        return
    where.mkdir(parents=True, exist_ok=True)
    for split, rows in TASKS[task]().items():
        pairs = any(second for _, second, _ in rows)
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(("text1", "text2", "label") if pairs else ("text", "label"))
        table.writerows(row if pairs else (row[0], row[2]) for row in rows)
        with whole_file(where / f"{split}.csv") as file:
            file.write(text.getvalue().encode("utf-8", "replace"))


def train(one: Trained) -> None:
    from sterna.training.run import train as run

    one.run.mkdir(parents=True, exist_ok=True)

    write_rows(one.task)
    config: dict[str, Any] = {
        "model": str(base()),
        "task": "classification",
        "data": {split: str(one.data / f"{split}.csv") for split in SPLITS} | {"max_length": tasks.MAX_LENGTH},
        "output": str(one.expert),
        "run_dir": str(one.run),
        "metadata": {"task": one.task},
        **METHODS[one.method],
    }
    config["training"] = {"num_train_epochs": 2, "per_device_train_batch_size": 16, **config["training"]}
    run(config)


def listed() -> str:
    lines = ["| task | method | test accuracy, trained | test accuracy, expert | bytes |", "| --- | --- | --- | --- | --- |"]
    for one in LIBRARY:
        if one.done:
            found = one.metrics
            scores = [f"{100 * found['metrics'][name]['test']['accuracy']:.1f}" for name in ("trained", "expert")]
            lines.append(f"| {one.task} | {one.method} | {scores[0]} | {scores[1]} | {found['sizes']['bytes']:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what is there")
    options = parser.parse_args()
    if options.list:
        print(listed())
        return
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for task in TASKS:
        write_rows(task)
    for one in LIBRARY:
        if not one.done:
            train(one)
            scores = one.metrics["metrics"]
            harness.note(f"{one.task}, {one.method}: {scores['trained']['test']['accuracy']:.3f} {scores['expert']['test']['accuracy']:.3f}")


if __name__ == "__main__":
    main()
