"""How fast does an expert go onto a live model, against copying the model's weights?

Question: How long do attach, swap and detach take end to end (plan, decode, save what is overwritten, write; all checks on; fingerprint known from an
    earlier attach), beside a warm copy of the same weights? How long does the fast coding alone take, encoding from positions and written to memory?
Goal: At density .05, one thread, on uniform and on real positions: decode and write, undo saved and bounds checked, at least 1.5 times as fast as
    dst.copy_(src) of all fp32 parameters as one flat tensor, and at least 120 million non-zeros a second; encode at least 250 million a second.
    Attach end to end at least 1.5 times as fast as that copy.
Predicted: Decode and write 1.6 times the copy's speed and 330 million a second on uniform positions, where more than half of all cache lines are
    touched and memory sets the pace; 2.2 times on real ones, which gather. Encode 350 million. Attach end to end adds 1.5 ms of Python: 1.2 times on
    the real expert. Half types slower than their copies, which move half of the bytes. The first attach is mostly SHA-256 of the live weights, 60 ms.
Peer: torch's copy_ from and to memory that is touched before every round: one flat tensor, and the list of the model's tensors.
Note: Copies, attach and writes each run once untimed right before they are timed. A side then finds the caches as it leaves them itself, and does not
    pay for lines that another side left to be written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch

import harness
import inputs
import sterna
from harness import Side, milliseconds, ratio
from sterna.codings import CHUNK, default_coding
from sterna.expert.changes import Add, Ternary
from sterna.live import patch as live
from sterna.live.update import SparseAdd
from sterna.live.weights import live_weights

DENSITIES = (0.01, 0.05, 0.1)


class Attached:
    """Attach and detach of one expert on one model, as sides that leave the base as they found it."""

    def __init__(self, model: torch.nn.Module, expert: sterna.Expert, other: sterna.Expert) -> None:
        self.model, self.expert, self.other = model, expert, other
        self.patch: sterna.Patch | None = None

    def on(self) -> None:
        self.patch = sterna.attach(self.model, self.expert, allow_narrower=True)

    def off(self) -> None:
        if self.patch is not None and self.patch.attached:
            self.patch.detach()

    def sides(self) -> dict[str, Side]:
        def swap() -> None:
            self.patch.swap(self.other, allow_narrower=True)

        def once() -> None:
            self.on()
            self.off()

        return {
            "attach": Side(self.on, before=once, after=self.off),
            "detach": Side(self.off, before=self.on),
            "swap": Side(swap, before=self.on, after=self.off),
        }


class Split:
    """Planning and the in-place work, each by itself, through the patch's own functions."""

    def __init__(self, model: torch.nn.Module, expert: sterna.Expert) -> None:
        self.make: Callable[[], live._Plan] = lambda: live._plan(model, expert, True, None)
        self.plan = self.make()

    def sides(self) -> dict[str, Side]:
        def fresh() -> None:
            self.plan = self.make()

        def apply() -> None:
            live._apply(self.plan)

        def revert() -> None:
            live._revert(self.plan)

        return {
            "plan": Side(fresh),
            "decode, save and write": Side(apply, before=fresh, after=revert),
            "decode and restore": Side(revert, before=lambda: (fresh(), apply())),
        }


def copies(model: torch.nn.Module) -> dict[str, Side]:
    """The peer, on copies of the model's parameters."""
    sources = [parameter.detach().clone() for parameter in model.parameters()]
    targets = [torch.zeros_like(source) for source in sources]
    flat = torch.cat([source.flatten() for source in sources])
    flat_target = torch.zeros_like(flat)

    def one_by_one() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def whole() -> None:
        flat_target.copy_(flat)

    return {"copy, flat": Side(whole, before=whole), "copy, tensor by tensor": Side(one_by_one, before=one_by_one)}


def end_to_end(report: harness.Report, options: object, state: tuple[inputs.State, ...], dtype: torch.dtype, rounds: int) -> None:
    base, tuned, second = state
    model = inputs.classifier(options, dtype=dtype)
    name, rows = str(dtype).removeprefix("torch."), []
    peer = copies(model)
    for density in DENSITIES:
        experts = [sterna.compress(base, one, density=density) for one in (tuned, second)]
        sides = Attached(model, *experts)
        times = harness.in_turn({**peer, **sides.sides()}, rounds)
        copied = times["copy, flat"]
        speeds = [ratio(times[peer_name], times["attach"]) for peer_name in peer]
        steps = [milliseconds(times[step]) for step in ("attach", "swap", "detach")]
        rows.append([f"{density:g}", *steps, milliseconds(copied), milliseconds(times["copy, tensor by tensor"]), *speeds])
        if dtype == torch.float32 and density == 0.05:
            report.goal("attach end to end against a flat copy_, real expert, density 0.05, float32, one thread", speeds[0], at_least=1.5)
    columns = ("density", "attach, ms", "swap, ms", "detach, ms", "flat copy, ms", "list copy, ms", "flat copy / attach", "list copy / attach")
    report.table(f"Live weights in {name}, one thread", columns, rows)


