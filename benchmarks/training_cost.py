"""What does a training step cost, in time and in memory?

Question: How long does a step of PaFi and HiWi take on BERT-base, and how much memory, beside full fine-tuning and PEFT's methods? What does the
    gradient of a matrix cost where only a mask of it is computed? How long does a mask of a 135M-parameter model take?
Goal: PaFi .005 takes at most 1.0 x the time and memory of LoRA r=8 on all linear layers, and at most 1.15 x the time and 1.1 x the memory of LoRA on
    query and value that trains as many values. A mask in under a second.
Predicted: PaFi .92 x the time of LoRA on all linear layers, 1.04 x that on query and value; .75 x and 1.02 x the memory; full fine-tuning 1.35 x
    PaFi's time and 1.6 x its memory; SHiRA and Supertuning 1.4 x its time, dearer than full fine-tuning in memory. HiWi bias as cheap as PaFi, HiWi
    weight 1.2 x. Sampled gradients 10 times as fast as dense ones at .005, 3 times at .02. A mask in .3 s.
Peer: PEFT's LoRA, SHiRA, and Supertuning with select_top=False, which trains the entries of smallest magnitude of each linear layer; their count is
    as near to PaFi's as a rank or a sparsity lets it be. torch.sparse.sampled_addmm beside the sampled gradient.
Note: BERT-base with weights drawn at random and biases from N(0, .02^2): as transformers draws them they are zeros, which HiWi refuses and which
    would make up a quarter of PaFi's mask. Dropout is on. Memory is the peak resident set of a process of its own that has made three steps; every
    one of them imports the same packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import harness
import inputs
import sterna
from harness import Estimate, Side, milliseconds, ratio
from sterna.expert.changes import MaskRule
from sterna.mask import choose, tensor_piece
from sterna.needs import quiet
from sterna.numbers.selection import kept_entries
from sterna.tuning.sampled import dense_product, sampled_product

warnings.filterwarnings("ignore", message="Sparse ")

BATCH, STEPS, RATE = (8, 128), 3, 1e-4
DENSITY = 0.005
TOKENS, SHAPE, DENSITIES = 1024, (3072, 768), (0.001, 0.005, 0.02)
LINEAR = r".*encoder.*\.(query|key|value|dense)"
NOT_ATTENTION_OUTPUT = r".*encoder.*\.(query|key|value|intermediate\.dense|\d+\.output\.dense)"
FEWEST, LONGEST = 5, 170
"""Rounds at least, and seconds after which no other round begins."""

PAFI, FULL, ALL, ATTENTION = "PaFi .005", "full fine-tuning", "LoRA r=8, all linear", "LoRA at equal count, query and value"
SHIRA, SUPERTUNING = "SHiRA at equal count", "Supertuning at equal count, smallest"
GOALS = ((ALL, 1.0, 1.0), (ATTENTION, 1.15, 1.1))
"""The peer, and PaFi's largest time and memory beside it."""


def model() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    made = BertForSequenceClassification(BertConfig()).train()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    return made


def sizes(bare: Any) -> tuple[int, int, int]:
    """Values that PaFi trains; entries of the encoder's linear layers; numbers of LoRA on query and value for each rank."""
    inside = {name: parameter for name, parameter in bare.named_parameters() if ".layer." in name}
    linear = sum(parameter.numel() for parameter in inside.values() if parameter.dim() == 2)
    each = sum(sum(parameter.shape) for name, parameter in inside.items() if name.endswith(("query.weight", "value.weight")))
    return kept_entries(DENSITY, sum(parameter.numel() for parameter in inside.values())), linear, each


