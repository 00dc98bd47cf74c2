"""A base and a tuned model brought together by name: which tensors make up the task vector, which are kept exact, which were dropped."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from sterna.errors import InvalidArgument, PairingError, Unsupported
from sterna.expert.changes import Role
from sterna.sources.checkpoint import Checkpoint, is_buffer
from sterna.sources.names import NONPERSISTENT, Alignment, align, is_embedding, is_head, last, near, plain, some, swap_prefix

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor that base and tuned model share; only its first `rows` rows where the tuned one grew."""

    name: str  # the base's
    tuned: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exact:
    """A tensor of the tuned model that is kept as it is, from row `first_row` on."""

    name: str
    tuned: str
    role: Role
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Pairing:
    """`pairs` in the order of the flat task vector; `prefixes` are the class prefixes of the base's and the tuned model's names."""

    pairs: tuple[Pair, ...]
    exact: tuple[Exact, ...]
    dropped: tuple[str, ...]
    excluded: tuple[str, ...]
    prefixes: tuple[str, str]
    warnings: tuple[str, ...]

    @property
    def entries(self) -> int:
        """d, the length of the task vector."""
        return sum(torch.Size(pair.shape).numel() for pair in self.pairs)


def pair(base: Checkpoint, tuned: Checkpoint, exclude: Sequence[str] = (), *, to_the_bit: bool = False) -> Pairing:
    """Bring two full checkpoints together. `exclude` are glob patterns over the base's names.

    `to_the_bit` keeps buffers exact that differ in a bit, and float64 parameters that do.

    Raises PairingError (tensors missing inside a layer, nothing in common), Unsupported (quantized), InvalidArgument (a pattern without a match).
    """
    for side, checkpoint in (("base", base), ("tuned model", tuned)):
        if checkpoint.config.get("quantization_config"):
            raise Unsupported(f"the {side} {checkpoint.label!r} is quantized (config.quantization_config); expected plain float weights")
        leftover = [name for name in checkpoint.tensors if ".lora_" in name or ".ia3_l" in name]
        if leftover:
            raise Unsupported(f"the {side} {checkpoint.label!r} holds adapter tensors ({some(leftover)}); merge them, or give the adapter folder")
    alignment = _aligned(base, tuned)
    prefixes = (alignment.base_prefix, alignment.other_prefix)
    skipped = excluded_names(base, tuned, alignment, exclude)
    equal = same_bits if to_the_bit else _same_values
    pairs: list[Pair] = []
    exact: list[Exact] = []
    warnings: list[str] = []
    for name in sorted(alignment.to_other):
        other = alignment.to_other[name]
        if name in skipped:
            continue
        ours, theirs = base.tensors[name], tuned.tensors[other]
        if is_buffer(base, name) or is_buffer(tuned, other) or not ours.dtype.is_floating_point:
            if last(plain(name)) not in NONPERSISTENT and (ours != theirs or not equal(base.read(name), tuned.read(other))):
                exact.append(Exact(name, other, "buffer"))
        elif is_head(plain(name), alignment.base_prefix):
            exact.append(Exact(name, other, "head"))
        elif to_the_bit and not {ours.dtype, theirs.dtype} <= FLOATS:
            if not equal(base.read(name), tuned.read(other)):
                exact.append(Exact(name, other, "saved"))
        elif ours.shape == theirs.shape:
            _require_float(name, ours.dtype, theirs.dtype)
            pairs.append(Pair(name, other, ours.shape))
        elif is_embedding(name) and ours.shape[1:] == theirs.shape[1:] and ours.shape[0] < theirs.shape[0]:
            _require_float(name, ours.dtype, theirs.dtype)
            pairs.append(Pair(name, other, ours.shape))
            exact.append(Exact(name, other, "rows", ours.shape[0]))
        else:
            exact.append(Exact(name, other, "head"))
    matched = {plain(p.name) for p in pairs} | {plain(e.name) for e in exact if e.role == "buffer"}
    reshaped = [e.name for e in exact if e.role == "head" and e.name in alignment.to_other and not is_head(plain(e.name), alignment.base_prefix)]
    if len(reshaped) > len(pairs):
        raise PairingError(
            f"most tensors differ in shape ({some(reshaped)}), only {len(pairs)} agree: these are two models, not a base and its fine-tune"
        )
    untied = _untied(base, tuned, alignment)
    for name in _extra(base, tuned, alignment, matched, skipped, untied):
        role: Role = "untied" if name in untied else "head"
        if role == "untied":
            warnings.append(f"{name} is tied in the base and separate in the tuned model; its copy is kept exact")
        exact.append(Exact(swap_prefix(plain(name), *prefixes[::-1]) if role == "untied" else plain(name), name, role))
    dropped = _missing(base, tuned, alignment, matched, skipped)
    return Pairing(tuple(pairs), tuple(sorted(exact, key=lambda e: (e.name, e.role))), dropped, tuple(sorted(skipped)), prefixes, tuple(warnings))


