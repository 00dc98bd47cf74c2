"""Ternary tensors and experts made from positions, for tests of the coding and of the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.codings import CHUNK, PADDING, by_name
from sterna.expert.changes import Change, Ternary
from sterna.expert.expert import Expert
from sterna.expert.facts import BaseFacts, Facts
from sterna.fingerprint import fingerprint

SCALE = 0.25


def stream_of(positions: NDArray[np.int64], negative: NDArray[np.bool_], entries: int, coding: str = "fast") -> bytes:
    """The stream of a tensor of `entries` with non-zeros at the ascending `positions`."""
    records = []
    for start in range(0, entries, CHUNK):
        first, last = np.searchsorted(positions, [start, start + CHUNK])
        codes = (positions[first:last] - start).astype(np.uint32) << np.uint32(1) | negative[first:last].astype(np.uint32)
        records.append(by_name(coding).encode(codes, min(CHUNK, entries - start)))
    return b"".join(records)


def opened(stream: bytes, shape: tuple[int, ...], scale: float = SCALE, coding: str = "fast") -> Ternary:
    data = np.frombuffer(stream + bytes(PADDING), np.uint8)
    return Ternary.open(shape, scale, by_name(coding), data, 0, len(stream))


def ternary_of(levels: NDArray[np.int8], scale: float = SCALE) -> Ternary:
    """The coded form of an array of -1, 0 and +1."""
    flat = levels.reshape(-1)
    positions = np.flatnonzero(flat)
    return opened(stream_of(positions, flat[positions] < 0, flat.size), levels.shape, scale)


def random_levels(shape: tuple[int, ...], density: float, seed: int = 0) -> NDArray[np.int8]:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.choice(np.array([-1, 1], np.int8), shape), 0).astype(np.int8)


def low_rank(shape: tuple[int, int], density: float, seed: int, rank: int = 2, noise: float = 0.3) -> NDArray[np.int8]:
    """The signs of the largest entries of a noisy matrix of low rank whose rows and columns differ in size."""
    random = np.random.default_rng(seed)
    u, v = (random.standard_normal((n, rank)) * random.lognormal(0, 1, (n, 1)) for n in shape)
    tau = u @ v.T + noise * random.standard_normal(shape)
    kept = np.abs(tau) >= np.quantile(np.abs(tau), 1 - density)
    return (np.sign(tau) * kept).astype(np.int8)


def expert_of(changes: list[Change], names: tuple[str, ...] = (), **fields: Any) -> Expert:
    """An expert over a base of small tensors of those names; `fields` are facts."""
    base = fingerprint({name: torch.full((2,), float(i)) for i, name in enumerate(sorted(names or {change.name for change in changes}))})
    usual: dict[str, Any] = {"method": "compeft", "source": "full", "density": 0.1, "alpha": 4.0, "scope": "global", "scale": SCALE}
    usual |= {
        "base": BaseFacts("base", base.hex, 1 << 40),
        "writer": "test",
        "parameters": sum(t.size for change in changes for t in change.ternaries),
    }
    return Expert(Facts(**(usual | fields)), base, tuple(changes))
