"""Pictures of results, by matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sterna.errors import CannotWrite, InvalidArgument
from sterna.needs import needed
from sterna.writing import whole_file

if TYPE_CHECKING:
    from sterna.numbers.bits import F64
    from sterna.similarities import Similarity

SUFFIXES = (".png", ".svg")

_CELL, _SIDE = 0.4, 2.2
"""Inches a cell takes, and the least that a matrix does."""
_LETTER, _LONGEST = 0.074, 28
"""Inches a letter of a name takes, and how many letters are shown."""
_BAR, _GAP, _TITLES = 0.12, 0.85, 0.75
"""Inches a colour bar is wide, from one matrix to the next, and over the matrices."""


def check_chart(path: str | os.PathLike[str]) -> None:
    """Raise InvalidArgument for a file that is no picture, CannotWrite without its folder, MissingDependency where matplotlib is not installed."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InvalidArgument(f"the chart is to be {path}; expected a file that ends in {' or '.join(SUFFIXES)}")
    if not Path(path).parent.is_dir():
        raise CannotWrite(f"{Path(path).parent} is not a folder; create it first")
    needed("matplotlib", "sterna[charts]")


def heat_map(similarity: Similarity, path: str | os.PathLike[str]) -> None:
    """Three matrices side by side: cosines, overlaps and sign conflicts, with the value in each cell. PNG or SVG, by the file's suffix.

    Colours span the values off the diagonal, cosines evenly about 0 and conflicts evenly about one half, which is what chance gives; at least .1 each
    way, so that noise stays pale. Raises InvalidArgument, MissingDependency or CannotWrite.
    """
    check_chart(path)
    matplotlib = needed("matplotlib", "sterna[charts]")
    figures = needed("matplotlib.figure", "sterna[charts]")
    count = len(similarity.names)
    names = [_short(name) for name in similarity.names]
    side = max(count * _CELL, _SIDE)
    label = max(map(len, names)) * _LETTER + 0.2
    level = label < side / count  # names fit under their columns
    below = 0.35 if level else label
    width, height = label + 3 * (side + _GAP), below + side + _TITLES
    panels = [
        _Panel("cosine", similarity.cosine, "{:z.2f}", 0.1, 0.0, "RdBu_r"),
        _Panel("overlap (Jaccard index), %", 100 * similarity.overlap, "{:.0f}", 10.0, None, "YlGnBu"),
        _Panel("sign conflicts, % of shared positions", 100 * similarity.conflicts, "{:.0f}", 10.0, 50.0, "PuOr_r"),
    ]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sterna", "font.size": 8}):  # names stay text, ids are always the same
        figure = figures.Figure(figsize=(width, height))
        figure.text(label / width, 1 - 0.12 / height, f"{count} experts for {_short(similarity.base)}", fontsize=11 + count // 4, va="top")
        for number, panel in enumerate(panels):
            left = label + number * (side + _GAP)
            axis = figure.add_axes((left / width, below / height, side / width, side / height))
            bar = figure.add_axes(((left + side + 0.08) / width, below / height, _BAR / width, side / height))
            _draw(axis, bar, panel)
            axis.set_xticks(range(count), names, rotation=0 if level else 90)
            axis.set_yticks(range(count), names if number == 0 else [""] * count)
        with whole_file(path) as file:
            kind = Path(path).suffix.lower()[1:]
            figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


class _Panel(NamedTuple):
    title: str
    matrix: F64
    shown: str
    reach: float  # of the colours, at least
    middle: float | None  # the colours' one; None where they begin at 0
    colours: str


def _draw(axis: Any, bar: Any, panel: _Panel) -> None:
    """One matrix: its diagonal grey, since it says nothing, the rest coloured over its range."""
    matrix, middle = panel.matrix, panel.middle or 0.0
    diagonal = np.eye(len(matrix), dtype=bool)
    reach = max([panel.reach, *np.abs(matrix[~diagonal & ~np.isnan(matrix)] - middle).tolist()])
    axis.set_facecolor("0.93")
    low = middle - reach if panel.middle is not None else 0.0
    image = axis.imshow(np.where(diagonal, np.nan, matrix), cmap=panel.colours, vmin=low, vmax=middle + reach)
    for (row, column), value in np.ndenumerate(matrix):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "0.6" if row == column else "white" if dark else "black"
        text = "" if np.isnan(value) else panel.shown.format(value)
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set_title(panel.title, fontsize=9 + len(matrix) // 4, loc="left")
    axis.tick_params(length=0)
    bar.figure.colorbar(image, cax=bar)
    bar.tick_params(labelsize=7, length=2)
    for spine in (*axis.spines.values(), *bar.spines.values()):
        spine.set_visible(False)


def _short(name: str) -> str:
    """A name without its middle, where it is long."""
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[: half - 1]}…{name[-half:]}"
