"""Experts for one base merged into one: a recipe's parents held against each other, their tensors merged, their heads carried along."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sterna import __version__
from sterna.errors import InvalidArgument, SternaError
from sterna.expert.changes import Add, Change, Factors, LowRank, Masked, Multiply, Product, Set, touched
from sterna.expert.expert import Expert, exact_bytes
from sterna.expert.facts import Facts
from sterna.expert.palette import MOST_TASKS, Palette
from sterna.merging.emitting import How, Task, merged
from sterna.merging.exact import Slot, entries_of, merge_slots, slot_fault, slots_of, vector_config
from sterna.merging.lora import form_of, loss_record, merge_products, product_entries_of
from sterna.merging.parents import Leveled, Part, dropped, part_of, threshold, trimmed
from sterna.merging.products import Products, adapter_config, product_fault
from sterna.merging.recipe import RECOMPRESS, Model, Recipe, of_arguments, parse, read_recipe
from sterna.merging.recompress import recompressed
from sterna.merging.registry import Semantics
from sterna.merging.schedule import layers_of
from sterna.merging.values import Share
from sterna.progress import Progress, silent
from sterna.sources.checkpoint import Source
from sterna.training.errors import Faults

Parent = Expert | str | os.PathLike[str]


def merge(
    experts: Sequence[Parent] | str | os.PathLike[str] | Mapping[str, Any],
    method: str | None = None,
    *,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    gamma: float | None = None,
    tasks: Sequence[str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    semantics: Semantics | None = None,
    seed: int | None = None,
    recompress: bool | Mapping[str, float] = False,
    base: Source | None = None,
    metadata: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> Expert:
    """Merge experts for one base (experts or their files) by a method's name, or by a recipe: a YAML file, or what one would hold.

    merge([a, b, c], "ties", weights=[1, 1, .5], density=.2)
    merge("recipe.yaml")

    `weights` (1 each), `density` and `gamma` are as the method documents them (docs/merging.md), `parameters` its others; `tasks` name the parents:
    else the task of their metadata, else their file's name. `semantics` is whose choices are followed: the "paper"'s, "peft"'s or "mergekit"'s.
    `base` is needed for experts that hold new values, of PaFi and HiWi: merged are their differences to it.
    `recompress` makes the result ternary again by ComPEFT, with a "density" (.1) and "alpha" (4). LoRA experts become what `parameters` say with
    "lora": "concat" (stacked factors), "svd" (of rank "rank") or "sparse" (full weights, ternary).
    The result records the recipe and the parents' digests; their heads are carried under their tasks' names, not merged.

    Raises InvalidConfig, with every fault of the recipe and its parents at once (different bases, one task twice, a parent twice, changes that cannot
    be merged); NotFound, InvalidFile, InvalidArgument, CannotWrite.
    """
    faults = Faults()
    rest = {"semantics": semantics, "seed": seed, "metadata": metadata, "recompress": recompress or None, "parameters": dict(parameters or {})}
    if isinstance(experts, str | os.PathLike | Mapping):
        beside = {**rest, "method": method, "weights": weights, "density": density, "gamma": gamma, "tasks": tasks}
        said = [name for name, value in beside.items() if value]
        if said:
            raise InvalidArgument(f"{', '.join(said)} cannot be given beside a recipe; write it into the recipe")
        recipe = parse(experts, Path(), faults) if isinstance(experts, Mapping) else read_recipe(experts, faults)
    else:
        if method is None:
            raise InvalidArgument("method is missing; expected the name of a merge method, or a recipe instead of experts")
        recipe = parse(of_arguments(experts, method, weights, density, gamma, tasks, rest), Path(), faults)
    faults.stop()
    assert recipe is not None
    return run(recipe, warn, progress, base)


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A parent that is open: its model in the recipe, the expert, its task, and its changes that are merged, by name."""

    model: Model
    expert: Expert
    task: str
    changes: Mapping[str, Leveled]
    slots: Mapping[str, Slot]
    products: Mapping[str, Product]


