"""What experts take: each way to keep a task, in bytes on disk; memory beside the base; and where in the model the changes are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sterna.expert.expert import Expert
from sterna.live.patch import attach
from sterna.needs import needed, quiet
from sterna.recoding import recode
from sterna.reporting.report import Kept, Layer, Memory
from sterna.sources.adapter import is_adapter
from sterna.summary import Summary, inspect
from sterna.training.methods import head_names

LORA_RANK = 8


def bytes_of(tuned: Path | Expert | None) -> int | None:
    """Bytes of the weights of a tuned model, a PEFT folder, or an exact expert."""
    if isinstance(tuned, Expert):
        return inspect(tuned).bytes
    return None if tuned is None else sum(file.stat().st_size for file in tuned.glob("*.safetensors"))


def ways_to_keep(summary: Summary, model: Any, base: Path, tuned: Path | Expert | None) -> tuple[Kept, ...]:
    """Bytes of the expert, of LoRA factors, of a 16-bit delta of every parameter, and of a full copy."""
    head = summary.bytes_head
    parameters = summary.facts.base.parameters
    ways = [Kept("expert", summary.bytes, True)]
    if isinstance(tuned, Path) and is_adapter(tuned):
        ways.append(Kept("lora", bytes_of(tuned) or 0, True))
    else:
        ways.append(Kept("lora", lora_bytes(model, LORA_RANK) + head, False))
    ways.append(Kept("delta", 2 * parameters + head, False))
    full = tuned if isinstance(tuned, Path) and not is_adapter(tuned) else base
    ways.append(Kept("copy", bytes_of(full) or 0, True))
    return tuple(ways)


def lora_bytes(model: Any, rank: int) -> int:
    """Bytes of rank-`rank` factors in 16 bit for the modules that PEFT takes by default; of all linear layers, where it has no default."""
    with quiet():  # what PEFT imports in turn may have much to say
        table: Mapping[str, Any] = needed("peft.utils", "sterna[train]").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = table.get(str(getattr(model.config, "model_type", "")))
    head = {name.rpartition(".")[0] for name in head_names(model)}
    total = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or name in head:
            continue
        if name.rpartition(".")[2] in targets if targets else isinstance(module, torch.nn.Linear):
            total += 2 * rank * sum(weight.shape)
    return total


def layers_of(summary: Summary) -> tuple[Layer, ...]:
    """The coded entries by layer: the first number in a tensor's name; what has none comes first, without a name."""
    found: dict[str, list[int]] = {}
    for tensor in summary.tensors:
        if tensor.entries:
            number = re.search(r"\.(\d+)\.", f".{tensor.name}.")
            sums = found.setdefault(number[1] if number else "", [0, 0, 0])
            for place, value in enumerate((tensor.entries, tensor.nonzeros, tensor.bytes)):
                sums[place] += value
    return tuple(Layer(name, *found[name]) for name in sorted(found, key=lambda name: int(name or -1)))


def memory_of(model: torch.nn.Module, experts: Sequence[Expert]) -> Memory:
    base = sum(value.numel() * value.element_size() for value in {id(v): v for v in model.state_dict(keep_vars=True).values()}.values())
    sizes, undo = [], []
    for expert in experts:
        sizes.append(inspect(recode(expert, "fast") if any(t.coding.name == "small" for t in expert.ternaries) else expert).bytes)
        patch = attach(model, expert)
        undo.append(patch.undo_bytes)
        patch.detach()
    return Memory(base, round(sum(sizes) / len(sizes)), max(undo))
