"""Tuned model to expert: bring the two sides together by name, run ComPEFT over what makes up the task vector, keep the rest exact."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sterna import __version__
from sterna.codings import by_name
from sterna.compeft import F32, Piece, check_options, ternarize
from sterna.errors import InvalidArgument, InvalidFile, PairingError
from sterna.expert.changes import Add, Change, Set
from sterna.expert.expert import Expert
from sterna.expert.facts import BaseFacts, Facts, Scope, carries
from sterna.fingerprint import HASHED_DTYPES, Fingerprint, fingerprint
from sterna.progress import Progress, silent
from sterna.sources.checkpoint import Checkpoint, Source, open_checkpoint, read_json
from sterna.sources.pairing import Pairing, pair

UNRELATED = 0.5
"""|tau| / |base| above which two checkpoints are taken for strangers."""


def compress(
    base: Source,
    tuned: Source,
    *,
    density: float = 0.1,
    alpha: float = 4.0,
    scope: Scope = "global",
    exclude: Sequence[str] = (),
    force: bool = False,
    coding: str = "rice",
    metadata: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> Expert:
    """Compress what `tuned` learned over `base` into an expert (ComPEFT, arXiv 2311.13171).

    `base` and `tuned` are model folders, safetensors files, hub ids, state dicts or modules; `tuned` may also be a PEFT folder with a LoRA or (IA)3.
    Keeps the signs of the `density` share of entries of largest magnitude, each worth alpha * std(task vector); `scope="tensor"` does so tensor by
    tensor. `exclude` are glob patterns over the base's names that stay at the base. Heads and changed buffers are kept exact. `force` goes on where
    the two do not seem to belong together. `metadata` is any JSON of yours. `warn` is told what a user should know.

    Raises InvalidArgument, PairingError, Unsupported, NotFound, InvalidFile or CannotWrite before anything is written.
    """
    check_options(density, alpha)
    if scope not in ("global", "tensor"):
        raise InvalidArgument(f"scope is {scope!r}; expected 'global' or 'tensor'")
    try:
        chosen = by_name(coding)
    except KeyError as error:
        raise InvalidArgument(str(error.args[0])) from None
    ours = open_checkpoint(base)
    theirs = open_checkpoint(tuned)
    pairing = pair(ours, theirs, exclude)
    if not pairing.pairs:
        raise PairingError("nothing is left to compress: every tensor is excluded, exact or dropped")
    for warning in pairing.warnings:
        warn(warning)
    pieces = [_difference(ours, theirs, p.name, p.tuned, p.shape) for p in pairing.pairs]
    mark = base_fingerprint(ours, progress)
    ternaries, norm = ternarize(pieces, density=density, alpha=alpha, per_tensor=scope == "tensor", coding=chosen, progress=progress)
    _refuse_strangers(norm, ours, pairing, force, warn)
    if not any(t.count for t in ternaries):
        warn("the tuned model equals the base in every tensor that is compressed: the expert changes nothing there")
    changes: list[Change] = [Add(piece.name, ternary) for piece, ternary in zip(pieces, ternaries, strict=True)]
    changes += [Set(e.name, theirs.read(e.tuned)[e.first_row :].detach().cpu().clone(), e.role, e.first_row) for e in pairing.exact]
    changes.sort(key=lambda change: (change.name, isinstance(change, Set)))
    facts = Facts(
        method="compeft",
        source="full",
        density=float(density),
        alpha=float(alpha),
        scope=scope,
        scale=ternaries[0].scale if scope == "global" else 0.0,
        base=base_facts(ours, mark),
        writer=f"sterna {__version__}",
        parameters=pairing.entries,
        architecture=theirs.architecture,
        prefixes=pairing.prefixes,
        dropped=pairing.dropped,
        excluded=pairing.excluded,
        config=changed_config(ours.config, theirs.config),
        tokens=added_tokens(ours.folder, theirs.folder),
        metadata=dict(metadata or {}),
    )
    return Expert(facts, mark, tuple(changes))


def base_fingerprint(base: Checkpoint, progress: Progress = silent) -> Fingerprint:
    """The fingerprint of a checkpoint's floating-point tensors."""
    floats = [name for name, info in base.tensors.items() if info.dtype in HASHED_DTYPES]
    progress("fingerprint", 0, len(floats), "tensors")
    return fingerprint({name: base.read(name) for name in floats})


