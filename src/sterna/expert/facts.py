"""What an expert says of itself as a whole: the one JSON object in its file's metadata, with a limit for every field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sterna.errors import InvalidArgument, InvalidFile
from sterna.expert.changes import Order

FORMAT = 1
"""Version of the file format: a reader refuses a newer one."""
LIMIT = 1 << 20
"""Bytes of the JSON at most."""
_DEPTH = 8
_TEXT = 4096
_NAME = 1024
_MASK_RULE = 1
"""The canonical mask that `sterna.mask` makes."""
_LARGEST_FLOAT32 = 3.4028234663852886e38

Method = Literal["compeft", "exact", "lossless", "merge"]
SourceKind = Literal["full", "lora", "ia3", "pafi", "hiwi"]
Scope = Literal["global", "tensor"]

_REFUSED_CONFIG = frozenset({"auto_map", "custom_pipelines", "quantization_config", "trust_remote_code", "architectures", "model_type"})
"""Config fields that no expert may hold: where code comes from, and what decides how weights are read."""
_CODE = frozenset({"auto_map", "auto_mapping", "custom_pipelines", "trust_remote_code"})
_LEFT_OUT_CONFIG = frozenset(
    {"dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
    | {"gradient_checkpointing", "num_labels"}
)
"""Config fields that are not worth carrying: how a run was set up, and what follows from other fields."""
_ARCHITECTURE = re.compile(r"[A-Za-z_]\w{0,127}")


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base as the header names it; `parameters` counts its floating-point entries."""

    name: str
    fingerprint: str
    parameters: int
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """Which rule made the mask of a PaFi expert: the `density` of the eligible entries that was asked for (None: a count was), by `order`.

    The table has the count and the eligible tensors. `rule` numbers the rule itself: 1 is the canonical mask of `sterna.mask`.
    """

    order: Order
    density: float | None = None
    seed: int = 0
    rule: int = _MASK_RULE


@dataclass(frozen=True, slots=True)
class Facts:
    """Global facts of an expert.

    `method` is "compeft", or "exact" for values stored as they were trained, or "lossless" for a checkpoint to the bit: then `density` and `alpha`
    are None. They are as asked for;
    `scale` is lambda, 0 where each tensor has its own (`scope="tensor"`). `prefixes` are the class prefixes of
    the base's and the tuned model's names; `config` the configuration fields that the tuned model changed; `tokens` the tokenizer's added tokens;
    `adapter` the adapter_config.json of an expert made from PEFT; `mask` is that of PaFi; `tuning` the options of the method that trained it;
    `method` "merge" is of an expert made of others: `merge` is the recipe, and `heads` has for each of the parents' tasks what goes with its head
    (`config`, `architecture`, `dropped`, and `prefix`, that of the tuned model's class);
    `metadata` is the user's.
    """

    method: Method
    source: SourceKind
    density: float | None
    alpha: float | None
    scope: Scope
    scale: float
    base: BaseFacts
    writer: str
    parameters: int
    architecture: str | None = None
    prefixes: tuple[str, str] = ("", "")
    dropped: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[Mapping[str, Any], ...] = ()
    adapter: Mapping[str, Any] = field(default_factory=dict)
    mask: MaskFacts | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)


def carries(name: str) -> bool:
    """Whether `compress` carries a config field of this name."""
    return _allowed(name) and name not in _LEFT_OUT_CONFIG


def _allowed(name: str) -> bool:
    return not name.startswith("_") and name not in _REFUSED_CONFIG


