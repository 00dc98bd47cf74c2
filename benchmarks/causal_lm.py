"""Does all of it hold for a causal language model of 135 million parameters?

Question: For SmolLM2-135M, fully fine-tuned for a few steps on dialogue: how large is the expert, how long do compress, attach, swap and detach take,
    how much of the gain in perplexity is kept, and is the base the same to the bit after?
Goal: None of its own; the restored base has to be equal in every tensor.
Predicted: 5.7 MB at .05, 95 % of the i.i.d. entropy, 48 times smaller than a 16-bit delta; so few steps leave a task vector without much structure.
    Compress 1.2 s and attach 28 ms with two threads. Half of the gain in perplexity kept at .1.
Peer: A copy of the weights, flat; and the tuned model itself.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import harness
import inputs
import sterna
from harness import Side, milliseconds
from sterna.demo.assets import asset_path, cache_folder, settle
from sterna.demo.data import read_tab
from sterna.needs import quiet

STEPS, BATCH, TOKENS, RATE = 24, 4, 64, 3e-5
DENSITIES, ALPHAS = (0.05, 0.1), (2.0, 4.0, 6.0, 8.0)
FACTORS = (1.0, 1.5, 2.0, 3.0)
"""Scales tried on the uncompressed task vector."""


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def dialogue(folder: Path) -> list[torch.Tensor]:
    """Segments of TOKENS tokens of the Friends transcripts, `speaker: line` after `speaker: line`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [cells for cells in read_tab(asset_path("texts") / "friends-transcripts.tab", quoted=True) if len(cells) > 3]
    ids = tokenizer("\n".join(": ".join(cells[-2:]) for cells in lines[:6000]))["input_ids"]
    return list(torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS))