def run(recipe: Recipe, warn: Callable[[str], None] = lambda message: None, progress: Progress = silent, base: Source | None = None) -> Expert:
    """Carry out a recipe. Raises as `merge` does."""
    faults = Faults()
    parents = [opened for model in recipe.models if (opened := _opened(model, faults, warn, progress, base)) is not None]
    _compare(recipe, parents, faults)
    faults.stop()
    exact = _exact(parents, faults)
    heads = _heads(parents, faults)
    if recipe.method.recovers:
        heads = {task: heads.get(task, {}) for parent in parents for task in _task_names(parent)}
    faults.stop()
    how = How(
        recipe.method, recipe.options, recipe.semantics, recipe.method.drop == "random" and recipe.semantics == "mergekit", _bits(recipe, parents)
    )
    total = sum(change.levels.size for change in {name: change for parent in parents for name, change in parent.changes.items()}.values())
    made = merged(_tasks(recipe, parents, warn), total, how, progress)
    slots = _merged_slots(recipe, parents, how, base, progress)
    products, losses = merge_products(recipe, _products(parents), how, progress)
    total += product_entries_of(products)
    total += sum(entries_of(slot) for slot in slots)
    if recipe.recompress is not None:
        made = recompressed(made, recipe.recompress["density"], recipe.recompress["alpha"], progress)
    changes = sorted(
        [*made, *slots, *products, *exact], key=lambda change: (change.name, isinstance(change, Set), change.task if isinstance(change, Set) else "")
    )
    facts = _facts(recipe, parents, heads, total)
    if slots and facts.source == "ia3":
        facts = replace(facts, adapter=vector_config([parent.expert.facts.adapter for parent in parents], slots))
    if products:
        facts = _facts_of_products(facts, recipe, parents, products, loss_record(losses))
    return Expert(facts, parents[0].expert.fingerprint, tuple(changes))


def _opened(model: Model, faults: Faults, warn: Callable[[str], None], progress: Progress, base: Source | None) -> Opened | None:
    from sterna.expert.file import load

    try:
        if isinstance(model.source, Recipe):
            expert = run(model.source, warn, progress, base)
        else:
            expert = model.source if isinstance(model.source, Expert) else load(model.source)
    except SternaError as error:
        faults.add(model.place, str(error))
        return None
    if model.content_digest is not None and expert.content_digest != model.content_digest:
        told = f"{model.name} has the content digest {expert.content_digest[:12]}; expected {model.content_digest[:12]}, as the recipe says"
        faults.add(model.place, f"{told}: another expert")
    held = expert.facts.metadata.get("task")
    task = model.task or (held if isinstance(held, str) and held else None) or Path(model.name).stem
    other = [change for change in expert.changes if not isinstance(change, Add | Palette | Masked | Multiply | Set | Product)]
    tuned = [change for change in expert.changes if isinstance(change, Set) and change.role == "rows"]
    if other or tuned:
        kind = type((other or tuned)[0]).__name__.lower() if other else f"set ({tuned[0].role})"
        told = f"{task} changes {(other or tuned)[0].name} by {kind}, which cannot be merged yet"
        faults.add(model.place, f"{told}; expected experts of full fine-tunes, LoRA, (IA)3, PaFi or HiWi's biases")
    leveled = {change.name: change for change in expert.changes if isinstance(change, Add | Palette)}
    if any(isinstance(change, Palette) and change.tasks for change in expert.changes):
        names = ", ".join(expert.facts.heads)
        faults.add(model.place, f"{task} has a mask for each of its tasks ({names}): merge its own parents, or one of its tasks (sterna.with_head)")
    products = {change.name: change for change in expert.changes if isinstance(change, Factors | LowRank)}
    return Opened(model, expert, task, leveled, slots_of(expert), products)


