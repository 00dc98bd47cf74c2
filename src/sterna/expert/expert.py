"""The expert: facts, the base's fingerprint, and changes. Immutable."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.codings import I64
from sterna.errors import InvalidArgument, WrongBase
from sterna.expert.changes import (
    Add,
    Change,
    Factors,
    Folded,
    Joined,
    Lossless,
    LowRank,
    Masked,
    MaskRule,
    Multiply,
    Product,
    Set,
    Ternary,
    coded_shapes,
)
from sterna.expert.facts import Facts
from sterna.expert.palette import Palette, refuse_tasks
from sterna.fingerprint import Fingerprint, require_base, tensor_digest
from sterna.numbers.products import product_entries

if TYPE_CHECKING:
    from sterna.bitmasks import Bitmasks
    from sterna.sources.checkpoint import Source

F64 = NDArray[np.float64]

DENSE_LIMIT = 8 << 30
DENSE_FREE = 256 << 20
DENSE_RATIO = 4096
"""Bytes that `task_vector` makes without a base: no more than the file says of its base, nor DENSE_LIMIT, and beyond DENSE_FREE no more than
DENSE_RATIO for each coded byte (float32 at density .001 takes some 2,800). So a small hostile file cannot ask for much."""


@dataclass(frozen=True, eq=False)
class Expert:
    """What fine-tuning taught a model. Made by `sterna.compress` or `sterna.load`; `changes` are in the order of their names."""

    facts: Facts
    fingerprint: Fingerprint
    changes: tuple[Change, ...]
    file_digest: str | None = None  # of the file that it was loaded from
    file_bytes: int | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the expert as a safetensors file, whole or not at all. The same expert gives the same bytes. Raises CannotWrite."""
        from sterna.expert.file import save

        save(self, path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal: of the one it was loaded from, else of the one that `save` writes."""
        if self.file_digest is not None:
            return self.file_digest
        from sterna.expert.file import file_pieces

        sha = hashlib.sha256()
        for piece in file_pieces(self):
            sha.update(piece)
        return sha.hexdigest()

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 of what the file decodes to: method, base, names, shapes, kinds of change, levels, scales, exact tensors, digests of lossless ones.

        Not of the coding, the user's metadata, the writer or the base's name: recoding keeps it.
        """
        sha = hashlib.sha256()
        for text in ("sterna content 1", self.facts.method, self.facts.source, self.facts.base.fingerprint):
            _add_text(sha, text)
        for change in self.changes:
            _add_text(sha, type(change).__name__.lower())
            _add_text(sha, change.name)
            match change:
                case Factors():
                    sha.update(struct.pack("<d??", change.scaling, change.transposed, change.embedding))
                    if change.ranks is not None:
                        _add_tensor(sha, change.ranks)
                case LowRank():
                    sha.update(struct.pack("<??", change.transposed, change.embedding))
                    _add_tensor(sha, change.A)
                    _add_tensor(sha, change.B)
                case Multiply():
                    sha.update(struct.pack("<B", change.axis))
                    _add_text(sha, change.bias or "")
                    for _, vector in change.exact:
                        _add_tensor(sha, vector)
                case Set():
                    _add_text(sha, f"{change.role}:{change.task}" if change.task else change.role)
                    _add_text(sha, str(change.value.dtype).removeprefix("torch."))
                    _add_shape(sha, tuple(change.value.shape))
                    sha.update(struct.pack("<Q?", change.first_row, change.scales is not None))
                    sha.update(exact_bytes(change.value))
                    if change.scales is not None:
                        sha.update(exact_bytes(change.scales))
                case Masked(rule=rule):
                    _add_text(sha, rule.order)
                    sha.update(struct.pack("<3Q?", rule.seed, rule.count, len(rule.names), bool(change.ternaries)))
                    for name in rule.names:
                        _add_text(sha, name)
                    for _, values in change.exact:
                        _add_tensor(sha, values)
                case Folded():
                    _add_text(sha, change.activation)
                    sha.update(struct.pack("<d?", change.scale, change.transposed))
                    _add_tensor(sha, change.D)
                    _add_tensor(sha, change.U)
                case Lossless():
                    _add_text(sha, str(change.dtype).removeprefix("torch."))
                    _add_shape(sha, change.shape)
                    sha.update(change.digest)
            for ternary in change.ternaries:
                _add_shape(sha, ternary.shape)
                sha.update(struct.pack("<fQ", ternary.scale, ternary.count))
                for codes in ternary.batches():
                    sha.update(codes)
            if isinstance(change, Palette):
                _add_palette(sha, change)
        return sha.hexdigest()

    @property
    def ternaries(self) -> Iterator[Ternary]:
        """Every coded tensor, in the file's order."""
        for change in self.changes:
            yield from change.ternaries

    @property
    def lossless(self) -> dict[str, torch.dtype] | None:
        """The dtypes of the tensors that the expert gives back to the bit, by name; None where it is of another method."""
        if self.facts.method != "lossless":
            return None
        return {change.name: change.dtype for change in self.changes if isinstance(change, Lossless)}

    @cached_property
    def adds(self) -> Joined:
        """The levels of the `Add` changes, in their order, joined for attaching; coded anew, once, where their coding is not the default one."""
        from sterna.recoding import blockwise

        return Joined.of(blockwise([change.levels for change in self.changes if isinstance(change, Add)]))

    def bitmasks(self, names: Collection[str] | None = None) -> Bitmasks:
        """The ternary changes (those of `names` alone, where given) as two bit masks a tensor, for arithmetic; see `sterna.bitmasks.bitmasks`."""
        from sterna.bitmasks import bitmasks

        return bitmasks(self, names)

    def check(self) -> None:
        """Decode every stream once, a few blocks at a time; InvalidFile where one is damaged. Lossless ones decode with their base alone."""
        for ternary in self.ternaries:
            for _ in ternary.batches():
                pass
        for change in self.changes:
            if isinstance(change, Palette):
                change.numbers(0, change.levels.count)

    def task_vector(self, base: Source | None = None, *, max_bytes: int | None = None) -> dict[str, torch.Tensor]:
        """The dense float32 task vector by base name: what attaching adds to each tensor, before rounding to the live dtype.

        All changes but `Add`, `Palette` and LoRA's are differences to the base, so they need `base` (a path, state dict, module); without it one that
        has them raises InvalidArgument, but for heads, which have no base tensor and are left out either way. Shapes must be the base's (WrongBase),
        and so must all values where a mask is to be made of them.
        `max_bytes` limits what is allocated: by default the base's size in float32; without a base see DENSE_LIMIT.
        """
        tensors = self._base_tensors(base) if base is not None else None
        limit = max_bytes if max_bytes is not None else self._dense_limit() if tensors is None else sum(4 * t.numel() for t in tensors.values())
        wanted = sum(4 * math.prod(_dense_shape(change)) for change in self.changes if isinstance(change, Add | Product | Palette))
        factors = max((4 * (change.A.size + change.B.size) for change in self.changes if isinstance(change, Factors)), default=0)
        if wanted > limit or factors > max(limit, DENSE_FREE):
            takes = max(wanted, factors)
            raise InvalidArgument(f"the dense task vector takes {takes:,} bytes, more than the {limit:,} allowed; give its base, or max_bytes")
        for change in self.changes:
            refuse_shape(change, tensors)
        if tensors is not None and any(isinstance(change, Masked | Lossless) for change in self.changes):
            digests = {name: (tensor_digest(tensor), tensor.dtype) for name, tensor in tensors.items()}
            require_base(self.fingerprint, self.facts.base.name, digests, masked=self.lossless is None, lossless=self.lossless)
        dense: dict[str, torch.Tensor] = {}
        for change in self.changes:
            match change:
                case Add():
                    dense[change.name] = torch.from_numpy(change.levels.levels().astype(np.float32)) * change.levels.scale
                case Palette():
                    refuse_tasks(change)
                    dense[change.name] = change.dense()
                case Factors() | LowRank():
                    dense[change.name] = factor_product(change).reshape(_dense_shape(change) if tensors is None else tensors[change.name].shape)
                case Multiply():
                    for name in (change.name, change.bias) if change.bias else (change.name,):
                        old = _needed(tensors, name).float()
                        dense[name] = old * multiplier(change, old.dim()) - old
                case Masked():
                    dense.update(masked_updates(change, [_needed(tensors, name) for name in change.rule.names]))
                case Folded():
                    dense[change.name] = folded_update(change, _needed(tensors, change.name)).float()
                case Lossless():
                    old = _needed(tensors, change.name)
                    dense[change.name] = new_value(change, old).float() - old.float().cpu()
                case Set(role="buffer" | "saved" | "tuned"):
                    if change.value.is_floating_point() and (tensors is None or change.name in tensors):
                        dense[change.name] = change.tensor.float() - _needed(tensors, change.name).float()
                case Set():
                    continue  # heads, gained rows and untied copies have no counterpart in the base
        return dense

    def _dense_limit(self) -> int:
        coded = sum(ternary.stop - ternary.start for ternary in self.ternaries)
        return min(4 * self.facts.base.parameters, DENSE_LIMIT, max(DENSE_FREE, DENSE_RATIO * coded))

    def _base_tensors(self, base: Source) -> Mapping[str, torch.Tensor]:
        from sterna.sources.checkpoint import open_checkpoint
        from sterna.sources.names import align

        opened = open_checkpoint(base)
        alignment = align(dict(zip(self.fingerprint.names, self._shapes(), strict=True)), opened.shapes_by_any_name)
        return {name: opened.read(own) for name, own in alignment.to_other.items()}

    def _shapes(self) -> list[tuple[int, ...] | None]:
        known = {change.name: coded_shapes(change)[0] for change in self.changes if isinstance(change, Add | Lossless | Palette)}
        return [known.get(name) for name in self.fingerprint.names]


def factor_product(change: Product, device: torch.device | str = "cpu") -> torch.Tensor:
    """The product that a LoRA adds, float32, transposed where the change says so.

    Levels multiply as integers, and products of other numbers are made in the order that the format states: the result is the same everywhere.
    """
    if isinstance(change, Factors) and change.ranks is None:
        A = torch.from_numpy(change.A.levels()).flatten(1).to(device, torch.float32)
        B = torch.from_numpy(change.B.levels()).flatten(1).to(device, torch.float32)
        product = (B @ A) * (change.A.scale * change.B.scale * change.scaling)
        return product.T.contiguous() if change.transposed else product
    left, right = thin_matrices(change)
    out = np.empty(left.shape[0] * right.shape[1], np.float32)
    product_entries(left, right, 0, out)
    return torch.from_numpy(out.reshape(left.shape[0], right.shape[1])).to(device)


def thin_matrices(change: Product) -> tuple[F64, F64]:
    """float64 [rows, r] and [r, columns], whose product is what the change adds, transposed where it says so."""
    if isinstance(change, LowRank):
        A, B = (factor.flatten(1).double().numpy() for factor in (change.A, change.B))
    else:
        A, B = (levels.levels().reshape(levels.shape[0], -1).astype(np.float64) for levels in (change.A, change.B))
        B *= float(np.float32(change.A.scale * change.B.scale * change.scaling))
        if change.ranks is not None:
            B *= change.ranks.numpy()
    return (np.ascontiguousarray(A.T), np.ascontiguousarray(B.T)) if change.transposed else (B, A)


def multiplier(change: Multiply, dimensions: int) -> torch.Tensor:
    """1 + scale * level, or 1 + a number: float32, shaped to multiply a tensor of `dimensions` axes along the change's axis (a bias's only one)."""
    if isinstance(change.vector, torch.Tensor):
        vector = 1 + change.vector.flatten()
    else:
        vector = 1 + torch.from_numpy(change.vector.levels().astype(np.float32)).flatten() * change.vector.scale
    shape = [1] * dimensions
    shape[change.axis if dimensions > 1 else 0] = -1
    return vector.reshape(shape)


def folded_update(change: Folded, old: torch.Tensor) -> torch.Tensor:
    """scale * act(W D) U of a live or base tensor W, float64, in CPU memory (where every machine has float64), in W's shape."""
    W = old.detach().to("cpu", torch.float64)
    hidden = (W.T if change.transposed else W) @ change.D.double()
    match change.activation:
        case "relu":
            hidden = torch.relu(hidden)
        case "gelu":
            hidden = torch.nn.functional.gelu(hidden)
    update = change.scale * (hidden @ change.U.double())
    return update.T if change.transposed else update


def rounded(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 values rounded once, to nearest even: torch goes to 16 bits by way of float32, and so rounds twice."""
    if dtype not in (torch.bfloat16, torch.float16):
        return wide.to(dtype)
    near = wide.float()
    bits = near.view(torch.int32)
    outward = (wide.abs() > near.double().abs()).int()
    odd = torch.where((near.double() == wide) | (bits & 1 == 1), bits, bits + 2 * outward - 1)  # sticky: an inexact value ends odd, so it is no tie
    return odd.view(torch.float32).to(dtype)


def masked_parts(change: Masked, positions: Sequence[I64]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each tensor of the mask the flat indices (int64) that change, and for each its new value, or what is added to it (float32, ternary).

    `positions` are the mask's, for each of rule.names. Raises InvalidFile where the levels' stream is damaged.
    """
    starts = np.cumsum([0, *(places.size for places in positions)])
    if isinstance(change.values, torch.Tensor):
        return [(torch.from_numpy(places), change.values[start : start + places.size]) for places, start in zip(positions, starts, strict=False)]
    codes = change.values.codes()
    entries, updates = codes >> 1, np.where(codes & 1, np.float32(-change.values.scale), np.float32(change.values.scale))
    cuts = np.searchsorted(entries, starts)
    return [
        (torch.from_numpy(places[entries[first:last] - start]), torch.from_numpy(updates[first:last]))
        for places, start, (first, last) in zip(positions, starts, pairwise(cuts), strict=False)
    ]


def masked_value(change: Masked, old: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The new values of entries whose old ones are `old`, in the dtype and on the device of `old`; `part` is `masked_parts`'."""
    part = part.to(old.device)
    return (old.float() + part).to(old.dtype) if change.ternaries else part.to(old.dtype)


def masked_updates(change: Masked, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense float32 differences by name to the base's tensors, those of rule.names in order, whose fingerprint has matched."""
    from sterna.mask import choose, tensor_piece

    names = change.rule.names
    dense = {name: torch.zeros(tensor.shape) for name, tensor in zip(names, tensors, strict=True)}
    positions = choose(change.rule, [tensor_piece(name, tensor) for name, tensor in zip(names, tensors, strict=True)])
    for name, tensor, (places, part) in zip(names, tensors, masked_parts(change, positions), strict=True):
        old = tensor.detach().reshape(-1)[places].to("cpu", torch.float32)
        dense[name].view(-1)[places] = part if change.ternaries else part.float() - old
    return dense


def new_value(change: Product | Multiply | Folded | Set | Lossless, old: torch.Tensor) -> torch.Tensor:
    """What the change makes of a base tensor, before it is rounded to the base tensor's dtype: float32, but an exact tensor in its own dtype.

    A Folded one is rounded already, once, from float64. Raises InvalidFile where a Lossless one does not decode.
    """
    old = old.detach()
    match change:
        case Factors() | LowRank():
            return old.float() + factor_product(change, old.device).reshape(old.shape)
        case Multiply():
            return old.float() * multiplier(change, old.dim()).to(old.device)
        case Folded():
            return rounded(old.to("cpu", torch.float64) + folded_update(change, old), old.dtype)
        case Lossless():
            from sterna.lossless import rebuilt

            return next(rebuilt([(change, old)]))
        case Set(role="rows"):
            return torch.cat([old, change.value.to(old.device, old.dtype)])
        case Set():
            return change.tensor.clone()


def exact_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _dense_shape(change: Add | Product | Palette) -> tuple[int, ...]:
    if not isinstance(change, Product):
        return change.levels.shape
    out, inner = change.B.shape[0], change.A.shape[1:]
    return (math.prod(inner), out) if change.transposed else (out, *inner)


def folded_shape(change: Folded, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the change needs, nearest to the one that is there."""
    n = change.D.shape[0]
    other = shape[-1 if change.transposed else 0] if shape else n
    return (n, other) if change.transposed else (other, n)


def refuse_count(rule: MaskRule, tensors: Sequence[torch.Tensor]) -> None:
    """Raise WrongBase where the tensors of a mask have fewer entries than it wants."""
    entries = sum(tensor.numel() for tensor in tensors)
    if rule.count > entries:
        raise WrongBase(f"the expert has values for {rule.count:,} masked entries; the {len(rule.names)} tensors of its mask have {entries:,}")


def refuse_shape(change: Change, tensors: Mapping[str, torch.Tensor] | None) -> None:
    """Raise WrongBase where a change does not fit the base's tensor, before anything is made."""
    if tensors is None or (isinstance(change, Set) and (change.role not in ("buffer", "saved", "tuned") or change.name not in tensors)):
        return
    if isinstance(change, Masked):
        refuse_count(change.rule, [_needed(tensors, name) for name in change.rule.names])
        return
    there = tuple(_needed(tensors, change.name).shape)
    match change:
        case Multiply():
            for name in (change.name, change.bias) if change.bias else (change.name,):
                shape = tuple(_needed(tensors, name).shape)
                axis = change.axis if len(shape) > 1 else 0
                if axis >= len(shape) or shape[axis] != change.size:
                    raise WrongBase(f"the expert scales {name} by {change.size} numbers along axis {axis}; the base has {shape}")
            return
        case Set():
            wanted = tuple(change.value.shape)
        case Folded():
            wanted = folded_shape(change, there)
        case Lossless():
            wanted = change.shape
        case _:
            wanted = _dense_shape(change)
    unfolded = isinstance(change, Product) and not change.transposed and there[:1] == wanted[:1] and math.prod(there) == math.prod(wanted)
    if there != wanted and not unfolded:
        raise WrongBase(f"the expert changes {change.name} with shape {wanted}; the base has {there}")


def _needed(tensors: Mapping[str, torch.Tensor] | None, name: str) -> torch.Tensor:
    if tensors is None:
        raise InvalidArgument(f"the change of {name} is a difference to the base: give task_vector the base")
    if name not in tensors:
        raise WrongBase(f"the base has no tensor {name}, which the expert changes")
    return tensors[name]


def _add_text(sha: hashlib._Hash, text: str) -> None:
    encoded = text.encode()
    sha.update(struct.pack("<Q", len(encoded)) + encoded)


def _add_tensor(sha: hashlib._Hash, tensor: torch.Tensor) -> None:
    _add_text(sha, str(tensor.dtype).removeprefix("torch."))
    _add_shape(sha, tuple(tensor.shape))
    sha.update(exact_bytes(tensor))


def _add_palette(sha: hashlib._Hash, change: Palette) -> None:
    for held in (change.magnitudes, change.members):
        for first in range(0, change.levels.count if held is not None else 0, 1 << 20):
            assert held is not None
            sha.update(held.numpy()[change.numbers(first, min(1 << 20, change.levels.count - first))])
    if change.scales is not None:
        _add_tensor(sha, change.scales)


def _add_shape(sha: hashlib._Hash, shape: tuple[int, ...]) -> None:
    sha.update(struct.pack(f"<B{len(shape)}Q", len(shape), *shape))