def base_facts(base: Checkpoint, mark: Fingerprint) -> BaseFacts:
    parameters = sum(math.prod(base.tensors[name].shape) for name in mark.names)
    return BaseFacts(name=base.label, fingerprint=mark.hex, parameters=parameters, revision=base.revision)


def _difference(base: Checkpoint, tuned: Checkpoint, name: str, other: str, shape: tuple[int, ...]) -> Piece:
    """tuned - base as a piece. A tuned dtype that cannot hold the base's values rounds the base first, or rounding noise would fill the difference."""
    entries = math.prod(shape)
    ours = base.read(name).detach().reshape(-1)
    theirs = tuned.read(other).detach().reshape(-1)[:entries]
    round_to = theirs.dtype if torch.promote_types(ours.dtype, theirs.dtype) != theirs.dtype else None

    def read(start: int, stop: int) -> F32:
        before, after = ours[start:stop], theirs[start:stop]
        if round_to is not None:
            before = before.to(round_to)
        return np.subtract(_wide(after), _wide(before))

    return Piece(name, shape, read)


def _wide(values: torch.Tensor) -> F32:
    wide: F32 = values.to("cpu", torch.float32).numpy()
    return wide


def _refuse_strangers(norm: float, base: Checkpoint, pairing: Pairing, force: bool, warn: Callable[[str], None]) -> None:
    squares = sum(float(torch.linalg.vector_norm(base.read(p.name).detach().float())) ** 2 for p in pairing.pairs)
    ratio = norm / math.sqrt(squares) if squares else math.inf if norm else 0.0
    if ratio <= UNRELATED:
        return
    message = f"the difference is {ratio:.2f} times as large as the base (at most {UNRELATED} is usual for a fine-tune)"
    if not force:
        raise PairingError(f"{message}: is this the right base? --force (force=True) goes on")
    warn(message)


_NEW_FIELDS = frozenset(
    {"id2label", "problem_type", "pad_token_id", "eos_token_id", "bos_token_id", "classifier_dropout", "vocab_size"}
)
"""Fields that matter where only the tuned configuration has them; the rest of such fields are defaults that a newer library writes out."""


def changed_config(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration fields in which the tuned model differs from its base."""
    changed: dict[str, Any] = {}
    for name, value in tuned.items():
        known = name in base
        if carries(name) and (base[name] != value if known else name in _NEW_FIELDS and value not in (None, False)):
            changed[name] = value
    labels = changed.get("id2label")
    if isinstance(labels, dict) and changed.get("label2id") == {label: int(i) for i, label in labels.items() if str(i).isdigit()}:
        del changed["label2id"]  # made again from its inverse
    elif "label2id" in tuned and labels is not None and "label2id" not in changed and carries("label2id"):
        inverse = {label: int(i) for i, label in labels.items() if str(i).isdigit()} if isinstance(labels, dict) else None
        if tuned["label2id"] != inverse:
            changed["label2id"] = tuned["label2id"]
    return changed


def added_tokens(base: Path | None, tuned: Path | None) -> tuple[Mapping[str, Any], ...]:
    """The entries of the tuned tokenizer.json's added_tokens whose content the base's lacks."""
    entries: list[list[dict[str, Any]]] = []
    for folder in (base, tuned):
        if folder is None or not os.path.isfile(folder / "tokenizer.json"):
            return ()
        listed = read_json(folder / "tokenizer.json").get("added_tokens") or []
        if not isinstance(listed, list) or not all(isinstance(entry, dict) and "content" in entry for entry in listed):
            raise InvalidFile(f"{folder / 'tokenizer.json'} has added_tokens that are not a list of tokens")
        entries.append(listed)
    known = {entry["content"] for entry in entries[0]}
    return tuple(entry for entry in entries[1] if entry["content"] not in known)
