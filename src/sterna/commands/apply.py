"""sterna apply: an expert and its base become a folder that from_pretrained loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sterna.commands.shared import BASE_HELP, AllowNarrower, ExpertFile, Json, print_json, progress_bar


def apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help=BASE_HELP, show_default=False)],
    expert: ExpertFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT_DIR", help="The folder to write; new or empty.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="A full checkpoint also for LoRA and (IA)3 experts, not a PEFT folder.")] = False,
    head_task: Annotated[str | None, typer.Option("--head-task", metavar="TASK", help="Whose head, of an expert merged of several.")] = None,
    allow_narrower: AllowNarrower = False,
    as_json: Json = False,
) -> None:
    """Write the tuned model as a checkpoint folder; for an expert made from LoRA or (IA)3, as a PEFT folder."""
    from sterna.applying import apply as run

    with progress_bar() as progress:
        folder = run(base, expert, output, merged=merged, head=head_task, allow_narrower=allow_narrower, progress=progress)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if as_json:
        print_json({"folder": str(folder), "files": files})
    else:
        print(f"{folder}: {', '.join(files)}")