def check(facts: Facts) -> None:
    """Raise InvalidArgument for the first fact out of its limits."""
    _require(facts.method in ("compeft", "exact", "lossless", "merge"), "method", facts.method, "compeft, exact, lossless or merge")
    _require(facts.source in ("full", "lora", "ia3", "pafi", "hiwi"), "source", facts.source, "full, lora, ia3, pafi or hiwi")
    _require(facts.scope in ("global", "tensor"), "scope", facts.scope, "global or tensor")
    if facts.method != "compeft":
        for key in ("density", "alpha"):
            _require(getattr(facts, key) is None, key, getattr(facts, key), "none where values are stored exactly")
        wanted = "tensor" if facts.method == "merge" else "global"
        _require(facts.scope == wanted and facts.scale == 0, "scale", facts.scale, f"0, of scope {wanted}, under the method {facts.method}")
    else:
        _require(facts.density is not None and 0 < facts.density <= 1, "density", facts.density, "a number above 0, up to 1")
        _require(facts.alpha is not None and 0 < facts.alpha < 1e6, "alpha", facts.alpha, "a finite number above 0, below a million")
    if facts.mask is not None:
        _check_mask(facts.mask)
    _require(0 <= facts.scale <= _LARGEST_FLOAT32, "scale", facts.scale, "a float32 number, 0 or more")
    _require(0 <= facts.parameters < 1 << 53, "parameters", facts.parameters, "a count below 2^53")
    _require(0 <= facts.base.parameters < 1 << 53, "base.parameters", facts.base.parameters, "a count below 2^53")
    _require(re.fullmatch(r"[0-9a-f]{64}", facts.base.fingerprint) is not None, "base.fingerprint", facts.base.fingerprint, "64 hexadecimal digits")
    texts = {"base.name": facts.base.name, "base.revision": facts.base.revision or "", "writer": facts.writer, "prefixes": "".join(facts.prefixes)}
    for key, text in texts.items():
        _require(len(text) <= _TEXT and text.isprintable(), key, text[:80], f"printable text of at most {_TEXT} characters")
    _require(_ARCHITECTURE.fullmatch(facts.architecture or "None") is not None, "architecture", facts.architecture, "a class name")
    _require(_no_path(facts.base.name), "base.name", facts.base.name, "a hub id or a folder's last name, not a path")
    for key, names in (("dropped", facts.dropped), ("excluded", facts.excluded)):
        for name in names:
            _require(len(name) <= _NAME and name.isprintable(), key, name, f"printable names of at most {_NAME} characters")
    _require(bool(facts.merge) == (facts.method == "merge"), "merge", dict(facts.merge), "a recipe where the method is merge, and only there")
    for task, held in facts.heads.items():
        _check_head(task, held)
    for name in facts.config:
        _require(_allowed(name), "config", name, "fields that describe the model, not where its code or weights come from")
    for key in ("config", "adapter", "tuning"):
        _require(not _names_code(getattr(facts, key)), key, "a value that names code", f"none of {', '.join(sorted(_CODE))}, at any depth")
    for key in ("config", "tokens", "adapter", "tuning", "merge", "heads", "metadata"):
        _require(_plain_json(getattr(facts, key), _DEPTH), key, "its value", f"plain JSON at most {_DEPTH} deep, with finite numbers")


def _check_head(task: str, held: object) -> None:
    where = f"heads.{task[:80]}"
    _require(0 < len(task) <= _NAME and task.isprintable(), "heads", task[:80], f"tasks named by printable text of at most {_NAME} characters")
    known = isinstance(held, Mapping) and set(held) <= {"config", "architecture", "prefix", "dropped"}
    _require(known, where, held, "an object with config, architecture, prefix and dropped, or some of them")
    assert isinstance(held, Mapping)
    config, architecture, prefix, dropped = (held.get(key, empty) for key, empty in _HEAD.items())
    _require(isinstance(config, Mapping) and all(map(_allowed, config)) and not _names_code(config), where, config, "a config without code")
    _require(isinstance(architecture, str) and bool(_ARCHITECTURE.fullmatch(architecture)), where, architecture, "a class name")
    _require(isinstance(prefix, str) and len(prefix) <= _TEXT and prefix.isprintable(), where, prefix, "a printable prefix")
    names = isinstance(dropped, list | tuple) and all(isinstance(name, str) and len(name) <= _NAME and name.isprintable() for name in dropped)
    _require(names, where, dropped, f"dropped names of at most {_NAME} printable characters")


_HEAD: dict[str, Any] = {"config": {}, "architecture": "None", "prefix": "", "dropped": []}


def _check_mask(mask: MaskFacts) -> None:
    _require(mask.order in ("smallest", "largest", "random"), "mask.order", mask.order, "smallest, largest or random")
    _require(mask.density is None or 0 < mask.density <= 1, "mask.density", mask.density, "a number above 0, up to 1")
    _require(0 <= mask.seed < 1 << 53, "mask.seed", mask.seed, "an integer below 2^53, 0 or more")
    _require(mask.rule == _MASK_RULE, "mask.rule", mask.rule, f"{_MASK_RULE}, the rule that this Sterna knows (a newer one may know more)")


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise InvalidArgument(f"{key} is {repr(value)[:80]}; expected {expected}")


def _no_path(name: str) -> bool:
    """Whether a base's name is at most "organisation/name", so that it says nothing of its maker's disk and leads nowhere on its reader's."""
    parts = name.split("/")
    return len(parts) <= 2 and "\\" not in name and not {".", ".."} & set(parts) and (len(parts) == 1 or all(parts))


def _names_code(value: object) -> bool:
    """Whether a field that tells a library which code to import is set anywhere inside."""
    if isinstance(value, Mapping):
        return any((key in _CODE and held not in (None, False)) or _names_code(held) for key, held in value.items())
    return isinstance(value, list | tuple) and any(map(_names_code, value))


def _plain_json(value: object, depth: int) -> bool:
    if depth < 0:
        return False
    if value is None or isinstance(value, bool | int | str):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain_json(v, depth - 1) for k, v in value.items())
    return isinstance(value, list | tuple) and all(_plain_json(v, depth - 1) for v in value)


