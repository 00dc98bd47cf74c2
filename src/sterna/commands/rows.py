"""What the commands that score rows share: options for the rows and their columns, and the packages that scoring needs."""

from __future__ import annotations

from typing import Annotated

import typer

from sterna.errors import InvalidArgument

TASKS = ("classification", "regression", "causal-lm", "seq2seq")

TaskOption = Annotated[
    str | None, typer.Option(metavar="TASK", help="classification, regression, causal-lm or seq2seq.", show_default="by the experts or the data")
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column", "--text", metavar="NAME", help="The column of the text, of the prompt, or of chats.", show_default="by usual names"
    ),
]
PairColumn = Annotated[
    str | None, typer.Option("--pair-column", "--pair", metavar="NAME", help="The column of a second text.", show_default="by usual names")
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", "--label", metavar="NAME", help="The column of the label.", show_default="by usual names")
]
TargetColumn = Annotated[
    str | None,
    typer.Option(
        "--target-column", "--target", metavar="NAME", help="The column of the target text, or of the completion.", show_default="by usual names"
    ),
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Tokens of a text at most.", show_default="128, 256 or 1024")]
TargetMaxLength = Annotated[int, typer.Option(min=2, help="Tokens of a generated text at most.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows that are run at once.")]
Dtype = Annotated[str, typer.Option(help="What the base is loaded in: fp32, bf16 or fp16.")]


def check_task(task: str | None) -> None:
    """Raise InvalidArgument for a task that there is not."""
    if task is not None and task not in TASKS:
        raise InvalidArgument(f"--task is {task!r}; expected {', '.join(TASKS[:-1])} or {TASKS[-1]}")


def need_scoring(*more: str) -> None:
    """Raise MissingDependency where a package that scoring needs is not installed."""
    from sterna.needs import needed, quiet

    with quiet():  # what they import in turn may have much to say
        for package in ("pydantic", "transformers", "sklearn", "scipy", *more):
            needed(package, "sterna[train]")
