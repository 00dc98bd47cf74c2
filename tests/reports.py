"""Reports of made-up numbers, with everything in them that a report can hold."""

from __future__ import annotations

import random

from sterna.reporting.report import (
    Candidate,
    DtypeRun,
    Gate,
    Kept,
    Latency,
    Layer,
    Memory,
    Metric,
    Neighbour,
    Report,
    SideBySide,
    Step,
    Steps,
    TaskReport,
    ThreadRun,
    Times,
)
from sterna.scoring.intervals import Estimate

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=document.title="owned">\u202e\x00\x1b"\'&'
LONG = "お客様相談窓口に届いた問い合わせの分類(2026年度上期、地域別)with_a_name_that_is_one_very_long_word_and_does_not_end_where_it_should"
ACCURACY = Metric("accuracy", "accuracy")
PERPLEXITY = Metric("perplexity", "perplexity", higher_is_better=False, points=False)


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half)


def task(name: str, metric: Metric = ACCURACY, seed: int = 0) -> TaskReport:
    """A base, a tuned model, controls, and experts of falling density, the one of .05 chosen."""
    draw = random.Random(seed)
    sign = 1.0 if metric.higher_is_better else -1.0
    good, half = (80.0, 2.2) if metric.points else (20.0, 0.4)

    def at(kind: str, label: str, size: int | None, loss: float, **more: object) -> Candidate:
        compared = {"to_tuned": estimate(-sign * loss, half / 2), "to_base": estimate(sign * (9 - loss), half), "p": 0.4} if kind != "base" else {}
        return Candidate(kind, label, size, estimate(good - sign * loss, half), **compared, **more)  # type: ignore[arg-type]

    experts = [
        at("expert", f"ComPEFT {density}", int(10e6 * density), loss, density=density, alpha=4.0, chosen=density == 0.05)
        for density, loss in ((0.02, 3.1), (0.05, 0.3), (0.1, 0.2), (0.2, 0.1), (0.3, 0.1))
    ]
    stored = (("prune only", 5_578_531, 2.4), ("STC, mean magnitude", 1_319_805, 2.0), ("BitDelta", 3_319_805, 1.2))
    controls = [at("control", *one) for one in stored]
    tuned = at("tuned", "", 90_875_664, 0.0)
    kept = (Kept("expert", 500_000, True), Kept("lora", 178_996, False), Kept("delta", 45_441_832, False), Kept("copy", 90_875_664, True))
    numbers = ["", *(str(i) for i in range(12))]
    layers = tuple(Layer(name, 1_774_464, int(1_774_464 * draw.uniform(0.02, 0.08)), 70_000) for name in numbers)
    return TaskReport(name, metric, 1500, (at("base", "", None, 9.0), tuned, *controls, *experts), kept, layers, tuple(experts), 500)


def times(middle: float, count: int = 15, seed: int = 0) -> Times:
    draw = random.Random(seed)
    return Times(tuple(draw.gauss(middle, 0.04 * middle) for _ in range(count)))


def report(*names: str) -> Report:
    """A whole report; the last of several tasks is scored by perplexity."""
    names = names or ("news",)
    tasks = tuple(task(name, PERPLEXITY if place and place == len(names) - 1 else ACCURACY, place) for place, name in enumerate(names))
    gates = tuple(
        Step(
            one.name,
            density,
            4.0,
            int(10e6 * density),
            (
                Gate("score", 3.1 if density < 0.05 else 0.3, 0.5, -0.6, 1.2),
                Gate("bytes", 10e6 * density, 4e6),
                Gate("latency", 1.01, 1.05, 0.97, 1.05),
            ),
        )
        for one in tasks
        for density in (0.3, 0.2, 0.1, 0.05, 0.02)
    )
    precisions = (("fp32", 0.0), ("bf16", 0.31))
    neighbours = tuple(Neighbour(one.name, estimate(79.7, 2), estimate(79.7, 2), True, times(11)) for one in tasks)
    return Report(
        base="encoder",
        parameters=22_713_216,
        created="2026-11-22",
        tasks=tasks,
        steps=Steps(163.2, times(11), times(12), times(6)),
        latency=Latency(times(1551), times(1560), estimate(1.01, 0.04), 16, 64),
        memory=Memory(90_875_664, 1_100_000, 12_000_000),
        restored=True,
        dtypes=(
            *(DtypeRun(one.name, dtype, one.candidates[1].score, None, share) for one in tasks for dtype, share in precisions),
            DtypeRun(tasks[0].name, "fp16", None, None, 0.0),
        ),
        threads=(ThreadRun(1, times(19, 5), True), ThreadRun(2, times(11, 5), True)),
        side_by_side=SideBySide(neighbours, True) if len(tasks) > 1 else None,
        gates=gates,
        machine={"cpu": "a processor of two cores", "torch": "2.13.0"},
        inputs=(("news: expert", "density 0.05, sha256 " + "0123456789abcdef" * 4),),
        seconds=312.0,
    )
