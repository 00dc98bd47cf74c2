"""A PEFT LoRA or (IA)3 folder as plain data: factors, vectors and whole tensors; read and written without PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sterna.errors import CannotWrite, InvalidArgument, InvalidFile, NotFound, PairingError, Unsupported

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Fields that say where an adapter comes from or how it was trained, not what it computes.
_HARMLESS = re.compile(
    "peft_type|peft_version|task_type|auto_mapping|base_model_name_or_path|revision|inference_mode|runtime_config|target_modules|exclude_modules|"
    "layers_to_transform|layers_pattern|lora_dropout|init_ia3_weights|merge_weights|megatron_core|qalora_group_size|(loftq|eva|corda|lora_ga)_config"
)
# Fields that are read, with their types.
_READ: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float), "use_rslora": (bool,), "fan_in_fan_out": (bool,), "bias": (str,)}
_READ |= {"rank_pattern": (dict, NoneType), "alpha_pattern": (dict, NoneType), "init_lora_weights": (bool, str, NoneType)}
_READ |= {"modules_to_save": (list, NoneType), "feedforward_modules": (list, str, NoneType)}
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take their first factors out of the base weights, so they do not fit the base as it was published.
_INITS_THAT_KEEP_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|ia3_l)")
_FOREIGN = re.compile(r"(^|\.)(lora_|ia3_|base_layer\.|original_module\.)")


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One LoRA module: its base weight gains `scaling * (B @ A)`. Floating dtype, as in the file.

    Linear: `A` [r, in], `B` [out, r]. Convolution: `A` [r, in, *kernel], `B` [out, r, 1, ...], multiplied as `B.flatten(1) @ A.flatten(1)`.
    Embedding: `A` [r, rows], `B` [columns, r], always transposed. `transposed` is what the config says and may be wrong: see `stored_transposed`.
    """

    key: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    transposed: bool
    embedding: bool


