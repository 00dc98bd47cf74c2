"""What the benchmarks work on: the demo's encoder with its full fine-tune, a second tuned model, live classifiers, the causal language model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import harness
from sterna.demo.assets import asset_path, cache_folder
from sterna.demo.causal_lm import causal_lm_folder
from sterna.demo.evaluation import tokenized
from sterna.demo.models import load_classifier
from sterna.demo.options import DemoOptions, checked
from sterna.demo.run import recipes_of, tasks_of
from sterna.demo.training import run_folder, train
from sterna.errors import NotFound
from sterna.sources.checkpoint import open_checkpoint
from sterna.sources.pairing import pair
from sterna.training.models import length_limit, load_tokenizer

State = dict[str, torch.Tensor]


def base_folder(options: argparse.Namespace) -> Path:
    return options.base or asset_path("encoder")


def tuned_folder(options: argparse.Namespace) -> Path:
    """The demo's full fine-tune on 20 newsgroups, from its cache; trained now where it is not there (about ten minutes)."""
    return options.tuned or _trained(options, 0, "full")


def second_folder(options: argparse.Namespace) -> Path:
    """A full fine-tune on another task, election tweets (two epochs of 2,000), kept beside it; trained where it is not there (some five minutes)."""
    return _trained(options, 1, "full")


def adapter_folder(options: argparse.Namespace) -> Path:
    """The demo's LoRA adapter of rank 8 on election tweets, from its cache; trained now where it is not there (some three minutes)."""
    return _trained(options, 1, "lora")


def _trained(options: argparse.Namespace, number: int, kind: str) -> Path:
    chosen, cache, base = checked(DemoOptions()), cache_folder(), base_folder(options)
    tokenizer = load_tokenizer(base)
    chosen = replace(chosen, max_length=length_limit(base, tokenizer, chosen.max_length))
    if number and kind == "full":
        chosen = replace(chosen, lora_rows=2000, epochs=2)
    task, recipe = tasks_of(chosen, cache)[number], next(recipe for recipe in recipes_of(chosen) if recipe.kind == kind)
    target = run_folder(recipe, base, task, cache / "demo" / "runs")
    if not target.is_dir():
        harness.note(f"training a full fine-tune on {task.name}, some minutes, once")
        with harness.threads(harness.CORES):
            train(recipe, base, task, tokenized(tokenizer, task.train, recipe.max_length), tokenizer, target, lambda rows: None)
    return target


def in_memory(folder: Path) -> State:
    """A folder's tensors, copied out of the file."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def task_pairs(base: State, tuned: State) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, base tensor, tuned tensor) of what makes up the task vector, in its order."""
    return [(p.name, base[p.name], tuned[p.tuned]) for p in pair(open_checkpoint(base), open_checkpoint(tuned)).pairs]


def dense_vector(base: State, tuned: State) -> torch.Tensor:
    """tau, flat."""
    return torch.cat([(theirs - ours).flatten() for _, ours, theirs in task_pairs(base, tuned)])


def normal_tuned(base: State, scale: float = 1e-3, seed: int = 0) -> State:
    """The base plus normal noise in every floating-point tensor: a task vector without any structure."""
    generator = torch.Generator().manual_seed(seed)
    return {n: t + scale * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t.clone() for n, t in base.items()}


def second_tuned(base: State, tuned: State, classes: int = 2, seed: int = 1) -> State:
    """Another tuned model: each tensor's changes shuffled within it (densities by tensor stay, positions do not), and a head of `classes` rows."""
    generator = torch.Generator().manual_seed(seed)
    second = dict(tuned)
    for _, ours, theirs in task_pairs(base, tuned):
        tuned_name = next(key for key, value in tuned.items() if value is theirs)
        change = (theirs - ours).flatten()
        second[tuned_name] = ours + change[torch.randperm(change.numel(), generator=generator)].view(ours.shape)
    for name in tuned:
        if name.startswith("classifier."):
            second[name] = tuned[name][:classes].clone()
    return second


def classifier(options: argparse.Namespace, classes: int = 20, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The live base as a classifier."""
    base = base_folder(options)
    return load_classifier(base, [str(i) for i in range(classes)], load_tokenizer(base)).to(dtype)


def causal_lm(options: argparse.Namespace) -> Path | None:
    """The folder of the causal language model, or None, with a word about it, where it cannot be had."""
    if options.causal_lm:
        return options.causal_lm
    try:
        return causal_lm_folder()
    except (NotFound, ImportError) as error:
        harness.note(f"without the causal language model: {error}")
        return None
