"""How alike experts for one base are: cosines, overlaps and sign conflicts of every pair, in bounded memory."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sterna import comparison
from sterna.bitmasks import Layout, Leveled, leveled, words_of
from sterna.errors import InvalidArgument, WrongBase
from sterna.expert.expert import Expert
from sterna.numbers.bits import F64, I64

_BYTES = 256 << 20
"""Masks held at a time, of all experts together, unless those of one tensor take more."""


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """Every pair among n experts for one base. Matrices are symmetric, in the order of `names`; NaN stands where a ratio has nothing below.

    A *position* is an entry of what an expert changes: of the base tensor for added levels and LoRA's products, of the (IA)3 vector, of PaFi's masked
    entries. Heads and other exact tensors do not count.
    """

    names: tuple[str, ...]
    base: str
    fingerprint: str
    nonzeros: I64
    """int64[n]: positions that each expert changes."""
    norms: F64
    """float64[n]: Euclidean norms of the task vectors."""
    cosine: F64
    """float64[n, n]: inner product over both norms, -1 to 1."""
    shared: I64
    """int64[n, n]: positions that both change."""
    overlap: F64
    """float64[n, n]: Jaccard index, positions that both change over positions that either changes, 0 to 1."""
    conflicts: F64
    """float64[n, n]: share of the shared positions whose signs differ, 0 to 1. Two unrelated experts have one half."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: matrices as lists of rows, null for NaN."""
        experts = zip(self.names, self.nonzeros.tolist(), self.norms.tolist(), strict=True)
        return {
            "base": {"name": self.base, "fingerprint": self.fingerprint},
            "experts": [{"name": name, "nonzeros": nonzeros, "norm": norm} for name, nonzeros, norm in experts],
            "cosine": _plain(self.cosine),
            "shared": self.shared.tolist(),
            "overlap": _plain(self.overlap),
            "conflicts": _plain(self.conflicts),
        }


def similarity(experts: Sequence[Expert | str | os.PathLike[str]]) -> Similarity:
    """Cosines, overlaps and sign conflicts between experts for the same base, two or more, each an expert or its file.

    A file is named as it is without folder and suffix (with them, where two have one name), an expert in memory "expert 1" and so on.
    Raises WrongBase where two are for different bases; InvalidArgument for fewer than two, a file given twice, exact experts, and where two change a
    tensor in ways that cannot be compared; NotFound or InvalidFile.
    """
    names = _names(experts)
    if len(experts) < 2:
        raise InvalidArgument(f"experts to compare: {len(experts)}; expected two or more")
    loaded = [expert if isinstance(expert, Expert) else _load(expert) for expert in experts]
    changes = _changes(loaded, names)
    count = len(loaded)
    dots = np.zeros((count, count))
    shared, conflicting = np.zeros((2, count, count), np.int64)
    for part in _parts(changes):
        masks = [expert.bitmasks(part) for expert in loaded]
        for i, first in enumerate(masks):
            dots[i, i] += comparison.square(first)
            shared[i, i] += comparison.nonzeros(first)
            for j, second in enumerate(masks[:i]):
                dots[i, j] += comparison.dot(first, second)
                both, differ = comparison.shared(first, second)
                shared[i, j] += both
                conflicting[i, j] += differ
    for matrix in (dots, shared, conflicting):
        matrix += np.tril(matrix, -1).T
    squares, nonzeros = dots.diagonal(), shared.diagonal()
    cosines = [[comparison.cosine(dots[i, j], squares[i], squares[j]) for j in range(count)] for i in range(count)]
    base = loaded[0].facts.base
    return Similarity(
        names=names,
        base=base.name,
        fingerprint=base.fingerprint,
        nonzeros=nonzeros.copy(),
        norms=np.sqrt(squares),
        cosine=np.array(cosines),
        shared=shared,
        overlap=_over(shared, nonzeros[:, None] + nonzeros - shared),
        conflicts=_over(conflicting, shared),
    )


def _names(experts: Sequence[Expert | str | os.PathLike[str]]) -> tuple[str, ...]:
    paths = [None if isinstance(expert, Expert) else Path(expert) for expert in experts]
    short = [path.stem if path else f"expert {number}" for number, path in enumerate(paths, 1)]
    names = tuple(str(path) if path and short.count(name) > 1 else name for name, path in zip(short, paths, strict=True))
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidArgument(f"{twice[0]} is given twice; expected experts that differ")
    return names


def _load(path: str | os.PathLike[str]) -> Expert:
    from sterna.expert.file import load

    return load(path)


def _changes(experts: Sequence[Expert], names: Sequence[str]) -> list[tuple[Leveled, ...]]:
    """What is to be compared of each expert, once it is sure that it can be."""
    first = experts[0].facts.base
    for expert, name in zip(experts, names, strict=True):
        base = expert.facts.base
        if base.fingerprint != first.fingerprint:
            raise WrongBase(
                f"{names[0]} is for the base {first.name}, fingerprint {first.fingerprint[:12]}, and {name} for {base.name}, "
                f"{base.fingerprint[:12]}; only experts for the same base can be compared"
            )
    changes: list[tuple[Leveled, ...]] = []
    layouts: list[Layout] = []
    for expert, name in zip(experts, names, strict=True):
        with _told(name):
            changes.append(leveled(expert))
        layouts.append(Layout.of(changes[-1]))
        for layout, other in zip(layouts, names, strict=False):
            with _told(f"{other} and {name}"):
                comparison.require_comparable(layout, layouts[-1])
    return changes


@contextlib.contextmanager
def _told(names: str) -> Iterator[None]:
    """An error that says of which experts it speaks."""
    try:
        yield
    except InvalidArgument as error:
        raise InvalidArgument(f"{names}: {error}") from error


def _parts(changes: Sequence[Sequence[Leveled]]) -> Iterator[list[str]]:
    """Names of changes whose masks, of all experts, are held at a time."""
    takes: dict[str, int] = {}
    for own in changes:
        for change in own:
            takes[change.name] = takes.get(change.name, 0) + 16 * sum(map(words_of, change.ternaries))
    part: list[str] = []
    held = 0
    for name, size in sorted(takes.items()):
        if part and held + size > _BYTES:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    yield part


def _over(above: I64, below: I64) -> F64:
    """above / below, NaN where nothing is below."""
    share: F64 = np.divide(above, below, out=np.full(above.shape, math.nan), where=below > 0)
    return share


def _plain(matrix: F64) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]
