"""The same merge again, from what a merged expert says of itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sterna.errors import InvalidArgument
from sterna.expert.expert import Expert
from sterna.expert.fitted import is_fitted, with_fitted_of
from sterna.merging.merge import run
from sterna.merging.recipe import parse
from sterna.progress import Progress, silent
from sterna.sources.checkpoint import Source
from sterna.training.errors import Faults, InvalidConfig


def replay(
    expert: Expert | str | os.PathLike[str],
    parents: Sequence[str | os.PathLike[str]] = (),
    *,
    base: Source | None = None,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> Expert:
    """Make a merged expert (or its file) again. Its parents are looked for by file name among `parents` (files and folders) and beside the file.

    Each parent is held against its recorded content digest, and so is the result. A head that was fitted to examples follows from no recipe: it is
    taken over. Raises InvalidConfig where a parent is missing or another expert;
    InvalidArgument for an expert that was not merged, or where the result is not the same; as `sterna.merge` otherwise.
    """
    from sterna.expert.file import load

    places = [Path(place) for place in parents]
    if not isinstance(expert, Expert):
        places.append(Path(expert).parent)
        expert = load(expert)
    record = expert.facts.merge
    if not record:
        raise InvalidArgument("the expert was not merged (its facts have no recipe), so there is nothing to replay")
    missing: list[str] = []
    raw = _found({**record, "metadata": dict(expert.facts.metadata)}, places, missing)
    if missing:
        raise InvalidConfig(tuple(missing))
    faults = Faults()
    recipe = parse(raw, Path(), faults)
    faults.stop()
    assert recipe is not None
    made = run(recipe, warn, progress, base)
    if is_fitted(expert):
        made = with_fitted_of(made, expert)
    if made.content_digest != expert.content_digest:
        told = f"{made.content_digest[:12]}, not {expert.content_digest[:12]}"
        raise InvalidArgument(f"the recipe gave the content digest {told}: it was made by {expert.facts.writer}, or by a method that changed since")
    return made


def _found(record: Mapping[str, Any], places: Sequence[Path], missing: list[str]) -> dict[str, Any]:
    """The record with paths in the place of parents' names."""
    models: list[dict[str, Any]] = []
    for number, model in enumerate(record.get("models", ())):
        told = dict(model)
        if isinstance(told.get("recipe"), Mapping):
            told["recipe"] = _found(told["recipe"], places, missing)
        elif isinstance(told.get("model"), str):
            at = next((path for path in _candidates(told["model"], places) if path.is_file()), None)
            if at is None:
                looked = ", ".join(str(place) for place in places) or "nowhere"
                digest = str(told.get("content_digest", ""))[:12]
                missing.append(f"models[{number}]: {told['model']} is missing (content digest {digest}); looked in {looked}")
            told["model"] = at
        models.append(told)
    return {**{key: value for key, value in record.items() if key not in ("loss", "head")}, "models": models}


def _candidates(name: str, places: Sequence[Path]) -> list[Path]:
    plain = Path(name).name  # a record may be anybody's: it names files, not ways to them
    return [place / plain if place.is_dir() else place for place in places if place.is_dir() or place.name == plain]