def _compare(recipe: Recipe, parents: Sequence[Opened], faults: Faults) -> None:
    """Tell of everything that keeps the parents from being merged."""
    if not parents:
        return
    first = parents[0]
    base = first.expert.facts.base
    if recipe.base is not None and recipe.base not in (base.name, base.name.rpartition("/")[2]):
        faults.add("base_model", f"{recipe.base!r} is not the parents' base, {base.name}")
    for parent in parents[1:]:
        other = parent.expert.facts.base
        if other.fingerprint != base.fingerprint:
            what = f"{parent.task} is for the base {other.name}, fingerprint {other.fingerprint[:12]}, and {first.task} for {base.name}"
            faults.add(parent.model.place, f"{what}, {base.fingerprint[:12]}; only experts for the same base can be merged")
    for task, count in Counter(task for parent in parents for task in _task_names(parent)).items():
        if count > 1:
            faults.add("models", f"{count} parents are named {task}; name them apart (task: ..., tasks=...)")
    digests = Counter(parent.expert.content_digest for parent in parents)
    for digest, count in digests.items():
        if count > 1:
            names = ", ".join(parent.task for parent in parents if parent.expert.content_digest == digest)
            faults.add("models", f"{names} have the same content: a parent is given {count} times; weights say how much one counts")
    if recipe.method.recovers:
        _refuse_to_recover(recipe, parents, faults)
    if recipe.recompress is not None and any(parent.slots for parent in parents):
        faults.add("recompress", "the parents hold new values, of PaFi or HiWi; compress the merged expert over its base instead")
    slots: dict[str, tuple[Slot, str]] = {}
    for parent in parents:
        for name, slot in parent.slots.items():
            before, task = slots.setdefault(name, (slot, parent.task))
            if fault := slot_fault(before, slot):
                faults.add(parent.model.place, f"{name}: {fault}, in {task} and {parent.task}")
    masks = {name for name, (slot, _) in slots.items() if isinstance(slot, Masked)}
    under = {name for mask in masks for name in touched(slots[mask][0])}
    under |= {slot.bias for slot, _ in slots.values() if isinstance(slot, Multiply) and slot.bias is not None}
    for parent in parents:
        if mixed := sorted(set(parent.changes) & (under | set(slots))) + sorted(set(parent.slots) & under - masks):
            faults.add(parent.model.place, f"{mixed[0]} is changed by levels or as a whole in {parent.task}, as new values in another parent")
    if len(masks) > 1:
        faults.add("models", f"the parents have masks over different tensors ({', '.join(sorted(masks)[:3])}); only one mask can be merged")
    factors: dict[str, tuple[Product, str]] = {}
    for parent in parents:
        for name, product in parent.products.items():
            held, task = factors.setdefault(name, (product, parent.task))
            if fault := product_fault(held, product):
                faults.add(parent.model.place, f"{name}: {fault}, in {task} and {parent.task}")
    others = {name: parent.task for parent in parents for name in [*parent.changes, *parent.slots, *under]}
    if mixed := sorted(set(factors) & set(others)):
        told = f"{mixed[0]} is changed by LoRA in {factors[mixed[0]][1]}, and otherwise in {others[mixed[0]]}"
        faults.add("models", f"{told}: merge the LoRA experts by themselves first, with lora: sparse, then the result with the others")
    if not factors and (recipe.lora or recipe.rank):
        faults.add("parameters.lora", "no parent is a LoRA expert")
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for parent in parents:
        for name, change in parent.changes.items():
            shape, task = shapes.setdefault(name, (change.levels.shape, parent.task))
            if shape != change.levels.shape:
                faults.add(parent.model.place, f"{name} has shape {change.levels.shape} in {parent.task}, {shape} in {task}")


def _bits(recipe: Recipe, parents: Sequence[Opened]) -> tuple[int, ...]:
    """Where a method recovers: each parent's bit in masks, which is its place among the tasks in order."""
    named = [_task_names(parent)[0] for parent in parents]
    return tuple(map(sorted(named).index, named)) if recipe.method.recovers else ()


def _refuse_to_recover(recipe: Recipe, parents: Sequence[Opened], faults: Faults) -> None:
    name = recipe.method.name
    for parent in parents:
        if parent.slots or parent.products:
            kind = "LoRA" if parent.products else "new values under a mask or of whole tensors"
            faults.add(parent.model.place, f"{name} keeps a mask of coded levels for each task; {parent.task} has {kind}: use lora: sparse first")
        if len(_task_names(parent)) > 1:
            faults.add(parent.model.place, f"{name} keeps one mask for each task; {parent.task} has the heads of {len(_task_names(parent))}")
    if len(parents) > MOST_TASKS:
        faults.add("models", f"{len(parents)} parents; {name} keeps masks of at most {MOST_TASKS} tasks")
    if recipe.recompress is not None:
        faults.add("recompress", f"what {name} keeps for each task is lost where the result is made ternary")


def _task_names(parent: Opened) -> tuple[str, ...]:
    return tuple(parent.expert.facts.heads) or (parent.task,)