def _peft(made: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def ready(bare: Any) -> Any:
        import peft

        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(bare, made(peft, bare))

    return ready


def _tuned(method: sterna.PaFi | sterna.HiWi) -> Callable[[Any], Any]:
    def ready(bare: Any) -> Any:
        sterna.tune(bare, method)
        return bare

    return ready


def _supertuning(peft: Any, bare: Any) -> Any:
    count, linear, _ = sizes(bare)
    return peft.SupertuningConfig(
        task_type="SEQ_CLS", target_modules=LINEAR, sparsity=1 - count / linear, select_top=False, save_precomputed_indices=False
    )


READY: dict[str, Callable[[Any], Any]] = {
    PAFI: _tuned(sterna.PaFi(density=DENSITY)),
    FULL: lambda bare: bare,
    ALL: _peft(lambda peft, bare: peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear")),
    ATTENTION: _peft(
        lambda peft, bare: peft.LoraConfig(task_type="SEQ_CLS", r=round(sizes(bare)[0] / sizes(bare)[2]), target_modules=["query", "value"])
    ),
    SHIRA: _peft(lambda peft, bare: peft.ShiraConfig(task_type="SEQ_CLS", r=3, target_modules=NOT_ATTENTION_OUTPUT)),
    SUPERTUNING: _peft(_supertuning),
    "HiWi bias r=16": _tuned(sterna.HiWi(target="bias", rank=16)),
    "HiWi weight r=4": _tuned(sterna.HiWi(target="weight", rank=4)),
}


class Training:
    """A model that one of the methods has made ready, and its training step."""

    def __init__(self, name: str) -> None:
        self.model = READY[name](model())
        trained = [(key, parameter) for key, parameter in self.model.named_parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for key, parameter in trained if "classifier" not in key)
        self.optimizer = torch.optim.AdamW([parameter for _, parameter in trained], lr=RATE)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 20000, BATCH, generator=generator)
        labels = torch.randint(0, 2, BATCH[:1], generator=generator)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def resident(key: str) -> int:
    """Bytes: VmRSS as it is now, VmHWM the highest so far; ru_maxrss would begin at that of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"this system does not tell {key}: the benchmark needs Linux")


def one_side(name: str) -> None:
    """What a process of its own does: prints (bytes after imports, peak)."""
    import peft  # noqa: F401  (every side carries the same packages)
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    level = resident("VmRSS")
    training = Training(name)
    for _ in range(STEPS):
        training.step()
    print(json.dumps([level, resident("VmHWM")]))


def peaks(repeats: int) -> dict[str, list[tuple[int, int]]]:
    """(bytes after imports, peak) of each side, `repeats` times; as many processes at once as there are cores."""

    def measure(name: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, __file__, "--side", name], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        level, highest = json.loads(done.stdout.splitlines()[-1])
        return level, highest

    names = [name for _ in range(repeats) for name in READY]
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in READY}
    with ThreadPoolExecutor(harness.CORES) as pool:
        for name, pair in zip(names, pool.map(measure, names), strict=True):
            found[name].append(pair)
    return found


def late() -> Callable[[Mapping[str, Sequence[float]]], bool]:
    started = time.perf_counter()
    return lambda times: len(times[PAFI]) >= FEWEST and time.perf_counter() - started > LONGEST


def memory(report: harness.Report, repeats: int) -> None:
    found = peaks(repeats)
    highest = {name: [peak for _, peak in pairs] for name, pairs in found.items()}

    def against(name: str) -> Estimate:
        return ratio(highest[PAFI], highest[name])

    for name, _, limit in GOALS:
        report.goal(f"peak memory of PaFi .005 / {name}", against(name), at_most=limit)
    rows = []
    for name, pairs in found.items():
        level, peak = (sum(values) / len(pairs) / 1e6 for values in zip(*pairs, strict=True))
        rows.append([name, peak, peak - level, None if name == PAFI else against(name), len(pairs)])
    columns = ("method", "peak, MB", "above imports, MB", "PaFi / it", "processes")
    report.table(f"Peak resident memory of {STEPS} training steps, BERT-base, batch 8 x 128, AdamW, one thread", columns, rows)


def steps(report: harness.Report, rounds: int) -> None:
    training = {name: Training(name) for name in READY}
    times = harness.in_turn({name: Side(one.step) for name, one in training.items()}, rounds, until=late(), warm=1)
    for name, limit, _ in GOALS:
        report.goal(f"training step of PaFi .005 / {name}", ratio(times[PAFI], times[name]), at_most=limit)
    rows = [
        [name, one.trained, milliseconds(times[name]), None if name == PAFI else ratio(times[PAFI], times[name]), ratio(times[name], times[FULL])]
        for name, one in training.items()
    ]
    note = (
        f"{len(times[PAFI])} rounds; forward, backward and optimizer. Trained values are counted without the head. A rank of SHiRA is worth in + out "
        "values a layer: rank 3 on the encoder's linear layers but the attention's output comes as near to PaFi's count as LoRA does."
    )
    columns = ("method", "trained values", "ms a step", "PaFi / it", "it / full fine-tuning")
    report.table("Training step, BERT-base, batch 8 x 128, AdamW, float32, one thread", columns, rows, note)


def gradients(report: harness.Report, rounds: int) -> None:
    """One matrix's gradient under a random mask, three ways."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(TOKENS, width, generator=generator) for width in SHAPE)
    rows = []
    for density in DENSITIES:
        count = kept_entries(density, SHAPE[0] * SHAPE[1])
        index = torch.randperm(SHAPE[0] * SHAPE[1], generator=generator)[:count].sort().values
        row, column = index // SHAPE[1], index % SHAPE[1]
        pattern = torch.sparse_csr_tensor(torch.searchsorted(row, torch.arange(SHAPE[0] + 1)), column, torch.zeros(count), SHAPE)

        def sparse(pattern: torch.Tensor = pattern) -> torch.Tensor:
            return torch.sparse.sampled_addmm(pattern, left.T.contiguous(), right, beta=0).values()

        def sampled(row: torch.Tensor = row, column: torch.Tensor = column) -> torch.Tensor:
            return sampled_product(left, right, row, column)

        def dense(row: torch.Tensor = row, column: torch.Tensor = column) -> torch.Tensor:
            return dense_product(left, right, row, column)

        sides = {"ours": Side(sampled), "dense": Side(dense), "sparse": Side(sparse)}
        times = harness.in_turn(sides, rounds)
        apart = float((sampled() - dense()).abs().max() / dense().abs().max())
        ratios = [ratio(times[peer], times["ours"]) for peer in ("dense", "sparse")]
        rows.append([density, count, *(milliseconds(times[name]) for name in sides), *ratios, f"{apart:.1e}"])
    columns = ("density", "entries", "sampled, ms", "dense, ms", "sampled_addmm, ms", "dense / sampled", "sampled_addmm / sampled", "difference")
    note = "The pattern of sampled_addmm is made beforehand. The difference is the largest to the dense product, as a share of its largest entry."
    report.table(f"Gradient of a weight {SHAPE[0]} x {SHAPE[1]} at a mask, {TOKENS:,} tokens, one thread", columns, rows, note)


def masks(report: harness.Report, options: Any, rounds: int) -> None:
    folder = inputs.causal_lm(options)
    if folder is None:
        return
    state = inputs.in_memory(folder)
    rows = []
    for label, names in (
        ("transformer blocks", tuple(sorted(name for name in state if ".layers." in name))),
        ("every tensor", tuple(sorted(state))),
    ):
        entries = sum(state[name].numel() for name in names)
        pieces = [tensor_piece(name, state[name]) for name in names]
        rule = MaskRule("smallest", kept_entries(DENSITY, entries), names)
        times = {}
        for count in (1, 2):
            with harness.threads(count):
                work = Side(lambda rule=rule, pieces=pieces: choose(rule, pieces), wall=True)
                times[count] = harness.in_turn({"it": work}, rounds)["it"]
        rows.append([label, entries, rule.count, milliseconds(times[1]), milliseconds(times[2])])
        if label == "every tensor":
            report.goal(f"mask of {entries / 1e6:.1f} million entries, one thread", harness.mean(times[1]), at_most=1, unit="s")
    columns = ("of", "entries", "chosen", "one thread, ms", "two threads, ms")
    report.table(f"Making a mask of smallest magnitudes, SmolLM2-135M, density {DENSITY:g}", columns, rows)


def main() -> None:
    options = harness.options(__doc__, ("--side", {"help": "three steps with this method, and the memory that they took", "choices": list(READY)}))
    if options.side:
        one_side(options.side)
        return
    report = harness.Report(__file__, __doc__ or "", options.quick)
    memory(report, 1 if options.quick else 3)  # first: this process is small yet
    steps(report, 2 if options.quick else 15)
    gradients(report, 5 if options.quick else 21)
    masks(report, options, 3 if options.quick else 9)
    report.write()


if __name__ == "__main__":
    main()