def coding_alone(report: harness.Report, options: object, experts: dict[str, sterna.Expert], rounds: int) -> None:
    """The fast coding by itself: from positions to bytes, and from bytes to memory, as compress and attach do it."""
    model = inputs.classifier(options)
    coding = default_coding()
    flat = copies(model)["copy, flat"]
    rows = []
    for name, expert in experts.items():
        adds, count = expert.adds, expert.adds.count
        named = dict(live_tensors(model, expert))
        step = SparseAdd([named[change.name] for change in expert.changes if isinstance(change, Add)], adds)
        chunks = [one for ternary in adds.ternaries for one in chunks_of(ternary)]
        codes = np.empty(adds.room, np.uint32)

        def once(step: SparseAdd = step) -> None:
            step.apply()
            step.revert()

        sides = {
            "copy": flat,
            "encode": Side(lambda chunks=chunks: [coding.encode(*chunk) for chunk in chunks]),
            "decode": Side(lambda adds=adds, codes=codes: [adds.decode(batch, codes) for batch in range(len(adds.batches) - 1)]),
            "write": Side(step.apply, before=once, after=step.revert),
            "restore": Side(step.revert, before=step.apply),
        }
        times = harness.in_turn(sides, rounds)
        rates = {side: harness.mean([count / 1e6 / seconds for seconds in taken]) for side, taken in times.items()}
        against = {side: ratio(times["copy"], times[side]) for side in ("write", "restore")}
        report.goal(f"decode, save and write against a flat copy_, {name} positions", against["write"], at_least=1.5)
        report.goal(f"decode, save and write, {name} positions", rates["write"], at_least=120, unit="million non-zeros/s")
        report.goal(f"encode from positions, {name} positions", rates["encode"], at_least=250, unit="million non-zeros/s")
        rows += [[name, what, milliseconds(times[side]), rates[side], against.get(side, "")] for side, what in WHAT.items()]
    columns = ("positions", "what", "ms", "million non-zeros/s", "flat copy / this")
    report.table("The fast coding alone, density 0.05, float32, one thread", columns, rows)


WHAT = {"encode": "encode from positions", "decode": "decode to positions", "write": "decode, save and write", "restore": "decode and restore"}


def live_tensors(model: torch.nn.Module, expert: sterna.Expert) -> Iterator[tuple[str, torch.Tensor]]:
    """The live tensors by the names of the expert's changes."""
    for name, slot in live_weights(model, expert.fingerprint.names, (None,) * len(expert.fingerprint.names), {}).of_base.items():
        yield name, slot.tensor


def chunks_of(ternary: Ternary) -> list[tuple[np.ndarray, int]]:
    """(codes, entries) of each chunk of a tensor, as `Coding.encode` takes them."""
    codes, starts = ternary.codes(), range(0, ternary.size, CHUNK)
    cuts = [*np.searchsorted(codes, [start << 1 for start in starts]).tolist(), codes.size]
    return [
        ((codes[first:last] - (start << 1)).astype(np.uint32), min(CHUNK, ternary.size - start))
        for start, (first, last) in zip(starts, pairwise(cuts), strict=True)
    ]


def first_attach(options: object, expert: sterna.Expert, rounds: int) -> list[float]:
    """Seconds of attach to a model whose tensors were never hashed."""
    model = inputs.classifier(options)
    sides = Attached(model, expert, expert)

    def fresh() -> None:
        sides.model = copy.deepcopy(model)

    return harness.in_turn({"first": Side(sides.on, before=fresh, after=sides.off)}, rounds)["first"]


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base, tuned = inputs.in_memory(inputs.base_folder(options)), inputs.in_memory(inputs.tuned_folder(options))
    second = inputs.second_tuned(base, tuned)
    rounds = 15 if options.quick else 101
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        end_to_end(report, options, (base, tuned, second), dtype, rounds if dtype == torch.float32 else rounds // 2)

    expert = sterna.compress(base, tuned, density=0.05)
    uniform = sterna.compress(base, inputs.normal_tuned(base, scale=1.0), density=0.05, force=True)
    coding_alone(report, options, {"uniform": uniform, "real": expert}, rounds)
    model = inputs.classifier(options)
    sterna.attach(model, expert).detach()
    parts = harness.in_turn({**Attached(model, expert, expert).sides(), **Split(model, expert).sides()}, rounds)
    rows = [[name, milliseconds(times)] for name, times in parts.items()]
    rows.append(["first attach of a model, base hashed", milliseconds(first_attach(options, expert, rounds // 5))])
    note = "swap goes to the same expert again; a plan reads no weights, and makes the room in which the work saves them. The work includes the head."
    report.table("Parts at density 0.05, float32, one thread", ("part", "ms"), rows, note)
    report.write()


if __name__ == "__main__":
    main()
