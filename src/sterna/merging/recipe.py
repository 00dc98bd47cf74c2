"""What is to be merged and how, as YAML or arguments say it, in mergekit's words: checked whole, every fault at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sterna.compeft import check_options
from sterna.errors import InvalidArgument, SternaError
from sterna.expert.expert import Expert
from sterna.expert.table import name_fault
from sterna.merging.products import FORMS, Form
from sterna.merging.registry import SEMANTICS, MergeMethod, Semantics, by_name
from sterna.merging.schedule import Setting, numbers_of, setting, setting_fault
from sterna.training.errors import Faults

FIELDS = ("merge_method", "models", "base_model", "parameters", "semantics", "seed", "recompress", "metadata")
_MODEL = ("model", "task", "parameters", "digest", "content_digest", "recipe")
_PER_MODEL = ("weight", "density", "gamma")
RECOMPRESS = {"density": 0.1, "alpha": 4.0}
"""What `recompress` makes ternary by, where nothing else is said: as `sterna.compress`."""
GAMMA = 0.01
"""The share of outliers that breadcrumbs drops where nothing else is said: the paper's, and mergekit's."""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A parent as a recipe names it: a file, an expert in memory, or another recipe whose result it is. `place` is where a fault says it is."""

    source: Path | Expert | Recipe
    name: str
    task: str | None
    weight: Setting
    density: Setting
    gamma: Setting
    content_digest: str | None
    place: str


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A recipe without faults. `options` are all of the method's own parameters; `lora` and `rank` say what LoRA experts become."""

    method: MergeMethod
    semantics: Semantics
    seed: int
    options: Mapping[str, Any]
    models: tuple[Model, ...]
    base: str | None
    recompress: Mapping[str, float] | None
    metadata: Mapping[str, Any]
    lora: Form | None = None
    rank: int | None = None

    @property
    def drops(self) -> tuple[str, ...]:
        """Which of `density` and `gamma` the method uses."""
        return {None: (), "outliers": ("density", "gamma")}.get(self.method.drop, ("density",))


def read_recipe(path: str | os.PathLike[str], faults: Faults) -> Recipe | None:
    """The recipe in a YAML file; parents' paths are relative to its folder. Raises NotFound or InvalidConfig where it is no YAML."""
    return _read(Path(path), faults, "", ())


def _read(path: Path, faults: Faults, place: str, above: tuple[Path, ...]) -> Recipe | None:
    from sterna.needs import needed

    needed("yaml", "sterna[train]")
    needed("pydantic", "sterna[train]")
    from sterna.training.config import read_yaml

    known = path.resolve()
    if known in above:
        way = " -> ".join(each.name for each in (*above[above.index(known) :], known))
        faults.add(place.rstrip(".") or path.name, f"the recipes make a circle: {way}")
        return None
    return parse(read_yaml(path), path.parent, faults, place, (*above, known))


def parse(raw: Mapping[str, Any], folder: Path, faults: Faults, place: str = "", above: tuple[Path, ...] = ()) -> Recipe | None:
    """The recipe that `raw` says; None where it has a fault, all of which are told to `faults`. Experts may stand in the place of paths."""
    before = len(faults.found)
    _refuse_unknown(raw, FIELDS, place, faults)
    method = None
    if "merge_method" not in raw:
        faults.add(f"{place}merge_method", "missing; a recipe names its method")
    else:
        with faults.at(f"{place}merge_method"):
            method = by_name(raw["merge_method"])
    semantics = raw.get("semantics", "paper")
    if semantics not in SEMANTICS:
        faults.add(f"{place}semantics", f"{semantics!r} is not one of {', '.join(SEMANTICS)}")
    elif method is not None and semantics not in method.semantics:
        faults.add(f"{place}semantics", f"{method.name} follows {' or '.join(method.semantics)}, not {semantics}")
    seed = raw.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 53:
        faults.add(f"{place}seed", f"{seed!r} is no integer of 0 or more, below 2^53")
    for key, kind, told in (("base_model", str, "a base's name"), ("metadata", Mapping, "an object")):
        if key in raw and not isinstance(raw[key], kind):
            faults.add(f"{place}{key}", f"{raw[key]!r} is not {told}")
    recompress = _recompress(raw.get("recompress"), f"{place}recompress", faults)
    shared = raw.get("parameters", {})
    if not isinstance(shared, Mapping):
        faults.add(f"{place}parameters", f"{shared!r} is not an object")
        shared = {}
    options = _options(shared, method, f"{place}parameters.", faults)
    lora, rank = _lora(shared, method, f"{place}parameters.", faults)
    models = _models(raw.get("models"), shared, method, semantics, folder, faults, place, above)
    if len(faults.found) > before or method is None:
        return None
    return Recipe(method, semantics, seed, options, tuple(models), raw.get("base_model"), recompress, raw.get("metadata", {}), lora, rank)


