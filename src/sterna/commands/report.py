"""sterna report: experts measured beside their base and tuned model, as one HTML file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sterna.commands.rows import LabelColumn, MaxLength, PairColumn, TargetColumn, TextColumn, need_scoring
from sterna.commands.shared import Json, by_task, print_json, progress_bar, refuse_unwritable, say, warn
from sterna.errors import InvalidArgument

WHAT_HELP = "Expert files, or the run folder of `sterna pilot`, `sterna train` or `sterna search`."
DATA_HELP = "Test rows: .csv, .tsv, .jsonl, .parquet, .txt, or a hub id. Given again as TASK=FILE: several tasks, each with the experts named for it."
TUNED_HELP = "The tuned model's folder, a PEFT folder, or an exact expert; TASK=DIR where there are several tasks."


def report(
    what: Annotated[list[Path], typer.Argument(metavar="RUN_DIR | EXPERT...", help=WHAT_HELP, show_default=False)],
    base: Annotated[str | None, typer.Option(metavar="BASE", help="The base: a model folder or a hub id.", show_default="the run's")] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="FILE | TASK=FILE", help=DATA_HELP, show_default="the run's")] = None,
    tuned: Annotated[list[str] | None, typer.Option(metavar="DIR | TASK=DIR", help=TUNED_HELP, show_default="the run's")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="A metric, or package.module:function.", show_default="by the task")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Test rows to use, each label in proportion.", show_default="all")] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    target_column: TargetColumn = None,
    max_length: MaxLength = None,
    target_max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a generated text at most.", show_default="64, or as the run says")
    ] = None,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Other ways to store the tuned model beside the experts.")] = True,
    repeats: Annotated[int, typer.Option(min=3, help="How often each time is taken.")] = 15,
    lang: Annotated[str, typer.Option("--lang", metavar="en|ja", help="The language that the page opens in; it holds both.")] = "en",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Measure experts and write one self-contained HTML file: scores, storage, transfer, swaps, latency, memory, and the numbers behind them."""
    folders = any(path.is_dir() for path in what)
    if folders and len(what) > 1:
        raise InvalidArgument(f"a folder is among {len(what)} paths; expected one run folder, or expert files")
    if not folders and (base is None or not data):
        raise InvalidArgument(f"{'--base' if base is None else '--data'} is missing; experts need a base and test rows to be measured with")
    refuse_unwritable(output)
    need_scoring("peft")
    from sterna.reporting.measure import measure
    from sterna.reporting.page import checked_language, write_page
    from sterna.reporting.subjects import subjects_of
    from sterna.training.errors import Interrupted

    checked_language(lang)
    columns = {"text": text_column, "text_pair": pair_column, "label": label_column, "target": target_column}
    options: dict[str, Any] = {"metric": metric, "rows": rows, "max_length": max_length, "warn": warn, **columns}
    options |= {"target_max_length": target_max_length} if target_max_length is not None else {}
    rows_of, tuned_of = by_task(data, "--data") if data else None, by_task(tuned, "--tuned") if tuned else None
    found = None
    if folders:
        from sterna.pilot.run import report_of_pilot
        from sterna.reporting.runs import subject_of_run

        found = report_of_pilot(what[0])
        subjects = [] if found else [subject_of_run(what[0], base, rows_of, tuned_of, controls, options)]
    else:
        assert base is not None
        assert rows_of is not None
        subjects = subjects_of(base, what, rows_of, tuned_of, controls=controls, **options)
    if found is None:
        try:
            with progress_bar() as progress:
                found = measure(subjects, repeats=repeats, inputs=[("command", shlex.join(["sterna", *sys.argv[1:]]))], progress=progress)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing was written") from None
    write_page(found, output, lang)
    if as_json:
        print_json(found.to_dict())
    else:
        from sterna.reporting.verdict import verdict

        say(" ".join(getattr(text, lang) for text in verdict(found)))
        print(output)
