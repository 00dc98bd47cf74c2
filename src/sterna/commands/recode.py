"""sterna recode: the same expert in other bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sterna.commands.compress import CODING_HELP, CodingName
from sterna.commands.shared import ExpertFile, Json, print_json, progress_bar, size


def recode(
    expert: ExpertFile,
    coding: Annotated[CodingName, typer.Option(help=CODING_HELP, show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; by default in its place.")] = None,
    as_json: Json = False,
) -> None:
    """Code an expert anew: its content and content digest stay, its bytes change."""
    from sterna.expert.file import load
    from sterna.recoding import recode as run

    before = load(expert)
    with progress_bar() as progress:
        after = run(before, coding.value, progress=progress)
    target = output or expert
    after.save(target)
    sizes = before.file_bytes or 0, target.stat().st_size
    if as_json:
        digests = {"digest": after.digest, "content_digest": after.content_digest}
        print_json({"file": str(target), "coding": coding.value, "bytes_before": sizes[0], "bytes": sizes[1], **digests})
    else:
        print(f"{target}: {size(sizes[1])}, {sizes[1] / sizes[0]:.2f} times the {size(sizes[0])} of before; content digest {after.content_digest}")