def _lora(shared: Mapping[str, Any], method: MergeMethod | None, place: str, faults: Faults) -> tuple[Form | None, int | None]:
    """What LoRA experts are to become, and of which rank, where it is said."""
    lora, rank = shared.get("lora"), shared.get("rank")
    if lora is not None and lora not in FORMS:
        faults.add(f"{place}lora", f"{lora!r} is not one of {', '.join(FORMS)}")
    elif lora == "concat" and method is not None and not method.linear:
        faults.add(f"{place}lora", f"{method.name} looks at single values of the products, so stacked factors are not its result; svd or sparse")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        faults.add(f"{place}rank", f"{rank!r} is no integer of 1 or more")
    elif rank is not None and (lora or ("concat" if method is not None and method.linear else "svd")) != "svd":
        faults.add(f"{place}rank", "only lora: svd has a rank")
    return lora, rank


def _recompress(raw: object, place: str, faults: Faults) -> dict[str, float] | None:
    """Density and alpha, where the result is to be ternary: `true`, or an object with one or both of them."""
    if raw is None or raw is False:
        return None
    if raw is not True and not isinstance(raw, Mapping):
        faults.add(place, f"{raw!r} is neither true nor an object with density and alpha")
        return None
    given = raw if isinstance(raw, Mapping) else {}
    _refuse_unknown(given, tuple(RECOMPRESS), f"{place}.", faults)
    values = {**RECOMPRESS, **{key: value for key, value in given.items() if key in RECOMPRESS}}
    with faults.at(place):
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values.values()):
            raise InvalidArgument(f"{values} are not both numbers")
        check_options(values["density"], values["alpha"])
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def _refuse_unknown(raw: Mapping[str, Any], fields: Sequence[str], place: str, faults: Faults) -> None:
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=2, cutoff=0.6)
            meant = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(fields)}"
            faults.add(f"{place}{key}", f"there is no such field; {meant}")


def _options(shared: Mapping[str, Any], method: MergeMethod | None, place: str, faults: Faults) -> dict[str, Any]:
    if method is None:
        return {}
    _refuse_unknown(shared, (*method.options, *_used(method), "lora", "rank"), place, faults)
    values = {}
    for name, option in method.options.items():
        values[name] = shared.get(name, option.default)
        if fault := option.fault(values[name]):
            faults.add(f"{place}{name}", fault)
    return values


def _used(method: MergeMethod) -> tuple[str, ...]:
    """The parameters of each model that a method looks at."""
    return {None: ("weight",), "outliers": _PER_MODEL}.get(method.drop, ("weight", "density"))


