"""Experts, their base and rows -> the numbers of a report: each task on its own, then all of them on one live model."""

from __future__ import annotations

import datetime
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sterna.compression import DENSITY
from sterna.errors import WrongBase
from sterna.expert.expert import Expert
from sterna.live.patch import attach, attached, forget_base
from sterna.progress import Progress, silent
from sterna.reporting.machine import machine
from sterna.reporting.report import (
    Candidate,
    DtypeRun,
    Kept,
    Kind,
    Latency,
    Layer,
    Memory,
    Metric,
    Neighbour,
    Report,
    SideBySide,
    Steps,
    TaskReport,
    ThreadRun,
)
from sterna.reporting.sizes import bytes_of, layers_of, memory_of, ways_to_keep
from sterna.reporting.timing import THREADS, Count, latency, live_steps, same_bits, swaps_among, with_threads
from sterna.scoring.bench import Bench
from sterna.scoring.evaluate import SELECTION
from sterna.scoring.intervals import Difference, Estimate
from sterna.scoring.outcome import Outcome
from sterna.sources.checkpoint import open_checkpoint
from sterna.summary import inspect
from sterna.training.evaluation import Outputs
from sterna.training.models import DTYPES, load_model
from sterna.training.tokens import batches

REPEATS = 15
"""Rounds of the live steps, and pairs of forward passes."""
LATENCY_ROWS = 16
DTYPE_ROWS = 300
"""Rows at most that the expert answers in each precision."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One task to measure: its name, how its bench is opened, the expert that the report speaks of and what it is called.

    `tuned` is the tuned model's folder, a PEFT folder or an exact expert; `others` are further experts for the same task by label.
    `expert` is None where a pilot's gates left none. `controls` asks for other ways to store the tuned model, at the expert's density; `choose` opens
    rows for the one control that has a scale to choose (else a fifth of the bench's are kept apart for it). `trail` is what was tried before on
    `trail_rows` rows.
    """

    name: str
    open: Callable[[], Bench]
    expert: Expert | None
    label: str = ""
    tuned: Path | Expert | None = None
    others: tuple[tuple[str, Expert], ...] = ()
    controls: bool = False
    choose: Callable[[], Bench] | None = None
    trail: tuple[Candidate, ...] = ()
    trail_rows: int = 0

    @property
    def has_controls(self) -> bool:
        return self.controls and self.tuned is not None and self.expert is not None


@dataclass(frozen=True, slots=True)
class TaskPart:
    """What was measured of one task on its own."""

    task: TaskReport
    dtypes: tuple[DtypeRun, ...]


@dataclass(frozen=True, slots=True)
class LivePart:
    """What was measured on one live model that all experts share."""

    steps: Steps
    latency: Latency
    memory: Memory
    restored: bool
    threads: tuple[ThreadRun, ...]
    side_by_side: SideBySide | None


def measure(subjects: Sequence[Subject], *, repeats: int = REPEATS, inputs: Sequence[tuple[str, str]] = (), progress: Progress = silent) -> Report:
    """Measure every subject and make a report of it. `inputs` are further lines for what was run.

    Raises what opening the benches and attaching raise, before anything is measured of that task.
    """
    started = time.perf_counter()
    parts: list[TaskPart] = []
    benches: list[Bench] = []
    for subject in subjects:
        bench = subject.open()
        if subject.has_controls and subject.choose is None:
            bench, apart = bench.split(1 - SELECTION)
            subject = replace(subject, choose=partial(replace, apart))
            inputs = (*inputs, (f"{subject.name}: rows kept apart", f"{len(apart)}, for the scale of a control"))
        parts.append(task_part(subject, bench, progress))
        benches.append(replace(bench, model=benches[0].model) if benches else bench)
    live = live_part(subjects, benches, repeats, progress)
    lines = (*inputs, *((f"{subject.name}: rows", bench.source) for subject, bench in zip(subjects, benches, strict=True)), *expert_lines(subjects))
    return report_of(benches[0].base, parts, live, inputs=lines, seconds=time.perf_counter() - started)


def expert_lines(subjects: Sequence[Subject]) -> tuple[tuple[str, str], ...]:
    """Which experts were measured, by the digest of their files."""
    return tuple((f"{one.name}: expert", f"{one.label}, sha256 {one.expert.digest}".removeprefix(", ")) for one in subjects if one.expert is not None)


