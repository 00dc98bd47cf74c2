"""sterna evaluate: the base, the tuned model and experts scored on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sterna.commands.rows import (
    BatchSize,
    Dtype,
    LabelColumn,
    MaxLength,
    PairColumn,
    TargetColumn,
    TargetMaxLength,
    TaskOption,
    TextColumn,
    check_task,
    need_scoring,
)
from sterna.commands.shared import Json, by_task, print_json, progress_bar, refuse_unwritable, warn
from sterna.errors import InvalidArgument

if TYPE_CHECKING:
    from sterna.scoring.evaluated import Evaluated

DATA_HELP = "Rows: .csv, .tsv, .jsonl, .parquet, .txt, or a hub id. Given again as TASK=FILE: several tasks, each with the experts named for it."
TUNED_HELP = "The tuned model's folder, a PEFT folder, or an exact expert, to hold the experts against; TASK=DIR where there are several tasks."
METRIC_HELP = "accuracy, macro_f1, matthews, spearman, perplexity, rougeL, exact_match, ... or package.module:function. May be given again."
CONTROLS_HELP = (
    "Add other ways to store the tuned model: pruned, rounded, BitDelta, DARE, ...; a fifth of the rows is kept apart to choose a scale on."
)


def evaluate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base: a model folder or a hub id.", show_default=False)],
    experts: Annotated[list[Path] | None, typer.Argument(metavar="EXPERT", help="Expert files.", show_default=False)] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="FILE | TASK=FILE", help=DATA_HELP, show_default=False)] = None,
    tuned: Annotated[list[str] | None, typer.Option(metavar="DIR", help=TUNED_HELP, show_default=False)] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME", help=METRIC_HELP, show_default="by the task")] = None,
    task: TaskOption = None,
    head: Annotated[
        str | None, typer.Option("--head-task", "--head", metavar="NAME", help="Which head of a merged expert is used.", show_default=False)
    ] = None,
    controls: Annotated[bool, typer.Option("--controls", help=CONTROLS_HELP)] = False,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    target_column: TargetColumn = None,
    max_length: MaxLength = None,
    target_max_length: TargetMaxLength = 64,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows to use, each label in proportion.", show_default="all")] = None,
    batch_size: BatchSize = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of rows.")] = 0,
    dtype: Dtype = "fp32",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result as JSON too.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Score the base, the tuned model and experts on the same rows, with 95 % intervals and paired differences."""
    from sterna.training.errors import Interrupted
    from sterna.writing import whole_file

    if not data:
        raise InvalidArgument("--data is missing; expected rows with labels (--data test.csv)")
    check_task(task)
    if output is not None:
        refuse_unwritable(output)
    try:
        need_scoring()
        from sterna.scoring.evaluate import evaluate as run

        with progress_bar() as progress:
            result = run(
                base,
                list(experts or []),
                data=by_task(data, "--data"),
                tuned=by_task(tuned, "--tuned") if tuned else None,
                metric=metric,
                task=task,  # type: ignore[arg-type]
                head=head,
                controls=controls,
                text=text_column,
                text_pair=pair_column,
                label=label_column,
                target=target_column,
                rows=rows,
                max_length=max_length,
                target_max_length=target_max_length,
                batch=batch_size,
                seed=seed,
                dtype=dtype,
                warn=warn,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    if output is not None:
        with whole_file(output) as file:
            file.write((json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    if as_json:
        print_json(result.to_dict())
    else:
        show(result)


def show(result: Evaluated) -> None:
    """Print one table a task and metric: on a terminal as wide as it is, else in lines that are never folded."""
    from rich.console import Console

    from sterna.commands.scores import tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    for part in tables(result, console):
        console.print(part)
