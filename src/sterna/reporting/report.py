"""A report as data: everything that was measured, and so every number that the page shows. Frozen, and plain JSON by `to_dict`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sterna.scoring.intervals import Estimate

FORMAT = 1

Kind = Literal["base", "tuned", "expert", "control", "words"]
Way = Literal["expert", "lora", "delta", "copy"]
"""Ways to keep a tuned model: an expert, LoRA factors, a delta of every parameter in 16 bit, a full copy as its files are."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What scores are called and counted in; `points` where they are shares of 100."""

    name: str
    title: str
    higher_is_better: bool = True
    points: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve a task, with its score on the test rows.

    `bytes` are those on disk, None where it is no file; `to_tuned` and `to_base` are differences paired on the same rows, `p` the p-value of
    the first; `chosen` is the expert that the report speaks of.
    """

    kind: Kind
    label: str
    bytes: int | None
    score: Estimate
    to_tuned: Estimate | None = None
    to_base: Estimate | None = None
    p: float | None = None
    density: float | None = None
    alpha: float | None = None
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one way to keep a task. `measured`: a file that exists; else computed from shapes."""

    way: Way
    bytes: int
    measured: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """The coded entries of one layer's tensors, and how many of them are not zero. `name` is the layer's number, or empty for what is in none."""

    name: str
    entries: int
    nonzeros: int
    bytes: int

    @property
    def density(self) -> float:
        return self.nonzeros / self.entries if self.entries else 0.0


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One task: its test rows, the candidates on them, what each way to keep it takes, and the chosen expert layer by layer.

    `trail` is what a search or a pilot tried before it chose, on `trail_rows` other rows.
    """

    name: str
    metric: Metric
    rows: int
    candidates: tuple[Candidate, ...]
    kept: tuple[Kept, ...]
    layers: tuple[Layer, ...] = ()
    trail: tuple[Candidate, ...] = ()
    trail_rows: int = 0

    def of(self, kind: Kind) -> Candidate | None:
        """The first candidate of a kind; of experts, the chosen one."""
        found = [one for one in self.candidates if one.kind == kind]
        return next((one for one in found if one.chosen), found[0] if found and kind != "expert" else None)

    def bytes(self, way: Way) -> int | None:
        return next((kept.bytes for kept in self.kept if kept.way == way), None)


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of repeated runs of one step."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True, slots=True)
class Steps:
    """Times of the live steps. `first_attach` (milliseconds, once for a loaded model) includes the base's fingerprint."""

    first_attach: float
    attach: Times
    swap: Times | None
    detach: Times


@dataclass(frozen=True, slots=True)
class Latency:
    """Forward passes of one batch in turn: the bare base, the base with an expert on it, and the ratio of the pairs with its 95 % interval."""

    base: Times
    attached: Times
    ratio: Estimate
    batch: int
    length: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in memory: the base's weights, one loaded expert (the mean of those measured), what undoing the one that is on takes (the largest)."""

    base: int
    expert: int
    undo: int

    def experts(self, memory: int) -> int:
        """How many experts fit beside one base, with one of them on it."""
        return max(0, (memory - self.base - self.undo) // max(self.expert, 1))

    def copies(self, memory: int) -> int:
        """How many full copies fit."""
        return memory // self.base


@dataclass(frozen=True, slots=True)
class DtypeRun:
    """The chosen expert on the base loaded in one dtype: its score, the difference to fp32 on the same rows.

    `swallowed` is the share of updates that rounding took away, 0 to 1. No score: the expert refuses such a base, as one of PaFi
    refuses a narrower one.
    """

    task: str
    dtype: str
    score: Estimate | None
    to_fp32: Estimate | None
    swallowed: float


@dataclass(frozen=True, slots=True)
class ThreadRun:
    """Attaching with a number of threads: milliseconds, and whether the weights are, to the bit, those of one thread."""

    threads: int
    attach: Times
    same_bits: bool


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One expert beside the others: its score alone and after all swaps, whether each of its rows was answered alike, and the swaps to it."""

    name: str
    alone: Estimate
    among: Estimate
    same_answers: bool
    swap: Times


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Experts swapped among each other on one live model; `restored`: after all of it the base was as before, to the bit."""

    experts: tuple[Neighbour, ...]
    restored: bool

    @property
    def passed(self) -> bool:
        return self.restored and all(one.same_answers for one in self.experts)


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate's decision: the value, the limit that the user set (at most, in the unit of `name`), and whether it held."""

    name: Literal["score", "bytes", "latency", "attach", "memory"]
    value: float
    limit: float
    low: float | None = None
    high: float | None = None

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True, slots=True)
class Step:
    """One step of compression of one task in a pilot, and its gates."""

    task: str
    density: float
    alpha: float | None
    bytes: int
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True, slots=True)
class Report:
    """One report. `created` is an ISO date; `machine` and `inputs` are facts by name, shown as they are."""

    base: str
    parameters: int
    created: str
    tasks: tuple[TaskReport, ...]
    steps: Steps | None = None
    latency: Latency | None = None
    memory: Memory | None = None
    restored: bool | None = None
    dtypes: tuple[DtypeRun, ...] = ()
    threads: tuple[ThreadRun, ...] = ()
    side_by_side: SideBySide | None = None
    gates: tuple[Step, ...] = ()
    machine: dict[str, str] = field(default_factory=dict)
    inputs: tuple[tuple[str, str], ...] = ()
    seconds: float | None = None
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, with medians and decisions beside the numbers that they come from left out: they are computed."""
        return asdict(self)


def frontier(candidates: Iterable[Candidate], higher_is_better: bool) -> list[Candidate]:
    """Those that nothing smaller or equally small beats in score, from the smallest on: the efficient frontier of score against bytes."""
    sign = 1.0 if higher_is_better else -1.0
    best: list[Candidate] = []
    for one in sorted((c for c in candidates if c.bytes is not None), key=lambda c: (c.bytes, -sign * c.score.value)):
        if not best or sign * one.score.value > sign * best[-1].score.value:
            best.append(one)
    return best


def is_noise(difference: Estimate) -> bool:
    """Whether the 95 % interval of a difference holds zero."""
    return difference.low <= 0 <= difference.high


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
