"""How many weightings a second can be put onto a live model, beside adding task vectors one after another?

Question: Twenty experts of the encoder (22.7 million parameters) at density .05 are under a pool: how long does it take to put another weighted sum
    of them on the live model, without running it? How does that follow the non-zeros, and what memory does a pool hold? And twenty LoRA experts?
Goal: At least 20 weightings a second on two threads for 20 experts of density .05 at uniform positions.
Predicted: 45 a second on one thread, 80 on two: with 22.7 million non-zeros 65 % of all positions are touched, in 5,000 kinds a block of 65,536; a
    look-up and a store for each touched position take 1 ns, and the sums of the kinds a third of that. 6 bytes a non-zero. LoRA: 10 a second on two
    threads, since every entry of the touched matrices is a product of rank 160.
Peer: torch's index_add_ of every expert's positions and weighted values, tensor by tensor, onto a copy of the base; for LoRA, PEFT's
    add_weighted_adapter (combination_type "cat", which is the sum of products), without merging it into the weights.
Note: Weights are drawn anew for every round. Positions are uniform: each expert is the base plus noise. A pool's time includes the look at the
    tensors' version counters, which tells whether somebody else wrote to them.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import harness
import inputs
import sterna
from harness import Side, mean, ratio
from sterna.composing.pool import Pool
from sterna.expert.changes import Add
from sterna.expert.expert import Expert
from sterna.needs import quiet

COUNT, DENSITY = 20, 0.05
CASES = ((3, 0.01), (20, 0.01), (5, 0.05), (20, 0.05), (20, 0.1), (60, 0.05))
RANK = 8


def noisy(base: inputs.State, count: int, density: float) -> list[Expert]:
    """Experts at uniform positions."""
    return [sterna.compress(base, inputs.normal_tuned(base, seed=seed), density=density) for seed in range(count)]


def draws(count: int) -> Callable[[], list[float]]:
    random = np.random.default_rng(0)
    return lambda: random.uniform(-1.5, 1.5, count).tolist()


class Scatter:
    """The same by torch alone: the base copied back, then each expert's weighted values added at its positions."""

    def __init__(self, model: torch.nn.Module, experts: Sequence[Expert]) -> None:
        own = {name.removeprefix("bert."): tensor.detach() for name, tensor in model.named_parameters()}
        names = sorted({change.name for expert in experts for change in expert.changes if isinstance(change, Add)})
        self.live = [own[name].view(-1) for name in names]
        self.base = [tensor.clone() for tensor in self.live]
        self.parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for expert in experts:
            levels = {change.name: change.levels for change in expert.changes if isinstance(change, Add)}
            codes = [torch.from_numpy(levels[name].codes()) for name in names]
            self.parts.append([((c >> 1).int(), (1 - 2 * (c & 1)).float() * levels[n].scale) for c, n in zip(codes, names, strict=True)])

    def weigh(self, weights: Sequence[float]) -> None:
        for live, base in zip(self.live, self.base, strict=True):
            live.copy_(base)
        for weight, parts in zip(weights, self.parts, strict=True):
            for live, (index, values) in zip(self.live, parts, strict=True):
                live.index_add_(0, index, values, alpha=weight)

    @property
    def bytes(self) -> int:
        return sum(index.nbytes + values.nbytes for parts in self.parts for index, values in parts) + sum(base.nbytes for base in self.base)

    def close(self) -> None:
        self.weigh([0.0] * len(self.parts))


def with_threads(count: int, weigh: Callable[[list[float]], object], weights: Callable[[], list[float]]) -> Side:
    """A weighting on so many threads; its weights are drawn before the clock starts."""
    drawn: list[list[float]] = []

    def before() -> None:
        drawn.append(weights())
        torch.set_num_threads(count)

    return Side(lambda: weigh(drawn[-1]), before, lambda: torch.set_num_threads(1), wall=count > 1)


def rates(times: Sequence[float]) -> harness.Estimate:
    return mean([1 / seconds for seconds in times])


def adapters(folder: Path, base: Path, count: int) -> tuple[list[Expert], list[Path]]:
    """LoRA adapters on every linear layer of the encoder, of random numbers, and their experts."""
    import peft
    from transformers import AutoModel

    folders = []
    with quiet():
        for number in range(count):
            torch.manual_seed(number)
            wrapped = peft.get_peft_model(AutoModel.from_pretrained(base), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR))
            for name, parameter in wrapped.named_parameters():
                if "lora" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            wrapped.save_pretrained(folder / str(number))
            folders.append(folder / str(number))
    return [sterna.compress(base, each, density=0.2) for each in folders], folders


LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def products(report: harness.Report, base: Path, rounds: int) -> None:
    import peft
    from transformers import AutoModel

    with tempfile.TemporaryDirectory() as name:
        experts, folders = adapters(Path(name), base, COUNT)
        with quiet():
            plain, theirs = (AutoModel.from_pretrained(base) for _ in range(2))
            wrapped = peft.PeftModel.from_pretrained(theirs, folders[0], adapter_name="a0")
            for number, folder in enumerate(folders[1:], 1):
                wrapped.load_adapter(folder, adapter_name=f"a{number}")
        names, serial = [f"a{number}" for number in range(COUNT)], itertools.count()

        def combine(weights: list[float]) -> None:
            made = f"sum{next(serial)}"
            wrapped.add_weighted_adapter(names, weights, made, combination_type="cat")
            wrapped.set_adapter(made)
            wrapped.delete_adapter(made)

        pool, weights = Pool(plain, experts), draws(COUNT)
        sides = {f"pool, {t} thread{'s' * (t > 1)}": with_threads(t, pool.weigh, weights) for t in (1, 2)}
        sides["PEFT, add_weighted_adapter"] = with_threads(1, combine, weights)
        times = harness.in_turn(sides, rounds)
        rows = [[side, rates(each), 1e3 * float(np.median(each))] for side, each in times.items()]
        told = f"PEFT leaves a product of rank {COUNT * RANK} to every forward; the pool's is in the weights. It holds {pool.bytes / 1e6:.0f} MB."
        report.table(f"{COUNT} LoRA experts of rank {RANK} on all {6 * len(LINEAR)} linear layers", ("", "weightings a second", "ms"), rows, told)


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    rounds = 3 if options.quick else 25
    folder = inputs.base_folder(options)
    base = inputs.in_memory(folder)
    rows = []
    for count, density in CASES[:2] if options.quick else CASES:
        experts, model = noisy(base, count, density), inputs.classifier(options)
        weights = draws(count)
        pool = Pool(model, experts)
        sides = {f"pool, {threads}": with_threads(threads, pool.weigh, weights) for threads in (1, 2)}
        times = harness.in_turn(sides, rounds)
        held, nonzeros = pool.bytes, pool.nonzeros
        pool.close()
        if (count, density) in ((COUNT, DENSITY), CASES[0]):
            scatter = Scatter(model, experts)
            times |= harness.in_turn({f"scatter, {threads}": with_threads(threads, scatter.weigh, weights) for threads in (1, 2)}, min(rounds, 9))
            scatter.close()
        one, two = rates(times["pool, 1"]), rates(times["pool, 2"])
        peer = [rates(times[f"scatter, {threads}"]) for threads in (1, 2)] if "scatter, 1" in times else [None, None]
        rows.append([count, density, nonzeros, one, two, *peer, 1e9 * float(np.median(times["pool, 1"])) / nonzeros, held / nonzeros])
        if (count, density) == (COUNT, DENSITY):
            report.goal(f"weightings a second, {COUNT} experts of density {DENSITY}, 2 threads", two, at_least=20, unit="a second")
            report.goal("the same on 1 thread", one, at_least=20, unit="a second")
            shorter = min(len(times["pool, 2"]), len(times["scatter, 2"]))
            report.goal("index_add_'s time over the pool's, 2 threads", ratio(times["scatter, 2"][:shorter], times["pool, 2"][:shorter]), at_least=1)
        harness.note(f"{count} experts, density {density}: {one.value:.1f} and {two.value:.1f} a second, {held / nonzeros:.2f} bytes a non-zero")
    columns = (
        "experts", "density", "non-zeros", "pool, 1 thread: a second", "2 threads", "index_add_, 1 thread: a second", "2 threads",
        "pool, 1 thread: ns a non-zero", "bytes a non-zero",
    )  # fmt: skip
    report.table("Another weighting on the live encoder, model forward excluded", columns, rows)
    products(report, folder, 3 if options.quick else 11)
    report.write()


if __name__ == "__main__":
    main()
