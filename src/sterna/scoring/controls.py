"""What stands beside an expert in every comparison: other ways to store what was tuned, each written to a file, and scored as read from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save

from sterna.codings import default_coding
from sterna.compeft import ternarize
from sterna.compression import Matched, exact_changes, expert_of, match
from sterna.errors import InvalidArgument
from sterna.expert.changes import Set
from sterna.expert.expert import Expert
from sterna.expert.file import load
from sterna.progress import Progress, silent
from sterna.scoring.dense import dare, mean_in_std, prune_only
from sterna.scoring.packing import Halves, Layout, OneBit, Packing, Rounded, Sparse
from sterna.scoring.scales import FACTORS, climb
from sterna.sources.checkpoint import Source
from sterna.sources.names import is_embedding
from sterna.writing import whole_file

ControlName = Literal["rescaled", "prune", "stc", "compeft", "bitdelta", "bitdelta_all", "dare", "int8", "int4"]

TITLES: dict[ControlName, str] = {
    "rescaled": "16-bit delta, tuned scale",
    "prune": "prune only",
    "stc": "STC, mean magnitude",
    "compeft": "ComPEFT",
    "bitdelta": "BitDelta",
    "bitdelta_all": "BitDelta, embeddings too",
    "dare": "DARE",
    "int8": "8 bits, scales by row",
    "int4": "4 bits, scales by row",
}
"""The controls by name, in the order in which they are made, and what they are called in tables."""


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """One control: its file's bytes on disk, and an expert in memory that puts on a base what was read from that file."""

    name: ControlName
    title: str
    bytes: int
    expert: Expert
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class TunedVector:
    """A tuned model's task vector over its base, dense: `tau` float32 [d], and the exact tensors beside it."""

    matched: Matched
    layout: Layout
    tau: torch.Tensor
    exact: list[Set]

    @classmethod
    def of(cls, base: Source, tuned: Source | Expert, progress: Progress = silent) -> TunedVector:
        """Of a full fine-tune the differences, of a PEFT folder the factors or vectors, of a PaFi or HiWi expert its values' differences.

        Raises what `sterna.compress` does.
        """
        matched = match(base, tuned, progress=progress)
        pieces = matched.task.pieces
        tau = torch.empty(sum(piece.size for piece in pieces))
        done = 0
        for piece in pieces:
            piece.read(0, piece.size, tau[done : done + piece.size].numpy())
            done += piece.size
        layout = Layout(tuple(piece.shape for piece in pieces), tuple(is_embedding(piece.name) for piece in pieces))
        return cls(matched, layout, tau, exact_changes(matched, "exact"))

    def expert(self, tau: torch.Tensor) -> Expert:
        """An expert in memory that puts any vector of the same length on the base, with the exact tensors: no file holds it."""
        changes = self.matched.task.moved(self.layout.split(tau))
        made = expert_of(self.matched, changes, self.exact, density=1.0, alpha=1.0, scope="global", metadata={})
        return replace(made, facts=replace(made.facts, method="exact", density=None, alpha=None, scale=0.0))

    def compressed(self, density: float, alpha: float) -> Expert:
        """What `sterna.compress` makes of it."""
        levels, _ = ternarize(self.matched.task.pieces, density=density, alpha=alpha, per_tensor=False, coding=default_coding(), progress=silent)
        changes = self.matched.task.changes(levels)
        return expert_of(self.matched, changes, self.exact, density=density, alpha=alpha, scope="global", metadata={})


def controls(
    vector: TunedVector,
    folder: str | os.PathLike[str],
    *,
    density: float = 0.1,
    alpha: float = 4.0,
    names: Sequence[ControlName] | None = None,
    rank: Callable[[Expert], Any] | None = None,
    seed: int = 0,
) -> Iterator[Control]:
    """Make the controls one after another, each into a file in `folder`; one dense copy of what it changes is in memory at a time.

    `density` is that of the sparse ones, `alpha` ComPEFT's. `rank` tells how good an expert is, greater is better, on rows kept apart for choosing:
    it chooses the scale of "rescaled", which is left out without it. Raises InvalidArgument for an unknown name, and CannotWrite.
    """
    if unknown := [name for name in names or () if name not in TITLES]:
        raise InvalidArgument(f"there is no control {unknown[0]!r}; expected {', '.join(TITLES)}")
    if not 0 < density <= 1:
        raise InvalidArgument(f"density is {density:g}; expected a number above 0, up to 1")
    tau = vector.tau
    for name in names or TITLES:
        path = Path(folder) / f"{name}.safetensors"
        if name in ("stc", "compeft"):
            scale = mean_in_std(tau, density) if name == "stc" else alpha
            if scale > 0:
                vector.compressed(density, scale).save(path)
                yield Control(name, TITLES[name], path.stat().st_size, load(path), {"density": density, "alpha": scale})
        elif name == "rescaled":
            if rank is not None:
                factor = climb(FACTORS, 1.0, lambda value: rank(vector.expert(value * tau)))
                yield _packed(name, vector, tau, Halves(factor), path, {"factor": factor})
        elif name in ("prune", "dare"):
            kept = prune_only(tau, density) if name == "prune" else dare(tau, density, seed)
            yield _packed(name, vector, kept, Sparse(), path, {"density": density})
        elif name in ("bitdelta", "bitdelta_all"):
            if name == "bitdelta" or any(vector.layout.embeddings):
                yield _packed(name, vector, tau, OneBit(embeddings=name == "bitdelta_all"), path, {})
        else:
            yield _packed(name, vector, tau, Rounded(8 if name == "int8" else 4), path, {})


def _packed(name: ControlName, vector: TunedVector, tau: torch.Tensor, packing: Packing, path: Path, detail: dict[str, Any]) -> Control:
    """Write a vector and the exact tensors, and read the vector back."""
    beside = {f"exact.{change.name}": change.value.contiguous() for change in vector.exact}
    facts = {"control": name, "config": dict(vector.matched.task.config), **detail}
    with whole_file(path) as file:
        file.write(save({**packing.pack(tau, vector.layout), **beside}, {"control": json.dumps(facts)}))
    with safe_open(path, "pt") as stored:
        read = {key: stored.get_tensor(key) for key in stored.keys() if not key.startswith("exact.")}  # noqa: SIM118
    return Control(name, TITLES[name], path.stat().st_size, vector.expert(packing.unpack(read, vector.layout)), detail)


def sixteen_bit(vector: TunedVector) -> int:
    """Bytes of the task vector and the exact tensors at 16 bits a number, without a header: what ratios are made against."""
    return 2 * (vector.tau.numel() + sum(math.prod(change.value.shape) for change in vector.exact))
