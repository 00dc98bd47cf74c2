"""sterna verify: is the file whole, and is this the right base?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sterna.commands.shared import BASE_HELP, AllowNarrower, ExpertFile, Json, print_json, progress_bar


def verify(
    expert: ExpertFile,
    base: Annotated[str | None, typer.Option(metavar="BASE", help=BASE_HELP, show_default=False)] = None,
    allow_narrower: AllowNarrower = False,
    as_json: Json = False,
) -> None:
    """Check that an expert file is whole, and with --base that this is the base it was made for. Exit code 2 where it is not."""
    from sterna.verification import verify as run

    with progress_bar() as progress:
        result = run(expert, base, allow_narrower=allow_narrower, progress=progress)
    if as_json:
        print_json({"file": str(expert), "whole": True, **asdict(result)})
        return
    print(f"{expert}: whole, sha256 {result.digest}")
    if result.base is not None:
        narrower = f", {len(result.narrower)} tensors in a narrower dtype" if result.narrower else ""
        absent = f", {len(result.absent)} tensors of the base are not there" if result.absent else ""
        print(f"{result.base}: the right base{narrower}{absent}")
