"""How fast does a live model change its expert, against PEFT?

Question: How long does patch.swap take (the old expert off, the new one planned and on), against PEFT's merged adapters on the same model? Does
    it grow with the number of experts loaded before? Is the base the same to the bit after a cycle?
Goal: At least 5 times as fast as PEFT's LoRA load + merge + unmerge and as SHiRA merge + unmerge; no growth with the number of loaded experts.
Predicted: 12 ms a swap between full experts of density .05: 5 times as fast as the LoRA cycle on all linear layers, whose load alone takes 35 ms,
    but only 3 times SHiRA's merge + unmerge at rank 16; a LoRA expert in 10 ms. With the file loaded each time 2 ms more. No growth. PEFT
    changes 5 % of the weights in one bfloat16 cycle, we none.
Peer: PEFT on the same encoder: LoRA of rank 8 and SHiRA of rank 32 and 16; load_adapter + set_adapter + merge_adapter + unmerge_adapter.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import harness
import inputs
import peers
import sterna
from harness import Side, milliseconds, ratio

COUNTS = (1, 10, 50, 100)
FULL, LORA, LORA_ATTENTION, MIXED = "full to full", "LoRA to LoRA, all linear", "LoRA to LoRA, query and value", "full to LoRA and back"
RELOADED = ", file loaded each time"
CYCLE, MERGED = "load + merge + unmerge", "merge + unmerge"


class Swapping:
    """One live model that swaps through experts in turn."""

    def __init__(self, model: torch.nn.Module, experts: list[sterna.Expert]) -> None:
        self.model = model  # a patch does not keep its model alive
        self.experts = experts
        self.next = 0
        self.patch = sterna.attach(model, experts[-1], allow_narrower=True)

    def swap(self) -> None:
        self.patch.swap(self.experts[self.next % len(self.experts)], allow_narrower=True)
        self.next += 1


def ours(options: object, files: dict[str, list[Path]]) -> dict[str, Side]:
    """Two swaps, there and back."""
    sides = {}
    for name, pair in files.items():
        turns = Swapping(inputs.classifier(options), [sterna.load(path) for path in pair])

        def both(turns: Swapping = turns) -> None:
            turns.swap()
            turns.swap()

        def reload(turns: Swapping = turns, pair: list[Path] = pair) -> None:
            for i, path in enumerate(pair):
                turns.experts[i] = sterna.load(path)
                turns.swap()

        sides |= {name: Side(both), name + RELOADED: Side(reload)}
    return sides


def against_peft(report: harness.Report, options: object, files: dict[str, list[Path]], adapters: dict[peers.Kind, list[Path]], rounds: int) -> None:
    sides = ours(options, files)
    peer: dict[str, Side] = {}
    for kind, folders in adapters.items():
        carrying = peers.Carrying(options, folders)
        peer[f"PEFT {kind.name}: {CYCLE}"] = Side(carrying.cycle, after=carrying.drop)
        peer[f"PEFT {kind.name}: {MERGED}"] = Side(peers.Carrying(options, folders).merge_and_unmerge)
    times = harness.in_turn({**sides, **peer}, rounds)
    times |= {name: [seconds / 2 for seconds in times[name]] for name in sides}
    compared = [(name, peers.LORA, CYCLE) for name in (FULL, FULL + RELOADED, LORA + RELOADED)]
    compared += [(LORA_ATTENTION + RELOADED, peers.LORA_ATTENTION, CYCLE), (FULL, peers.SHIRA, MERGED), (FULL, peers.SHIRA_16, MERGED)]
    for mine, kind, what in compared:
        theirs = f"PEFT {kind.name}: {what}"
        report.goal(f"swap {mine}; against {theirs}", ratio(times[theirs], times[mine]), at_least=5)
    rows = [[f"swap {name}", milliseconds(times[name]), "", ""] for name in sides]
    rows += [[name, milliseconds(times[name]), ratio(times[name], times[FULL]), ratio(times[name], times[LORA])] for name in peer]
    report.table("One swap, float32, one thread", ("what", "ms", f"times ours, {FULL}", f"times ours, {LORA}"), rows)


def exactness(report: harness.Report, options: object, pair: list[Path], adapters: dict[peers.Kind, list[Path]]) -> None:
    """Entries of the base that a cycle leaves changed."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        model = inputs.classifier(options, dtype=dtype)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        patch = sterna.attach(model, pair[0], allow_narrower=True)
        patch.swap(pair[1], allow_narrower=True)
        patch.detach()
        left = sum(int((now != was).sum()) for now, was in zip(model.parameters(), before, strict=True))
        rows.append([name, "Sterna: attach + swap + detach", left, "", f"{left / sum(was.numel() for was in before):.2%}"])
        for kind in (peers.LORA, peers.SHIRA):
            carrying = peers.Carrying(options, adapters[kind], dtype)
            carrying.cycle()
            changed, targeted, entries = carrying.changed()
            rows.append([name, f"PEFT {kind.name}: {MERGED}", changed, f"{changed / targeted:.2%}", f"{changed / entries:.2%}"])
    columns = ("live dtype", "what", "entries", "share of the targeted weights", "share of the base")
    report.table("Entries of the base that one cycle leaves changed", columns, rows)


