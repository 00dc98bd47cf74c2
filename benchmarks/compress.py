"""How fast is compression, and where does its time go?

Question: How long does sterna.compress take on state dicts in memory, fingerprint and coding included, against the dense procedure that it replaces?
Goal: At least 3 times as fast as the dense procedure, and 60 million parameters a second; selection alone at least 8 times torch.kthvalue.
Predicted: 2.4 times the dense procedure and 65 million parameters a second: three SHA-256 digests of 91 MB take more than half of the time. Selection
    12 times kthvalue: two counting passes against a quickselect with its copy. Two threads 1.6 times one: hashing waits for the largest tensor.
Peer: The dense procedure in torch: tau concatenated, kthvalue of |tau|, std, sign where above, times the scale; it neither codes nor hashes.
"""

from __future__ import annotations

import numpy as np
import torch

import harness
import inputs
import sterna
from harness import Side, milliseconds
from sterna import streaming
from sterna.codings import default_coding
from sterna.compression import base_fingerprint
from sterna.fingerprint import tensor_digest
from sterna.numbers import moments, selection
from sterna.sources.checkpoint import open_checkpoint
from sterna.sources.finetune import finetune

DENSITIES = (0.05, 0.1)
ALPHA = 4.0


def dense(pairs: list[tuple[str, torch.Tensor, torch.Tensor]], density: float) -> torch.Tensor:
    """What ComPEFT's authors do: every step on the whole vector."""
    tau = torch.cat([(theirs - ours).flatten() for _, ours, theirs in pairs])
    magnitudes = tau.abs()
    threshold = magnitudes.kthvalue(tau.numel() - int(density * tau.numel()) + 1).values
    return torch.where(magnitudes >= threshold, tau.sign(), 0) * (ALPHA * tau.std())


def select(tau: np.ndarray, wanted: int) -> selection.Threshold:
    """The exact threshold, as compress finds it."""
    upper, lower = np.zeros(selection.UPPER_BINS, np.int64), np.zeros(selection.LOWER_BINS, np.int64)
    selection.count_upper(tau, upper)
    at, above = selection.locate_upper(upper, wanted)
    selection.count_lower(tau, at, lower)
    return selection.locate(at, above, lower, wanted)


def against_dense(report: harness.Report, title: str, base: inputs.State, tuned: inputs.State, rounds: int, goals: bool) -> None:
    pairs = inputs.task_pairs(base, tuned)
    entries = sum(ours.numel() for _, ours, _ in pairs)
    sides = {}
    for density in DENSITIES:
        sides[f"ours {density}"] = Side(lambda density=density: sterna.compress(base, tuned, density=density, alpha=ALPHA))
        sides[f"dense {density}"] = Side(lambda density=density: dense(pairs, density))
    times = harness.in_turn(sides, rounds, warm=1)
    rows = []
    for density in DENSITIES:
        ours, peer = times[f"ours {density}"], times[f"dense {density}"]
        faster, rate = harness.ratio(peer, ours), harness.mean([entries / 1e6 / seconds for seconds in ours])
        rows.append([f"{density:g}", milliseconds(ours), milliseconds(peer), faster, rate])
        if goals:
            report.goal(f"compress against the dense procedure, density {density:g}", faster, at_least=3)
            report.goal(f"compress, density {density:g}", rate, at_least=60, unit="million parameters/s")
    report.table(f"{title}: {entries:,} parameters, one thread", ("density", "compress, ms", "dense, ms", "times as fast", "million/s"), rows)


def against_kthvalue(report: harness.Report, tau: torch.Tensor, rounds: int) -> None:
    flat, magnitudes, rows = tau.numpy(), tau.abs(), []
    for density in DENSITIES:
        kept = int(density * tau.numel())
        sides = {
            "ours": Side(lambda kept=kept: select(flat, kept)),
            "kthvalue": Side(lambda kept=kept: magnitudes.kthvalue(tau.numel() - kept + 1)),
        }
        times = harness.in_turn(sides, rounds, warm=1)
        faster = harness.ratio(times["kthvalue"], times["ours"])
        rows.append([f"{density:g}", milliseconds(times["ours"]), milliseconds(times["kthvalue"]), faster])
        report.goal(f"selection alone against kthvalue, density {density:g}", faster, at_least=8)
    report.table("Selection alone, real fine-tune, |tau| given to kthvalue", ("density", "selection, ms", "kthvalue, ms", "times as fast"), rows)


