"""Results as tables: on the terminal (by rich where it is installed, else Markdown) and as Markdown for files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def shown(cell: Any) -> str:
    """Text as it is; counts with separators; measures with three digits; an estimate as `value [low, high]`."""
    match cell:
        case None:
            return ""
        case {"value": value, "low": low, "high": high}:
            digits = _digits(value, high - low)
            return f"{value:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"
        case bool():
            return "yes" if cell else "no"
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:,.{_digits(cell, 0)}f}"
    return str(cell)


def _digits(value: float, width: float) -> int:
    """Decimals for three digits of the value, more where an interval is narrow beside it."""
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return digits + 1 if 0 < width < 0.05 * size and size < 10 else digits


def goals(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The goals of one result as a table."""
    rows = []
    for goal in result["goals"]:
        low, high, unit = goal["at_least"], goal["at_most"], f" {goal['unit']}".rstrip()
        measured = goal["measured"]
        value = f"{measured:.4f}" if isinstance(measured, float) and abs(measured) < 10 else shown(measured)
        limit = f"{low:g} to {high:g}" if low is not None and high is not None else f"at least {low:g}" if low is not None else f"at most {high:g}"
        rows.append([goal["goal"], limit + unit, value + unit, goal["verdict"]])
    return ["goal", "limit", "measured, 95 % interval", "verdict"], rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(shown(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def result_markdown(result: Mapping[str, Any], whole: bool = True) -> str:
    """The goals and tables of one result, and the command that made them; `whole` with its name, the question and what was predicted."""
    about = result["about"]
    parts = [f"## {result['name']}", about.get("question", "")] if whole else []
    parts += [f"{word.capitalize()}: {about[word]}" for word in ("peer", "predicted", "note") if whole and word in about]
    if result["goals"]:
        parts.append(markdown(*goals(result)))
    for table in result["tables"]:
        parts += [f"**{table['title']}**", markdown(table["columns"], table["rows"]), table["note"]]
    machine = result["machine"]
    load = f"load {machine['load_before']:.1f} before, {machine['load_after']:.1f} after"
    few = ", few repetitions" if result["quick"] else ""
    parts.append(f"Made by `{result['command']}` in {result['seconds']:.0f} s{few}; commit {machine['commit']}, {machine['date']}, {load}.")
    return "\n\n".join(part for part in parts if part)


def show(result: Mapping[str, Any]) -> None:
    """Print the result's tables."""
    listed = [("Goals", *goals(result), "")] if result["goals"] else []
    listed += [(t["title"], t["columns"], t["rows"], t["note"]) for t in result["tables"]]
    if not sys.stdout.isatty():
        print(result_markdown(result))
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(result_markdown(result))
        return
    console = Console()
    for title, columns, rows, remark in listed:
        table = Table(title=f"{result['name']}: {title}", caption=remark, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(shown, row))
        console.print(table)
