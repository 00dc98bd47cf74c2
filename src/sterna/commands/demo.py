"""sterna demo: the main job on a real model and real text, ending in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sterna.commands.shared import Json, print_json, progress_bar


def demo(
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="A model folder or hub id, not the bundled encoder.", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Labelled text: .csv, .tsv or .jsonl.", show_default=False)] = None,
    test_data: Annotated[Path | None, typer.Option(metavar="FILE", help="Test rows; else --data is split 80/10/10.", show_default=False)] = None,
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="The column that holds the label.")] = "label",
    density: Annotated[list[float] | None, typer.Option(help="A density to try. May be given again.", show_default="0.05 0.1 0.2")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits and the trainings.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few hundred texts and one epoch: everything runs, the accuracies say little.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune, compress, attach, evaluate and swap on a real model and real text, beside the controls; trainings are kept for the next run."""
    from sterna.demo.options import DemoOptions
    from sterna.demo.run import run_demo

    options = DemoOptions(
        model=model, data=data, test_data=test_data, text_column=text_column, label_column=label_column, seed=seed, quick=quick,
        densities=tuple(density or DemoOptions().densities),
    )  # fmt: skip
    with progress_bar() as progress:
        result = run_demo(options, progress)
    if as_json:
        print_json(result.to_dict())
    elif markdown:
        print(result.markdown())
    else:
        from rich.console import Console

        result.print(Console())
        print(f"The report: {result.page}")