def report_of(base: Path, parts: Sequence[TaskPart], live: LivePart | None, **fields: Any) -> Report:
    """The parts as one report, with the machine and today's date."""
    tensors = open_checkpoint(base).tensors.values()
    return Report(
        base=base.name,
        parameters=sum(math.prod(info.shape) for info in tensors if info.dtype.is_floating_point),
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        tasks=tuple(part.task for part in parts),
        dtypes=tuple(run for part in parts for run in part.dtypes),
        machine=machine(),
        **({} if live is None else {name: getattr(live, name) for name in LivePart.__slots__}),
        **fields,
    )


def task_part(subject: Subject, bench: Bench, progress: Progress = silent) -> TaskPart:
    """The scores of the base, the tuned model and the experts on the bench's rows; what each way to keep the task takes; other precisions."""

    def run(what: Any, called: str) -> Outcome:
        return bench.outcome(bench.outputs(what, progress=progress, step=f"{subject.name}: {called}"))

    base = run(None, "base")
    tuned = run(subject.tuned, "tuned model") if subject.tuned is not None else None
    candidates = [candidate("base", "", None, base, None, None)]
    if tuned is not None:
        candidates.append(candidate("tuned", "", bytes_of(subject.tuned), tuned, None, base))
    named = [] if subject.expert is None else [(subject.label, subject.expert), *subject.others]
    for name, expert in named:
        outcome = run(expert, name or "expert")
        chosen = expert is subject.expert
        size = inspect(expert).bytes
        facts = {"density": expert.facts.density, "alpha": expert.facts.alpha} if expert.facts.method == "compeft" else {}
        candidates.append(candidate("expert", name, size, outcome, tuned, base, chosen=chosen, **facts))
    if subject.has_controls:
        candidates += [candidate("control", title, size, outcome, tuned, base) for title, size, outcome in _controls(subject, bench, progress)]
    kept: tuple[Kept, ...] = ()
    layers: tuple[Layer, ...] = ()
    if subject.expert is not None:
        summary = inspect(subject.expert)
        kept, layers = ways_to_keep(summary, bench.model, bench.base, subject.tuned), layers_of(summary)
    task = TaskReport(subject.name, metric_of(base), base.rows, tuple(candidates), kept, layers, subject.trail, subject.trail_rows)
    return TaskPart(task, dtype_runs(subject, bench, progress))


def _controls(subject: Subject, bench: Bench, progress: Progress) -> Iterator[tuple[str, int, Outcome]]:
    """What each control is called, the bytes of its file, and how it did."""
    from sterna.scoring.controls import TITLES, TunedVector, controls

    assert subject.expert is not None
    assert subject.tuned is not None
    assert subject.choose is not None
    apart = replace(subject.choose(), model=bench.model)
    sign = 1 if bench.metric.higher_is_better else -1

    def rank(expert: Expert) -> float:
        return sign * apart.run(expert, progress=_renamed(progress, f"{subject.name}: choosing a scale")).value

    names = [name for name in TITLES if name != "compeft"]
    density = subject.expert.facts.density or DENSITY
    vector = TunedVector.of(bench.base, subject.tuned, progress)
    with tempfile.TemporaryDirectory(prefix="sterna-") as folder:
        for control in controls(vector, folder, density=density, names=names, rank=rank):
            found = bench.outputs(control.expert, progress=progress, step=f"{subject.name}: {control.title}")
            yield control.title, control.bytes, bench.outcome(found)


def metric_of(outcome: Outcome) -> Metric:
    metric = outcome.metric
    return Metric(metric.name, metric.title, metric.higher_is_better, metric.points)


def candidate(kind: Kind, label: str, size: int | None, outcome: Outcome, tuned: Outcome | None, base: Outcome | None, **fields: Any) -> Candidate:
    """An outcome beside those of the tuned model and the base on the same rows."""
    to_tuned = outcome.against(tuned) if tuned is not None else None
    to_base = outcome.against(base) if base is not None else None
    pair = (_estimate(to_tuned), _estimate(to_base))
    return Candidate(kind, label, size, outcome.interval(), *pair, p=to_tuned.p if to_tuned else None, **fields)


def _estimate(difference: Difference | None) -> Estimate | None:
    return None if difference is None else Estimate(difference.value, difference.low, difference.high)


