"""PaFi and HiWi times ComPEFT: how few bytes a fine-tune of 20 newsgroups takes on disk, header in, head apart, and what it still gets right.

Takes the exact experts that `sterna demo` trains (4,000 texts of 64 tokens, 3 epochs, batch 16, seed 0) and compresses them at several densities;
alpha is climbed to on 1,000 validation texts, and the 1,500 test texts are looked at once for each row. About half an hour:

    python benchmarks/pafi_ternary.py               trains what the cache lacks, compresses and scores
    python benchmarks/pafi_ternary.py --tables      prints the table of what is there
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import harness
import sterna
import tasks
from machine import machine
from rendering import markdown
from sterna.demo.assets import asset_path, cache_folder
from sterna.demo.data import Sizes, newsgroups
from sterna.demo.evaluation import Score, climb, tokenized
from sterna.demo.options import DemoOptions, checked
from sterna.demo.run import tuned_recipes_of
from sterna.demo.training import EXPERT, run_folder, train
from sterna.expert.expert import Expert
from sterna.training.models import load_tokenizer
from sterna.writing import whole_file

RESULT = harness.RESULTS / "pafi_ternary.json"
SIZES = Sizes(train=4000, validation=1000, test=1500)
ALPHAS = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
DENSITIES = (0.1, 0.2, 0.3, 0.5, 1.0)
STARTS = {0.1: 4.0, 0.2: 3.0, 0.3: 2.0, 0.5: 1.5, 1.0: 1.0}
ENCODER = 22_713_216
"""Parameters of the encoder without a head."""
METHODS = {"PaFi .005": "pafi", "HiWi bias r=16": "hiwi"}


def fresh(task: tasks.Task) -> Any:
    transformers.set_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(tasks.folder(), num_labels=len(task.classes), dtype=torch.float32).eval()


def trained(name: str) -> Path:
    """The exact expert that the demo trains, from its cache; trained now where it is not there (some ten minutes)."""
    options, base, cache = checked(DemoOptions()), tasks.folder(), cache_folder()
    task = newsgroups(asset_path("texts"), options.sizes, options.seed)
    recipe = next(recipe for recipe in tuned_recipes_of(options) if recipe.kind == METHODS[name])
    target = run_folder(recipe, base, task, cache / "demo" / "runs")
    if not target.is_dir():
        tokenizer = load_tokenizer(base)
        train(recipe, base, task, tokenized(tokenizer, task.train, recipe.max_length), tokenizer, target, lambda rows: None)
    return target / EXPERT


def score(expert: Expert, model: Any, tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> Score:
    with sterna.attached(model, expert):
        return Score(np.array(tasks.right_answers(model, tokenizer, rows)), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], choices=list(METHODS))
    parser.add_argument("--tables", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    if options.tables:
        print(tables())
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tasks.folder())
    task = tasks.newsgroups(SIZES)
    validation, test = (tasks.tokens(tokenizer, rows) for rows in (task.validation, task.test))
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    result["machine"] = machine()
    for name in options.only or METHODS:
        exact = sterna.load(trained(name))
        model = fresh(task)
        rows: list[dict[str, Any]] = []

        def add(expert: Expert, model: Any = model, rows: list[dict[str, Any]] = rows, **said: Any) -> None:
            size, found = sterna.inspect(expert), score(expert, model, tokenizer, test).accuracy
            rows.append({**said, "bytes": size.bytes, "head": size.bytes_head, "test": found.value, "low": found.low, "high": found.high})
            harness.note(f"{rows[-1]}")

        add(exact, values="exact", head_as="exact")
        add(sterna.compress(tasks.folder(), exact, density=1e-9, alpha=1.0), values="none: the base with the trained head", head_as="exact")
        for density in DENSITIES:
            seen: dict[float, Score] = {}

            def validated(alpha: float, seen: dict[float, Score] = seen, exact: Expert = exact, density: float = density, live: Any = model) -> Score:
                seen[alpha] = score(sterna.compress(tasks.folder(), exact, density=density, alpha=alpha), live, tokenizer, validation)
                return seen[alpha]

            alpha = climb(ALPHAS, STARTS[density], validated)
            for head in ("exact", "fp16", "int8"):
                expert = sterna.compress(tasks.folder(), exact, density=density, alpha=alpha, head=head)  # type: ignore[arg-type]
                add(expert, values="ternary", density=density, alpha=alpha, validation=seen[alpha].accuracy.value, head_as=head)
        result["rows"][name] = rows
        with whole_file(RESULT) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())


def tables() -> str:
    """One table of every method that is there, and the command that made it."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    columns = ("method", "values", "density", "alpha", "head stored as", "bytes of the file", "of those the head", "test accuracy, %")
    rows: list[list[Any]] = []
    for name, entries in found["rows"].items():
        for row in entries:
            accuracy = f"{100 * row['test']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            scales = [f"{row[key]:g}" if key in row else "" for key in ("density", "alpha")]
            rows.append([name, row["values"], *scales, row["head_as"], row["bytes"], row["head"], accuracy])
    notes = [
        f"{SIZES.train:,} training texts, alpha chosen on {SIZES.validation:,} others, {SIZES.test:,} test texts; exact is float32. "
        f"The yardstick: a full fine-tune's delta in 16 bits takes {2 * ENCODER:,} bytes ({2 * ENCODER / 1e6:.0f} MB) without its head."
    ]
    if missing := [name for name in METHODS if name not in found["rows"]]:
        notes.append(f"Not run: {', '.join(missing)}.")
    if "machine" in found:
        notes.append(f"Made by `python benchmarks/pafi_ternary.py`; commit {found['machine']['commit']}, {found['machine']['date']}.")
    return "\n\n".join([markdown(columns, rows), *notes])


if __name__ == "__main__":
    main()
