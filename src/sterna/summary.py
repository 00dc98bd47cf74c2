"""What an expert is and how large, in numbers: for `sterna inspect`, reports and benchmarks."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from sterna.expert.changes import Change, Factors, Folded, Lossless, LowRank, Masked, Multiply, Set, streams
from sterna.expert.expert import Expert
from sterna.expert.facts import Facts
from sterna.expert.palette import Palette


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One change: entries that are coded, how many are not zero (lossless: are other than the base's), and the bytes that they take.

    An exact tensor has no entries and no non-zeros.
    """

    name: str
    change: str
    shape: tuple[int, ...]
    entries: int
    nonzeros: int
    bytes: int

    @property
    def density(self) -> float:
        return self.nonzeros / self.entries if self.entries else 0.0


@dataclass(frozen=True, slots=True)
class MaskSummary:
    """A PaFi expert's mask: `count` entries of `tensors` eligible tensors, by `order`; `values` is the dtype of their new values, or "ternary"."""

    order: str
    density: float | None
    seed: int
    count: int
    tensors: int
    values: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Sizes in bytes on disk: `bytes` = header + table + streams + exact tensors + checksum. `bytes_head` are those of the exact ones that are heads.

    `parameters` is d, the length of the task vector; `bits_per_parameter` counts streams and table, exact tensors not; `entropy_bits_per_parameter`
    is the i.i.d. entropy of a ternary vector with this many non-zeros and signs; `ratio_to_16bit` is a 16-bit copy of the task vector and the exact
    tensors over `bytes`; of the whole base and the head, where PaFi or HiWi trained it. `coding` is the name of the streams'
    coding, None where there are none. Of a lossless expert `nonzeros` are the entries that changed, `bits_per_change` is what each takes, and no
    entropy is given (0).
    """

    facts: Facts
    digest: str
    content_digest: str
    bytes: int
    bytes_streams: int
    bytes_table: int
    bytes_exact: int
    bytes_head: int
    bytes_header: int
    parameters: int
    nonzeros: int
    bits_per_parameter: float
    entropy_bits_per_parameter: float
    bits_per_change: float | None
    ratio_to_16bit: float
    mask: MaskSummary | None
    coding: str | None
    tensors: tuple[TensorSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        tensors = [{**asdict(t), "density": t.density} for t in self.tensors]
        return {**{k: v for k, v in asdict(self).items() if k != "tensors"}, "tensors": tensors}


def inspect(expert: Expert | str | os.PathLike[str]) -> Summary:
    """Sizes, densities and facts of an expert or its file. Raises NotFound or InvalidFile."""
    from sterna.expert.file import file_pieces, load
    from sterna.expert.table import write_table

    if not isinstance(expert, Expert):
        expert = load(expert)
    size = expert.file_bytes or sum(len(piece) for piece in file_pieces(expert))
    table = len(write_table(expert.fingerprint, expert.changes, expert.facts.scope == "tensor"))
    tensors = tuple(_tensor(change) for change in expert.changes)
    coded = sum(stream.size for change in expert.changes for stream in streams(change))
    merged = sum(_bytes(change) for change in expert.changes if isinstance(change, Factors | LowRank | Multiply))
    coded += merged
    exact = sum(_bytes(change) for change in expert.changes) - merged
    entries = expert.facts.parameters if expert.lossless is not None else sum(t.entries for t in tensors)
    nonzeros = sum(t.nonzeros for t in tensors)
    return Summary(
        facts=expert.facts,
        digest=expert.digest,
        content_digest=expert.content_digest,
        bytes=size,
        bytes_streams=coded,
        bytes_table=table,
        bytes_exact=exact,
        bytes_head=sum(_bytes(change) for change in expert.changes if isinstance(change, Set) and change.role == "head"),
        bytes_header=size - coded - table - exact - 32,
        parameters=entries,
        nonzeros=nonzeros,
        bits_per_parameter=8 * (coded + table) / entries if entries else 0.0,
        entropy_bits_per_parameter=ternary_entropy(nonzeros / entries) if entries and expert.lossless is None else 0.0,
        bits_per_change=8 * coded / nonzeros if nonzeros and expert.lossless is not None else None,
        ratio_to_16bit=2 * _fully_tuned(expert, entries) / size,
        mask=next((_mask(expert.facts, change) for change in expert.changes if isinstance(change, Masked)), None),
        coding="+".join(sorted({ternary.coding.name for ternary in expert.ternaries})) or None,
        tensors=tensors,
    )


def _fully_tuned(expert: Expert, coded: int) -> int:
    """Entries of what the expert stands for: the task vector and the exact tensors; the whole base and the head where PaFi or HiWi tuned it."""
    exact = [change.value.numel() for change in expert.changes if isinstance(change, Set) and change.role != "tuned"]
    return (expert.facts.base.parameters if expert.facts.source in ("pafi", "hiwi") else coded) + sum(exact)


def ternary_entropy(density: float) -> float:
    """i.i.d. entropy in bits an entry: -(1-k) log2(1-k) - k log2(k/2)."""
    if density <= 0:
        return 0.0
    zeros = -(1 - density) * math.log2(1 - density) if density < 1 else 0.0
    return zeros - density * math.log2(density / 2)


def _bytes(change: Change) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in change.exact)


def _mask(facts: Facts, change: Masked) -> MaskSummary:
    rule = change.rule
    values = "ternary" if change.ternaries else str(change.exact[0][1].dtype).removeprefix("torch.")
    return MaskSummary(rule.order, facts.mask.density if facts.mask else None, rule.seed, rule.count, len(rule.names), values)


def _tensor(change: Change) -> TensorSummary:
    match change:
        case Set():
            return TensorSummary(change.name, f"set ({change.role})", tuple(change.value.shape), 0, 0, _bytes(change))
        case Folded():
            return TensorSummary(change.name, f"folded ({change.activation})", tuple(change.D.shape), 0, 0, _bytes(change))
        case Lossless():
            kind = f"lossless ({str(change.dtype).removeprefix('torch.')})"
            return TensorSummary(change.name, kind, change.shape, math.prod(change.shape), change.count, change.stream.size)
        case Palette(levels=levels):
            kind = f"palette ({change.magnitudes.numel()}" + (f", masks of {change.tasks} tasks)" if change.tasks else ")")
            return TensorSummary(change.name, kind, levels.shape, levels.size, levels.count, levels.stop - levels.start + change.coded.size)
        case LowRank(A=A, B=B):
            sides = (B.shape[0], math.prod(A.shape[1:]))
            return TensorSummary(change.name, f"lowrank ({A.shape[0]})", sides, A.numel() + B.numel(), A.numel() + B.numel(), _bytes(change))
        case Multiply() if not change.ternaries:
            return TensorSummary(change.name, "multiply", tuple(change.vector.shape), change.size, change.size, _bytes(change))
        case Masked() if not change.ternaries:
            return TensorSummary(change.name, _masked(change), (change.rule.count,), 0, 0, _bytes(change))
    parts = change.ternaries
    shape = parts[0].shape if len(parts) == 1 else (parts[1].shape[0], math.prod(parts[0].shape[1:]))
    kind = _masked(change) if isinstance(change, Masked) else type(change).__name__.lower()
    entries, nonzeros, size = (sum(column) for column in zip(*((t.size, t.count, t.stop - t.start) for t in parts), strict=True))
    return TensorSummary(change.name, kind, shape, entries, nonzeros, size)


def _masked(change: Masked) -> str:
    more = len(change.rule.names) - 1
    return f"masked (and {more} more)" if more else "masked"
