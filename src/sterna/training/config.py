"""The config of a training: what a person's YAML may say, its defaults, and every fault in it at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from sterna.errors import NotFound
from sterna.training.errors import Faults, InvalidConfig
from sterna.training.tasks import TaskName

OWN_METHODS = ("pafi", "hiwi", "full", "head")
Values = Literal["exact", "fp32", "fp16", "bf16", "ternary"]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the config: unknown fields are faults, and it never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _number_or_name(value: object) -> object:
    """A fraction that was written as text, as on the command line, is a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Held = Annotated[float | str | list[str] | None, BeforeValidator(_number_or_name)]


class Data(Section):
    """Where the rows come from, what their columns mean, and how they become tokens."""

    train: str | list[str] | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    validation: Held = 0.1
    test: Held = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    target: str | None = None
    documents: Literal["line", "file"] | None = None
    train_rows: Count | None = None
    validation_rows: Count | None = None
    test_rows: Count | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    max_length: Annotated[int, Field(ge=2)] | None = None
    target_max_length: Annotated[int, Field(ge=2)] = 64
    truncation: bool = True


class PaFiMethod(Section):
    """Sparse fine-tuning of the values that a rule of the base alone chooses (`sterna.PaFi`)."""

    name: Literal["pafi"] = "pafi"
    density: Fraction | None = None
    count: Count | None = None
    include: list[str] = []
    exclude: list[str] = []
    order: Literal["smallest", "largest", "random"] = "smallest"
    seed: Annotated[int, Field(ge=0)] = 0
    gradient: Literal["sampled", "dense", "auto"] | None = None


class HiWiMethod(Section):
    """An adapter on the biases or weights of the feed-forward layers, folded away after training (`sterna.HiWi`)."""

    name: Literal["hiwi"] = "hiwi"
    target: Literal["bias", "weight"] = "bias"
    rank: Count = 16
    activation: Literal["relu", "gelu", "identity"] | None = None
    scale: float = 1.0
    init_std: Positive = 0.02
    modules: list[str] | None = None
    zero_bias: Literal["error", "direct"] = "error"


class PlainMethod(Section):
    """Every parameter, or the head alone."""

    name: Literal["full", "head"] = "full"


class PeftMethod(BaseModel):
    """A method of PEFT by its name; the other fields are those of PEFT's own config class, which judges them."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str


def _named(field: str) -> BeforeValidator:
    """A section may be given by its main field alone, as `method: lora` and `data: texts.csv`."""
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str | list) else value)


def _kind(value: object) -> str:
    name = value.get("name", "pafi") if isinstance(value, Mapping) else getattr(value, "name", None)
    return str(name) if name in ("pafi", "hiwi") else "plain" if name in ("full", "head") else "peft"


Method = Annotated[
    Annotated[PaFiMethod, Tag("pafi")]
    | Annotated[HiWiMethod, Tag("hiwi")]
    | Annotated[PlainMethod, Tag("plain")]
    | Annotated[PeftMethod, Tag("peft")],
    Discriminator(_kind),
]


class Optimization(Section):
    """Hyper-parameters in the words of transformers' TrainingArguments, with the same meaning."""

    learning_rate: Positive | None = None
    num_train_epochs: Positive = 3.0
    max_steps: Count | None = None
    per_device_train_batch_size: Count = 16
    per_device_eval_batch_size: Count = 64
    gradient_accumulation_steps: Count = 1
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lr_scheduler_type: str = "linear"
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    save_steps: Count | None = None


class Compression(Section):
    """How what was learned becomes an expert."""

    values: Values | None = None
    density: Fraction | None = None
    alpha: Positive | None = None
    scope: Literal["global", "tensor"] = "global"
    head: Literal["exact", "fp16", "bf16", "int8"] = "exact"
    exclude: list[str] = []


class TrainingConfig(Section):
    """One training. Fields that are None have a default that depends on the others; `resolve` fills them in."""

    model: str | None = None
    task: TaskName | None = None
    data: Annotated[Data, _named("train")] = Data()
    method: Annotated[Method, _named("name")] = PaFiMethod()
    training: Optimization = Optimization()
    compress: Compression = Compression()
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    metadata: dict[str, Any] = {}
    output: str | None = None
    run_dir: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order of the fields, that `parse` reads back to an equal config."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _sections(kind: str) -> dict[str, list[str]]:
    """The fields of each section, for a kind of method."""
    methods: dict[str, type[BaseModel]] = {"pafi": PaFiMethod, "hiwi": HiWiMethod, "plain": PlainMethod}
    method = methods.get(kind, PeftMethod)
    sections: dict[str, type[BaseModel]] = {"": TrainingConfig, "data": Data, "method": method, "training": Optimization, "compress": Compression}
    return {name: list(section.model_fields) for name, section in sections.items()}


