"""Which output of a head each label of the data is: by name, by number, or by the order of the names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sterna.errors import InvalidArgument
from sterna.training.data import sorted_labels
from sterna.training.tables import listed

_GENERIC = re.compile(r"LABEL_\d+")


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of a configuration's `id2label` by index; None where it has none, or not one for each index."""
    given = config.get("id2label")
    if not isinstance(given, Mapping) or not given:
        return None
    by_number = {int(number): str(name) for number, name in given.items() if str(number).isdigit()}
    return tuple(by_number[i] for i in range(len(by_number))) if set(by_number) == set(range(len(given))) else None


def generic(count: int) -> tuple[str, ...]:
    """The names that transformers gives classes without names."""
    return tuple(f"LABEL_{i}" for i in range(count))


def is_generic(classes: Sequence[str]) -> bool:
    return all(_GENERIC.fullmatch(name) for name in classes)


def numbered(labels: Sequence[str], classes: Sequence[str], source: str, warn: Callable[[str], None]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The index of each row's label among a head's classes, and what the data call these classes.

    By name, but for letter case; by number, where all labels are whole numbers of classes; or, of a head whose classes have no names, by the order
    of the sorted labels where there are as many, of which `warn` is told.

    Raises InvalidArgument with both sides where none of these fits.
    """
    present = sorted_labels(dict.fromkeys(labels, 1))
    index = _by_name(present, classes) or _by_number(present, len(classes))
    if index is None and is_generic(classes) and len(present) == len(classes):
        index = {label: place for place, label in enumerate(present)}
        warn(f"the head's classes have no names; the {len(present)} labels of {source} are taken in the order {listed(present)}")
    if index is None:
        raise InvalidArgument(
            f"the labels do not fit: {source} has {len(present)} ({listed(present)}), the head has {len(classes)} classes ({listed(classes)}); "
            "name labels as the head does, or number them from 0"
        )
    names = list(classes)
    for label, place in index.items():
        names[place] = label
    return tuple(index[label] for label in labels), tuple(names)


def _by_name(labels: Sequence[str], classes: Sequence[str]) -> dict[str, int] | None:
    for alike in (str, str.casefold):
        places = {alike(name): place for place, name in enumerate(classes)}
        if len(places) == len(classes) and all(alike(label) in places for label in labels):
            found = {label: places[alike(label)] for label in labels}
            if len(set(found.values())) == len(found):
                return found
    return None


def _by_number(labels: Sequence[str], count: int) -> dict[str, int] | None:
    found = {label: int(label) for label in labels if re.fullmatch(r"\d+", label)}
    fits = len(found) == len(labels) and len(set(found.values())) == len(found) and max(found.values(), default=-1) < count
    return found if fits else None


def columns_in_order(names: Sequence[str] | None, wanted: Sequence[str], outputs: int, who: str) -> list[int] | None:
    """Which of a head's outputs stands for each of the wanted classes; None where they are in order already.

    Raises InvalidArgument where the head has other classes.
    """
    if outputs != len(wanted):
        own = f" ({listed(names)})" if names is not None and len(names) == outputs else ""
        raise InvalidArgument(f"{who} has {outputs} classes{own}, the rows have {len(wanted)} ({listed(wanted)}): it was made for another task")
    if names is None or len(names) != outputs or is_generic(names) or is_generic(wanted) or tuple(names) == tuple(wanted):
        return None
    if set(names) != set(wanted):
        raise InvalidArgument(f"{who} has the classes {listed(names)}, the rows have {listed(wanted)}: it was made for another task")
    return [tuple(names).index(name) for name in wanted]
