"""Checkpoints: named tensors that are read one at a time, from a folder, a safetensors file, a hub id, a state dict or a live module."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch

from sterna.errors import InvalidArgument, InvalidFile, NotFound, Unsupported
from sterna.sources.names import BUFFERS, NONPERSISTENT, is_embedding, last, plain, some
from sterna.sources.stored import stored_names, unwrap

Source = str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name. `read(name)` gives one tensor, mapped from disk where it can be; nothing is held between reads.

    `aliases` names the tied copies and what they are copies of; they are not in `tensors`. `buffers` are the names known not to be parameters.
    `label` is a hub id or the last folder name, never a path. `folder` is where configuration and tokenizer lie.
    """

    tensors: dict[str, TensorInfo]
    read: Callable[[str], torch.Tensor]
    label: str
    revision: str | None = None
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: frozenset[str] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def shapes_by_any_name(self) -> dict[str, tuple[int, ...]]:
        """Those of the tied copies too; `read` knows their names as well."""
        return self.shapes | {name: self.tensors[first].shape for name, first in self.aliases.items()}

    @property
    def architecture(self) -> str | None:
        """The class that the configuration names."""
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def open_checkpoint(source: Source) -> Checkpoint:
    """Open a model folder, a safetensors file, a hub id ("org/name" or "org/name@revision"), a state dict or a module.

    Raises NotFound, InvalidFile, or Unsupported (pickled weights, quantized tensors).
    """
    if isinstance(source, torch.nn.Module):
        return _from_module(source)
    if isinstance(source, Mapping):
        return _from_state_dict(source)
    path = resolve(source)
    return _from_folder(path) if path.is_dir() else _from_file(path)


def resolve(source: str | os.PathLike[str]) -> Path:
    """The local path of a path or hub id; downloads what is needed of a hub model."""
    path = Path(source)
    if path.exists():
        return path
    name = os.fspath(source)
    if not _HUB_ID.fullmatch(name):
        raise NotFound(f"{name!r} is neither a file, a folder nor a hub id")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise NotFound(f"{name!r} is no local path; to fetch it as a hub id: pip install 'sterna[hub]'") from None
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise NotFound(f"{name!r} is no local path, and fetching it from the hub failed: {str(error).splitlines()[0]}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InvalidFile where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFile(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidFile(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise Unsupported(
            f"{path.name} holds pickled weights, which can run code when opened; convert it in a place you trust: "
            "AutoModel.from_pretrained(folder).save_pretrained(new_folder), or torch.load(..., weights_only=True) and safetensors.torch.save_file"
        )


def _from_folder(folder: Path) -> Checkpoint:
    try:
        files = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise NotFound(f"{folder} cannot be read: {error.strerror}") from error
    index = next((f for f in files if f.endswith(".safetensors.index.json")), None)
    weights = [f for f in files if f.endswith(".safetensors")]
    if "model.safetensors" in weights:  # before an index, as transformers does
        shards: dict[str | None, Path] = {None: folder / "model.safetensors"}
    elif index is not None:
        shards = _shards(folder, index)
    elif len(weights) == 1:
        shards = {None: folder / weights[0]}
    elif weights:
        raise InvalidFile(f"{folder} has {len(weights)} safetensors files and no index ({some(weights)}); expected model.safetensors.index.json")
    else:
        for name in files:
            refuse_pickle(folder / name)
        nested = dict.fromkeys(str(path.parent) for path in sorted(folder.glob("*/*.safetensors")))
        where = f"; some lie in {some(nested)}" if nested else f"; found {some(files) or 'nothing'}"
        raise NotFound(f"{folder} has no safetensors weights{where}")
    config = read_json(folder / "config.json") if "config.json" in files else {}
    return _from_files(shards, folder, config)


def _shards(folder: Path, index: str) -> dict[str | None, Path]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidFile(f"{folder / index} has no weight_map")
    shards: dict[str | None, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InvalidFile(f"{folder / index} maps {name!r} to {file!r}; expected a file name in the same folder")
        shards[name] = folder / file
    return shards


def _from_file(path: Path) -> Checkpoint:
    refuse_pickle(path)
    beside = path.parent / "config.json"
    config = read_json(beside) if path.name == "model.safetensors" and beside.is_file() else {}
    return _from_files({None: path}, path.parent if config else None, config, label=path.parent.name if config else path.stem)


def _from_files(shards: dict[str | None, Path], folder: Path | None, config: dict[str, Any], label: str | None = None) -> Checkpoint:
    from sterna.expert.file import TABLE  # the kernels come with it

    tensors: dict[str, TensorInfo] = {}
    where: dict[str, Path] = {}
    for path in dict.fromkeys(shards.values()):
        handle = _safe_open(path)
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            if None not in shards and shards.get(name) != path:
                continue
            piece = handle.get_slice(name)
            tensors[name] = TensorInfo(_dtype(piece.get_dtype(), name, path), tuple(piece.get_shape()))
            where[name] = path
    if TABLE in tensors:
        raise InvalidArgument(f"{where[TABLE]} is an expert; expected a checkpoint: a model's folder or its safetensors file")
    missing = [name for name in shards if name is not None and name not in tensors]
    if missing:
        raise InvalidFile(f"the index of {folder} names tensors that its shards lack: {some(missing)}")
    opened: list[tuple[Path, Any]] = []  # one shard at a time

    def read(name: str) -> torch.Tensor:
        path = where[name]
        if not opened or opened[0][0] != path:
            opened[:] = [(path, _safe_open(path))]
        tensor: torch.Tensor = opened[0][1].get_tensor(name)
        return tensor

    aliases = _tied_copies(tensors, read) if config.get("tie_word_embeddings") is not False else {}
    for name in aliases:
        del tensors[name]
    label, revision = _label(folder, label)
    return Checkpoint(tensors, read, label, revision, folder, config, aliases)


def _label(folder: Path | None, label: str | None) -> tuple[str, str | None]:
    """A hub id and its commit where the folder is a snapshot in the hub's cache, else the last folder name."""
    if folder is None:
        return label or "", None
    full = folder.resolve()
    if full.parent.name == "snapshots" and full.parent.parent.name.startswith("models--"):
        return full.parent.parent.name.removeprefix("models--").replace("--", "/"), full.name
    return label or full.name, None


def _safe_open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InvalidFile(f"{path} is not a whole safetensors file: {error}") from error
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error}") from error


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


