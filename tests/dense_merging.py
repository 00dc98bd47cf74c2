"""The merge methods as the papers' formulas on dense float64 vectors, sharing no code with the library; and mergekit's own, in its environment.

A vector is a dictionary of arrays by name; `vectors` has one a parent. Weights are applied as docs/merging.md says the papers' formulas are extended.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

Vector = dict[str, np.ndarray]
MERGEKIT = Path(os.environ.get("STERNA_MERGEKIT_PYTHON", Path(__file__).parents[1] / ".venv-mergekit" / "bin" / "python"))
"""A Python that has mergekit, in an environment of its own."""


def kept_above_threshold(vector: Vector, density: float) -> Vector:
    """TIES's trim as its authors compute it: entries at or above the k-th largest magnitude of the whole vector."""
    flat = np.sort(np.abs(np.concatenate([v.reshape(-1) for v in vector.values()])))
    least = flat[flat.size - int(round(density * flat.size, 9))] if density < 1 else 0.0
    return {name: np.where(np.abs(v) >= least, v, 0) for name, v in vector.items()}


def stacked(vectors: list[Vector], name: str, weights: list[float]) -> np.ndarray:
    return np.stack([w * v[name] for v, w in zip(vectors, weights, strict=True)])


def linear(vectors: list[Vector], weights: list[float]) -> Vector:
    return {n: stacked(vectors, n, weights).sum(0) / sum(weights) for n in vectors[0]}


def task_arithmetic(vectors: list[Vector], weights: list[float], scale: float = 1.0) -> Vector:
    return {n: scale * stacked(vectors, n, weights).sum(0) for n in vectors[0]}


def disjoint_mean(x: np.ndarray) -> np.ndarray:
    out = np.zeros(x.shape[1:])
    for place in np.ndindex(*x.shape[1:]):
        column = [float(v) for v in x[(slice(None), *place)]]
        positive, negative = sum(v for v in column if v > 0), -sum(v for v in column if v < 0)
        if not np.isclose(positive, negative, rtol=1e-11, atol=0):
            winners = [v for v in column if (v > 0 if positive > negative else v < 0)]
            out[place] = sum(winners) / len(winners)
    return out


def ties(vectors: list[Vector], weights: list[float], density: float = 1.0, scale: float = 1.0) -> Vector:
    trimmed = [kept_above_threshold(v, density) for v in vectors]
    return {n: scale * disjoint_mean(stacked(trimmed, n, weights)) for n in vectors[0]}


def breadcrumbs(vectors: list[Vector], weights: list[float], density: float, gamma: float) -> Vector:
    """Magnitudes that occur once: without the largest gamma share of a tensor, and of the rest the largest density share."""

    def crumbs(v: np.ndarray) -> np.ndarray:
        order = np.argsort(-np.abs(v.reshape(-1)), kind="stable")
        top = int(gamma * v.size)
        kept = np.zeros(v.size, bool)
        kept[order[top : top + int(density * v.size)]] = True
        return np.where(kept.reshape(v.shape), v, 0)

    return task_arithmetic([{n: crumbs(v) for n, v in vector.items()} for vector in vectors], weights)


def consensus(vectors: list[Vector], weights: list[float], mask_lambda: float = 0.4, agree: int = 2) -> Vector:
    out = {}
    for n in vectors[0]:
        x = stacked(vectors, n, weights)
        total = x.sum(0)
        votes = sum(((np.abs(t) >= mask_lambda * np.abs(total - t) * (1 - 1e-12)) & (t != 0)).astype(int) for t in x)
        out[n] = np.where(votes >= agree, total, 0)
    return out


def model_stock(vectors: list[Vector], weights: list[float]) -> Vector:
    out = {}
    for n in vectors[0]:
        flat = [v[n].reshape(-1) for v in vectors]
        pairs = [(a, b) for i, a in enumerate(flat) for b in flat[i + 1 :]]
        cosine = np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs])
        k = len(flat)
        out[n] = (k * cosine / (1 + (k - 1) * cosine)) * np.mean([v[n] for v in vectors], axis=0)
    return out


def slerp(vectors: list[Vector], weights: list[float], t: float = 0.5) -> Vector:
    out = {}
    for n, a in vectors[0].items():
        b = vectors[1][n]
        angle = np.arccos((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
        out[n] = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return out


def drop_mask(seed: int, task: str, name: str, shape: tuple[int, ...], density: float) -> np.ndarray:
    """Which entries DARE keeps, from docs/merging.md: SplitMix64 outputs, by flat index, of a state that hashes seed, task and tensor."""
    state = int.from_bytes(hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()[:8], "little")
    mask = []
    for index in range(int(np.prod(shape))):
        z = (state + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        mask.append(((z ^ z >> 31) >> 11) / 2**53 < density)
    return np.array(mask).reshape(shape)


def with_mergekit(asked: list[tuple[str, dict[str, Any]]], vectors: list[Vector], weights: list[float], masks: list[Vector]) -> list[Vector]:
    """What mergekit itself makes of the task vectors over a base of zeros, by each method with its parameters; `masks` for its random ones."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        for what, arrays in (("vectors", vectors), ("masks", masks)):
            np.savez(where / f"{what}.npz", **{f"{i}|{n}": v for i, vector in enumerate(arrays) for n, v in vector.items()})
        told = {"asked": asked, "weights": weights, "parents": len(vectors), "names": list(vectors[0])}
        (where / "told.json").write_text(json.dumps(told))
        script = Path(__file__).with_name("ask_mergekit.py")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([MERGEKIT, script, folder], check=True, env=environment, cwd=folder)
        with np.load(where / "merged.npz") as merged:
            return [{name: merged[f"{number}|{name}"] for name in vectors[0]} for number in range(len(asked))]
