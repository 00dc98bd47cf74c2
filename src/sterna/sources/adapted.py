"""The task vector of a PEFT adapter: LoRA's A and B themselves (theta0 = 0), or (IA)3's vectors minus one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sterna.errors import InvalidArgument, Unsupported
from sterna.expert.changes import Change, Factors, Multiply, Role, Set, Ternary
from sterna.sources.adapter import Adapter, Ia3Vector, LoraFactors, stored_transposed
from sterna.sources.checkpoint import Checkpoint
from sterna.sources.names import Alignment, align, is_embedding, is_head, plain, swap_prefix
from sterna.taskvector import Piece, TaskVector, float32


def adapted(base: Checkpoint, adapter: Adapter, exclude: Sequence[str]) -> TaskVector:
    """Describe an adapter over its base. Raises PairingError, Unsupported or InvalidArgument."""
    if exclude:
        raise InvalidArgument("exclude does not apply to an adapter: leave modules out of its target_modules instead")
    keys = [module.key for module in adapter.factors] + [module.key for module in adapter.vectors]
    alignment = align(base.shapes, {f"{key}.weight": None for key in keys})
    own = {theirs.removesuffix(".weight"): ours for ours, theirs in alignment.to_other.items()}
    transposed = stored_transposed(adapter, {key: base.tensors[name].shape for key, name in own.items()})
    factors = sorted(adapter.factors, key=lambda factor: own[factor.key])
    vectors = sorted(adapter.vectors, key=lambda vector: own[vector.key])
    pieces = [piece for factor in factors for piece in (_piece(f"{factor.key}.lora_A", factor.A), _piece(f"{factor.key}.lora_B", factor.B))]
    pieces += [_piece(f"{vector.key}.ia3_l", vector.vector.reshape(vector.stored_shape), minus=1) for vector in vectors]

    def changes(levels: Sequence[Ternary]) -> list[Change]:
        made: list[Change] = []
        for factor, A, B in zip(factors, levels[0::2], levels[1::2], strict=False):
            made.append(Factors(own[factor.key], factor.key, A, B, factor.scaling, transposed[factor.key], factor.embedding))
        for vector, level in zip(vectors, levels, strict=False):
            made.append(Multiply(own[vector.key], vector.key, level, vector.axis(transposed[vector.key]), bias_of(vector)))
        return made

    def bias_of(vector: Ia3Vector) -> str | None:
        bias = own[vector.key].removesuffix("weight") + "bias"
        return bias if not vector.feedforward and bias in base.tensors else None

    def moved(values: Sequence[torch.Tensor]) -> list[Change]:
        made: list[Change] = []
        for factor, A, B in zip(factors, values[0::2], values[1::2], strict=False):
            old = base.read(own[factor.key])
            factor = replace(factor, A=A, B=B)
            made.append(_moved(own[factor.key], old, factor.scaling * _product(factor, transposed[factor.key]).reshape(old.shape)))
        for vector, value in zip(vectors, values, strict=False):
            for name in filter(None, (own[vector.key], bias_of(vector))):
                old = base.read(name)
                shape = [1] * old.dim()
                shape[vector.axis(transposed[vector.key]) if old.dim() > 1 else 0] = -1
                made.append(_moved(name, old, old.float() * value.reshape(shape)))
        return made

    def merged() -> list[Change]:
        whole = [part.float() for factor in factors for part in (factor.A, factor.B)]
        return moved(whole + [vector.vector.float() - 1 for vector in vectors])

    return TaskVector(
        adapter.kind,
        pieces,
        changes,
        merged,
        moved,
        [*_saved(base, adapter, alignment), *_embeddings(base, adapter, alignment)],
        prefixes=(alignment.base_prefix, alignment.other_prefix),
        adapter=_portable_config(adapter),
    )


def _product(factor: LoraFactors, transposed: bool) -> torch.Tensor:
    """B @ A in float32, transposed where the base's tensor is."""
    product = factor.B.float().flatten(1) @ factor.A.float().flatten(1)
    return product.T if transposed else product


def _moved(name: str, old: torch.Tensor, update: torch.Tensor) -> Set:
    return Set(name, (old.float() + update).to(old.dtype), "tuned")


def _piece(name: str, tensor: torch.Tensor, minus: int = 0) -> Piece:
    flat = tensor.reshape(-1)
    return Piece(name, tuple(tensor.shape), lambda start, stop, out: np.subtract(float32(flat[start:stop]), np.float32(minus), out=out))


def _saved(base: Checkpoint, adapter: Adapter, alignment: Alignment) -> list[Set]:
    """modules_to_save, whole: heads under the adapter's names, other modules under the base's."""
    kept: list[Set] = []
    base_names = {plain(name): name for name in base.tensors}
    for name, tensor in adapter.saved.items():
        there = base_names.get(swap_prefix(name, alignment.other_prefix, alignment.base_prefix))
        headlike = there is None or base.tensors[there].shape != tuple(tensor.shape) or is_head(name, alignment.other_prefix)
        role: Role = "head" if headlike else "saved"
        kept.append(Set(there or name, tensor.detach().clone(), role))
    return kept


def _embeddings(base: Checkpoint, adapter: Adapter, alignment: Alignment) -> list[Set]:
    """Embeddings that PEFT stored beside the adapter: dropped where they are the base's, new rows kept exact."""
    kept: list[Set] = []
    base_names = {plain(name): name for name in (*base.tensors, *base.aliases)}
    for name, tensor in adapter.base_embeddings.items():
        there = base_names.get(swap_prefix(name, alignment.other_prefix, alignment.base_prefix))
        there = base.aliases.get(there, there) if there else None
        if there is None or not is_embedding(there):
            raise Unsupported(f"the adapter stores {name} whole, which the base lacks; train it as one of modules_to_save")
        old = base.read(there)
        if tensor.shape[1:] != old.shape[1:] or tensor.shape[0] < old.shape[0] or not torch.equal(tensor[: old.shape[0]].float(), old.float()):
            raise Unsupported(f"the adapter stores {name} whole and changed; train it as one of modules_to_save")
        if tensor.shape[0] > old.shape[0] and all(there != other.name for other in kept):
            kept.append(Set(there, tensor[old.shape[0] :].detach().clone(), "rows", old.shape[0]))
    return kept


_LEFT_OUT = frozenset({"base_model_name_or_path", "auto_mapping", "megatron_core", "qalora_group_size"})
"""A path of the trainer's machine; code to import by name; what other fields that are not supported would read."""


def _portable_config(adapter: Adapter) -> Mapping[str, Any]:
    """adapter_config.json without what says where the base lay, with patterns that do not depend on their order, and without fields that are empty or
    off: PEFT's are off by default, but for how an adapter begins."""
    kept = {key: value for key, value in adapter.config.items() if value not in (None, {}, []) and key not in _LEFT_OUT}
    config = {key: value for key, value in kept.items() if value is not False or key.startswith("init_")}
    if config.pop("rank_pattern", None) or config.pop("alpha_pattern", None):
        config.pop("alpha_pattern", None)
        config["rank_pattern"] = {factor.key: int(factor.A.shape[0]) for factor in adapter.factors}
        config["alpha_pattern"] = {factor.key: _alpha(factor, bool(config.get("use_rslora"))) for factor in adapter.factors}
    return config


def _alpha(factor: LoraFactors, rslora: bool) -> float:
    rank = factor.A.shape[0]
    alpha = factor.scaling * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha)) else alpha