def _dtype(code: str, name: str, path: Path) -> torch.dtype:
    try:
        return _DTYPES[code]
    except KeyError:
        raise Unsupported(f"{name} in {path.name} is stored as {code}; quantized weights are not supported, expected F32, F16 or BF16") from None


def _tied_copies(tensors: dict[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> dict[str, str]:
    """Output layers and embeddings that a file stores twice, bit for bit: each counts once, under its first sorted name."""
    tables = sorted(name for name, info in tensors.items() if len(info.shape) == 2 and last(name) == "weight" and is_embedding(name))
    aliases: dict[str, str] = {}
    for i, name in enumerate(tables):
        for earlier in tables[:i]:
            if earlier not in aliases and tensors[earlier] == tensors[name] and torch.equal(read(earlier), read(name)):
                aliases[name] = earlier
                break
    return aliases


def _from_state_dict(state: Mapping[str, torch.Tensor], label: str = "state dict", later: frozenset[str] = frozenset()) -> Checkpoint:
    """Tensors that share memory count once, under the first of their sorted names; under one of `later` only where all of them are."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InvalidArgument(f"a state dict maps names to tensors; found {name!r}: {type(tensor).__name__}")
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name in sorted(state, key=lambda name: (name in later, name)):
        refuse_tensor(name, state[name])
        identity = (state[name].data_ptr(), state[name].shape, state[name].stride(), state[name].dtype, state[name].device)
        if state[name].numel() == 0 or first.setdefault(identity, name) == name:
            continue
        aliases[name] = first[identity]
    tensors = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in state.items() if name not in aliases}
    return Checkpoint(tensors, lambda name: state[name].detach(), label, aliases=aliases)


def _from_module(module: torch.nn.Module) -> Checkpoint:
    module = unwrap(module)
    memory = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)}
    stored = stored_names(module, {name: tuple(tensor.shape) for name, tensor in memory.items()})
    state = {stored.get(name, name): tensor for name, tensor in memory.items()}
    opened = _from_state_dict(state, later=frozenset(stored.get(name, name) for name in _left_out_of_files(module, memory)))
    config = getattr(module, "config", None)
    values: dict[str, Any] = {}
    label = type(module).__name__
    if config is not None and hasattr(config, "to_dict"):
        values = json.loads(json.dumps(config.to_dict(), default=str))
        values["architectures"] = [type(module).__name__]  # a loaded configuration names the class that its folder was saved as
        origin = str(getattr(config, "_name_or_path", "") or "")
        label = (origin if _HUB_ID.fullmatch(origin) and not Path(origin).exists() else Path(origin).name) or label
    buffers = frozenset(name for name, tensor in state.items() if not isinstance(tensor, torch.nn.Parameter))
    return Checkpoint(opened.tensors, opened.read, label, config=values, aliases=opened.aliases, buffers=buffers)


def _left_out_of_files(module: torch.nn.Module, names: Iterable[str]) -> frozenset[str]:
    """The names of tied copies that transformers' save_pretrained does not write."""
    patterns = [
        re.compile(re.escape(f"{path}." if path else "") + pattern)
        for path, part in module.named_modules()
        for pattern in getattr(type(part), "_tied_weights_keys", None) or ()
    ]
    return frozenset(name for name in names if any(pattern.match(name) for pattern in patterns))


_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_PLAIN_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.bool})


def refuse_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise Unsupported for what has no plain values to read: meta, quantized, sharded and other wrapped tensors."""
    kind = type(tensor)
    if kind in _PLAIN_TYPES and tensor.dtype in _PLAIN_DTYPES and tensor.layout is torch.strided and not tensor.is_meta:
        return
    if tensor.is_meta:
        raise Unsupported(f"{name} is on the meta device (offloaded or not loaded); load the whole model first")
    if is_wrapped(tensor):
        raise Unsupported(f"{name} is a {kind.__module__}.{kind.__qualname__}; sharded and quantized tensors: gather or dequantize first")
    if tensor.is_quantized or (tensor.dtype.is_floating_point and tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        raise Unsupported(f"{name} is quantized ({tensor.dtype}); expected float32, float16 or bfloat16")
    if tensor.is_complex() or tensor.layout != torch.strided:
        raise Unsupported(f"{name} is a {tensor.dtype} tensor in {tensor.layout} layout; expected a dense real tensor")


def is_wrapped(tensor: torch.Tensor) -> TypeGuard[Any]:
    """Whether the tensor is of a subclass that keeps its values elsewhere (DTensor, bitsandbytes, torchao)."""
    return type(tensor) not in _PLAIN_TYPES


def is_buffer(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is a buffer: known from the module, or told by its dtype and by torch's own names."""
    if checkpoint.buffers is not None:
        return name in checkpoint.buffers
    return not checkpoint.tensors[name].dtype.is_floating_point or last(plain(name)) in BUFFERS | NONPERSISTENT
