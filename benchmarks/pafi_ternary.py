"""PaFi and HiWi times ComPEFT: how few bytes a fine-tune of 20 newsgroups takes on disk, header in, head apart, and what it still gets right.

Trains on the demo's 4,000 texts of 64 tokens (3 epochs, batch 16, seed 0), keeps the exact experts in the cache, and compresses them at several
densities; alpha is climbed to on 1,000 validation texts, and the 1,500 test texts are looked at once for each row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import harness
import sterna
import tasks
from machine import machine
from sterna.demo.assets import cache_folder
from sterna.demo.data import Sizes
from sterna.demo.intervals import wilson
from sterna.expert.expert import Expert
from sterna.writing import whole_file

RESULT = harness.RESULTS / "pafi_ternary.json"
SIZES = Sizes(train=4000, validation=1000, test=1500)
ALPHAS = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
DENSITIES = (0.1, 0.2, 0.3, 0.5, 1.0)
STARTS = {0.1: 4.0, 0.2: 3.0, 0.3: 2.0, 0.5: 1.5, 1.0: 1.0}
METHODS: dict[str, tuple[sterna.PaFi | sterna.HiWi, float]] = {
    "PaFi .005": (sterna.PaFi(density=0.005, gradient="sampled"), 1e-2),
    "HiWi bias r=16": (sterna.HiWi(target="bias", rank=16), 1e-2),
}


def fresh(task: tasks.Task) -> Any:
    transformers.set_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(tasks.folder(), num_labels=len(task.classes), dtype=torch.float32).eval()


def trained(name: str, task: tasks.Task, tokenizer: Any) -> Path:
    """The exact expert's file; trained now where the cache lacks it."""
    target = cache_folder() / "benchmarks" / f"{name.replace(' ', '-').lower()}-4000x3.safetensors"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    method, rate = METHODS[name]
    model = fresh(task)
    tuning = sterna.tune(model, method, base=tasks.folder())
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=3, per_device_train_batch_size=16, learning_rate=rate, seed=0, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        rows = tasks.tokens(tokenizer, task.train)
        sterna.Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, tuning=tuning).train()
    tuning.expert().save(target)
    return target


def score(expert: Expert, model: Any, tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> int:
    with sterna.attached(model, expert):
        return sum(tasks.right_answers(model, tokenizer, rows))


def sizes(expert: Expert) -> tuple[int, int]:
    """Bytes of the file, and those of the head in it."""
    with tempfile.TemporaryDirectory() as folder:
        expert.save(Path(folder) / "expert.safetensors")
        whole = (Path(folder) / "expert.safetensors").stat().st_size
    head = sum(t.numel() * t.element_size() for c in expert.changes if getattr(c, "role", "") == "head" for _, t in c.exact)
    return whole, head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tasks.folder())
    task = tasks.newsgroups(SIZES)
    validation, test = (tasks.tokens(tokenizer, rows) for rows in (task.validation, task.test))
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    result["machine"] = machine()
    for name in options.only or METHODS:
        exact = sterna.load(trained(name, task, tokenizer))
        model = fresh(task)
        rows: list[dict[str, Any]] = []

        def add(expert: Expert, model: Any = model, rows: list[dict[str, Any]] = rows, **said: Any) -> None:
            whole, head = sizes(expert)
            right = score(expert, model, tokenizer, test)
            found = wilson(right, len(test))
            rows.append({**said, "bytes": whole, "head": head, "test": right / len(test), "low": found.low, "high": found.high})
            harness.note(f"{rows[-1]}")

        add(exact, values="exact", head_as="exact")
        add(sterna.compress(tasks.folder(), exact, density=1e-9, alpha=1.0), values="none: the base with the trained head", head_as="exact")
        for density in DENSITIES:
            seen: dict[float, int] = {}

            def validated(alpha: float, density: float = density, seen: dict[float, int] = seen, exact: Expert = exact, model: Any = model) -> int:
                if alpha not in seen:
                    seen[alpha] = score(sterna.compress(tasks.folder(), exact, density=density, alpha=alpha), model, tokenizer, validation)
                return seen[alpha]

            alpha = climb(STARTS[density], validated)
            for head in ("exact", "fp16", "int8"):
                expert = sterna.compress(tasks.folder(), exact, density=density, alpha=alpha, head=head)  # type: ignore[arg-type]
                add(expert, values="ternary", density=density, alpha=alpha, validation=seen[alpha] / len(validation), head_as=head)
        result["rows"][name] = rows
        with whole_file(RESULT) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())


def climb(start: float, rank: Any) -> float:
    """The best of ALPHAS, walking uphill from `start`: the curve over scales has one peak."""
    place = ALPHAS.index(start)
    for direction in (1, -1):
        while 0 <= place + direction < len(ALPHAS) and rank(ALPHAS[place + direction]) > rank(ALPHAS[place]):
            place += direction
    return ALPHAS[place]


if __name__ == "__main__":
    main()
