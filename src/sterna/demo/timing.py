"""How long the live steps take: attach, swap and detach, and the model's answer with an expert on it against the bare base."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import sterna
from sterna.scoring.intervals import Estimate, paired_ratio


@dataclass(frozen=True, slots=True)
class Steps:
    """Median milliseconds of the live steps; `first_attach` includes hashing the base, which happens once for a loaded model."""

    first_attach: float
    attach: float
    swap: float
    detach: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one forward pass of the bare base (median), and the ratio with an expert attached, with its 95 % interval over paired runs."""

    base: float
    ratio: Estimate
    batch: int
    length: int


def live_steps(model: torch.nn.Module, expert: sterna.Expert, other: sterna.Expert, repeats: int, step: Callable[[int], None]) -> Steps:
    """Time attach, swap to `other` and back, and detach; of `repeats` + 1 rounds the first is left out."""
    attach, swap, detach = [], [], []
    for _ in range(repeats + 1):
        started = _now()
        patch = sterna.attach(model, expert)
        attach.append(_now() - started)
        for following in (other, expert):
            started = _now()
            patch.swap(following)
            swap.append(_now() - started)
        started = _now()
        patch.detach()
        detach.append(_now() - started)
        step(1)
    return Steps(attach[0], *(statistics.median(times[skipped:]) for times, skipped in ((attach, 1), (swap, 2), (detach, 1))))


def latency(model: torch.nn.Module, expert: sterna.Expert, inputs: Mapping[str, torch.Tensor], pairs: int, step: Callable[[int], None]) -> Latency:
    """Time forward passes of one batch, bare and attached in turn on one model, changing which of the two comes first.

    Writing weights leaves the caches in another state than running them does, so a pass that is not timed precedes the timed ones.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in inputs.items()}
    bare, attached = [], []
    with torch.inference_mode():
        for pair in range(pairs):
            for on in (False, True) if pair % 2 == 0 else (True, False):
                if on:
                    with sterna.attached(model, expert):
                        attached.append(_forward(model, batch))
                else:
                    bare.append(_forward(model, batch))
            step(1)
    return Latency(statistics.median(bare), paired_ratio(attached, bare), *batch["input_ids"].shape)


def _forward(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> float:
    """The faster of two timed passes after one that is not timed, in milliseconds."""
    times = []
    for _ in range(3):
        started = _now()
        model(**batch)
        times.append(_now() - started)
    return min(times[1:])


def _now() -> float:
    """Milliseconds, after an accelerator has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3