def _models(
    raw: object,
    shared: Mapping[str, Any],
    method: MergeMethod | None,
    semantics: str,
    folder: Path,
    faults: Faults,
    place: str,
    above: tuple[Path, ...],
) -> list[Model]:
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        faults.add(f"{place}models", "missing" if raw is None else f"{raw!r} is no list of parents")
        return []
    models: list[Model] = []
    for number, entry in enumerate(raw):
        where = f"{place}models[{number}]"
        if isinstance(entry, str | os.PathLike | Expert):
            entry = {"model": entry}
        if not isinstance(entry, Mapping):
            faults.add(where, f"{entry!r} is no parent; expected an expert's file, or an object with model")
            continue
        _refuse_unknown(entry, _MODEL, f"{where}.", faults)
        own = entry.get("parameters", {})
        if not isinstance(own, Mapping):
            faults.add(f"{where}.parameters", f"{own!r} is not an object")
            own = {}
        if method is not None:
            _refuse_unknown(own, _used(method), f"{where}.parameters.", faults)
        settings = {}
        for name in _PER_MODEL:
            value = own.get(name, shared.get(name))
            settings[name] = _setting(name, value, method, semantics, f"{where}.parameters.{name}", faults)
        task = entry.get("task")
        if task is not None and (not isinstance(task, str) or name_fault(task)):
            faults.add(f"{where}.task", f"{task!r} is no name: printable text that is no path")
        source = _source(entry, folder, faults, where, above)
        if source is not None:
            held = entry.get("model")
            name = Path(held).name if isinstance(held, str | os.PathLike) else f"expert {number + 1}"
            models.append(Model(source, name, task, **settings, content_digest=entry.get("content_digest"), place=where))
    if method is not None and len(raw) != len(models):
        return models
    least, most = method.parents if method is not None else (1, None)
    if len(models) < least or (most is not None and len(models) > most):
        assert method is not None
        faults.add(f"{place}models", f"{method.name} takes {least if most == least else f'{least} or more'} parents; given {len(models)}")
    return models


def _setting(name: str, value: Any, method: MergeMethod | None, semantics: str, place: str, faults: Faults) -> Setting:
    default = Setting.of(GAMMA if name == "gamma" else 1.0)
    if value is None:
        if name == "density" and method is not None and method.drop == "random":
            faults.add(place, f"missing; {method.name} keeps each non-zero with this probability")
        return default
    if fault := setting_fault(value):
        faults.add(place, fault)
        return default
    made = setting(value)
    if name == "density" and not all(0 < number <= 1 for number in numbers_of(made)):
        faults.add(place, f"{value!r} is not above 0, up to 1")
    if name == "gamma" and not all(0 <= number < 1 for number in numbers_of(made)):
        faults.add(place, f"{value!r} is not 0 or more, below 1")
    if name == "density" and method is not None and method.drop == "magnitude" and semantics == "paper" and made.constant is None:
        faults.add(place, "differs from tensor to tensor, but the paper trims over the whole vector; semantics peft or mergekit trim each by itself")
    return made


def _source(entry: Mapping[str, Any], folder: Path, faults: Faults, where: str, above: tuple[Path, ...]) -> Path | Expert | Recipe | None:
    held = entry.get("model")
    if isinstance(entry.get("recipe"), Mapping) and not isinstance(held, Expert):
        return parse(entry["recipe"], folder, faults, f"{where}.recipe.", above)
    if isinstance(held, Expert):
        return held
    if not isinstance(held, str | os.PathLike) or not os.fspath(held):
        faults.add(f"{where}.model", "missing" if held is None else f"{held!r} is no expert and no path")
        return None
    path = folder / held
    if path.suffix in (".yaml", ".yml"):
        try:
            return _read(path, faults, f"{where}.", above)
        except SternaError as error:
            faults.add(f"{where}.model", str(error))
            return None
    if not path.is_file():
        faults.add(f"{where}.model", f"{path} is no file")
        return None
    return path


def of_arguments(
    experts: Sequence[Any],
    method: str,
    weights: Sequence[float] | None,
    density: float | None,
    gamma: float | None,
    tasks: Sequence[str] | None,
    rest: Mapping[str, Any],
) -> dict[str, Any]:
    """The raw recipe that arguments say. Raises InvalidArgument where weights or tasks are not one an expert."""
    for what, values in (("weights", weights), ("tasks", tasks)):
        if values is not None and len(values) != len(experts):
            raise InvalidArgument(f"{what} are {list(values)} for {len(experts)} experts; expected one each")
    models: list[dict[str, Any]] = []
    for number, expert in enumerate(experts):
        own = {"weight": weights[number]} if weights is not None else {}
        models.append({"model": expert, "parameters": own} | ({"task": tasks[number]} if tasks is not None else {}))
    shared = {key: value for key, value in (("density", density), ("gamma", gamma)) if value is not None}
    parameters = {**rest.get("parameters", {}), **shared}
    return {"merge_method": method, "models": models, **{key: value for key, value in rest.items() if value is not None}, "parameters": parameters}
