"""sterna pilot: compression raised step by step behind gates, ending in a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sterna.commands.rows import need_scoring
from sterna.commands.shared import Json, print_json, progress_bar, say, warn


def pilot(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="The plan: model, tasks, steps, gates.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN_DIR", help="The run folder; the report goes there.", show_default=False)],
    restart: Annotated[bool, typer.Option("--restart", help="Take all steps again in place of going on; trainings and scores are kept.")] = False,
    as_json: Json = False,
) -> None:
    """Run a pilot in steps: one small task first, compression raised behind your gates, then all experts side by side, then the report."""
    need_scoring("yaml", "peft")
    from sterna.pilot.run import pilot as run
    from sterna.reporting.verdict import verdict
    from sterna.training.config import read_yaml

    raw = read_yaml(plan)
    with progress_bar() as progress:
        result = run(raw, output, restart=restart, warn=warn, progress=progress)
    if as_json:
        print_json(result.report.to_dict() | {"page": str(result.page), "experts": {name: str(path) for name, path in result.experts.items()}})
        return
    language = raw.get("language", "en")
    for step in result.report.gates:
        failed = [gate.name for gate in step.gates if not gate.passed]
        print(f"{step.task}, density {step.density:g}: {f'stopped by {chr(44).join(failed)}' if failed else 'passed'}, {step.bytes:,} bytes")
    say(" ".join(getattr(text, language) for text in verdict(result.report)))
    for path in (*result.experts.values(), result.page):
        print(path)
