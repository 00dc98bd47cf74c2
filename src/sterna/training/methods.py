"""What a method makes of a loaded model before training, and what becomes of it after: an expert, or a PEFT folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sterna.errors import InvalidArgument
from sterna.needs import quiet
from sterna.progress import Progress
from sterna.training.config import Compression, HiWiMethod, PaFiMethod, TrainingConfig
from sterna.training.peft_methods import merged, merges, no_expert, with_peft
from sterna.writing import whole_folder


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model of which only what the method trains requires a gradient.

    `trained` and `trained_head` count numbers. `folder_because` says why it ends as a PEFT folder; None where it ends as an expert, of the adapter's
    factors themselves, or where `merge` says so of the weights that it is merged into.
    """

    model: Any
    trained: int
    trained_head: int
    tuning: Any = None
    adapter: bool = False
    merge: bool = False
    folder_because: str | None = None


def own_method(method: PaFiMethod | HiWiMethod) -> Any:
    """`sterna.PaFi` or `sterna.HiWi` with the config's fields. Raises InvalidArgument."""
    from sterna.tuning.hiwi import HiWi
    from sterna.tuning.pafi import PaFi

    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in method.model_dump(exclude={"name"}, exclude_none=True).items()
    }
    return PaFi(**fields) if isinstance(method, PaFiMethod) else HiWi(**fields)


def prepare(config: TrainingConfig, model: Any, peft: Any) -> Prepared:
    """Put the method on the model; `peft` is the config of a PEFT method.

    Raises InvalidArgument or another SternaError where the method does not fit the model.
    """
    if config.training.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        raise InvalidArgument(f"training.gradient_checkpointing: {type(model).__name__} has none; leave it out")
    if isinstance(config.method, PaFiMethod | HiWiMethod):
        from sterna.tuning.tuning import tune

        assert config.model is not None
        tuning = tune(model, own_method(config.method), base=config.model)
        return Prepared(model, tuning.trained, tuning.trained_head, tuning)
    if peft is not None:
        wrapped = with_peft(model, peft)
        counts = _counted(wrapped, lambda name: "modules_to_save" in name)
        because = no_expert(wrapped, peft)
        merge = because is not None and merges(wrapped, peft)
        return Prepared(wrapped, *counts, adapter=True, merge=merge, folder_because=None if merge else because)
    head = head_names(model)
    if config.method.name == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
    return Prepared(model, *_counted(model, lambda name: name in head))


def head_names(model: Any) -> set[str]:
    """The parameters outside transformers' base model: the task's own. Empty for a language model, whose output layer is no head."""
    body = getattr(model, "base_model_prefix", "")
    if not hasattr(model, body) or not type(model).__name__.endswith("ForSequenceClassification"):
        return set()
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{body}.")}


def _counted(model: torch.nn.Module, is_head: Callable[[str], bool]) -> tuple[int, int]:
    """Numbers that require a gradient, outside the head and in it."""
    body = head = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_head(name):
            head += parameter.numel()
        elif parameter.requires_grad:
            body += parameter.numel()
    return body, head


def tuned_expert(prepared: Prepared, config: TrainingConfig) -> Any:
    """The expert of a PaFi or HiWi tuning, by the config's `compress`."""
    how = config.compress
    return prepared.tuning.expert(values=how.values, density=how.density, alpha=how.alpha, head=how.head, metadata=config.metadata)


def keep_trained(prepared: Prepared, tokenizer: Any, folder: Path) -> None:
    """The trained model, or its PEFT folder, written into `folder` in place of what an earlier part of the run left there."""
    if folder.exists():
        shutil.rmtree(folder)
    with whole_folder(folder) as partial, quiet():
        prepared.model.save_pretrained(partial)
        if not prepared.adapter:
            tokenizer.save_pretrained(partial)


def compressed_expert(prepared: Prepared, config: TrainingConfig, trained: Path, warn: Callable[[str], None], progress: Progress) -> Any:
    """The expert that `sterna.compress` makes of the trained folder, by the config's `compress`."""
    from sterna.compression import compress
    from sterna.sources.checkpoint import open_checkpoint
    from sterna.sources.config import changed_config

    how: Compression = config.compress
    assert config.model is not None
    assert how.density is not None
    assert how.alpha is not None
    if prepared.merge:
        trained = trained.with_name("merged")
        whole = merged(prepared.model)
        if trained.exists():
            shutil.rmtree(trained)
        with whole_folder(trained) as partial, quiet():
            whole.save_pretrained(partial)
    nothing = "equals the base in every tensor"  # as it should, where the head alone is trained
    expert = compress(
        config.model,
        trained,
        density=how.density,
        alpha=how.alpha,
        scope=how.scope,
        exclude=how.exclude,
        head=how.head,
        metadata=config.metadata,
        warn=warn if config.method.name != "head" else lambda message: None if nothing in message else warn(message),
        progress=progress,
    )
    if not prepared.adapter or prepared.merge:
        return expert
    # A PEFT folder does not say what the labels are called; the model that was trained does.
    tuned = json.loads(json.dumps(prepared.model.config.to_dict(), default=str))
    changed = changed_config(open_checkpoint(config.model).config, tuned, bool(prepared.trained_head))
    labels = {name: value for name, value in changed.items() if name in ("id2label", "label2id", "problem_type")}
    return replace(expert, facts=replace(expert.facts, config=labels))
