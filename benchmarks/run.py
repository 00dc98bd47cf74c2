"""Run the benchmarks one after another and write their tables: results/NAME.json, results/README.md, and between the marks of docs/benchmarks.md.

    python benchmarks/run.py                 # all but the long ones, about 25 minutes on two quiet cores
    python benchmarks/run.py attach swap     # some
    python benchmarks/run.py --tables        # none: only the tables again, from the results that are there
    python benchmarks/run.py --check         # exit code 1 where a table is not what the results say

The long ones (causal_lm_training by name; those in APART by themselves) go on where they were stopped; their tables are written too.
Needs what `python -m sterna.demo.assets --all` fetches, the demo's training (made where it is not cached) and, for the causal language model, gguf.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rendering import goals, markdown, result_markdown

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "benchmarks.md"
NAMES = (
    "size",
    "coding",
    "lossless",
    "compress",
    "attach",
    "swap",
    "latency",
    "training_cost",
    "threads",
    "memory",
    "causal_lm",
    "bitmasks",
    "merging",
    "compose",
    "optimizers",
    "command_line",
)
LONG = ("causal_lm_training", "lorahub_causal_lm")
"""Run where they are named."""
APART = ("accuracy", "pafi_ternary", "merge_scores", "frontier", "allocation", "lorahub")
"""Run by their own commands, with results of their own kind and a `tables()` that tells them as Markdown."""
PASSED_ON = ("--base", "--tuned", "--causal-lm")
ALONE = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Where a script wants more threads than one, it says so to torch."""


def results() -> dict[str, dict[str, Any]]:
    """What there is, by name, in the order of NAMES and LONG."""
    files = {name: RESULTS / f"{name}.json" for name in NAMES + LONG}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def apart() -> dict[str, str]:
    """The tables of those in APART that have been run, by name."""
    return {name: importlib.import_module(name).tables() for name in APART if (RESULTS / f"{name}.json").exists()}


def machine_lines(found: dict[str, dict[str, Any]]) -> str:
    """The machine, once for each description that the results carry."""
    lines: dict[str, list[str]] = {}
    for name, result in found.items():
        machine = {key: value for key, value in result["machine"].items() if key not in ("commit", "date", "load_before", "load_after")}
        cpu, cores, caches, memory, system = (machine.pop(key) for key in ("cpu", "cores", "caches", "memory_gb", "system"))
        hardware = f"{cpu}, {cores} cores, {caches}, {memory} GB, {system}"
        software = ", ".join(f"{key} {value}" for key, value in machine.items())
        lines.setdefault(f"{hardware}; {software}", []).append(name)
    return "\n".join(f"- {', '.join(names) if len(lines) > 1 else 'Machine'}: {text}" for text, names in lines.items())


def goal_table(found: dict[str, dict[str, Any]]) -> str:
    """Every goal of every script."""
    columns: list[str] = []
    rows = []
    for name, result in found.items():
        columns, lines = goals(result)
        rows += [[f"`{name}`", *line] for line in lines]
    return markdown(["script", *columns], rows)


def summary(found: dict[str, dict[str, Any]], others: dict[str, str]) -> str:
    """results/README.md."""
    rule = "A goal is met or missed where the whole 95 % interval lies on one side of it, else not decided."
    head = f"# Results\n\nWritten by `python benchmarks/run.py`; do not edit. {rule}"
    sections = [result_markdown(result) for result in found.values()] + [f"## {name}\n\n{text}" for name, text in others.items()]
    return "\n\n".join([head, machine_lines(found), "## Goals", goal_table(found), *sections]) + "\n"


def page(text: str, found: dict[str, dict[str, Any]], others: dict[str, str]) -> str:
    """docs/benchmarks.md with what lies between its marks made anew."""
    parts = {"machine": machine_lines(found), "goals": goal_table(found)}
    parts |= {name: result_markdown(result, whole=False) for name, result in found.items()} | others

    def filled(match: re.Match[str]) -> str:
        begin, name, end = match[1], match[2], match[4]
        return f"{begin}\n\n{parts[name]}\n\n{end}" if name in parts else match[0]

    return re.sub(r"(<!-- (\w+): begin -->)(.*?)(<!-- \2: end -->)", filled, text, flags=re.S)


def tables() -> Iterator[tuple[Path, str]]:
    """The files that hold tables, and what they should say."""
    found, others = results(), apart()
    yield RESULTS / "README.md", summary(found, others)
    if PAGE.exists():
        yield PAGE, page(PAGE.read_text(encoding="utf-8"), found, others)


def run(name: str, arguments: list[str]) -> bool:
    """Run one script; whether it went well."""
    started = time.perf_counter()
    print(f"== {name}", flush=True)
    done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments], check=False, env={**os.environ, **ALONE})
    print(f"== {name}: {'done' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - started:.0f} s\n", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}, all where none is named; and {', '.join(LONG)}")
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables from the results")
    parser.add_argument("--check", action="store_true", help="run and write nothing, compare the tables with the results")
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see that it runs")
    parser.add_argument("--processor-time", action="store_true", help="for development while others use the machine")
    for flag in PASSED_ON:
        parser.add_argument(flag, metavar="DIR", help="as the scripts take it")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.names if name not in NAMES + LONG]:
        own = f"; it has a command of its own: python benchmarks/{unknown[0]}.py" if unknown[0] in APART else ""
        parser.error(f"no benchmark named {unknown[0]!r}; there are {', '.join(NAMES + LONG)}{own}")
    if chosen.check:
        stale = [str(path.relative_to(HERE.parent)) for path, text in tables() if not path.exists() or path.read_text(encoding="utf-8") != text]
        print(f"not what the results say: {', '.join(stale)}; python benchmarks/run.py --tables" if stale else "the tables are what the results say")
        return 1 if stale else 0
    arguments = [flag for flag, given in (("--quick", chosen.quick), ("--processor-time", chosen.processor_time)) if given]
    for flag in PASSED_ON:
        value = getattr(chosen, flag.removeprefix("--").replace("-", "_"))
        arguments += [flag, value] if value else []
    failed = [] if chosen.tables else [name for name in chosen.names or NAMES if not run(name, arguments)]
    for path, text in tables():
        path.write_text(text, encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
