"""Expert and base to a folder: a full checkpoint that `from_pretrained` loads, or the PEFT folder that an adapter's expert came from."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sterna.errors import InvalidArgument, WrongBase
from sterna.expert.changes import Add, Factors, Folded, Joined, Lossless, LowRank, Masked, Multiply, Product, Set, Ternary, touched
from sterna.expert.container import ITEM_BYTES, Part, safetensors_pieces
from sterna.expert.expert import Expert, exact_bytes, folded_shape, masked_parts, masked_value, new_value, refuse_count
from sterna.expert.file import CODES, load
from sterna.expert.heads import with_head
from sterna.expert.palette import Palette
from sterna.live.palettes import add_palette
from sterna.live.update import sparse_adds
from sterna.mask import choose, tensor_piece
from sterna.progress import Progress, silent
from sterna.recoding import blockwise
from sterna.sources.adapter import PREFIX, part_names, write_adapter
from sterna.sources.checkpoint import Checkpoint, Source, open_checkpoint, read_json
from sterna.sources.names import plain, swap_prefix
from sterna.verification import require_checkpoint
from sterna.writing import refuse_existing, whole_folder

SHARD_BYTES = 5 << 30
"""Bytes of tensors in one file of a checkpoint at most, unless one tensor alone is larger."""
_COPIED = (".json", ".txt", ".model", ".jinja", ".py")


def apply(
    base: Source,
    expert: Expert | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    merged: bool = False,
    head: str | None = None,
    allow_narrower: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the tuned model into the new folder `out`, whole or not at all, and return it.

    A full checkpoint in the base's dtypes, with its configuration and tokenizer; for an expert made from LoRA or (IA)3 a PEFT folder, or with
    `merged` the full checkpoint; for a lossless one the tuned tensors to the bit, in their dtypes. Tensors stream one at a time.

    Raises WrongBase, InvalidFile, CannotWrite, and what opening the base raises.
    """
    expert = with_head(expert if isinstance(expert, Expert) else load(expert), head)
    refuse_existing(Path(out))
    opened = open_checkpoint(base)
    own, _, _ = require_checkpoint(expert, opened, allow_narrower, progress)
    expert.check()
    with whole_folder(out) as folder:
        if expert.facts.source in ("lora", "ia3") and not merged:
            _write_peft(expert, folder)
        else:
            _write_checkpoint(expert, opened, own, folder, progress)
    return Path(out)


def _write_peft(expert: Expert, folder: Path) -> None:
    """The adapter again, with its factors (or vectors) as the expert has them, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    base_prefix, tuned_prefix = expert.facts.prefixes
    for change in expert.changes:
        match change:
            case Factors() | LowRank():
                names = part_names(change.key, "embedding" if change.embedding else "lora")
                tensors.update(zip(names, _factors(change), strict=True))
            case Multiply():
                tensors[part_names(change.key, "ia3")[0]] = 1 + (_dense(change.vector) if isinstance(change.vector, Ternary) else change.vector)
            case Set(role="head" | "saved"):
                of_base = change.name in expert.fingerprint.names
                name = swap_prefix(plain(change.name), base_prefix, tuned_prefix) if of_base else change.name
                tensors[PREFIX + name] = change.tensor
            case _:
                raise InvalidArgument(f"{change.name} is changed in a way that a PEFT folder cannot hold; use --merged (merged=True)")
    config = {**expert.facts.adapter, "base_model_name_or_path": expert.facts.base.name, "inference_mode": True}
    write_adapter(folder, config, tensors)


def _factors(change: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as PEFT has them; B carries the scales of the single ranks."""
    if isinstance(change, LowRank):
        return change.A, change.B
    B = _dense(change.B)
    return _dense(change.A), B if change.ranks is None else B * change.ranks.reshape(1, -1, *[1] * (B.dim() - 2))


def _dense(levels: Ternary) -> torch.Tensor:
    return torch.from_numpy(levels.levels()).float() * levels.scale


