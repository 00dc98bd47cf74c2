"""The trainings of the demo, by transformers' Trainer: everything, LoRA through PEFT, PaFi and HiWi. Each is done once and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import sterna
from sterna.demo.assets import settle
from sterna.demo.data import Task
from sterna.demo.evaluation import Tokens
from sterna.demo.models import load_classifier
from sterna.errors import CannotWrite, SternaError, Unsupported
from sterna.needs import needed, quiet
from sterna.training.models import model_digest

EXPERT = "expert.safetensors"
PAFI_DENSITY = 0.005


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is trained. `rank` counts for LoRA, on the modules that are PEFT's default for the architecture, and for HiWi."""

    kind: Literal["full", "lora", "pafi", "hiwi"]
    learning_rate: float
    epochs: int = 3
    batch: int = 16
    max_length: int = 64
    seed: int = 0
    rank: int = 8


def training_key(recipe: Recipe, base: Path, task: Task) -> str:
    """A digest of everything that determines the result: recipe, what of Sterna's it trains by, base, training rows, library versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "tokenizers")}
    said = {"recipe": asdict(recipe), "methods": [str(method) for method in methods_of(recipe)]}
    facts = {**said, "base": model_digest(base), "task": task.digest(), "versions": versions}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def run_folder(recipe: Recipe, base: Path, task: Task, runs: Path) -> Path:
    """Where the training's result lies, or will lie: a model folder, a PEFT adapter's, or one with the exact expert that was tuned."""
    return runs / f"{recipe.kind}-{training_key(recipe, base, task)}"


def train(recipe: Recipe, base: Path, task: Task, tokens: Tokens, tokenizer: Any, target: Path, step: Callable[[int], None]) -> None:
    """Train, and rename the result to `target` when it is whole; an interrupted training leaves nothing behind.

    `step` hears of the rows of every optimizer step.

    Raises:
        CannotWrite: the cache folder cannot be written.
    """
    runs = target.parent
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs, prefix=".partial-") as partial:
            whole = Path(partial) / target.name
            _train(recipe, base, task, tokens, tokenizer, whole, step)
            settle(whole, target)
    except OSError as error:
        if isinstance(error, SternaError):
            raise
        raise CannotWrite(f"cannot keep the trained model in {runs}: {error.strerror or error}; set STERNA_CACHE to another folder") from error


def _train(recipe: Recipe, base: Path, task: Task, tokens: Tokens, tokenizer: Any, into: Path, step: Callable[[int], None]) -> None:
    transformers = needed("transformers")
    rows = [{"input_ids": list(ids), "labels": int(label)} for ids, label in zip(tokens.ids, tokens.labels, strict=True)]
    with quiet():
        transformers.set_seed(recipe.seed)  # before the head is drawn
        model: Any = load_classifier(base, task.classes, tokenizer)
        tuning = None
        if recipe.kind == "lora":
            model = with_lora(model, recipe.rank)
        elif recipe.kind != "full":
            tuning = tuned(model, recipe, base)
        arguments = transformers.TrainingArguments(
            output_dir=str(into.parent / "trainer"),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch,
            learning_rate=recipe.learning_rate,
            weight_decay=0.0,
            seed=recipe.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        reporter = _reporter(step, recipe.batch)
        trainer = sterna.Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[reporter], tuning=tuning)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        if tuning is not None:
            into.mkdir()
            tuning.expert().save(into / EXPERT)
            return
        model.save_pretrained(into)
        if recipe.kind == "full":
            tokenizer.save_pretrained(into)


def methods_of(recipe: Recipe) -> tuple[sterna.PaFi | sterna.HiWi, ...]:
    """PaFi at its usual density, or HiWi on the feed-forward biases, then on the weights for a model that has no such biases."""
    match recipe.kind:
        case "pafi":
            return (sterna.PaFi(density=PAFI_DENSITY, gradient="sampled"),)
        case "hiwi":
            return sterna.HiWi(target="bias", rank=recipe.rank, zero_bias="direct"), sterna.HiWi(target="weight", rank=recipe.rank)
        case _:
            return ()


def tuned(model: torch.nn.Module, recipe: Recipe, base: Path) -> sterna.Tuning:
    """The model under the recipe's first method that fits it."""
    *others, last = methods_of(recipe)
    for method in others:
        with contextlib.suppress(Unsupported):
            return sterna.tune(model, method, base=base)
    return sterna.tune(model, last, base=base)


def with_lora(model: Any, rank: int) -> Any:
    """LoRA on the modules that PEFT takes by default for the architecture (query and value for BERT), or else on all linear layers."""
    peft = needed("peft")
    known = needed("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = None if model.config.model_type in known else "all-linear"
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, task_type="SEQ_CLS", target_modules=targets))


def load_lora(base: Path, adapter: Path, task: Task, tokenizer: Any) -> torch.nn.Module:
    """The base with the adapter on it as PEFT runs it, in evaluation mode."""
    model = load_classifier(base, task.classes, tokenizer)
    with quiet():
        loaded: torch.nn.Module = needed("peft").PeftModel.from_pretrained(model, adapter)
    return loaded.eval()


def _reporter(step: Callable[[int], None], batch: int) -> Any:
    callback: Any = needed("transformers").TrainerCallback

    class Reporter(callback):  # type: ignore[misc]
        def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
            step(batch)

    return Reporter()