def parse(raw: Mapping[str, Any], faults: Faults) -> TrainingConfig:
    """The config that `raw` says, with every fault in it told to `faults`; a field with a fault has its default in the result."""
    try:
        return TrainingConfig.model_validate(raw)
    except ValidationError as error:
        kept: Any = _plain(raw)
        kind = "pafi"
        found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for fault in error.errors(include_url=False):
            path = [str(part) for part in fault["loc"]]
            if path[0] == "method" and len(path) > 1:  # the second part is pydantic's name for the kind of method
                kind = path[1]
                path = [path[0], *path[2:]]
            found.setdefault(tuple(path[:2]), []).append(dict(fault))  # deeper parts are members of a union, and places in a list
        for place, told in found.items():
            faults.add(".".join(place), _said(place, told, _sections(kind)))
            _drop(kept, place)
        try:
            return TrainingConfig.model_validate(kept)
        except ValidationError:  # what the fields together are: nothing deeper can be checked
            return TrainingConfig()


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _drop(tree: Any, path: Sequence[str]) -> None:
    for part in path[:-1]:
        if not isinstance(tree, dict) or not isinstance(tree.get(part), dict):
            return
        tree = tree[part]
    if isinstance(tree, dict):
        if path[-1] == "name" and len(path) == 2 and path[0] == "method":
            tree.clear()
            tree["name"] = "full"
        else:
            tree.pop(path[-1], None)


def _said(path: Sequence[str], told: Sequence[Mapping[str, Any]], fields: Mapping[str, Sequence[str]]) -> str:
    first = told[0]
    if first["type"] == "extra_forbidden":
        return f"there is no such field{_near(path, fields)}"
    if first["type"] == "missing":
        return "missing"
    given = first["input"]
    shown = repr(given) if isinstance(given, str | int | float | bool | None) else f"a {type(given).__name__}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{shown} is not valid; expected fields with values"
    expected = " or ".join(dict.fromkeys(str(fault["msg"]).removeprefix("Input should be ").partition(", ")[0] for fault in told))
    return f"{shown} is not valid; expected {expected}"


def _near(path: Sequence[str], fields: Mapping[str, Sequence[str]]) -> str:
    """Where the field may have been meant: fields of like name in its section, or of this name in another."""
    section, name = ("", path[0]) if len(path) == 1 else (path[0], path[-1])
    here = fields.get(section, [])
    alike = [f"{section}.{field}" if section else field for field in difflib.get_close_matches(name, here, n=2, cutoff=0.7)]
    elsewhere = [f"{where}.{name}" if where else name for where, names in fields.items() if name in names and where != section]
    meant = " or ".join([*alike, *elsewhere])
    return f"; did you mean {meant}?" if meant else f"; the fields here are {', '.join(here)}"


class _Loader(yaml.SafeLoader):
    """YAML with 5e-5 as a number (YAML 1.1 takes it for text) and no key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"the field {name!r} is no text", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the field {name} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {letter: list(rules) for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        NotFound: no such file.
        InvalidConfig: not YAML, a field given twice, or something other than a mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise NotFound(f"the config {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig((f"{path.name}: not UTF-8 text (byte {error.start})",)) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InvalidConfig((f"{path.name}{line}: {error.problem}",)) from error
    except yaml.YAMLError as error:
        raise InvalidConfig((f"{path.name}: {' '.join(str(error).split())}",)) from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InvalidConfig((f"{path.name}: expected fields with values (model: ..., data: ...), not a {type(raw).__name__}",))
    return raw


def value_of(text: str) -> Any:
    """What a value means where it stands in YAML; text that is no YAML stands for itself."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def merged(raw: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with dotted `options` in place of its own; a method of another name takes its fields away with it."""
    result: dict[str, Any] = _plain(raw)
    if isinstance(result.get("method"), str):
        result["method"] = {"name": result["method"]}
    if isinstance(result.get("data"), str | list):
        result["data"] = {"train": result["data"]}
    name = options.get("method.name")
    if name is not None and isinstance(result.get("method"), dict) and result["method"].get("name", "pafi") != name:
        result["method"] = {}
    for dotted, value in options.items():
        here = result
        *sections, field = dotted.split(".")
        for section in sections:
            inner = here.get(section)
            here[section] = inner = inner if isinstance(inner, dict) else {}
            here = inner
        here[field] = value
    return result
