"""A config made ready to run: everything that can be wrong before training is looked at here, and told at once."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sterna import __version__
from sterna.errors import InvalidArgument, SternaError
from sterna.needs import needed, quiet
from sterna.sources.checkpoint import open_checkpoint
from sterna.training.config import (
    Compression,
    HiWiMethod,
    Optimization,
    PaFiMethod,
    PeftMethod,
    PlainMethod,
    TrainingConfig,
    parse,
    read_yaml,
)
from sterna.training.data import Examples, TaskData, guessed_task, load_data
from sterna.training.errors import Faults
from sterna.training.hyperparameters import learning_rate, total_steps, training_arguments
from sterna.training.methods import own_method
from sterna.training.models import DTYPES, length_limit, load_settings, load_tokenizer, model_digest, model_folder
from sterna.training.peft_methods import peft_config, peft_kind
from sterna.training.runs import RunFolder, check_run, run_facts
from sterna.training.tasks import TaskName
from sterna.training.tokens import Lengths, Row, refuse_foreign, tokenized

MAX_LENGTH: dict[TaskName, int] = {"classification": 128, "regression": 128, "causal-lm": 256, "seq2seq": 256}
"""Tokens of a text, or of a packed block, where the config does not say and the model takes that many."""

COMPLETED = 1024
"""The same of a prompt with its completion, which TRL's SFTTrainer takes too: fewer would cut most chats."""

DENSITY, ALPHA = 0.1, 4.0
TUNED_DENSITY, TUNED_ALPHA = 0.3, 2.0
"""ComPEFT's defaults for a task vector, and for the few values of a PaFi or HiWi tuning, of which more are worth keeping."""

DENSE_FROM = 0.02
"""The share of trained entries from which PaFi takes its gradients by way of the dense product, where the config does not say."""


@dataclass(frozen=True, slots=True)
class Output:
    """The files that a training writes, by the name that the user gave them."""

    stem: Path

    @classmethod
    def of(cls, output: str) -> Output:
        return cls(Path(output.removesuffix(".safetensors")).expanduser())

    @property
    def expert(self) -> Path:
        return Path(f"{self.stem}.safetensors")

    @property
    def folder(self) -> Path:
        """Where a PEFT folder goes, for a method that makes no expert."""
        return self.stem

    @property
    def metrics(self) -> Path:
        return Path(f"{self.stem}.metrics.json")

    @property
    def config(self) -> Path:
        return Path(f"{self.stem}.yaml")

    @property
    def run(self) -> Path:
        return Path(f"{self.stem}.run")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run needs. `config` has every default filled in. `resumable` is false for a method whose state no checkpoint holds."""

    config: TrainingConfig
    task: TaskName
    base: Path
    tokenizer: Any
    data: TaskData
    lengths: Lengths
    rows: list[Row]
    peft: Any
    arguments: Any
    steps: int
    output: Output
    run: RunFolder
    facts: dict[str, Any]
    resumable: bool
    notes: tuple[str, ...]


def make_plan(raw: Mapping[str, Any], *, restart: bool = False) -> Plan:
    """Check a config against the model, the data, the libraries and the folders.

    Raises InvalidConfig with every fault that could be found, and MissingDependency where a package of the extra `train` is not here.
    """
    with quiet():  # what they import in turn may have much to say
        for package in ("transformers", "accelerate", "peft", "sklearn", "scipy"):
            needed(package, "sterna[train]")
    faults = Faults()
    config = parse(raw, faults)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        faults.add("WORLD_SIZE", "sterna train runs as one process; for several use sterna.Trainer in a script of your own")
    base, settings, tokenizer = _model(config, faults)
    task = config.task or guessed_task(config.data)
    data = load_data(config.data, task, faults)
    lengths, rows = _tokens(config, task, base, settings, tokenizer, data, faults)
    _check_method(config, task, base, faults)
    peft = None
    if isinstance(config.method, PeftMethod) and not faults.concern("method.name"):
        steps = total_steps(config.training, max(1, len(rows)), config.training.per_device_train_batch_size)
        peft = peft_config(config.method.name, config.method.model_extra or {}, task, settings, steps, faults)
    _check_compression(config, faults)
    output = _output(config, faults)
    run = RunFolder(Path(config.run_dir).expanduser() if config.run_dir else output.run)
    resumable = not (isinstance(config.method, PeftMethod) and peft_kind(config.method.name) == "ADALORA")
    arguments = training_arguments(config, run.checkpoints, max(1, len(rows)), resumable, faults)
    faults.stop()
    assert base is not None
    assert data is not None
    resolved = _resolved(config, task, data, lengths, arguments)
    steps = total_steps(resolved.training, len(rows), arguments.train_batch_size)
    facts = run_facts(resolved, data.digest(), model_digest(base), versions())
    notes: list[str] = []
    with faults.at("run_dir" if config.run_dir else "output"):
        notes += check_run(run, facts, restart)
    faults.stop()
    if data.dropped:
        notes.append(f"{data.dropped} rows lack a text or an answer and are left out")
    return Plan(resolved, task, base, tokenizer, data, lengths, rows, peft, arguments, steps, output, run, facts, resumable, tuple(notes))


def _model(config: TrainingConfig, faults: Faults) -> tuple[Path | None, Any, Any]:
    """The base's folder, its configuration and its tokenizer, as far as they can be had."""
    base, settings, tokenizer = None, None, None
    if config.model is None:
        if not faults.concern("model"):
            faults.add("model", "missing; expected a model folder or a hub id")
        return base, settings, tokenizer
    with faults.at("model"):
        base = model_folder(config.model)
        settings = load_settings(base)
        if getattr(settings, "quantization_config", None):
            raise InvalidArgument(f"{config.model} is quantized; expected fp32, bf16 or fp16 weights")
        tokenizer = load_tokenizer(base)
        if tokenizer.pad_token_id is None:
            raise InvalidArgument(f"the tokenizer of {config.model} has neither a padding token nor an end of text; give it one and save it")
    return base, settings, tokenizer