def to_json(facts: Facts) -> str:
    """Compact JSON with sorted keys; fields that hold nothing are left out. The same facts give the same text."""
    value: dict[str, Any] = {"format": FORMAT, "base": {}}
    for key in Facts.__slots__:
        held = getattr(facts, key)
        if key == "base":
            value["base"] = {k: v for k in BaseFacts.__slots__ if (v := getattr(held, k)) is not None}
        elif isinstance(held, MaskFacts):
            value["mask"] = {k: v for k in MaskFacts.__slots__ if (v := getattr(held, k)) not in (None, 0)}
        elif held not in (None, (), {}, ("", "")) and (key, held) != ("scale", 0):
            value[key] = held
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=dict)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidArgument("the expert's facts (metadata, config, adapter) hold half a surrogate pair, which is no text") from None
    if size > LIMIT:
        raise InvalidArgument(f"the expert's facts (metadata, config, adapter) take {size} bytes as JSON; at most {LIMIT} fit")
    return text


def from_json(text: str) -> Facts:
    """The facts of a file; InvalidFile for anything but what `to_json` writes, unknown fields included."""
    if len(text.encode()) > LIMIT:
        raise InvalidFile(f"the expert's metadata has {len(text.encode())} bytes; at most {LIMIT} are allowed")
    value = parse_json(text, "the expert's metadata")
    version = value.pop("format", None)
    if type(version) is not int or version < 1:
        shown = repr(version)[:80] if isinstance(version, int | float | str | None) else type(version).__name__
        raise InvalidFile(f"the metadata's format is {shown}; expected a version number")
    if version > FORMAT:
        raise InvalidFile(f"the file has format {str(version)[:80]}, this Sterna reads up to {FORMAT}: use a newer Sterna")
    base = value.pop("base", None)
    try:
        _expect_fields("base", base, {"name": str, "fingerprint": str, "parameters": int, "revision": str}, ("name", "fingerprint", "parameters"))
        leveled = value.get("method") not in ("exact", "lossless", "merge")
        required = ("method", "source", "scope", "writer", *(("density", "alpha") if leveled else ()))
        _expect_fields("object", value, _TYPES, required)
        if "mask" in value:
            _expect_fields("mask", value["mask"], {"order": str, "density": (int, float), "seed": int, "rule": int}, ("order", "rule"))
            value["mask"] = MaskFacts(**value["mask"])
        for key in ("prefixes", "dropped", "excluded"):
            if key in value:
                value[key] = tuple(_expect(key, item, str) for item in value[key])
        if "tokens" in value:
            value["tokens"] = tuple(_expect("tokens", item, dict) for item in value["tokens"])
        if "prefixes" in value and len(value["prefixes"]) != 2:
            raise InvalidFile("the metadata's prefixes are not two")
        value.setdefault("scale", 0.0)
        value.setdefault("parameters", 0)
        value = {"density": None, "alpha": None, **value}
        value.update({key: float(value[key]) for key in ("density", "alpha", "scale") if value[key] is not None})
        return Facts(base=BaseFacts(**base), **value)
    except (InvalidArgument, OverflowError) as error:
        raise InvalidFile(f"the expert's metadata: {error}") from error


_TYPES: dict[str, Any] = {
    "method": str, "source": str, "density": (int, float), "alpha": (int, float), "scope": str, "scale": (int, float), "writer": str,
    "parameters": int, "architecture": str, "prefixes": list, "dropped": list, "excluded": list, "config": dict, "tokens": list, "adapter": dict,
    "mask": dict, "tuning": dict, "merge": dict, "heads": dict, "metadata": dict,
}  # fmt: skip


def _expect_fields(what: str, value: Any, types: dict[str, Any], required: tuple[str, ...]) -> None:
    _expect(what, value, dict)
    for key in required:
        if key not in value:
            raise InvalidFile(f"the metadata's {what} lacks the field {key!r}")
    for key, item in value.items():
        if key not in types:
            raise InvalidFile(f"the metadata has an unknown field {key[:80]!r}; a newer Sterna may read it")
        _expect(key, item, types[key])


def _expect(key: str, value: Any, types: Any) -> Any:
    if not isinstance(value, types) or isinstance(value, bool):
        raise InvalidFile(f"the metadata's {key} is a {type(value).__name__}")
    return value


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object, in UTF-8, without repeated keys, NaN, infinities or half surrogate pairs; InvalidFile otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            raise InvalidFile(f"{what} repeats a key")
        return seen

    def refuse(constant: str) -> Any:
        raise InvalidFile(f"{what} holds {constant}, which is not JSON")

    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=unique, parse_constant=refuse)
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be encoded
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidFile):
            raise
        raise InvalidFile(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidFile(f"{what} is a JSON {type(value).__name__}; expected an object")
    return value
