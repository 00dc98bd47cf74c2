"""Tuned model to expert: bring the two sides together by name, run ComPEFT over what makes up the task vector, keep the rest exact."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sterna import __version__
from sterna.codings import DEFAULT, by_name, default_coding
from sterna.compeft import check_options, ternarize
from sterna.errors import InvalidArgument, PairingError
from sterna.expert.changes import Change, Set
from sterna.expert.container import is_expert
from sterna.expert.expert import Expert
from sterna.expert.facts import BaseFacts, Facts, Scope
from sterna.expert.file import refuse_unwritable
from sterna.expert.palette import Palette
from sterna.fingerprint import HASHED_DTYPES, Fingerprint, fingerprint
from sterna.lossless import Both, coded
from sterna.precision import HeadPrecision, check_head, stored
from sterna.progress import Progress, silent
from sterna.recoding import recoded
from sterna.sources.adapted import adapted
from sterna.sources.adapter import is_adapter, read_adapter
from sterna.sources.checkpoint import Checkpoint, Source, open_checkpoint, resolve
from sterna.sources.config import added_tokens
from sterna.sources.finetune import finetune
from sterna.sources.pairing import pair
from sterna.sources.trained import trained, trained_expert
from sterna.taskvector import TaskVector

DENSITY, ALPHA = 0.1, 4.0
UNRELATED = 0.5
"""|tau| / |base| above which two checkpoints are taken for strangers."""


def compress(
    base: Source,
    tuned: Source | Expert,
    *,
    density: float | None = None,
    alpha: float | None = None,
    scope: Scope | None = None,
    exclude: Sequence[str] = (),
    head: HeadPrecision = "exact",
    force: bool = False,
    coding: str | None = None,
    lossless: bool = False,
    metadata: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> Expert:
    """Compress what `tuned` learned over `base` into an expert (ComPEFT, arXiv 2311.13171).

    `base` and `tuned` are model folders, safetensors files, hub ids, state dicts or modules; `tuned` may also be a PEFT folder with a LoRA or (IA)3,
    or an exact expert (or its file) that PaFi or HiWi trained: the new one keeps its mask, its head and what it says of itself.
    Keeps the signs of the `density` share (.1) of entries of largest magnitude, each worth alpha (4) * std(task vector); `scope="tensor"` does so
    tensor by tensor. `exclude` are glob patterns over the base's names that stay at the base. Heads and changed buffers are kept exact;
    `head` stores heads in "fp16", "bf16" or "int8" (matrices with a scale for each row, vectors in float16). `force` goes on where
    the two do not seem to belong together. `metadata` is any JSON of yours. `warn` is told what a user should know.
    `lossless` keeps the tuned checkpoint to the bit instead, as what was added to the base's bit patterns: no density, alpha, scope or coding then.

    Raises InvalidArgument, PairingError, WrongBase (of an expert), Unsupported, NotFound, InvalidFile or CannotWrite before anything is written.
    """
    given = {"density": density, "alpha": alpha, "scope": scope, "coding": coding, "head": None if head == "exact" else head}
    density, alpha = DENSITY if density is None else density, ALPHA if alpha is None else alpha
    scope, coding = scope or "global", coding or DEFAULT
    check_options(density, alpha)
    if scope not in ("global", "tensor"):
        raise InvalidArgument(f"scope is {scope!r}; expected 'global' or 'tensor'")
    chosen = by_name(coding)
    check_head(head)
    if lossless:
        return _lossless(open_checkpoint(base), tuned, given, exclude, dict(metadata or {}), warn, progress)
    matched = match(base, tuned, exclude=exclude, warn=warn, progress=progress)
    exact = exact_changes(matched, head)
    block = default_coding() if chosen.sequential is True else chosen
    levels, norm = ternarize(matched.task.pieces, density=density, alpha=alpha, per_tensor=scope == "tensor", coding=block, progress=progress)
    if chosen.sequential is True:
        levels = recoded(levels, chosen, progress)
    refuse_strangers(matched, norm, force, warn)
    if not any(ternary.count for ternary in levels):
        warn("the tuned model equals the base in every tensor that is compressed: the expert changes nothing there")
    return expert_of(matched, matched.task.changes(levels), exact, density=density, alpha=alpha, scope=scope, metadata=metadata or {})


@dataclass(frozen=True, slots=True)
class Matched:
    """A base and what was tuned over it, brought together and ready to be compressed again and again. `before` is the exact expert that it was."""

    base: Checkpoint
    task: TaskVector
    mark: Fingerprint
    before: Expert | None


def match(
    base: Source,
    tuned: Source | Expert,
    *,
    exclude: Sequence[str] = (),
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> Matched:
    """Bring the two together by name and hash the base. Raises as `compress` does."""
    ours = open_checkpoint(base)
    before = trained_expert(tuned)
    if before is not None:
        task = trained(ours, before, exclude, progress)
    else:
        assert not isinstance(tuned, Expert)
        task = _task_vector(ours, tuned, exclude)
    for warning in task.warnings:
        warn(warning)
    return Matched(ours, task, before.fingerprint if before is not None else base_fingerprint(ours, progress), before)


def exact_changes(matched: Matched, head: HeadPrecision) -> list[Set]:
    """What is kept beside the levels, heads in that precision. Raises Unsupported or InvalidArgument for what a file cannot hold."""
    exact = [stored(change, head) for change in matched.task.exact]
    for change in exact:
        refuse_unwritable(change)
    return exact


def expert_of(
    matched: Matched,
    changes: Sequence[Change],
    exact: Sequence[Set],
    *,
    density: float,
    alpha: float,
    scope: Scope,
    metadata: Mapping[str, Any],
) -> Expert:
    """The expert of coded changes and exact ones; under scope "global" all levels have one scale."""
    before, task = matched.before, matched.task
    scale = next((ternary.scale for change in changes if not isinstance(change, Palette) for ternary in change.ternaries), 0.0)
    how: dict[str, Any] = {"method": "compeft", "density": float(density), "alpha": float(alpha), "scope": scope, "writer": f"sterna {__version__}"}
    how |= {"scale": scale if scope == "global" else 0.0, "parameters": sum(piece.size for piece in task.pieces)}
    whole = tuple(sorted([*changes, *exact], key=lambda change: (change.name, isinstance(change, Set))))
    if before is not None:
        return Expert(replace(before.facts, **how, metadata={**before.facts.metadata, **metadata}), matched.mark, whole)
    return Expert(_facts(matched.base, matched.mark, task, dict(metadata), how), matched.mark, whole)


def _lossless(
    base: Checkpoint,
    tuned: Source | Expert,
    given: Mapping[str, Any],
    exclude: Sequence[str],
    metadata: Mapping[str, Any],
    warn: Callable[[str], None],
    progress: Progress,
) -> Expert:
    """The expert that gives `tuned`, a full checkpoint, back to the bit. `given` are the options that do not go with it, where they were."""
    if refused := [name for name, value in given.items() if value is not None]:
        raise InvalidArgument(f"{refused[0]} is {given[refused[0]]!r}; a lossless expert keeps every bit, so expected none")
    if isinstance(tuned, Expert) or (isinstance(tuned, str | os.PathLike) and (is_expert(tuned) or is_adapter(resolve(tuned)))):
        raise InvalidArgument("the tuned model is an adapter or an expert; expected a full checkpoint for a lossless expert: apply it first, merged")
    theirs = open_checkpoint(tuned)
    pairing = pair(base, theirs, exclude, to_the_bit=True)
    task = finetune(base, theirs, exclude, pairing)
    for warning in task.warnings:
        warn(warning)
    for change in task.exact:
        refuse_unwritable(change)
    mark = base_fingerprint(base, progress)
    changes = coded([Both(p.name, p.shape, base.read(p.name), theirs.read(p.tuned)) for p in pairing.pairs], progress)
    if not changes:
        warn("the tuned model equals the base in every tensor that is compressed: the expert changes nothing there")
    how = {"method": "lossless", "density": None, "alpha": None, "scope": "global", "scale": 0.0, "writer": f"sterna {__version__}"}
    facts = _facts(base, mark, task, metadata, {**how, "parameters": pairing.entries})
    return Expert(facts, mark, tuple(sorted([*changes, *task.exact], key=lambda change: (change.name, isinstance(change, Set)))))


def _facts(base: Checkpoint, mark: Fingerprint, task: TaskVector, metadata: Mapping[str, Any], how: Mapping[str, Any]) -> Facts:
    return Facts(
        source=task.source,
        base=base_facts(base, mark),
        architecture=task.architecture,
        prefixes=task.prefixes,
        dropped=task.dropped,
        excluded=task.excluded,
        config=task.config,
        tokens=added_tokens(base.folder, task.folder),
        adapter=task.adapter,
        metadata=metadata,
        **how,
    )


def _task_vector(base: Checkpoint, tuned: Source, exclude: Sequence[str]) -> TaskVector:
    """What `tuned` is: a PEFT folder, or a full checkpoint."""
    if isinstance(tuned, str | os.PathLike) and is_adapter(resolve(tuned)):
        return adapted(base, read_adapter(resolve(tuned)), exclude)
    return finetune(base, open_checkpoint(tuned), exclude)


def base_fingerprint(base: Checkpoint, progress: Progress = silent) -> Fingerprint:
    """The fingerprint of a checkpoint's floating-point tensors."""
    floats = [name for name, info in base.tensors.items() if info.dtype in HASHED_DTYPES]
    progress("fingerprint", 0, len(floats), "tensors")
    found = fingerprint({name: base.read(name) for name in floats})
    progress("fingerprint", len(floats), len(floats), "tensors")
    return found


def base_facts(base: Checkpoint, mark: Fingerprint) -> BaseFacts:
    parameters = sum(math.prod(base.tensors[name].shape) for name in mark.names)
    return BaseFacts(name=base.label, fingerprint=mark.hex, parameters=parameters, revision=base.revision)


def refuse_strangers(matched: Matched, norm: float, force: bool, warn: Callable[[str], None]) -> None:
    """Raise PairingError (warn, under `force`) where a task vector of that norm is too large to be a fine-tune of the base."""
    if matched.task.norm is None:
        return
    base_norm = matched.task.norm()
    ratio = norm / base_norm if base_norm else math.inf if norm else 0.0
    if ratio <= UNRELATED:
        return
    message = f"the difference is {ratio:.2f} times as large as the base (at most {UNRELATED} is usual for a fine-tune)"
    if not force:
        raise PairingError(f"{message}: is this the right base? --force (force=True) goes on")
    warn(message)