def _tokens(
    config: TrainingConfig, task: TaskName, base: Path | None, settings: Any, tokenizer: Any, data: TaskData | None, faults: Faults
) -> tuple[Lengths, list[Row]]:
    wanted = config.data.max_length or (MAX_LENGTH[task] if data is None else usual_length(task, data.train))
    lengths = Lengths(wanted, config.data.target_max_length, config.data.truncation)
    if base is None or tokenizer is None or settings is None:
        return lengths, []
    limit = length_limit(base, tokenizer, wanted)
    if config.data.max_length is not None and limit < wanted:
        faults.add("data.max_length", f"{wanted} is not valid; the model takes {limit} tokens at most")
    lengths = Lengths(limit, config.data.target_max_length, config.data.truncation)
    rows: list[Row] = []
    if data is not None:
        for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
            with faults.at(f"data.{name}"):
                made = tokenized(tokenizer, split, task, lengths) if split is not None else []
                rows = made if name == "train" else rows
    with faults.at("model"):
        refuse_foreign(rows, settings)
    return lengths, rows


def usual_length(task: TaskName, examples: Examples) -> int:
    """Tokens of a row where nobody says."""
    return COMPLETED if task == "causal-lm" and examples.answers is not None else MAX_LENGTH[task]


def _check_method(config: TrainingConfig, task: TaskName, base: Path | None, faults: Faults) -> None:
    method = config.method
    if isinstance(method, PaFiMethod | HiWiMethod) and config.dtype != "fp32" and base is not None:
        with faults.at("model"):
            stored = {info.dtype for info in open_checkpoint(base).tensors.values() if info.dtype.is_floating_point}
            if stored - {DTYPES[config.dtype]}:
                said = f"{config.dtype!r} is not what the base is stored in, and {method.name} trains the base's own values"
                faults.add("dtype", f"{said}; leave it at fp32 (training.{config.dtype} is mixed precision)")
    if isinstance(method, PlainMethod) and method.name == "head" and task not in ("classification", "regression"):
        faults.add("method.name", f"'head' trains the head of a classification or regression; {task} has none")
    if isinstance(method, PaFiMethod | HiWiMethod) and not faults.concern("method"):
        with faults.at("method"):
            own_method(method)