def growth(report: harness.Report, options: object, files: list[Path], adapters: list[Path], passes: int) -> None:
    """Swap time against the number of experts in memory: a slope for each pass, whose counts come in random order."""
    model, order = inputs.classifier(options), np.random.default_rng(0)
    times: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(passes):
        for count in order.permutation(COUNTS):
            turns = Swapping(model, [sterna.load(files[i % 2]) for i in range(count)])
            times[count].append(milliseconds([Side(turns.swap).seconds() for _ in range(14)][2:]))
            turns.patch.detach()
    alone = float(np.median(times[1]))
    slopes = [np.polyfit(COUNTS, [times[count][i] for count in COUNTS], 1)[0] * 100 / alone for i in range(passes)]
    report.goal("growth of swap time over 100 loaded experts, as a share of a swap's", harness.mean(slopes), at_most=0.05, unit="")
    carrying, peer = peers.Carrying(options, adapters), []
    for count in COUNTS:
        for i in range(len(carrying.model.peft_config), count):
            carrying.model.load_adapter(adapters[i % 2], f"loaded {i}")
        peer.append(milliseconds([Side(carrying.cycle, after=carrying.drop).seconds() for _ in range(4)][1:]))
    rows = [[count, float(np.median(times[count])), their] for count, their in zip(COUNTS, peer, strict=True)]
    report.table("Experts or adapters loaded before", ("loaded", f"swap {FULL}, ms", f"PEFT {peers.LORA.name}: {CYCLE}, ms"), rows)


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    folder, tuned_folder = inputs.base_folder(options), inputs.tuned_folder(options)
    base, tuned = inputs.in_memory(folder), inputs.in_memory(tuned_folder)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        kinds = (peers.LORA, peers.LORA_ATTENTION, peers.SHIRA, peers.SHIRA_16)
        adapters = {kind: peers.saved_adapters(options, kind, work) for kind in kinds}
        made = {FULL: [sterna.compress(base, one, density=0.05) for one in (tuned, inputs.second_tuned(base, tuned))]}
        for name, kind in ((LORA, peers.LORA), (LORA_ATTENTION, peers.LORA_ATTENTION)):
            made[name] = [sterna.compress(folder, adapter, density=0.1) for adapter in adapters[kind]]
        files = {name: [work / f"{name} {i}.safetensors" for i in range(2)] for name in made}
        for name, experts in made.items():
            for expert, path in zip(experts, files[name], strict=True):
                expert.save(path)
        files[MIXED] = [files[FULL][0], files[LORA][1]]
        against_peft(report, options, files, adapters, 6 if options.quick else 51)
        exactness(report, options, files[MIXED], adapters)
        growth(report, options, files[FULL], adapters[peers.LORA], 3 if options.quick else 12)
    report.write()


if __name__ == "__main__":
    main()