def dtype_runs(subject: Subject, bench: Bench, progress: Progress) -> tuple[DtypeRun, ...]:
    """The expert on the base loaded in each precision, on some of the rows."""
    if subject.expert is None:
        return ()
    few = bench.rows(range(min(DTYPE_ROWS, len(bench))))
    runs: list[DtypeRun] = []
    reference: Outcome | None = None
    for dtype in DTYPES:
        torch.manual_seed(0)  # before a head is drawn
        model = load_model(bench.base, bench.task, bench.evaluation.tokenizer, bench.head or None, DTYPES[dtype])
        model = model.to(next(bench.model.parameters()).device)
        try:
            with attached(model, subject.expert, allow_narrower=True) as patch:
                outcome, swallowed = few.run_live(model, _renamed(progress, f"{subject.name}: {dtype}")), patch.swallowed
        except WrongBase:  # its mask, or its bits, cannot be had of a narrower base
            runs.append(DtypeRun(subject.name, dtype, None, None, 0.0))
            continue
        runs.append(DtypeRun(subject.name, dtype, outcome.interval(), _estimate(outcome.against(reference)) if reference else None, swallowed))
        reference = reference or outcome
    return tuple(runs)


def _renamed(progress: Progress, name: str) -> Progress:
    return lambda step, done, total, unit, note="": progress(name, done, total, unit, note)


def live_part(subjects: Sequence[Subject], benches: Sequence[Bench], repeats: int = REPEATS, progress: Progress = silent) -> LivePart | None:
    """Everything that is measured on one live model: the first bench's. None where there is no expert."""
    having = [(subject, bench, subject.expert) for subject, bench in zip(subjects, benches, strict=True) if subject.expert is not None]
    if not having:
        return None
    model: torch.nn.Module = benches[0].model
    subject, bench, first = having[0]
    experts = [expert for _, _, expert in having]
    other = experts[1] if len(experts) > 1 else next((expert for _, expert in subject.others), None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounds = _counter(progress, "timing attach, swap, detach", repeats + 1, "rounds")
    forget_base(model)  # the scores before have had its fingerprint
    steps = live_steps(model, first, other, repeats, rounds)
    speed = latency(model, first, longest_batch(bench), repeats, _counter(progress, "timing inference", repeats, "pairs"))
    memory = memory_of(model, experts)
    threads = with_threads(model, first, THREADS, max(3, repeats // 3))
    side = _side_by_side(model, having, progress) if len(having) > 1 else None
    restored = same_bits(model.state_dict(), before)
    return LivePart(steps, speed, memory, restored, threads, None if side is None else replace(side, restored=restored))


def longest_batch(bench: Bench) -> dict[str, torch.Tensor]:
    """The inputs of the longest rows, as one batch."""
    rows = sorted(bench.evaluation.rows, key=lambda row: len(row["input_ids"]))[-LATENCY_ROWS:]
    batch = next(iter(batches(bench.evaluation.tokenizer, rows, bench.task, len(rows))))
    kept = ("input_ids", "attention_mask", "token_type_ids", *(("labels",) if bench.task == "seq2seq" else ()))
    return {name: value for name, value in batch.inputs.items() if name in kept and isinstance(value, torch.Tensor)}


def _side_by_side(model: torch.nn.Module, having: Sequence[tuple[Subject, Bench, Expert]], progress: Progress) -> SideBySide:
    """Every expert alone; then all swapped among each other; then every one again, without the model ever being bare."""
    alone: list[tuple[Outcome, Outputs]] = []
    for subject, bench, expert in having:
        found = bench.outputs(expert, progress=progress, step=f"{subject.name}, alone")
        alone.append((bench.outcome(found), found))
    experts = [expert for _, _, expert in having]
    times = swaps_among(model, experts, _counter(progress, "swapping among all", len(experts) * (len(experts) - 1), "swaps"))
    patch = attach(model, experts[-1])
    neighbours = []
    for (subject, bench, expert), (score, before), swap in zip(having, alone, times, strict=True):
        patch.swap(expert)
        with patch.reading():
            found = bench.outputs(model, progress=progress, step=f"{subject.name}, among all")
        among = bench.outcome(found)
        neighbours.append(Neighbour(subject.name, score.interval(), among.interval(), _same(before, found), swap))
    patch.detach()
    return SideBySide(tuple(neighbours), restored=True)


def _same(one: Outputs, other: Outputs) -> bool:
    """Whether two models gave the same for every row, to the bit."""
    pairs = ((one.logits, other.logits), (one.nats, other.nats))
    arrays = all((a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs)
    return arrays and one.texts == other.texts


def _counter(progress: Progress, step: str, total: int, unit: str) -> Count:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(step, min(done, total), total, unit)

    progress(step, 0, total, unit)
    return count
