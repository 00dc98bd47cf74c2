"""How fast is arithmetic on bit masks, against the same on dense vectors?

Question: How long do inner product, norm, cosine, overlap, sign conflicts and the addition of eight experts take on two bit masks a tensor, beside
    the dense fp32 operation at equal threads?
Goal: Inner product, norm, cosine and overlap at least 10 times as fast as the dense fp32 operation, with one thread and with two.
Predicted: Memory sets both sides: 32 bits an entry against 2, so 16 times where both come from memory. The encoder's masks, 5.7 MB an expert, stay in
    the last cache, so 25 times for inner product and norm with one thread, and 15 with two, since Sterna's loops use one. Overlap and conflicts 100
    times: torch makes dense products on the way. Addition 10 times for votes, 4 times with weights; torch on the masks as fast as on dense vectors.
Peer: torch on one flat fp32 tensor an expert: dot, linalg.vector_norm, both for a cosine, count_nonzero of products, additions in place.
Note: An overlap is shared positions and the Jaccard index, so both experts' counts are included; conflicts are those shared of different signs. The
    columns of torch are what runs on an accelerator, here on the CPU. Masks are made before; the last table says how long that takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import torch

import harness
import inputs
import sterna
from harness import Side, milliseconds, ratio
from sterna import addition, comparison
from sterna.addition import sums
from sterna.bitmasks import Bitmasks

DENSITIES = (0.05, 0.2)
GOALS = ("inner product", "norm", "cosine", "overlap")
EXPERTS, PAIRS = 8, 5
"""How many are added, and how many operations need two alone."""


def dense_overlap(x: torch.Tensor, y: torch.Tensor) -> float:
    """The Jaccard index, in the quickest way found."""
    shared = int(torch.count_nonzero(x * y))
    return shared / (int(torch.count_nonzero(x)) + int(torch.count_nonzero(y)) - shared)


def dense_conflicts(x: torch.Tensor, y: torch.Tensor) -> float:
    products = x * y
    return int(torch.count_nonzero(products < 0)) / int(torch.count_nonzero(products))


def dense_sum(vectors: list[torch.Tensor], total: torch.Tensor) -> torch.Tensor:
    total.copy_(vectors[0])
    for vector in vectors[1:]:
        total.add_(vector)
    return total


def add_all(masks: list[Bitmasks], weights: list[float] | None) -> None:
    for key in masks[0].tensors:
        for _ in sums(masks, key, weights):
            pass


def by_torch(work: Callable[[], object]) -> Callable[[], object]:
    """The same work as on an accelerator."""

    def run() -> None:
        with mock.patch.object(comparison, "compiled", return_value=False), mock.patch.object(addition, "compiled", return_value=False):
            work()

    return run


Work = Callable[[], object]


def operations(masks: list[Bitmasks], vectors: list[torch.Tensor], total: torch.Tensor) -> dict[str, tuple[Work, Work]]:
    """(on masks, dense) by name."""
    a, b = masks[:2]
    x, y = vectors[:2]
    norm = torch.linalg.vector_norm
    distinct = [1 + k / 8 for k in range(len(masks))]
    found: dict[str, tuple[Work, Work]] = {
        "inner product": (lambda: a.dot(b), lambda: float(torch.dot(x, y))),
        "norm": (a.norm, lambda: float(norm(x))),
        "cosine": (lambda: a.cosine(b), lambda: float(torch.dot(x, y) / (norm(x) * norm(y)))),
        "overlap": (lambda: a.overlap(b), lambda: dense_overlap(x, y)),
        "conflicts": (lambda: a.conflicts(b), lambda: dense_conflicts(x, y)),
        f"votes of {EXPERTS}": (lambda: add_all(masks, None), lambda: dense_sum(vectors, total)),
        f"sum of {EXPERTS}, each with its weight": (lambda: add_all(masks, distinct), lambda: dense_sum(vectors, total)),
    }
    return found if len(masks) == EXPERTS else dict(list(found.items())[:PAIRS])


def check(masks: list[Bitmasks], vectors: list[torch.Tensor]) -> None:
    """Both sides must say the same, or the times mean nothing."""
    a, b, x, y = masks[0], masks[1], vectors[0], vectors[1]
    cosine = float(torch.nn.functional.cosine_similarity(x.double(), y.double(), 0))
    if not math.isclose(a.cosine(b), cosine, abs_tol=1e-9) or not math.isclose(a.overlap(b).jaccard, dense_overlap(x, y)):
        raise SystemExit("the masks and the dense vectors differ")


def experts_of(base: inputs.State, tuned: inputs.State, density: float) -> list[sterna.Expert]:
    """The fine-tune's expert and seven whose positions are shuffled within each tensor."""
    first = sterna.compress(base, tuned, density=density)
    return [first, *(sterna.compress(base, inputs.second_tuned(base, tuned, seed=seed), density=density) for seed in range(1, EXPERTS))]