def tuned_folder(base: Path, segments: list[torch.Tensor], steps: int) -> Path:
    """The fully fine-tuned model, kept in the cache: a couple of minutes on two cores."""
    target = cache_folder() / "benchmarks" / f"smollm2-friends-{steps}-{BATCH}x{TOKENS}-{RATE:g}-torch{torch.__version__.split('+')[0]}"
    if target.is_dir():
        return target
    harness.note(f"fine-tuning the causal language model, {steps} steps, once")
    torch.manual_seed(0)
    model = load(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    with harness.threads(harness.CORES):
        for step in range(steps):
            batch = torch.stack(segments[step * BATCH : (step + 1) * BATCH])
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial, quiet():
        model.save_pretrained(Path(partial) / target.name)
        settle(Path(partial) / target.name, target)
    return target


def perplexity(model: Any, segments: list[torch.Tensor]) -> float:
    batches = [torch.stack(segments[i : i + 16]) for i in range(0, len(segments), 16)]
    with torch.no_grad(), harness.threads(harness.CORES):
        losses = [float(model(input_ids=batch, labels=batch).loss) for batch in batches]
    return math.exp(sum(losses) / len(losses))


class Dense:
    """The tuned model with its uncompressed task vector at any scale."""

    def __init__(self, tuned: Any, base: Any) -> None:
        self.model = tuned
        self.base = [parameter.detach().clone() for parameter in base.parameters()]
        self.tau = [parameter.detach() - before for parameter, before in zip(tuned.parameters(), self.base, strict=True)]

    def scaled(self, factor: float) -> Any:
        with torch.no_grad():
            for parameter, before, tau in zip(self.model.parameters(), self.base, self.tau, strict=True):
                torch.add(before, tau, alpha=factor, out=parameter)
        return self.model


def quality(report: harness.Report, model: Any, base: Path, tuned: Path, held: list[torch.Tensor], folder: Path) -> list[sterna.Expert]:
    """A file and a perplexity for each density; scales are chosen on the first third of the held-out segments, the rest is for the table."""
    choosing, test = held[: len(held) // 3], held[len(held) // 3 :]
    parameters = sum(tensor.numel() for tensor in model.parameters())
    rows = [["base", "", "", "", "", perplexity(model, test)]]
    dense = Dense(load(tuned), model)
    rows.append(["tuned, as a 16-bit copy", "", 2 * parameters / 1e6, "", "", perplexity(dense.scaled(1.0), test)])
    factor = min(FACTORS, key=lambda factor: perplexity(dense.scaled(factor), choosing))
    rows.append([f"the same, task vector times {factor:g}", "", 2 * parameters / 1e6, "", "", perplexity(dense.scaled(factor), test)])
    chosen = []
    for density in DENSITIES:
        with harness.threads(harness.CORES):
            experts = {alpha: sterna.compress(base, tuned, density=density, alpha=alpha) for alpha in ALPHAS}
        scores = {}
        for alpha, expert in experts.items():
            with sterna.attached(model, expert):
                scores[alpha] = perplexity(model, choosing)
        alpha = min(scores, key=lambda alpha: scores[alpha])
        path = folder / f"{density:g}.safetensors"
        experts[alpha].save(path)
        chosen.append(sterna.load(path))
        sizes = sterna.inspect(chosen[-1])
        with sterna.attached(model, chosen[-1]):
            score = perplexity(model, test)
        ratio = sizes.bits_per_parameter / sizes.entropy_bits_per_parameter
        rows.append([f"expert, density {density:g}, alpha {alpha:g}", sizes.nonzeros, sizes.bytes / 1e6, sizes.ratio_to_16bit, f"{ratio:.4f}", score])
    columns = ("model", "non-zeros", "file, MB", "times smaller than 16 bit", "coded / entropy", "perplexity")
    report.table(f"SmolLM2-135M, {tuned.name.split('-')[2]} steps on dialogue; {len(test)} held-out segments of {TOKENS} tokens", columns, rows)
    return chosen


def timed(model: Any, base: Path, tuned: Path, experts: list[sterna.Expert], threads: int, rounds: int) -> Iterator[list[Any]]:
    """Medians in milliseconds, a row for each step."""

    def on() -> None:
        sterna.attach(model, experts[0], allow_narrower=True)

    def off() -> None:
        patch = sterna.attached_to(model)
        if patch is not None:
            patch.detach()

    def swap() -> None:
        sterna.attached_to(model).swap(experts[1], allow_narrower=True)

    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    target = torch.empty_like(flat)
    sides = {
        "attach, density 0.05": Side(on, after=off, wall=True),
        "swap to density 0.1": Side(swap, before=on, after=off, wall=True),
        "detach": Side(off, before=on, wall=True),
        "copy of the weights, flat": Side(lambda: target.copy_(flat), wall=True),
    }
    with harness.threads(threads):
        if experts[0].facts.base.parameters == flat.numel() and flat.dtype == torch.float32:
            compress = Side(lambda: sterna.compress(base, tuned, density=0.05), wall=True)
            yield ["compress, from the folders", milliseconds(harness.in_turn({"it": compress}, max(rounds // 3, 1), warm=1)["it"])]
        for name, times in harness.in_turn(sides, rounds).items():
            yield [name, milliseconds(times)]


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base = inputs.causal_lm(options)
    if base is None:
        raise SystemExit("the causal language model is needed: python -m sterna.demo.assets --all; pip install gguf")
    segments = dialogue(base)
    steps = 6 if options.quick else STEPS
    tuned = tuned_folder(base, segments, steps)
    held = segments[STEPS * BATCH :][: 48 if options.quick else 96]
    rounds = 5 if options.quick else 15
    model = load(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        experts = quality(report, model, base, tuned, held, Path(folder))
        columns = [list(timed(model, base, tuned, experts, threads, rounds)) for threads in (1, 2)]
        half = [list(timed(load(base, torch.bfloat16), base, tuned, experts, threads, rounds)) for threads in (1, 2)]
    rows = [[f"{one[0]}", one[1], two[1]] for one, two in zip(*columns, strict=True)]
    rows += [[f"{one[0]}, bfloat16", one[1], two[1]] for one, two in zip(*half, strict=True)]
    report.table("Times, float32 where no dtype is named", ("step", "one thread, ms", "two threads, ms"), rows)
    after = model.state_dict()
    different = sum(not torch.equal(after[name], tensor) for name, tensor in before.items())
    report.goal("tensors of the base that differ after all of this", different, at_most=0, unit="tensors")
    report.write()


if __name__ == "__main__":
    main()
