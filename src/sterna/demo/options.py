"""What a person can choose about the demo, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sterna.demo.data import Sizes
from sterna.errors import InvalidArgument

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 14.0, 20.0)
"""The paper's grid from 1 up, and two steps beyond its end: at low densities the best alpha of a LoRA lies there."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`sterna demo` without arguments: the bundled encoder, 20 newsgroups by full fine-tuning, PaFi and HiWi, and a LoRA expert of election tweets.

    `model` is a folder or hub id. With `data` (.csv, .tsv or .jsonl) both trainings are on that file; without `test_data` it is split 80/10/10.
    Row counts are upper limits. `quick` trains for about a minute on a few hundred texts: everything runs, the accuracies say little.
    Experts are written to `output`, or else into the cache (`cache`, by default `sterna.demo.assets.cache_folder()`).
    """

    model: str | None = None
    data: Path | None = None
    test_data: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    densities: tuple[float, ...] = (0.05, 0.1, 0.2)
    alphas: tuple[float, ...] = ALPHAS
    train_rows: int = 4000
    lora_rows: int = 2000
    validation_rows: int = 500
    test_rows: int = 1500
    epochs: int = 3
    batch: int = 16
    learning_rate: float = 5e-5
    lora_learning_rate: float = 1e-3
    lora_rank: int = 8
    tuned_learning_rate: float = 1e-2
    hiwi_rank: int = 16
    max_length: int = 64
    seed: int = 0
    repeats: int = 15
    quick: bool = False
    cache: Path | None = None
    output: Path | None = None

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.train_rows, self.validation_rows, self.test_rows)

    @property
    def control_density(self) -> float:
        """Where the controls stand: .1, or the density nearest to it."""
        return min(self.densities, key=lambda density: abs(density - 0.1))


def checked(options: DemoOptions) -> DemoOptions:
    """The options in the order and sizes that the run uses.

    Raises:
        InvalidArgument: a number out of range, or arguments that do not go together.
    """
    if options.quick:
        options = replace(
            options,
            densities=(options.control_density,),
            train_rows=min(options.train_rows, 800),
            lora_rows=min(options.lora_rows, 480),
            validation_rows=min(options.validation_rows, 128),
            test_rows=min(options.test_rows, 300),
            epochs=1,
            learning_rate=3 * options.learning_rate,  # few steps have to be long ones
            lora_learning_rate=3 * options.lora_learning_rate,
            tuned_learning_rate=3 * options.tuned_learning_rate,
            repeats=min(options.repeats, 4),
        )
    for name, values in (("densities", options.densities), ("alphas", options.alphas)):
        if not values:
            raise InvalidArgument(f"{name} is empty: give at least one")
    for density in options.densities:
        if not 0 < density <= 1:
            raise InvalidArgument(f"density is {density}: it must lie above 0 and at most at 1")
    for alpha in options.alphas:
        if not 0 < alpha < float("inf"):
            raise InvalidArgument(f"alpha is {alpha}: it must be a positive number")
    for name, least in COUNTS.items():
        if getattr(options, name) < least:
            raise InvalidArgument(f"{name} is {getattr(options, name)}: it must be at least {least}")
    for name in ("learning_rate", "lora_learning_rate", "tuned_learning_rate"):
        if not 0 < getattr(options, name) < 1:
            raise InvalidArgument(f"{name} is {getattr(options, name)}: it must lie between 0 and 1")
    if options.test_data is not None and options.data is None:
        raise InvalidArgument("test data was given without data to train on: give both, or neither")
    return replace(options, densities=tuple(sorted(set(options.densities))), alphas=tuple(sorted(set(options.alphas))))


COUNTS = {
    "train_rows": 16,
    "lora_rows": 16,
    "validation_rows": 16,
    "test_rows": 16,
    "epochs": 1,
    "batch": 1,
    "lora_rank": 1,
    "hiwi_rank": 1,
    "max_length": 4,
    "seed": 0,
    "repeats": 2,
}
