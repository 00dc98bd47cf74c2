"""sterna compose: weights of many experts, found from a few examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sterna.commands.fields import parse_metadata
from sterna.commands.rows import Dtype, LabelColumn, MaxLength, PairColumn, TargetColumn, TaskOption, TextColumn, check_task, need_scoring
from sterna.commands.shared import BASE_HELP, Json, print_json, progress_bar, size
from sterna.errors import InvalidArgument

if TYPE_CHECKING:
    from sterna.composing.examples import ComposedExamples, Contender


def compose(
    experts: Annotated[list[Path] | None, typer.Argument(metavar="EXPERT ...", help="Experts for one base.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(metavar="BASE", help=BASE_HELP, show_default=False)] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="A few labelled rows of the new task: .csv, .tsv, .jsonl, .txt.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="EXPERT", help="The expert file to write.", show_default=False)] = None,
    test: Annotated[str | None, typer.Option(metavar="FILE", help="Rows that the result is scored on; the search never sees them.")] = None,
    task: TaskOption = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="What the test rows are scored by.", show_default="by the task")] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    target_column: TargetColumn = None,
    max_length: MaxLength = None,
    budget: Annotated[int, typer.Option(help="Trials of the search at most; each expert alone is tried beside.")] = 40,
    l1: Annotated[float, typer.Option("--l1", help="What the mean magnitude of weights costs.")] = 0.05,
    bound: Annotated[float, typer.Option(help="The largest magnitude of a weight.")] = 1.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which experts are first tried, and of a new head.")] = 0,
    dtype: Dtype = "fp32",
    meta: Annotated[list[str] | None, typer.Option("--meta", metavar="KEY=VALUE", help="Metadata of the result.")] = None,
    as_json: Json = False,
) -> None:
    """Find weights of experts for a new task from a few examples (LoraHub), and write their weighted sum as an expert."""
    need_scoring()
    from sterna.composing.examples import compose_examples
    from sterna.training.errors import Interrupted

    if not experts:
        raise InvalidArgument("experts are missing; expected one or more expert files for the same base")
    for option, value in (("--base", base), ("--data", data), ("--output", output)):
        if value is None:
            raise InvalidArgument(f"{option} is missing: sterna compose EXPERT ... --base BASE --data FILE -o EXPERT")
    check_task(task)
    assert base is not None
    assert data is not None
    assert output is not None
    try:
        with progress_bar() as progress:
            found = compose_examples(
                experts,
                base,
                data,
                test=test,
                task=task,  # type: ignore[arg-type]
                metric=metric,
                columns={"text": text_column, "text_pair": pair_column, "label": label_column, "target": target_column},
                max_length=max_length,
                budget=budget,
                seed=seed,
                bounds=(-bound, bound),
                l1=l1,
                dtype=dtype,
                metadata=parse_metadata(meta or []),
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    found.composed.expert.save(output)
    if as_json:
        print_json({"file": str(output), **found.to_dict()})
    else:
        _show(output, found)


def _show(output: Path, found: ComposedExamples) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    weights = Table("expert", "weight", box=None)
    order = sorted(zip(found.composed.weights, found.composed.parents, strict=True), key=lambda pair: -abs(pair[0]))
    for weight, name in order:
        weights.add_row(name, f"{weight:+.3f}")
    console.print(weights)
    scores = Table("", f"score of {found.rows} examples", box=None)
    tested = found.own.outcome is not None
    if found.own.outcome is not None:
        scores.add_column(f"{found.own.outcome.metric.title}, {found.own.outcome.rows} test rows")
        scores.add_column("composed minus this")
    for contender in (found.base, found.single, found.own):
        name = f"best alone: {contender.name}" if contender is found.single else contender.name
        scores.add_row(name, f"{contender.score:.4f}", *(_tested(contender, found.own) if tested else ()))
    console.print(scores)
    trials = len(found.composed.trials)
    note = "" if tested else "; no test rows were given (--test), so nothing is known of other texts"
    console.print(f"{output}: {size(output.stat().st_size)}, the best of {trials} trials{note}", highlight=False, soft_wrap=True)


def _tested(contender: Contender, own: Contender) -> tuple[str, str]:
    assert contender.outcome is not None
    assert own.outcome is not None
    interval = contender.outcome.interval()
    value = f"{contender.outcome.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
    if contender is own:
        return value, ""
    found = own.outcome.against(contender.outcome)
    return value, f"{found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f}){', noise' if found.noise else ''}"
