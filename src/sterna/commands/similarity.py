"""sterna similarity: how alike experts for one base are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sterna.commands.inspect import printable
from sterna.commands.shared import Json, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sterna.numbers.bits import F64
    from sterna.similarities import Similarity

Experts = Annotated[list[Path], typer.Argument(metavar="EXPERT", help="Expert files for the same base, two or more.", show_default=False)]
Chart = Annotated[Path | None, typer.Option("--chart", metavar="FILE", help="Draw them as a heat map: a .png or .svg file.", show_default=False)]


def similarity(experts: Experts, chart: Chart = None, as_json: Json = False) -> None:
    """Compare experts for the same base: cosines, overlaps and sign conflicts of every pair."""
    if chart is not None:
        from sterna.charts import check_chart

        check_chart(chart)
    from sterna.similarities import similarity as run

    result = run(experts)
    if chart is not None:
        from sterna.charts import heat_map

        heat_map(result, chart)
    if as_json:
        print_json(result.to_dict())
        return
    from rich.console import Console

    console = Console()
    console.print(_experts(result))
    for title, matrix, shown in (
        ("cosine", result.cosine, "{:z.3f}"),
        ("overlap, % of the positions that either changes", 100 * result.overlap, "{:.1f}"),
        ("sign conflicts, % of the positions that both change", 100 * result.conflicts, "{:.1f}"),
    ):
        _matrix(console, title, matrix, shown)


def _experts(result: Similarity) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "expert", "positions", "norm"):
        table.add_column(name, justify="left" if name == "expert" else "right", overflow="fold")
    for number, (name, nonzeros, norm) in enumerate(zip(result.names, result.nonzeros, result.norms, strict=True), 1):
        table.add_row(str(number), Text(printable(name)), f"{nonzeros:,}", f"{norm:.4g}")
    return table


def _matrix(console: Console, title: str, matrix: F64, shown: str) -> None:
    """What lies below the diagonal, by the experts' numbers, in as many bands of columns as the terminal's width asks for."""
    from rich.text import Text

    count = len(matrix)
    cells = [["-" if value != value else shown.format(value) for value in row[:number]] for number, row in enumerate(matrix.tolist())]
    width = 2 + max(len(cell) for row in cells for cell in row)
    bands = -(-(count - 1) // max((console.width - 4) // width, 1))
    band = -(-(count - 1) // bands)
    console.print(Text(f"\n{title}", style="bold"))
    for first in range(0, count - 1, band):
        lines = ["    " + "".join(f"{column + 1:>{width}}" for column in range(first, min(first + band, count - 1)))]
        lines += [f"{row + 1:>4}" + "".join(f"{cell:>{width}}" for cell in cells[row][first : first + band]) for row in range(first + 1, count)]
        console.print(Text("\n".join(lines)), no_wrap=True)
