"""sterna search: the smallest expert within a loss of the tuned model, or the best one under a size."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sterna.commands.compress import CODING_HELP, TUNED_HELP, CodingName
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
from sterna.commands.shared import BASE_HELP, Json, print_json, progress_bar, refuse_unwritable, say, size, warn
from sterna.errors import InvalidArgument, SternaError

if TYPE_CHECKING:
    from sterna.searching.result import SearchResult

DATA_HELP = "Rows to choose by: .csv, .tsv, .jsonl, .parquet, .txt, or a hub id. May be given again."
TEST_HELP = "Rows for the test, or the share of --data to put aside for it."
WITHIN_HELP = "The smallest file whose score is at most this much worse than the tuned model's; points of 100 where the score is a share."
BYTES_HELP = "The best score of at most this many bytes, as 500K, 2M or 750000."
METRIC_HELP = "accuracy, macro_f1, matthews, spearman, perplexity, rougeL, ... or package.module:function."

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class Unreached(SternaError, ValueError):
    """No expert that was tried is within the loss that was asked for."""


def search(
    base: Annotated[str, typer.Argument(metavar="BASE", help=BASE_HELP, show_default=False)],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help=TUNED_HELP, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="EXPERT", help="The expert file to write.", show_default=False)],
    data: Annotated[list[str] | None, typer.Option(metavar="FILE", help=DATA_HELP, show_default=False)] = None,
    test: Annotated[str, typer.Option(metavar="FILE", help=TEST_HELP)] = "0.5",
    within: Annotated[float | None, typer.Option(help=WITHIN_HELP, show_default=False)] = None,
    max_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help=BYTES_HELP, show_default=False)] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help=METRIC_HELP, show_default="by the task")] = None,
    task: TaskOption = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Settings that are scored at most.")] = 24,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    target_column: TargetColumn = None,
    max_length: MaxLength = None,
    target_max_length: TargetMaxLength = 64,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of --data to use, each label in proportion.", show_default="all")] = None,
    batch_size: BatchSize = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is put aside for the test.")] = 0,
    dtype: Dtype = "fp32",
    coding: Annotated[CodingName, typer.Option(help=CODING_HELP)] = CodingName.FAST,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Tensors that stay at the base. May be given again.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--meta", metavar="KEY=VALUE", help="Metadata to carry, as task=legal. May be given again.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where scores are kept.", show_default="EXPERT.search")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on where base and tuned model do not seem to belong together.")] = False,
    as_json: Json = False,
) -> None:
    """Choose density, scale and the rest by validation score, and write the expert. The same command goes on where it was interrupted."""
    check_task(task)
    if data:
        need_scoring()
    from sterna.commands.fields import parse_metadata
    from sterna.searching.search import search as run
    from sterna.training.errors import Interrupted
    from sterna.writing import whole_file

    if not data and within is not None:
        raise InvalidArgument("--within needs rows to measure it on; expected --data FILE")
    refuse_unwritable(output)
    kept = run_dir if run_dir is not None else Path(f"{str(output).removesuffix('.safetensors')}.search")
    options: dict[str, Any] = {"task": task, "text": text_column, "text_pair": pair_column, "label": label_column, "target": target_column}
    options |= {"rows": rows, "max_length": max_length, "target_max_length": target_max_length, "batch": batch_size, "dtype": dtype}
    if data:
        options |= {"data": data[0] if len(data) == 1 else data, "test": _test(test), "metric": metric, "run_dir": kept}
    else:
        options = {}
    try:
        with progress_bar() as progress:
            result = run(
                base,
                tuned,
                within=within,
                max_bytes=_bytes(max_bytes) if max_bytes is not None else None,
                evaluations=evaluations,
                coding=coding.value,
                exclude=exclude or [],
                force=force,
                seed=seed,
                metadata=parse_metadata(metadata or []),
                warn=warn,
                progress=progress,
                **options,
            )
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the same command goes on with the scores in {kept}: {shlex.join(['sterna', *sys.argv[1:]])}") from None
    if not result.reached:
        raise Unreached(_unreached(result))
    result.expert.save(output)
    if data:  # so that `sterna report` finds all of it
        said = {"base": base, "tuned": tuned, "data": options.pop("data"), "test": options.pop("test"), "seed": seed}
        options.pop("run_dir")
        with whole_file(kept / "search.json") as file:
            file.write(json.dumps({"file": str(output), "arguments": {**said, "options": options}, **result.to_dict()}, indent=2).encode())
    if as_json:
        print_json({"file": str(output), **result.to_dict()})
    else:
        _show(result, output, kept)


def _test(given: str) -> str | float:
    try:
        return float(given)
    except ValueError:
        return given


def _bytes(given: str) -> int:
    """A size in decimal units. Raises InvalidArgument."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", given.strip().lower())
    if found is None:
        raise InvalidArgument(f"--max-bytes is {given!r}; expected a number of bytes, as 500K, 2M or 750000")
    return int(float(found[1]) * _UNITS[found[2]])


def _unreached(result: SearchResult) -> str:
    from sterna.commands.scores import figures

    assert result.selection is not None
    assert result.metric is not None
    found = result.selection
    tuned, expert = figures(result.metric, found.tuned, found.expert)
    loss = _rounded_up(abs(found.tuned - found.expert))
    return (
        f"none of {len(result.trials)} settings is within {result.goal.within:g} of the tuned model's {result.metric.title}, {tuned}: the best, "
        f"{result.setting}, has {expert} in {size(result.bytes)}; --within {loss:g} takes it, or allow more --evaluations"
    )


def _rounded_up(value: float) -> float:
    """In three digits, and never less."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2) if value else 1.0
    return float(f"{math.ceil(value / unit) * unit:.3g}")


def _show(result: SearchResult, output: Path, kept: Path) -> None:
    say(f"{output}: {size(result.bytes)}; {result.setting}")
    if result.selection is None:
        say("chosen by formula, without data: --data FILE with --within or --max-bytes chooses by score")
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(_table(result))
    settle = result.rows_to_settle
    if result.goal.within is not None:
        sign = 1 if result.higher_is_better else -1
        loss = sign * (result.selection.tuned - result.selection.expert)
        more = f"; about {settle:,} rows like these would settle it" if settle and settle > (result.selection.rows or 0) else ""
        say(f"within {result.goal.within:g}: on the selection rows it {'gains' if loss < 0 else 'loses'} {abs(loss):.2f}{more}")
    made = "" if result.scored == len(result.trials) else f", {result.scored} of them now"
    say(f"{len(result.trials)} settings scored{made}; scores are kept in {kept}")


def _table(result: SearchResult) -> Any:
    from rich.table import Table

    from sterna.commands.scores import differing, scored

    assert result.metric is not None
    parts = {name: found for name, found in (("selection", result.selection), ("test", result.test)) if found is not None and found.outcomes}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(result.metric.title + ("" if result.metric.higher_is_better else " (less is better)"))
    for name, found in parts.items():
        table.add_column(f"{name}, {found.rows:,} rows", justify="right")
    for place, who in enumerate(("base", "tuned model", "expert")):
        cells = [scored(found.outcomes[place].interval(), result.metric) for found in parts.values() if found.outcomes]
        table.add_row(who, *cells)
    differences = [differing(found.outcomes[2].against(found.outcomes[1]), result.metric) for found in parts.values() if found.outcomes]
    table.add_row("expert against tuned", *(", ".join(cells) for cells in differences))
    return table