def _write_checkpoint(expert: Expert, base: Checkpoint, own: Mapping[str, str], folder: Path, progress: Progress) -> None:
    parts = _parts(expert, base, own)
    shards = _shards(parts)
    names = {i: "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))}
    done = 0
    for number, shard in enumerate(shards):
        with open(folder / names[number], "xb") as file:
            for piece in safetensors_pieces({"format": "pt"}, shard):
                file.write(piece)
                done += len(piece)
                progress("apply", done, sum(_bytes(part) for part in parts), "bytes")
    if len(shards) > 1:
        weight_map = {part[0]: names[number] for number, shard in enumerate(shards) for part in shard}
        index = {"metadata": {"total_size": sum(_bytes(part) for part in parts)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_surroundings(expert, base, folder)


def _parts(expert: Expert, base: Checkpoint, own: Mapping[str, str]) -> list[Part]:
    """Every tensor of the tuned model under its own name, made when it is written."""
    changes: dict[str, list[_Whole | _Entries]] = {}
    for made in expert.changes:
        if isinstance(made, Masked):
            changes.update({name: [entries] for name, entries in _entries(made, base, own).items()})
            continue
        for name in touched(made):
            changes.setdefault(name, []).append(made)
    fingerprinted = {found: name for name, found in own.items()}
    base_prefix, tuned_prefix = expert.facts.prefixes if expert.facts.source not in ("lora", "ia3") else ("", "")
    parts: list[Part] = []
    for found, info in sorted(base.tensors.items()):
        name = fingerprinted.get(found, plain(found))
        if name in expert.facts.dropped:
            continue
        applied = changes.pop(name, [])
        dtype, shape = info.dtype, info.shape
        for change in applied:
            if isinstance(change, Lossless):
                dtype = change.dtype
            if isinstance(change, Set):
                shape = (change.first_row + change.value.shape[0], *shape[1:]) if change.role == "rows" else tuple(change.value.shape)
                dtype = dtype if change.role in ("rows", "tuned") else _dtype(change)
            wanted = _shape_wanted(change, info.shape)
            if wanted != info.shape:
                raise WrongBase(f"the expert changes {name} with shape {wanted}; the base has {info.shape}")
        target = swap_prefix(plain(name), base_prefix, tuned_prefix)
        parts.append((target, CODES[dtype], shape, partial(_tuned, base, found, applied, dtype)))
    for name, left in changes.items():
        for change in left:
            if not isinstance(change, Set):
                raise WrongBase(f"this base has no {name}, which the expert changes")
            target = swap_prefix(name, base_prefix, tuned_prefix) if change.role == "untied" else name
            parts.append((target, CODES[_dtype(change)], tuple(change.value.shape), partial(_exact, change)))
    return sorted(parts, key=lambda part: part[0])


@dataclass(frozen=True, slots=True)
class _Entries:
    """What a masked change does to one tensor."""

    change: Masked
    places: torch.Tensor
    part: torch.Tensor


_Whole = Add | Product | Multiply | Folded | Set | Lossless | Palette


def _entries(change: Masked, base: Checkpoint, own: Mapping[str, str]) -> dict[str, _Entries]:
    tensors = [base.read(own[name]) for name in change.rule.names]
    refuse_count(change.rule, tensors)
    parts = masked_parts(change, choose(change.rule, list(map(tensor_piece, change.rule.names, tensors))))
    return {name: _Entries(change, *part) for name, part in zip(change.rule.names, parts, strict=True)}


def _dtype(change: Set) -> torch.dtype:
    return change.value.dtype if change.scales is None else torch.float32


def _shape_wanted(change: _Whole | _Entries, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the base's tensor must have, where the change itself does not see to it."""
    match change:
        case Add() | Palette():
            return change.levels.shape
        case Folded():
            return folded_shape(change, shape)
        case Lossless():
            return change.shape
        case Set(role="tuned"):
            return tuple(change.value.shape)
    return shape


def _tuned(base: Checkpoint, name: str, changes: Sequence[_Whole | _Entries], dtype: torch.dtype) -> Iterator[memoryview]:
    tensor = base.read(name).detach().cpu()
    for change in changes:
        if isinstance(change, _Entries):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            flat = tensor.view(-1)
            flat[change.places] = masked_value(change.change, flat[change.places], change.part)
        elif isinstance(change, Add):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            for step in sparse_adds([tensor], Joined.of(blockwise([change.levels]))):
                step.apply()
        elif isinstance(change, Palette):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            add_palette(tensor, change).apply()
        else:
            tensor = new_value(change, tensor).to(dtype)
    yield exact_bytes(tensor)


def _exact(change: Set) -> Iterator[memoryview]:
    yield exact_bytes(change.tensor)


def _bytes(part: Part) -> int:
    return math.prod(part[2]) * ITEM_BYTES[part[1]]


def _shards(parts: Sequence[Part]) -> list[list[Part]]:
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + _bytes(part) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += _bytes(part)
    return shards


def _write_surroundings(expert: Expert, base: Checkpoint, folder: Path) -> None:
    """Configuration with what the tuned model changed, and the base's tokenizer with the tokens that it added."""
    if base.folder is not None:
        for file in sorted(base.folder.iterdir()):
            wanted = file.suffix in _COPIED and not file.name.endswith(".index.json") and file.name not in ("config.json", "adapter_config.json")
            if file.is_file() and wanted:
                shutil.copyfile(file, folder / file.name)
    if expert.facts.tokens and (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
        tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *expert.facts.tokens]
        _write_json(folder / "tokenizer.json", tokenizer)
    if base.config:
        config = {name: value for name, value in base.config.items() if not name.startswith("_")}
        config.update(expert.facts.config)
        labels = config.get("id2label")
        if "id2label" in expert.facts.config and "label2id" not in expert.facts.config and isinstance(labels, dict):
            config["label2id"] = {label: int(number) for number, label in labels.items()}
        if expert.facts.architecture:
            config["architectures"] = [expert.facts.architecture]
        _write_json(folder / "config.json", config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
