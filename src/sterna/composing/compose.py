"""Experts for one base composed for a new task: weights that score well, and the merged expert that they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sterna.composing.grid import rounding
from sterna.composing.pool import Pool
from sterna.composing.search import BOUNDS, BUDGET, L1, Trial, best, check_search, search
from sterna.errors import InvalidArgument
from sterna.expert.expert import Expert
from sterna.merging.merge import Parent, merge
from sterna.progress import Progress, silent


@dataclass(frozen=True, slots=True, eq=False)
class Composed:
    """What a composition found. `weights` are by parent, in the order given; `trials` are all that were tried, in their order."""

    expert: Expert
    parents: tuple[str, ...]
    weights: tuple[float, ...]
    score: float
    trials: tuple[Trial, ...]


def compose(
    experts: Sequence[Parent],
    *,
    base: torch.nn.Module,
    score: Callable[[Any], float],
    budget: int = BUDGET,
    seed: int = 0,
    bounds: tuple[float, float] = BOUNDS,
    l1: float = L1,
    progress: Progress = silent,
) -> Composed:
    """Search weights for experts of one base (or their files) so that base + sum_i w_i t_i scores well, and merge them with the best.

    `base` is the live model, which carries each trial's weights while `score(base)` is called, and is the base again after, to the bit. `score` gives
    a number, higher for better (of a loss give minus it). Searched for is score - l1 * mean |w|, with w inside `bounds`, by at most `budget` trials
    from w = 0 (`sterna.composing.search`); `seed` draws the order in which experts are first tried. Ctrl-C ends the search with what it has.
    The expert is what `sterna.merge(experts, "task_arithmetic", weights=...)` makes: its record replays. Weights of more than ten ternary experts are
    rounded a little before they are tried (`sterna.composing.grid`).

    Raises WrongBase, InvalidArgument (no experts, one given twice, a score that is no number), Unsupported for changes that cannot be weighed, and as
    `load`, `attach` and `merge` do.
    """
    check_search(len(experts), budget, bounds, l1)
    opened = opened_parents(experts)
    names, near = names_of(experts, opened), rounding(opened, max(map(abs, bounds)))
    done = 0

    def tell(trial: Trial) -> None:
        nonlocal done
        done += 1
        progress("search", done, budget, "trials", f"score {trial.score:.4g}")

    with Pool(base, opened, progress) as pool:

        def scored(weights: Sequence[float]) -> float:
            pool.weigh(weights)
            return score(base)

        trials = search(len(opened), scored, budget=budget, seed=seed, bounds=bounds, l1=l1, rounding=near, tell=tell)
    found = best(trials)
    merged = merge(list(experts), "task_arithmetic", weights=found.weights, tasks=names, base=base, progress=progress)
    return Composed(merged, names, found.weights, found.score, tuple(trials))


def names_of(experts: Sequence[Parent], opened: Sequence[Expert]) -> tuple[str, ...]:
    """A name for each expert: its task, else its file's name, numbered where two are alike.

    Raises InvalidArgument where two experts that were merged carry heads of one name: merging cannot tell them apart.
    """
    carried = Counter(task for expert in opened for task in expert.facts.heads)
    if twice := [task for task, count in carried.items() if count > 1]:
        raise InvalidArgument(f"{carried[twice[0]]} experts carry a head for {twice[0]!r}; expected experts whose tasks have names of their own")
    named = []
    for number, (given, expert) in enumerate(zip(experts, opened, strict=True), 1):
        held = expert.facts.metadata.get("task")
        named.append(held if isinstance(held, str) and held else f"expert {number}" if isinstance(given, Expert) else Path(given).stem)
    return tuple(f"{name} {number}" if named.count(name) > 1 else name for number, name in enumerate(named, 1))


def opened_parents(experts: Sequence[Parent]) -> list[Expert]:
    """The experts, read where they are files. Raises NotFound, InvalidFile."""
    from sterna.expert.file import load

    return [expert if isinstance(expert, Expert) else load(expert) for expert in experts]
