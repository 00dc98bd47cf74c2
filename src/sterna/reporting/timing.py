"""How long the live steps take: attach, swap and detach, and the model's answer with an expert on it against the bare base."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

import torch

from sterna.expert.expert import Expert
from sterna.live.patch import attach, attached
from sterna.reporting.report import Latency, Steps, ThreadRun, Times
from sterna.scoring.intervals import paired_ratio

THREADS = (1, 2)
Count = Callable[[int], None]
"""Hears of every round that is done."""


def nothing(rounds: int) -> None:
    pass


def live_steps(model: torch.nn.Module, expert: Expert, other: Expert | None, repeats: int, count: Count = nothing) -> Steps:
    """Time attach, swap to `other` and back, and detach; of `repeats` + 1 rounds the first, which hashes the base, is told apart."""
    on: list[float] = []
    swaps: list[float] = []
    off: list[float] = []
    for _ in range(repeats + 1):
        started = now()
        patch = attach(model, expert)
        on.append(now() - started)
        for following in (other, expert) if other is not None else ():
            started = now()
            patch.swap(following)
            swaps.append(now() - started)
        started = now()
        patch.detach()
        off.append(now() - started)
        count(1)
    return Steps(on[0], Times(tuple(on[1:])), Times(tuple(swaps[2:])) if swaps else None, Times(tuple(off[1:])))


def latency(model: torch.nn.Module, expert: Expert, inputs: Mapping[str, torch.Tensor], pairs: int, count: Count = nothing) -> Latency:
    """Time forward passes of one batch, bare and attached in turn on one model, changing which of the two comes first.

    Writing weights leaves the caches in another state than running them does, so a pass that is not timed precedes the timed ones.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in inputs.items()}
    bare, on = [], []
    with torch.inference_mode():
        for pair in range(pairs):
            for wearing in (False, True) if pair % 2 == 0 else (True, False):
                if wearing:
                    with attached(model, expert):
                        on.append(_forward(model, batch))
                else:
                    bare.append(_forward(model, batch))
            count(1)
    rows, length = batch["input_ids"].shape
    return Latency(Times(tuple(bare)), Times(tuple(on)), paired_ratio(on, bare), rows, length)


def with_threads(model: torch.nn.Module, expert: Expert, threads: Sequence[int], repeats: int) -> tuple[ThreadRun, ...]:
    """Attach with several numbers of threads: how long it takes, and whether the weights are those of the first number, to the bit."""
    before = torch.get_num_threads()
    first: dict[str, torch.Tensor] | None = None
    found = []
    try:
        for number in threads:
            torch.set_num_threads(number)
            times = []
            for turn in range(repeats + 1):
                started = now()
                patch = attach(model, expert)
                times.append(now() - started)
                if turn == 0:
                    state = model.state_dict()
                    first = {name: value.clone() for name, value in state.items()} if first is None else first
                    equal = same_bits(state, first)
                patch.detach()
            found.append(ThreadRun(number, Times(tuple(times[1:])), equal))
    finally:
        torch.set_num_threads(before)
    return tuple(found)


def swaps_among(model: torch.nn.Module, experts: Sequence[Expert], count: Count = nothing) -> list[Times]:
    """Swap from each expert to each other one; the times of the swaps to each. The model is bare before and after."""
    times: list[list[float]] = [[] for _ in experts]
    patch = attach(model, experts[0])
    try:
        for start, end in permutations(range(len(experts)), 2):
            if patch.expert is not experts[start]:
                patch.swap(experts[start])
            started = now()
            patch.swap(experts[end])
            times[end].append(now() - started)
            count(1)
    finally:
        patch.detach()
    return [Times(tuple(values)) for values in times]


def same_bits(state: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same names with the same bits."""
    return list(state) == list(other) and all(_bits_equal(state[name], other[name]) for name in other)


def _bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)) if one.dim() else torch.equal(one, other)


def _forward(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> float:
    """The faster of two timed passes after one that is not timed, in milliseconds."""
    times = []
    for _ in range(3):
        started = now()
        model(**batch)
        times.append(now() - started)
    return min(times[1:])


def now() -> float:
    """Milliseconds, after an accelerator has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3