def _tasks(recipe: Recipe, parents: Sequence[Opened], warn: Callable[[str], None]) -> Iterator[Task]:
    """Every tensor that a parent changes, with what stays of each parent's non-zeros."""
    drop, paper = recipe.method.drop, recipe.semantics == "paper"
    least = [0.0] * len(parents)
    if drop == "magnitude" and paper:
        for number, parent in enumerate(parents):
            density = parent.model.density.constant or 1.0
            least[number] = threshold(list(parent.changes.values()), density)
            if least[number] and _all_tie(parent.changes.values()):
                warn(f"{parent.task} keeps all of its non-zeros at density {density:g}: they tie, and the threshold of the paper keeps ties")
    layers = layers_of(parents[0].expert.fingerprint.names)
    for name in sorted({name for parent in parents for name in parent.changes}):
        parts: list[Part | None] = []
        for number, parent in enumerate(parents):
            change = parent.changes.get(name)
            if change is None:
                parts.append(None)
                continue
            part, density = part_of(change), parent.model.density.at(name, layers)
            if drop == "random":
                part = dropped(part, density, recipe.seed, parent.task, name, rescale=recipe.semantics != "mergekit")
            elif drop is not None:
                part = trimmed(part, change, drop, recipe.semantics, density, parent.model.gamma.at(name, layers), least[number])
            parts.append(part)
        shape = next(parent.changes[name].levels.shape for parent in parents if name in parent.changes)
        yield Task(name, shape, parts, np.array([parent.model.weight.at(name, layers) for parent in parents]))


def _products(parents: Sequence[Opened]) -> list[Products]:
    """Every tensor that a parent adds a product to."""
    order = sorted(range(len(parents)), key=lambda number: parents[number].expert.content_digest)  # so that the parents' order does not matter
    layers = layers_of(parents[0].expert.fingerprint.names)
    made = []
    for name in sorted({name for parent in parents for name in parent.products}):
        weights = np.array([parent.model.weight.at(name, layers) for parent in parents])
        made.append(Products(name, [parent.products.get(name) for parent in parents], weights, order, _shares(parents, name, layers)))
    return made


def _shares(parents: Sequence[Opened], name: str, layers: int) -> list[Share]:
    return [Share(parent.model.density.at(name, layers), parent.model.gamma.at(name, layers), parent.task) for parent in parents]


def _merged_slots(recipe: Recipe, parents: Sequence[Opened], how: How, base: Source | None, progress: Progress) -> list[Change]:
    """The parents' new values, merged as differences to the base."""
    names = sorted({name for parent in parents for name in parent.slots})
    if not names:
        return []
    layers = layers_of(parents[0].expert.fingerprint.names)
    weights = {name: np.array([parent.model.weight.at(name, layers) for parent in parents]) for name in names}
    shares = {name: _shares(parents, name, layers) for name in names}
    return merge_slots([parent.slots for parent in parents], parents[0].expert, base, weights, shares, how, recipe.seed, progress)


def _all_tie(changes: Any) -> bool:
    return len({change.levels.scale for change in changes if change.levels.count}) == 1 and all(isinstance(change, Add) for change in changes)


def _exact(parents: Sequence[Opened], faults: Faults) -> list[Change]:
    """The heads, each with its task, and other exact tensors, which must be the same in all parents."""
    kept: list[Change] = []
    others: dict[str, list[Set]] = {}
    for parent in parents:
        for change in parent.expert.changes:
            if change.name in parent.slots:
                continue
            if isinstance(change, Set) and change.role == "head":
                kept.append(Set(change.name, change.value, "head", change.first_row, change.scales, change.task or parent.task))
            elif isinstance(change, Set):
                others.setdefault(change.name, []).append(change)
    for name, held in others.items():
        if len(held) < len(parents) or any(_different(held[0], change) for change in held):
            faults.add("models", f"{name} is kept exact ({held[0].role}) and is not the same in all parents: it cannot be merged")
        kept.append(held[0])
    return kept


def _different(first: Set, second: Set) -> bool:
    ours, theirs = first.value, second.value
    return first.role != second.role or ours.dtype != theirs.dtype or ours.shape != theirs.shape or exact_bytes(ours) != exact_bytes(theirs)


