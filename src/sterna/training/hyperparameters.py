"""The config's hyper-parameters as transformers' TrainingArguments, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from sterna.needs import needed, quiet
from sterna.sources.names import near
from sterna.training.config import HiWiMethod, Optimization, TrainingConfig
from sterna.training.errors import Faults
from sterna.training.models import first_line

RATES = {"pafi": 5e-3, "full": 5e-5, "head": 1e-3, "lora": 1e-3}
HIWI_RATES = {"bias": 5e-3, "weight": 1e-3}
OTHER_RATE = 1e-3

SAME = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "lr_scheduler_type",
    "optim",
    "optim_args",
    "max_grad_norm",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "torch_compile",
)
"""Fields that go to TrainingArguments as they are."""

CHECKPOINTS = 10
"""How many checkpoints a run writes where the config does not say."""


def learning_rate(config: TrainingConfig) -> float:
    """The config's, or the method's usual one."""
    if config.training.learning_rate is not None:
        return config.training.learning_rate
    if isinstance(config.method, HiWiMethod):
        return HIWI_RATES[config.method.target]
    return RATES.get(config.method.name, OTHER_RATE)


def total_steps(training: Optimization, rows: int, batch: int) -> int:
    """Optimizer steps, as transformers' Trainer counts them: ceil(epochs * ceil(ceil(rows / batch) / accumulation))."""
    if training.max_steps is not None:
        return training.max_steps
    return math.ceil(training.num_train_epochs * max(1, math.ceil(math.ceil(rows / batch) / training.gradient_accumulation_steps)))


def training_arguments(config: TrainingConfig, folder: Path, rows: int, checkpoints: bool, faults: Faults) -> Any:
    """TrainingArguments that write checkpoints into `folder`, report to nobody and print nothing; None where there are faults."""
    training = config.training
    before = len(faults.found)
    _check_choices(training, faults)
    if config.dtype == "fp16" and training.fp16:
        faults.add("training.fp16", "mixed precision scales the gradients of fp32 weights, and dtype is fp16: leave one of them out")
    if len(faults.found) > before:
        return None
    transformers = needed("transformers", "sterna[train]")
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    fields = {name: getattr(training, name) for name in SAME}
    fields["warmup_ratio" if "warmup_ratio" in names else "warmup_steps"] = training.warmup_ratio
    if training.gradient_checkpointing:  # the other kind passes no gradient through frozen embeddings
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        with quiet():
            arguments = transformers.TrainingArguments(
                output_dir=str(folder),
                learning_rate=learning_rate(config),
                max_steps=training.max_steps or -1,
                seed=config.seed,
                data_seed=config.seed,
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.accelerator.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_strategy="steps",
                save_strategy="steps" if checkpoints else "no",
                save_total_limit=1,
                **fields,
            )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        faults.add("training", first_line(error))
        return None
    steps = total_steps(training, rows, arguments.train_batch_size)
    arguments.save_steps = training.save_steps or max(1, math.ceil(steps / CHECKPOINTS))
    arguments.logging_steps = max(1, min(10, steps // 20))
    return arguments


def _check_choices(training: Optimization, faults: Faults) -> None:
    """An optimizer and a schedule that are known, and whose packages are here."""
    transformers = needed("transformers", "sterna[train]")
    kinds = {"optim": needed("transformers.training_args").OptimizerNames, "lr_scheduler_type": needed("transformers.trainer_utils").SchedulerType}
    for field, kind in kinds.items():
        given, known = getattr(training, field), [str(member.value) for member in kind]
        if given not in known:
            alike = near(given, known)
            faults.add(f"training.{field}", f"{given!r} is not known; {'near' if alike else 'expected one of'}: {', '.join(alike or known)}")
            continue
        try:
            with quiet():
                if field == "optim":
                    made = transformers.TrainingArguments(
                        output_dir="unused", optim=given, optim_args=training.optim_args, report_to="none", use_cpu=True
                    )
                    transformers.Trainer.get_optimizer_cls_and_kwargs(made)
                else:
                    weight = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
                    transformers.get_scheduler(given, optimizer=weight, num_warmup_steps=0, num_training_steps=10)
        except Exception as error:  # each of the many optimizers and schedules has its own way to say what it lacks
            faults.add(f"training.{field}", f"{given!r} cannot be used: {first_line(error)}")