def _check_compression(config: TrainingConfig, faults: Faults) -> None:
    """Options that the method has no use for are faults, not silence."""
    how, name = config.compress, config.method.name
    tuned = isinstance(config.method, PaFiMethod | HiWiMethod)
    if tuned:
        if how.values != "ternary":
            for field in ("density", "alpha"):
                if getattr(how, field) is not None:
                    faults.add(f"compress.{field}", f"{getattr(how, field):g} is for the ternary step; set compress.values to ternary, or leave this")
        if how.scope != "global":
            faults.add("compress.scope", f"{how.scope!r} is not for {name}, whose values are one vector; leave it out")
        if how.exclude:
            faults.add("compress.exclude", f"not for {name}: choose the tensors by the method's own fields")
    elif how.values not in (None, "ternary"):
        faults.add("compress.values", f"{how.values!r} is for pafi and hiwi; what {name} learned is stored as ternary levels")


def _output(config: TrainingConfig, faults: Faults) -> Output:
    if not config.output:
        if not faults.concern("output"):
            faults.add("output", "missing; expected the name of the expert file to write")
        return Output(Path("expert"))
    output = Output.of(config.output)
    if not output.stem.name:
        faults.add("output", f"{config.output!r} is not valid; expected the name of the expert file to write")
    elif not output.stem.parent.is_dir():
        faults.add("output", f"{output.stem.parent} is not a folder; create it first")
    elif not os.access(output.stem.parent, os.W_OK):
        faults.add("output", f"{output.stem.parent} cannot be written to")
    elif output.expert.is_dir():
        faults.add("output", f"{output.expert} is a folder")
    elif output.config.exists() and not _written_by_training(output.config):
        faults.add("output", f"{output.config}, where the full config goes, exists and was not written by a training; name another output")
    return output


def _written_by_training(path: Path) -> bool:
    try:
        return set(read_yaml(path)) == set(TrainingConfig.model_fields)
    except SternaError:
        return False


def _resolved(config: TrainingConfig, task: TaskName, data: TaskData, lengths: Lengths, arguments: Any) -> TrainingConfig:
    """The config with every default that depends on others filled in, so that it says all of what is run."""
    columns: dict[str, Any] = {"text": data.columns.text, "text_pair": data.columns.pair, "max_length": lengths.text}
    if data.columns.answer is not None:
        columns["label" if task in ("classification", "regression") else "target"] = data.columns.answer
    training: dict[str, Any] = {"learning_rate": learning_rate(config), "save_steps": int(arguments.save_steps)}
    return config.model_copy(
        update={
            "task": task,
            "data": config.data.model_copy(update=columns),
            "method": _resolved_method(config),
            "training": Optimization.model_validate({**config.training.model_dump(), **training}),
            "compress": _resolved_compression(config),
        }
    )


def _resolved_method(config: TrainingConfig) -> Any:
    method = config.method
    if isinstance(method, HiWiMethod):
        from sterna.tuning.hiwi import ACTIVATION

        return method.model_copy(update={"activation": method.activation or ACTIVATION[method.target]})
    if not isinstance(method, PaFiMethod):
        return method
    from sterna.tuning.pafi import DENSITY as PAFI_DENSITY

    density = PAFI_DENSITY if method.density is None and method.count is None else method.density
    # Timing the two ways, as `auto` does, could choose otherwise the next time, and they round differently.
    gradient = method.gradient or ("dense" if density is not None and density >= DENSE_FROM else "sampled")
    return method.model_copy(update={"density": density, "gradient": gradient})


def _resolved_compression(config: TrainingConfig) -> Compression:
    how = config.compress
    tuned = isinstance(config.method, PaFiMethod | HiWiMethod)
    values = how.values or ("exact" if tuned else "ternary")
    if values != "ternary":
        return how.model_copy(update={"values": values})
    density, alpha = (TUNED_DENSITY, TUNED_ALPHA) if tuned else (DENSITY, ALPHA)
    return how.model_copy(
        update={"values": values, "density": density if how.density is None else how.density, "alpha": alpha if how.alpha is None else how.alpha}
    )


def versions() -> dict[str, str]:
    """The versions of what computes a training's result."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "accelerate", "peft", "numpy")}
    return {"sterna": __version__, "python": platform.python_version(), **found}