def _heads(parents: Sequence[Opened], faults: Faults) -> dict[str, dict[str, Any]]:
    """What goes with each task's head: what its parent says of its model and not all parents say alike."""
    shared = _shared_config(parents)
    heads: dict[str, dict[str, Any]] = {}
    for parent in parents:
        facts = parent.expert.facts
        if facts.heads:
            heads |= {task: dict(held) for task, held in facts.heads.items()}
            continue
        if not any(isinstance(change, Set) and change.role == "head" for change in parent.expert.changes):
            continue
        held: dict[str, Any] = {"config": {name: value for name, value in facts.config.items() if name not in shared}}
        held |= {"architecture": facts.architecture, "prefix": facts.prefixes[1], "dropped": list(facts.dropped)}
        heads[parent.task] = {name: value for name, value in held.items() if value}
    if len({tuple(map(str, parent.expert.facts.tokens)) for parent in parents}) > 1:
        faults.add("models", "the parents added different tokens; only experts with the same tokens can be merged")
    return heads


def _shared_config(parents: Sequence[Opened]) -> dict[str, Any]:
    first, *others = (parent.expert.facts.config for parent in parents)
    return {name: value for name, value in first.items() if all(name in config and config[name] == value for config in others)}


def _facts(recipe: Recipe, parents: Sequence[Opened], heads: Mapping[str, Any], total: int) -> Facts:
    facts = [parent.expert.facts for parent in parents]
    first = facts[0]

    def same(key: str, otherwise: Any) -> Any:
        values = [getattr(each, key) for each in facts]
        return values[0] if all(value == values[0] for value in values) else otherwise

    return Facts(
        method="merge",
        source=same("source", "full"),
        mask=next((each.mask for each in facts if each.mask is not None), None),
        density=None,
        alpha=None,
        scope="tensor",
        scale=0.0,
        base=first.base,
        writer=f"sterna {__version__}",
        parameters=total,
        architecture=same("architecture", None),
        prefixes=same("prefixes", (first.prefixes[0], "")),
        dropped=tuple(name for name in first.dropped if all(name in each.dropped for each in facts)),
        excluded=tuple(name for name in first.excluded if all(name in each.excluded for each in facts)),
        config=_shared_config(parents),
        tokens=first.tokens,
        merge=_record(recipe, parents),
        heads=heads,
        metadata=dict(recipe.metadata),
    )


def _facts_of_products(facts: Facts, recipe: Recipe, parents: Sequence[Opened], changes: Sequence[Change], loss: Mapping[str, Any]) -> Facts:
    """The facts with what LoRA experts became; they are an adapter still where all that the result changes by is products."""
    held = [change for change in changes if isinstance(change, Factors | LowRank)]
    configs = [dict(parent.expert.facts.adapter) for parent in parents]
    lora = held and all(parent.expert.facts.source == "lora" for parent in parents)
    parameters = {**facts.merge["parameters"], "lora": form_of(recipe), **({"rank": recipe.rank} if recipe.rank else {})}
    record = {**facts.merge, "parameters": parameters}
    if form_of(recipe) == "sparse" and recipe.recompress is None:
        record["recompress"] = dict(RECOMPRESS)
    if loss:
        record["loss"] = dict(loss)
    return replace(facts, source="lora" if lora else "full", adapter=adapter_config(configs, held) if lora else {}, merge=record)


def _record(recipe: Recipe, parents: Sequence[Opened]) -> dict[str, Any]:
    """The recipe with everything that follows from it, from which the same expert can be made again."""
    models = []
    for parent in parents:
        model = parent.model
        used = {"weight": model.weight.plain(), **{name: getattr(model, name).plain() for name in recipe.drops}}
        told: dict[str, Any] = {"model": model.name, "task": parent.task, "content_digest": parent.expert.content_digest, "parameters": used}
        if isinstance(model.source, Recipe):
            told["recipe"] = dict(parent.expert.facts.merge)
        else:
            told["digest"] = parent.expert.digest
        models.append(told)
    record: dict[str, Any] = {"merge_method": recipe.method.name, "semantics": recipe.semantics, "models": models, "parameters": dict(recipe.options)}
    if recipe.method.drop == "random":
        record["seed"] = recipe.seed
    if recipe.recompress is not None:
        record["recompress"] = dict(recipe.recompress)
    return record | ({"base_model": recipe.base} if recipe.base else {})
