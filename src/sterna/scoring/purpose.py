"""What a model or an expert was made for, as far as it says: its task, its classes, its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sterna.errors import Unsupported
from sterna.expert.changes import Set
from sterna.expert.expert import Expert
from sterna.expert.heads import with_head
from sterna.scoring.labels import class_names, generic
from sterna.sources.adapter import CONFIG, read_adapter
from sterna.sources.checkpoint import open_checkpoint, read_json
from sterna.sources.names import HEADS
from sterna.training.data import LABELS, completes
from sterna.training.tables import Table
from sterna.training.tasks import TaskName

_CLASSES: tuple[tuple[str, TaskName], ...] = (
    ("ForSequenceClassification", "classification"),
    ("ForConditionalGeneration", "seq2seq"),
    ("ForSeq2SeqLM", "seq2seq"),
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
)
_PEFT_TASKS: dict[str, TaskName] = {"SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq", "CAUSAL_LM": "causal-lm"}


@dataclass(frozen=True, slots=True, eq=False)
class Purpose:
    """A task, the names of its classes by index, and the tensors of the head by name; what is not said is None or empty."""

    task: TaskName | None = None
    classes: tuple[str, ...] | None = None
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def classes_with(self, settings: Any) -> tuple[str, ...] | None:
        """The classes, or as many without names as the head has outputs: the first axis of its tensors that is not the model's width."""
        if self.classes is not None:
            return self.classes
        width = getattr(settings, "hidden_size", None)
        axes = {tensor.shape[0] for tensor in self.head.values() if tensor.dim()}
        found = axes - {width} or axes
        return generic(found.pop()) if len(found) == 1 else None


def of_expert(expert: Expert, head: str | None = None) -> Purpose:
    """Raises InvalidArgument where the expert has several heads and none is chosen."""
    chosen = with_head(expert, head)
    facts = chosen.facts
    tensors = {change.name: change.tensor for change in chosen.changes if isinstance(change, Set) and change.role == "head"}
    classes = class_names(facts.config)
    task = _task([facts.architecture] if facts.architecture else [], facts.config, classes)
    return Purpose(task or _PEFT_TASKS.get(str(facts.adapter.get("task_type"))), classes, tensors)


def of_folder(folder: Path) -> Purpose:
    """Of a model folder, from its configuration and what it stores. Raises InvalidFile."""
    checkpoint = open_checkpoint(folder)
    architectures = checkpoint.config.get("architectures")
    classes = class_names(checkpoint.config)
    task = _task(architectures if isinstance(architectures, list) else [], checkpoint.config, classes)
    if task not in ("classification", "regression"):
        return Purpose(task)
    names = [name for name in checkpoint.tensors if name.partition(".")[0] in HEADS]
    return Purpose(task, classes or (generic(2) if task == "classification" else None), {name: checkpoint.read(name) for name in names})


def of_adapter(folder: Path) -> Purpose:
    """Of a PEFT folder of any method; it does not name its classes. Raises NotFound, InvalidFile."""
    try:
        adapter = read_adapter(folder)
        config, head = adapter.config, adapter.saved
    except Unsupported:  # neither LoRA nor (IA)3: PEFT can run it all the same
        config, head = read_json(folder / CONFIG), {}
    return Purpose(_PEFT_TASKS.get(str(config.get("task_type"))), None, head)


def _task(architectures: Sequence[Any], config: Mapping[str, Any], classes: Sequence[str] | None) -> TaskName | None:
    for name in architectures:
        for ending, task in _CLASSES:
            if str(name).endswith(ending):
                alone = config.get("problem_type") == "regression" or (classes is not None and len(classes) == 1)
                return "regression" if task == "classification" and alone else task
    return None


def task_by_data(base: Purpose, table: Table, target: str | None = None) -> TaskName:
    """A label is for classification (regression, where the base is for that); without one, or with target texts, the base's own task."""
    labelled = target is None and not completes(table) and any(name in table.columns for name in LABELS)
    if base.task in ("causal-lm", "seq2seq") and not labelled:
        return base.task
    return "regression" if base.task == "regression" else "classification"