def breakdown(report: harness.Report, base: inputs.State, tuned: inputs.State, rounds: int) -> None:
    """Each part of compress by itself, over the same chunks."""
    task = finetune(open_checkpoint(base), open_checkpoint(tuned), ())
    chunks = [chunk for piece in task.pieces for chunk in streaming.chunks_of(piece)]
    taus = [chunk.read().copy() for chunk in chunks]
    flat = np.concatenate(taus)
    threshold = select(flat, int(DENSITIES[0] * flat.size))
    upper, lower, coding = np.zeros(selection.UPPER_BINS, np.int64), np.zeros(selection.LOWER_BINS, np.int64), default_coding()
    room = np.empty(max(tau.size for tau in taus), np.uint32)
    codes = [room[: selection.emit(tau, threshold.bits, 0, room)].copy() for tau in taus]

    def each(work: object, *arguments: list) -> Side:
        return Side(lambda: [work(*one) for one in zip(*arguments, strict=True)])

    floats = [tensor for tensor in base.values() if tensor.is_floating_point()]
    sides = {
        "whole": Side(lambda: sterna.compress(base, tuned, density=DENSITIES[0], alpha=ALPHA)),
        "fingerprint": Side(lambda: base_fingerprint(open_checkpoint(base))),
        "- digest in float32": each(tensor_digest, floats),
        "- digest rounded to bfloat16": each(lambda tensor: tensor_digest(tensor, torch.bfloat16), floats),
        "- digest rounded to float16": each(lambda tensor: tensor_digest(tensor, torch.float16), floats),
        "read tuned - base, once of three times": each(lambda chunk: chunk.read(), chunks),
        "sums for the standard deviation": each(moments.sums, taus),
        "count upper bits": each(lambda tau: selection.count_upper(tau, upper), taus),
        "count lower bits": each(lambda tau: selection.count_lower(tau, threshold.bits >> 15, lower), taus),
        "emit levels": each(lambda tau: selection.emit(tau, threshold.bits, 0, room), taus),
        "encode": each(lambda tau, code: coding.encode(code, tau.size), taus, codes),
        "norm of the base": Side(task.norm),
        "pair by name": Side(lambda: finetune(open_checkpoint(base), open_checkpoint(tuned), ())),
    }
    times = {name: milliseconds(values) for name, values in harness.in_turn(sides, rounds, warm=1).items()}
    whole = times.pop("whole")
    parts = sum(taken * (3 if name.startswith("read") else 1) for name, taken in times.items() if not name.startswith("- "))
    rows = [[name, taken, f"{100 * taken / whole:.1f} %"] for name, taken in times.items()]
    rows += [["the rest", whole - parts, f"{100 * (whole - parts) / whole:.1f} %"], ["compress", whole, "100 %"]]
    note = "Each part was timed by itself; the read counts three times towards the whole."
    report.table("Where compress spends its time, density 0.05, one thread", ("part", "ms", "share"), rows, note)


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base, tuned = inputs.in_memory(inputs.base_folder(options)), inputs.in_memory(inputs.tuned_folder(options))
    rounds = 3 if options.quick else 9
    against_dense(report, "Real full fine-tune", base, tuned, rounds, goals=True)
    against_dense(report, "Normal noise of the same shapes", base, inputs.normal_tuned(base), rounds // 2 + 1, goals=False)
    against_kthvalue(report, inputs.dense_vector(base, tuned), rounds)
    breakdown(report, base, tuned, rounds)

    def with_threads(count: int) -> None:
        with harness.threads(count):
            sterna.compress(base, tuned, density=DENSITIES[0], alpha=ALPHA)

    times = harness.in_turn({str(count): Side(lambda count=count: with_threads(count), wall=True) for count in (1, 2)}, rounds)
    row = [*(milliseconds(times[count]) for count in ("1", "2")), harness.ratio(times["1"], times["2"])]
    report.table("Threads, density 0.05", ("one thread, ms", "two threads, ms", "times as fast"), [row])
    report.write()


if __name__ == "__main__":
    main()
