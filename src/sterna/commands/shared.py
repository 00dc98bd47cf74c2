"""What the commands share: their common arguments, JSON output, warnings and progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sterna.errors import CannotWrite, InvalidArgument
from sterna.progress import Progress, silent

if TYPE_CHECKING:
    from sterna.summary import Summary

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; messages stay on stderr.")]
ExpertFile = Annotated[Path, typer.Argument(metavar="EXPERT", help="An expert file.", show_default=False)]
AllowNarrower = Annotated[bool, typer.Option("--allow-narrower", help="Accept the expert's base in a narrower dtype than the expert was made on.")]

WIDE = 120
"""Columns of a terminal from which on progress has its rate beside it."""

BASE_HELP = "The base: a model folder, a safetensors file, or a hub id (org/name or org/name@revision)."


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def changed(summary: Summary) -> str:
    """How much of the base a lossless expert changes."""
    share = summary.nonzeros / summary.parameters if summary.parameters else 0.0
    return f"{summary.nonzeros:,} of {summary.parameters:,} entries changed ({share:.2%})"


def warn(message: str) -> None:
    """A message that is no result: on stderr."""
    print(f"sterna: {message}", file=sys.stderr)


def say(text: str) -> None:
    """A result in words: on a terminal folded between words, else as it is."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(text))


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with rate, time left and a note (a loss, say) for each step, on a terminal only; gone when the work is done."""
    if not sys.stderr.isatty():
        yield silent
        return
    import rich.progress
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    console = Console(stderr=True)
    wide = console.width >= WIDE

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{_count(speed)} {task.fields['unit']}/s" if speed else "")

    class Note(ProgressColumn):  # what gives way where room is short
        def render(self, task: Task) -> Text:
            return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")

    bar = rich.progress.Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(40 if wide else 10),
        TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True)),
        *([Rate(table_column=Column(no_wrap=True))] if wide else []),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        Note(),
        console=console,
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def report(step: str, done: int, total: int, unit: str, note: str = "") -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(step, total=total, completed=done, unit=unit, note=note)
        bar.update(tasks[step], completed=done, total=total, note=note)

    with bar:
        yield report


def _count(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f} "


def size(count: int) -> str:
    """Bytes as a person reads them, in decimal units."""
    for unit, letter in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {letter}"
    return f"{count} bytes"


def by_task(given: Sequence[str], option: str) -> Any:
    """One file, or files by the name of their task. Raises InvalidArgument for several without names, or a name given twice."""
    found: dict[str, str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        named = bool(equals and name and value) and not Path(item).exists()
        if not named:
            if len(given) > 1:
                raise InvalidArgument(f"{option} is given {len(given)} times, and {item!r} names no task; expected TASK=FILE each time")
            return item
        if name in found:
            raise InvalidArgument(f"{option} is given twice for the task {name!r}")
        found[name] = value
    return found


def refuse_unwritable(path: Path) -> None:
    """Raise CannotWrite, before any work, where a file could not be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise CannotWrite(f"{path} cannot be written; expected a file in a folder that exists and can be written to")
