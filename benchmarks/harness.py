"""What every benchmark shares: timing sides in turn, ratios with their intervals, goals, the machine, and the JSON result with its tables.

Sides are timed in turn, round after round, in an order that changes, so that a slow moment of the machine meets all of them. A ratio is the
geometric mean of the rounds' ratios, with the 95 % percentile bootstrap interval over rounds. No script asserts a time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rendering
from machine import machine

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on a hub
RESULTS = Path(__file__).parent / "results"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CLOCK: Callable[[], float] = time.perf_counter


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval, from `rounds` paired rounds."""

    value: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Side:
    """One way of doing a thing: `work` is timed, `before` and `after` are not. `wall` is for what runs in threads, whatever the options say."""

    work: Callable[[], object]
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    wall: bool = False

    def seconds(self) -> float:
        self.before()
        clock = time.perf_counter if self.wall else CLOCK
        started = clock()
        self.work()
        taken = clock() - started
        self.after()
        return taken


def in_turn(
    sides: Mapping[str, Side], rounds: int, until: Callable[[Mapping[str, Sequence[float]]], bool] = lambda times: False, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of every side in every round, by its name; the first `warm` rounds are left out. Stops early where `until` says so.

    Every other round runs in reverse order, and the order moves on by one. The garbage collector waits meanwhile, as in timeit.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(-warm, rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order if number % 2 == 0 else order[::-1]:
                taken = sides[name].seconds()
                if number >= 0:
                    times[name].append(taken)
            if number >= 0 and until(times):
                break
    finally:
        gc.enable()
    return times


def ratio(above: Sequence[float], below: Sequence[float], draws: int = 10_000) -> Estimate:
    """exp(mean(log(above / below))) over paired rounds, with its percentile bootstrap interval."""
    return _bootstrap(np.log(np.asarray(above) / np.asarray(below)), math.exp, draws)


def mean(values: Sequence[float], draws: int = 10_000) -> Estimate:
    """The mean with its percentile bootstrap interval."""
    return _bootstrap(np.asarray(values, np.float64), float, draws)


def _bootstrap(values: np.ndarray, back: Callable[[float], float], draws: int) -> Estimate:
    chosen = np.random.default_rng(0).integers(0, values.size, (draws, values.size))
    low, high = np.percentile(values[chosen].mean(1), (2.5, 97.5))
    return Estimate(back(values.mean()), back(low), back(high), values.size)


def milliseconds(times: Sequence[float]) -> float:
    """Their median."""
    return 1e3 * float(np.median(times))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's number of threads inside, which is also Sterna's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Report:
    """The result of one script, printed and kept as results/NAME.json. Tables hold numbers, estimates or text; what is shown is made of them."""

    file: str
    about: str
    quick: bool = False
    name: str = field(init=False)
    result: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.name = Path(self.file).stem
        self._started = time.time()
        about = {key.lower(): " ".join(text.split()) for key, text in re.findall(r"^(\w+): (.*?)(?=\n\w+: |\Z)", self.about, re.M | re.S)}
        command = (
            f"python benchmarks/{self.name}.py" + (" --quick" if self.quick else "") + (" --processor-time" if time.process_time is CLOCK else "")
        )
        self.result = {"name": self.name, "command": command, "quick": self.quick, "about": about, "machine": machine(), "goals": [], "tables": []}

    def goal(self, text: str, measured: Estimate | float, *, at_least: float | None = None, at_most: float | None = None, unit: str = "x") -> None:
        """Note a goal and what was measured. Met or missed where the whole interval is on one side of each limit, else not decided."""
        low, high = (measured.low, measured.high) if isinstance(measured, Estimate) else (measured, measured)
        lower, upper = (-math.inf if at_least is None else at_least), (math.inf if at_most is None else at_most)
        verdict = "met" if lower <= low and high <= upper else "missed" if high < lower or low > upper else "not decided"
        limits = {"at_least": at_least, "at_most": at_most}
        self.result["goals"].append({"goal": text, **limits, "unit": unit, "measured": _plain(measured), "verdict": verdict})

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        self.result["tables"].append({"title": title, "columns": list(columns), "rows": [[_plain(c) for c in row] for row in rows], "note": note})

    def write(self) -> None:
        """Print the tables and write the JSON."""
        self.result["machine"]["load_after"] = os.getloadavg()[0]
        self.result["seconds"] = round(time.time() - self._started, 1)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.name}.json").write_text(json.dumps(self.result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        rendering.show(self.result)


def _plain(cell: Any) -> Any:
    if isinstance(cell, Estimate):
        return asdict(cell)
    return cell.item() if isinstance(cell, np.generic) else cell


def options(about: str | None, *extra: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """The arguments that every script takes, and its own."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see that it runs")
    parser.add_argument("--base", type=Path, help="base encoder folder (by default the demo's)")
    parser.add_argument("--tuned", type=Path, help="its full fine-tune (by default the demo's, trained where it is not cached)")
    parser.add_argument("--causal-lm", type=Path, help="causal language model folder (by default the one of the assets)")
    parser.add_argument("--processor-time", action="store_true", help="time the process, not the wall: for development while others use the machine")
    for flag, settings in extra:
        parser.add_argument(flag, **settings)
    chosen = parser.parse_args()
    if chosen.processor_time:
        global CLOCK
        CLOCK = time.process_time
    return chosen


def note(message: str) -> None:
    """Say on stderr what is going on."""
    print(message, file=sys.stderr, flush=True)
