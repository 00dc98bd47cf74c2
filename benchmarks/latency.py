"""Does an attached expert cost inference time?

Question: How long does a forward pass take with an expert attached, against the bare base, on one model that gets the expert and loses it in turn?
Goal: The 95 % interval of the paired ratio lies inside 0.98 to 1.02.
Predicted: 1.000 within half a percent: the modules, shapes and dtypes are the base's. Unmerged LoRA on all linear layers 1.4 at 1 x 64 tokens and
    1.15 at 16 x 64; unmerged SHiRA 3 at 1 x 64, where it copies and scatters every weight, and 1.3 at 16 x 64.
Peer: PEFT's adapters that are loaded and not merged, on a model of their own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import harness
import inputs
import peers
import sterna
from harness import Side, milliseconds, ratio

SHAPES = ((1, 64), (16, 64))
NARROW = 0.007
"""Half of the width at which the interval is narrow enough to stop."""
CHECKED, LONGEST = 20, 90
"""Rounds between two looks at the interval, and seconds after which the last look is taken."""


class Forward:
    """A forward pass of one batch."""

    def __init__(self, model: torch.nn.Module, batch: torch.Tensor) -> None:
        self.model, self.batch = model, batch

    def __call__(self) -> None:
        with torch.no_grad():
            self.model(input_ids=self.batch, attention_mask=torch.ones_like(self.batch))


class Fastest(Side):
    """A side whose seconds are the faster of two passes, after one that only warms the caches: writing weights leaves them otherwise."""

    def seconds(self) -> float:
        self.before()
        self.work()
        taken = min(Side(self.work).seconds() for _ in range(2))
        self.after()
        return taken


def narrow_or_late() -> Callable[[Mapping[str, Sequence[float]]], bool]:
    started = time.perf_counter()

    def enough(times: Mapping[str, Sequence[float]]) -> bool:
        rounds = len(times["bare"])
        if rounds < 2 * CHECKED or rounds % CHECKED:
            return False
        found = ratio(times["attached"], times["bare"], draws=2000)
        return max(found.high - found.value, found.value - found.low) < NARROW or time.perf_counter() - started > LONGEST

    return enough


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base, tuned = inputs.in_memory(inputs.base_folder(options)), inputs.in_memory(inputs.tuned_folder(options))
    expert = sterna.compress(base, tuned, density=0.05)
    model = inputs.classifier(options)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        unmerged = {
            kind.name: peers.Carrying(options, peers.saved_adapters(options, kind, Path(temporary), number=1)).model
            for kind in (peers.LORA, peers.LORA_ATTENTION, peers.SHIRA)
        }
    for shape in SHAPES:
        batch = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0))
        bare = Forward(model, batch)
        sides = {
            "bare": Fastest(bare),
            "attached": Fastest(bare, before=lambda: sterna.attach(model, expert), after=lambda: sterna.attached_to(model).detach()),
        }
        times = harness.in_turn(sides, 2 * CHECKED if options.quick else 25 * CHECKED, until=narrow_or_late())
        label = f"{shape[0]} x {shape[1]} tokens"
        found = ratio(times["attached"], times["bare"])
        report.goal(f"forward pass attached / bare, {label}", found, at_least=0.98, at_most=1.02)
        rows.append([label, "expert attached", milliseconds(times["bare"]), milliseconds(times["attached"]), found, found.rounds])
        peer = {"bare": Fastest(bare)} | {name: Fastest(Forward(carrying, batch)) for name, carrying in unmerged.items()}
        times = harness.in_turn(peer, 5 if options.quick else 21)
        for name in unmerged:
            found = ratio(times[name], times["bare"])
            rows.append([label, f"PEFT {name}, not merged", milliseconds(times["bare"]), milliseconds(times[name]), found, found.rounds])
    columns = ("batch", "with", "bare base, ms", "with it, ms", "ratio", "pairs")
    note = "Each time is the faster of two passes after one that is not timed."
    report.table("Forward pass, float32, no_grad, one thread", columns, rows, note)
    report.write()


if __name__ == "__main__":
    main()