def uniform_experts(base: inputs.State, density: float) -> list[sterna.Expert]:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    return [sterna.compress(zeros, inputs.normal_tuned(zeros, scale=1.0, seed=seed), density=density, force=True) for seed in range(2)]


Worst = dict[tuple[str, int], tuple[harness.Estimate, str]]


def measure(report: harness.Report, worst: Worst, name: str, experts: list[sterna.Expert], rounds: int) -> list[object]:
    """Times of every operation with one thread and with two, in a table; returns the row of making the masks. `worst` keeps the lowest ratios."""
    masks = [expert.bitmasks() for expert in experts]
    vectors = [torch.cat([tensor.flatten() for tensor in expert.task_vector().values()]) for expert in experts]
    total = torch.empty_like(vectors[0])
    check(masks, vectors)
    rows: list[list[object]] = []
    for operation, (on_masks, dense) in operations(masks, vectors, total).items():
        row: list[object] = [operation]
        turns = rounds if operation in GOALS[:3] else rounds // 4
        for threads in (1, 2):
            with harness.threads(threads):
                sides = {"masks": Side(on_masks), "dense": Side(dense)}
                if threads == 1:
                    sides["torch"] = Side(by_torch(on_masks))
                times = harness.in_turn(sides, turns)
            found = ratio(times["dense"], times["masks"])
            if operation in GOALS:
                worst[operation, threads] = min(worst.get((operation, threads), (found, name)), (found, name), key=lambda one: one[0].value)
            row += [milliseconds(times["masks"]), milliseconds(times["dense"]), found]
            if threads == 1:
                row += [milliseconds(times["torch"]), ratio(times["dense"], times["torch"])]
        rows.append(row)
    one = ("operation", "masks, ms", "dense, ms", "dense / masks", "torch, ms", "dense / torch")
    columns = (*one, "2 threads: masks, ms", "dense, ms", "dense / masks")
    report.table(f"{name}, {vectors[0].numel():,} entries", columns, rows)
    made = harness.in_turn({"made": Side(experts[0].bitmasks)}, rounds // 4)["made"]
    return [name, milliseconds(made), round(masks[0].words.nbytes / 1e6, 1), round(4 * vectors[0].numel() / 1e6, 1)]


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base, tuned = inputs.in_memory(inputs.base_folder(options)), inputs.in_memory(inputs.tuned_folder(options))
    rounds = 12 if options.quick else 44
    worst: Worst = {}
    real = [measure(report, worst, f"real full fine-tune, density {k:g}", experts_of(base, tuned, k), rounds) for k in DENSITIES]
    uniform = [measure(report, worst, f"uniform positions, density {k:g}", uniform_experts(base, k), rounds) for k in DENSITIES]
    for (operation, threads), (found, name) in worst.items():
        report.goal(f"{operation} against dense fp32, {threads} thread{'s' * (threads > 1)}, the worst of four ({name})", found, at_least=10)
    note = "From the coded streams in memory, one thread."
    report.table("Making the masks", ("expert", "ms", "masks, MB", "dense fp32, MB"), real + uniform, note)
    report.write()


if __name__ == "__main__":
    main()