def _same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.cpu(), second.cpu())


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and equal to the bit: NaN equals itself, -0 is not 0."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(*(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))


def _aligned(base: Checkpoint, tuned: Checkpoint) -> Alignment:
    """The alignment of what the two store; a tied tensor is found under any of its names, on either side."""
    found = align(base.shapes_by_any_name, tuned.shapes_by_any_name)
    names_of = {name: [name] for name in base.tensors}
    for alias, name in sorted(base.aliases.items()):
        names_of[name].append(alias)
    to_other = {name: found.to_other[known[0]] for name, names in names_of.items() if (known := [n for n in names if n in found.to_other])}
    return replace(found, to_other={name: tuned.aliases.get(other, other) for name, other in to_other.items()})


def excluded_names(base: Checkpoint, tuned: Checkpoint, alignment: Alignment, patterns: Sequence[str]) -> frozenset[str]:
    """Base names (and plain names of the tuned model's own tensors) that the glob patterns match."""
    known = set(base.tensors) | {plain(n) for n in tuned.tensors if n not in set(alignment.to_other.values())}
    chosen: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(known, pattern)
        if not hits:
            suggestions = near(pattern, known)
            raise InvalidArgument(f"--exclude {pattern!r} matches no tensor" + (f"; near names: {', '.join(suggestions)}" if suggestions else ""))
        chosen.update(hits)
    return frozenset(chosen)


def _require_float(name: str, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise Unsupported(f"{name} is {dtype}; expected float32, float16 or bfloat16 (convert float64 models to float32 first)")


def _untied(base: Checkpoint, tuned: Checkpoint, alignment: Alignment) -> frozenset[str]:
    """Tuned tensors without a base tensor of their own that the base ties to another: by its aliases, or as embeddings that its file leaves out."""
    aliases = {swap_prefix(plain(name), alignment.base_prefix, alignment.other_prefix) for name in base.aliases}
    ties = base.config.get("tie_word_embeddings") is not False
    tables = {info.shape[1:] for name, info in base.tensors.items() if len(info.shape) == 2 and is_embedding(name)}
    left = set(tuned.tensors) - set(alignment.to_other.values())
    return frozenset(name for name in left if plain(name) in aliases or (ties and is_embedding(name) and tuned.tensors[name].shape[1:] in tables))


def _inside(name: str, matched: Iterable[str]) -> bool:
    """Whether `name` lies in a module, below the model's first level, that has matched tensors."""
    parts = name.split(".")
    ancestors = {".".join(parts[:depth]) + "." for depth in range(2, len(parts))}
    parent = name.rpartition(".")[0] + "."
    return any((other.startswith(parent) and parent != ".") or any(other.startswith(a) for a in ancestors) for other in matched)


def _extra(
    base: Checkpoint, tuned: Checkpoint, alignment: Alignment, matched: set[str], skipped: frozenset[str], untied: frozenset[str]
) -> list[str]:
    """Tuned tensors that the base lacks: heads; an error where they lie inside a layer that both have."""
    used = set(alignment.to_other.values())
    as_base = {name: swap_prefix(plain(name), alignment.other_prefix, alignment.base_prefix) for name in tuned.tensors if name not in used}
    extra = [
        name for name, there in sorted(as_base.items()) if plain(name) not in skipped and there not in skipped and last(there) not in NONPERSISTENT
    ]
    placed = [name for name in extra if name in untied or is_head(plain(name), alignment.other_prefix) or not _inside(as_base[name], matched)]
    misplaced = sorted(set(extra) - set(placed))
    if misplaced:
        raise PairingError(f"the tuned model has tensors inside layers where the base lacks them: {some(misplaced)}{_both(base, tuned, alignment)}")
    return extra


def _missing(base: Checkpoint, tuned: Checkpoint, alignment: Alignment, matched: set[str], skipped: frozenset[str]) -> tuple[str, ...]:
    """Base tensors that the tuned model dropped with their whole module; an error where they are missing inside a layer that both have."""
    gone = [name for name in sorted(base.tensors) if name not in alignment.to_other and name not in skipped]
    untold = [name for name in gone if last(plain(name)) not in NONPERSISTENT and alignment.other_of(name) not in {plain(a) for a in tuned.aliases}]
    lost = [name for name in untold if _inside(plain(name), matched)]
    if lost:
        raise PairingError(f"the tuned model lacks tensors inside layers that it shares with the base: {some(lost)}{_both(base, tuned, alignment)}")
    return tuple(gone)


def _both(base: Checkpoint, tuned: Checkpoint, alignment: Alignment) -> str:
    used = set(alignment.to_other.values())
    only_base = [n for n in sorted(base.tensors) if n not in alignment.to_other]
    only_tuned = [n for n in sorted(tuned.tensors) if n not in used]
    return f" (only in the base: {some(only_base, 8) or 'none'}; only in the tuned model: {some(only_tuned, 8) or 'none'})"
