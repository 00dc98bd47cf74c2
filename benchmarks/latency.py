"""Does an expert cost inference time?

Question: How long does a forward pass take with an expert attached, against the bare base, on one model that gets the expert and loses it in turn:
    one of a full fine-tune, of PaFi, of HiWi? And in a model whose tuning is finished? Are its modules, names and exported graph the base's?
Goal: The 95 % interval of the paired ratio lies inside 0.98 to 1.02; no difference in modules, state_dict keys or the graph of torch.export.
Predicted: 1.000 within half a percent: the modules, shapes and dtypes are the base's. Unmerged LoRA on all linear layers 1.4 at 1 x 64 tokens and
    1.15 at 16 x 64; unmerged SHiRA 3 at 1 x 64, where it copies and scatters every weight, and 1.3 at 16 x 64.
Peer: PEFT's adapters that are loaded and not merged, on a model of their own.
Note: PaFi's and HiWi's values are moved by noise, not trained: what they are makes no difference to time. A finished model is timed beside a plain
    one whose parameters are the same memory.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import harness
import inputs
import peers
import sterna
from harness import Side, milliseconds, ratio

SHAPES = ((1, 64), (16, 64))
NARROW = 0.007
"""Half of the width at which the interval is narrow enough to stop."""
FEWEST, CHECKED, LONGEST = 5, 20, 300
"""Rounds at least, those between two looks at the intervals, and seconds after which no other round begins."""
METHODS = {
    "PaFi .005": sterna.PaFi(density=0.005),
    "HiWi bias r=16": sterna.HiWi(target="bias", rank=16),
    "HiWi weight r=4": sterna.HiWi(target="weight", rank=4),
}
FULL = "expert of a full fine-tune"


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


def narrow_or_late(longest: float) -> Callable[[Mapping[str, Sequence[float]]], bool]:
    """Until the interval of every side's ratio to "bare" is narrow, or `longest` seconds have passed."""
    started = time.perf_counter()

    def enough(times: Mapping[str, Sequence[float]]) -> bool:
        rounds = len(times["bare"])
        if rounds >= FEWEST and time.perf_counter() - started > longest:
            return True
        if rounds < 2 * CHECKED or rounds % CHECKED:
            return False
        found = [ratio(taken, times["bare"], draws=2000) for name, taken in times.items() if name != "bare"]
        return all(max(one.high - one.value, one.value - one.low) < NARROW for one in found)

    return enough


class Finished:
    """A classifier that was tuned and finished, its expert, and a plain one over the same memory."""

    def __init__(self, options: Any, method: sterna.PaFi | sterna.HiWi) -> None:
        self.model = inputs.classifier(options)
        self.plain = copy.deepcopy(self.model)
        tuning = sterna.tune(self.model, method)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in tuning.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        self.expert = tuning.expert()
        tuning.finish()
        for own, theirs in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            theirs.data = own.data

    def sides(self, batch: torch.Tensor) -> dict[str, Side]:
        return {"bare": Fastest(Forward(self.plain, batch)), "finished": Fastest(Forward(self.model, batch))}


def put_on(model: torch.nn.Module, expert: sterna.Expert) -> Callable[[], object]:
    return lambda: sterna.attach(model, expert)


def take_off(model: torch.nn.Module) -> Callable[[], None]:
    def off() -> None:
        patch = sterna.attached_to(model)
        assert patch is not None
        patch.detach()

    return off


def structure(model: Any) -> dict[str, Any]:
    """What must be the base's: names and classes of the modules; keys, shapes and dtypes of the state; the exported graph with its signature."""
    ids = torch.randint(1000, 20000, SHAPES[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return {
        "module tree": [(name, type(module)) for name, module in model.named_modules()],
        "state_dict keys": [(key, tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()],
        "torch.export graph": (str(exported.graph), exported.graph_module.code, str(exported.graph_signature)),
    }


def same_structure(report: harness.Report, model: torch.nn.Module, finished: Mapping[str, Finished], full: sterna.Expert) -> None:
    base = structure(model)
    rows = []

    def compare(label: str, other: torch.nn.Module) -> None:
        found = structure(other)
        rows.append([label, *(found[what] == base[what] for what in base)])

    for name, expert in {FULL: full, **{name: one.expert for name, one in finished.items()}}.items():
        with sterna.attached(model, expert):
            compare(f"{name}, attached", model)
    for name, one in finished.items():
        compare(f"{name}, finished", one.model)
    different = sum(not all(row[1:]) for row in rows)
    report.goal("models that differ from the base in modules, keys or exported graph", different, at_most=0, unit="models")
    report.table("Equal to the base's", ("model", *base), rows)


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base, tuned = inputs.in_memory(inputs.base_folder(options)), inputs.in_memory(inputs.tuned_folder(options))
    model = inputs.classifier(options)
    finished = {name: Finished(options, method) for name, method in METHODS.items()}
    experts = {FULL: sterna.compress(base, tuned, density=0.05)} | {name: one.expert for name, one in finished.items()}
    same_structure(report, model, finished, experts[FULL])
    most, longest = (2 * CHECKED, 6) if options.quick else (25 * CHECKED, LONGEST)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        unmerged = {
            kind.name: peers.Carrying(options, peers.saved_adapters(options, kind, Path(temporary), number=1)).model
            for kind in (peers.LORA, peers.LORA_ATTENTION, peers.SHIRA)
        }
    for shape in SHAPES:
        batch = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0))
        label = f"{shape[0]} x {shape[1]} tokens"
        bare = Forward(model, batch)

        def compared(what: str, times: Mapping[str, Sequence[float]], side: str, goal: bool, label: str = label) -> None:
            found = ratio(times[side], times["bare"])
            if goal:
                report.goal(f"forward pass with {what} / bare, {label}", found, at_least=0.98, at_most=1.02)
            rows.append([label, what, milliseconds(times["bare"]), milliseconds(times[side]), found, found.rounds])

        for names in ((FULL,), tuple(METHODS)):
            attached = {name: Fastest(bare, before=put_on(model, experts[name]), after=take_off(model)) for name in names}
            times = harness.in_turn({"bare": Fastest(bare), **attached}, most, until=narrow_or_late(longest))
            for name in names:
                compared(f"{name}, attached", times, name, goal=True)
        if shape == SHAPES[0]:
            for name, one in finished.items():
                times = harness.in_turn(one.sides(batch), most, until=narrow_or_late(longest / 3))
                compared(f"{name}, finished", times, "finished", goal=True)
        peer = {"bare": Fastest(bare)} | {name: Fastest(Forward(carrying, batch)) for name, carrying in unmerged.items()}
        times = harness.in_turn(peer, 5 if options.quick else 21)
        for name in unmerged:
            compared(f"PEFT {name}, not merged", times, name, goal=False)
    columns = ("batch", "with", "bare base, ms", "with it, ms", "ratio", "pairs")
    note = "Each time is the faster of two passes after one that is not timed."
    report.table("Forward pass, float32, no_grad, one thread", columns, rows, note)
    report.write()


if __name__ == "__main__":
    main()