@dataclass(frozen=True, slots=True)
class Ia3Vector:
    """One (IA)3 module: its base weight is multiplied by `vector` [n] along `axis(...)`; outside feed-forward modules so is its bias."""

    key: str
    vector: torch.Tensor
    feedforward: bool
    transposed: bool  # as in LoraFactors
    stored_shape: tuple[int, ...]  # in the file: [n, 1], feed-forward [1, n], convolutions [1, n, 1, ...]

    def axis(self, transposed: bool) -> int:
        """The axis of the base weight that the vector runs along: the output side, or the input side of a feed-forward module."""
        return int(self.feedforward != transposed)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a PEFT folder holds. `config` is adapter_config.json as read; `factors` and `vectors` are sorted by key, one of the two is empty.

    `saved` are the tensors of modules_to_save, by their names in the model. `base_embeddings`, by their names in the model, are embeddings and
    output layers that PEFT stored whole although it did not train them: under factors, after the vocabulary was resized, or on request.
    """

    kind: Literal["lora", "ia3"]
    config: dict[str, Any]
    factors: tuple[LoraFactors, ...]
    vectors: tuple[Ia3Vector, ...]
    saved: dict[str, torch.Tensor]
    base_embeddings: dict[str, torch.Tensor]


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is a PEFT folder, or is no model itself and holds one in a subfolder."""
    return (folder / CONFIG).is_file() or (not (folder / "config.json").is_file() and bool(_folders(folder)))


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, or in its only subfolder that holds one (where PEFT puts an adapter not named "default").

    Raises NotFound (no config or no weights), Unsupported (fields and tensors that plain LoRA and (IA)3 lack; pickled weights) and InvalidFile
    (broken JSON or safetensors, wrong types, NaN and infinity, shapes that contradict each other or the config).
    """
    folder, config = _open(folder)
    kind = _check_config(config)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] = {}
    beside: dict[str, torch.Tensor] = {}
    entries = (".modules_to_save", *(config.get("modules_to_save") or ()))
    for name, tensor in sorted(_read_weights(folder).items()):
        part = _PART.fullmatch(name.removeprefix(PREFIX))
        owner, leaf = part.groups() if part else name.removeprefix(PREFIX).rpartition(".")[::2]
        owner = owner if part else owner.removesuffix(".base_layer")
        # MultiheadAttention and target_parameters leave a base_layer inside the path of a module.
        if not name.startswith(PREFIX) or _FOREIGN.search(f"{owner}." if part else f"{owner}.{leaf}."):
            raise Unsupported(f"{WEIGHTS} holds {name}; supported: {PREFIX}<module>. and lora_A.weight, lora_B.weight, ia3_l or a plain name")
        if part and (leaf == "ia3_l") != (kind == "ia3"):
            raise InvalidFile(f"{WEIGHTS} holds {name}, but peft_type is {config['peft_type']}")
        # A module is saved if its name ends with an entry of modules_to_save (PEFT: _set_trainable).
        is_saved = any(path.endswith(entries) for path in accumulate(owner.split("."), "{}.{}".format))
        group = parts.setdefault(owner, {}) if part else saved if is_saved else beside
        full = leaf if part else f"{owner}.{leaf}".replace(".modules_to_save.", ".")
        if group.setdefault(full, tensor) is not tensor:
            raise InvalidFile(f"{WEIGHTS} holds two tensors for {full}")
    for name in beside:
        weight = beside.get(f"{name.rpartition('.')[0]}.weight")
        if weight is None or weight.ndim != 2:
            raise Unsupported(f"{WEIGHTS} holds {PREFIX}{name}, which is part of no {kind} module, of no entry of modules_to_save, and no embedding")
    if not parts:
        raise InvalidFile(f"{WEIGHTS} holds no {kind} tensor; expected names such as {part_names('<module>', kind)[0]}")
    try:
        factors = tuple(_factors(key, part, config) for key, part in sorted(parts.items()) if kind == "lora")
        vectors = tuple(_vector(key, part["ia3_l"], config) for key, part in sorted(parts.items()) if kind == "ia3")
    except (re.error, OverflowError) as error:
        raise InvalidFile(f"{CONFIG} has a bad lora_alpha, rank_pattern, alpha_pattern or feedforward_modules: {error}") from error
    return Adapter(kind, config, factors, vectors, saved, beside)


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `config` and `tensors`, under PEFT's names (see `adapter_tensors`), into the empty `folder`; equal input gives equal bytes.

    Raises InvalidArgument (a config without peft_type, names without PEFT's prefix) and CannotWrite.
    """
    foreign = [name for name in tensors if not name.startswith(PREFIX)]
    if foreign or config.get("peft_type") not in ("LORA", "IA3"):
        raise InvalidArgument(f"names must start with {PREFIX!r}, got {foreign[:3]}; peft_type must be LORA or IA3, got {config.get('peft_type')!r}")
    data = save({name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}, {"format": "pt"})
    try:
        # The order inside rank_pattern and alpha_pattern has a meaning, so keys are not sorted.
        (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (folder / WEIGHTS).write_bytes(data)  # safetensors' own save_file leaves mode 0600
    except OSError as error:
        raise CannotWrite(f"cannot write the adapter into {folder}: {error}") from error


def part_names(key: str, kind: Literal["lora", "embedding", "ia3"]) -> tuple[str, ...]:
    """PEFT's names of the tensors of module `key`: A and B, A and B of an embedding, or the (IA)3 vector."""
    parts = {"lora": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B"), "ia3": ("ia3_l",)}
    return tuple(f"{PREFIX}{key}.{part}" for part in parts[kind])


def vector_shape(length: int, feedforward: bool, kernel_axes: int = 0) -> tuple[int, ...]:
    """The shape in which PEFT stores an (IA)3 vector; `kernel_axes` is 2 for Conv2d and 3 for Conv3d."""
    return (1, length, *[1] * kernel_axes) if feedforward or kernel_axes else (length, 1)


def adapter_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """All tensors of `adapter` under PEFT's names: what `write_adapter` takes."""
    tensors = {PREFIX + name: tensor for name, tensor in adapter.saved.items()}
    for factor in adapter.factors:
        tensors.update(zip(part_names(factor.key, "embedding" if factor.embedding else "lora"), (factor.A, factor.B), strict=True))
    tensors.update({part_names(vector.key, "ia3")[0]: vector.vector.reshape(vector.stored_shape) for vector in adapter.vectors})
    for name, tensor in adapter.base_embeddings.items():
        module, _, leaf = name.rpartition(".")
        wrapped = any(factor.key == module for factor in adapter.factors)
        tensors[f"{PREFIX}{module}.base_layer.{leaf}" if wrapped else PREFIX + name] = tensor
    return tensors


def is_feedforward(config: Mapping[str, Any], key: str) -> bool | None:
    """Whether (IA)3 scales the input of module `key`: a string matches all of it, a list its end (PEFT: IA3Model); None if the config is silent."""
    modules = config.get("feedforward_modules")
    whole = re.fullmatch(modules, key) if isinstance(modules, str) else key.endswith(tuple(modules or ()))
    return None if modules is None else bool(whole)


def stored_transposed(adapter: Adapter, shapes: Mapping[str, Sequence[int]], known: Mapping[str, bool] | None = None) -> dict[str, bool]:
    """For every module of `adapter`, whether its base weight is stored [in, out] (Conv1D, embeddings) and not [out, in].

    `shapes` are the base weights' shapes by key; `known` are a live model's answers for square ones. PEFT corrects fan_in_fan_out for every module
    that it wraps and saves the flag of the last one (GPT-2 with its lm_head: False), so shapes decide first. A square weight follows the modules of
    the same last name, else all the others, else the config. Raises PairingError (shapes) and Unsupported (the others disagree on a square weight).
    """
    modules: tuple[LoraFactors | Ia3Vector, ...] = (*adapter.factors, *adapter.vectors)
    if lacking := [module.key for module in modules if module.key not in shapes]:
        raise PairingError(f"the base lacks the weights of {len(lacking)} modules of the adapter, as {lacking[0]}; is this the adapter's base?")
    fits = {module.key: _fits(module, tuple(shapes[module.key])) for module in modules}
    answers = {key: next(iter(fit)) for key, fit in fits.items() if len(fit) == 1}
    answers |= {key: known[key] for key, fit in fits.items() if known and known.get(key) in fit}
    embeddings = {factor.key for factor in adapter.factors if factor.embedding}
    votes = {key: answer for key, answer in answers.items() if len(shapes[key]) == 2 and key not in embeddings}
    for key in sorted(fits.keys() - answers.keys()):
        alike = {vote for other, vote in votes.items() if other.rpartition(".")[2] == key.rpartition(".")[2]} or set(votes.values())
        if len(alike) > 1:
            raise Unsupported(f"{key}: fan_in_fan_out of a square weight is ambiguous where an adapter mixes Linear and Conv1D modules")
        answers[key] = alike.pop() if alike else bool(adapter.config.get("fan_in_fan_out"))
    return answers


def _fits(module: LoraFactors | Ia3Vector, shape: tuple[int, ...]) -> set[bool]:
    if isinstance(module, Ia3Vector):
        n, axes, held = module.vector.numel(), len(module.stored_shape), f"a vector of {module.vector.numel()}"
        fit = {flip for flip in ([False] if axes > 2 else [False, True]) if len(shape) == axes and shape[module.axis(flip)] == n}
    else:
        plain, held = (module.B.shape[0], *module.A.shape[1:]), f"A {list(module.A.shape)} and B {list(module.B.shape)}"
        flips = [True] if module.embedding else [False] if len(plain) > 2 else [False, True]
        fit = {flip for flip in flips if shape == (plain[::-1] if flip else plain)}
    if not fit:
        raise PairingError(f"{module.key}: the adapter holds {held}, not of the base weight {list(shape)}; other base, or grouped convolution?")
    return fit


def _folders(folder: Path) -> list[Path]:
    return [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))


def _open(folder: Path) -> tuple[Path, dict[str, Any]]:
    found = _folders(folder)
    if len(found) != 1:
        held = f"several adapters, name one of them: {', '.join(path.name for path in found)}" if found else f"no {CONFIG}, nor does a subfolder"
        raise (InvalidFile if found else NotFound)(f"{folder} holds {held}")
    try:
        return found[0], {**json.loads((found[0] / CONFIG).read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise InvalidFile(f"{found[0] / CONFIG} is no readable JSON object: {error}") from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    pickles = [path.name for path in folder.glob("adapter_model*") if path.suffix in (".bin", ".pt", ".pth")]
    if pickles and not (folder / WEIGHTS).is_file():
        raise Unsupported(f"{folder} holds a pickle, {pickles[0]}: load it with PEFT, then save_pretrained(folder, safe_serialization=True)")
    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise (NotFound if isinstance(error, FileNotFoundError) else InvalidFile)(f"{folder / WEIGHTS} is missing or broken: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all():
            raise InvalidFile(f"{WEIGHTS}: {name} holds NaN or infinity")
    return tensors


def _check_config(config: dict[str, Any]) -> Literal["lora", "ia3"]:
    """The kind of adapter. All fields that are not supported are named in one error."""
    if (kind := config.get("peft_type")) not in ("LORA", "IA3"):
        raise (Unsupported if isinstance(kind, str) else InvalidFile)(f"{CONFIG}: peft_type = {kind!r:.60}; supported: LORA, IA3")
    refused = []
    for field, value in config.items():
        # Fields that a newer PEFT adds are off by default, and off they change nothing.
        known = field in _READ or _HARMLESS.fullmatch(field) or value is None or value is False or value in ("", [], {})
        rewrites = field == "init_lora_weights" and str(value).lower() not in _INITS_THAT_KEEP_THE_BASE
        if not known or rewrites or (field == "bias" and value != "none"):
            refused.append(f"{field} = {value!r:.60}")
    if refused:
        rule = 'bias = "none", init_lora_weights that keep the base, and null, false or nothing in all other fields'
        raise Unsupported(f"{CONFIG}: {', '.join(refused)}; supported: {rule}")
    for field, types in _READ.items():
        value = config.get(field)
        entries, allowed = (value.values(), (int, float)) if isinstance(value, dict) else (value if isinstance(value, list) else (), (str,))
        if field in config and (type(value) not in types or any(type(entry) not in allowed for entry in entries)):
            raise InvalidFile(f"{CONFIG}: {field} = {value!r:.60} is of a wrong type")
    return "lora" if kind == "LORA" else "ia3"


def _by_pattern(config: Mapping[str, Any], table: str, default: float, key: str) -> float:
    # The first match in the order of the file wins, not the longest (PEFT: get_pattern_key); PEFT itself writes the patterns sorted.
    patterns: dict[str, float] = config.get(table) or {}
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key)), patterns.get(key, default))


def _factors(key: str, part: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> LoraFactors:
    names, embedding = sorted(part), "lora_embedding_A" in part
    if len(names) != 2 or names[0].replace("_A", "_B") != names[1]:
        raise InvalidFile(f"{WEIGHTS}: {key} holds {' and '.join(names)}; lora_A and lora_B must come together")
    A, B = (part[name] for name in names)
    linear, found = A.ndim == 2, f"A {A.dtype} {list(A.shape)} and B {B.dtype} {list(B.shape)}"
    whole = A.is_floating_point() and B.is_floating_point() and A.numel() > 0 and B.numel() > 0
    if not whole or not A.ndim == B.ndim >= 2 or (embedding and not linear) or any(size != 1 for size in B.shape[2:]):
        raise InvalidFile(f"{WEIGHTS}: {key} holds {found}; expected floating A [r, in, ...] and B [out, r, 1, ...], gathered from all shards")
    if not linear and A.shape[0] > B.shape[1] and A.shape[0] % B.shape[1] == 0:
        raise Unsupported(f"{WEIGHTS}: {key} holds {found}, of a convolution with groups = {A.shape[0] // B.shape[1]}; supported: groups = 1")
    rank = _by_pattern(config, "rank_pattern", config.get("r", 8), key)
    if not A.shape[0] == B.shape[1] == rank:
        raise InvalidFile(f"{WEIGHTS}: {key} holds {found}, but its rank by r and rank_pattern of {CONFIG} is {rank}")
    scaling = _by_pattern(config, "alpha_pattern", config.get("lora_alpha", 8), key) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scaling):
        raise InvalidFile(f"{CONFIG}: lora_alpha or alpha_pattern gives {key} the scaling {scaling}")
    return LoraFactors(key, A, B, scaling, embedding or (linear and config.get("fan_in_fan_out", False)), embedding)


def _vector(key: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> Ia3Vector:
    shape, listed = tuple(tensor.shape), is_feedforward(config, key)
    both = (False, True) if listed is None else (listed,)
    sides = [side for side in both if vector_shape(tensor.numel(), side, max(0, tensor.ndim - 2)) == shape]
    if len(sides) != 1 or not tensor.numel() or not tensor.is_floating_point():
        rule = "[n, 1], or [1, n] for feedforward_modules, which " + {None: "is missing", True: "lists it", False: "does not list it"}[listed]
        raise InvalidFile(f"{WEIGHTS}: {key}.ia3_l is {tensor.dtype} {list(shape)}; expected floating {rule}")
    return Ia3Vector(key, tensor.reshape(-1), sides[0], len(shape) == 2 and bool(config.get("fan_in_fan_out", False)), shape)
