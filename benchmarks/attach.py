"""How fast does an expert go onto a live model, against copying the model's weights?

Question: How long do attach, swap and detach take end to end (plan, decode, save what is overwritten, write; all checks on; fingerprint known from an
    earlier attach), beside a warm copy of the same weights?
Goal: At density .05, attach at least 0.9 times as fast as dst.copy_(src) of all fp32 parameters as one flat tensor.
Predicted: 1.2 times the copy's speed at .05, 3 times at .01, 0.75 times at .1: about 2 ms of planning in Python, then 5 ns a non-zero. Half types
    slower than their copies, which move half of the bytes. The first attach is mostly SHA-256 of the live weights, about 60 ms.
Peer: torch's copy_ from and to memory that is touched before every round: one flat tensor, and the list of the model's tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

import harness
import inputs
import sterna
from harness import Side, milliseconds, ratio
from sterna.live import patch as live

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

        return {"attach": Side(self.on, after=self.off), "detach": Side(self.off, before=self.on), "swap": Side(swap, before=self.on, after=self.off)}


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

    return {"copy, flat": Side(lambda: flat_target.copy_(flat)), "copy, tensor by tensor": Side(one_by_one)}


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
            report.goal("attach against a flat copy_, density 0.05, float32, one thread", speeds[0], at_least=0.9)
    columns = ("density", "attach, ms", "swap, ms", "detach, ms", "flat copy, ms", "list copy, ms", "flat copy / attach", "list copy / attach")
    report.table(f"Live weights in {name}, one thread", columns, rows)


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
    model = inputs.classifier(options)
    sterna.attach(model, expert).detach()
    parts = harness.in_turn({**Attached(model, expert, expert).sides(), **Split(model, expert).sides()}, rounds)
    rows = [[name, milliseconds(times)] for name, times in parts.items()]
    rows.append(["first attach of a model, base hashed", milliseconds(first_attach(options, expert, rounds // 5))])
    note = "swap goes to the same expert again; a plan reads no weights, and makes the room in which the work saves them."
    report.table("Parts at density 0.05, float32, one thread", ("part", "ms"), rows, note)
    report.write()


if __name__ == "__main__":
    main()
