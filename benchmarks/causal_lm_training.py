"""Which expert of the same stored size learns most of a causal language model's task?

Question: SmolLM2-135M after 40 steps on Friends dialogue, by LoRA, PaFi and HiWi's weight variant with 518,400 stored numbers each: what is the
    perplexity on episodes that were never seen? What is left of it after ComPEFT, and in how many bytes?
Goal: None of its own; each method's perplexity is shown beside LoRA's on the same segments.
Predicted: Base 41, LoRA 22, HiWi weight 22, PaFi 24: so few steps favour methods that move every weight a little; full fine-tuning 20. Ternary
    PaFi within 3 % of its perplexity in 80 KB, 1 in 25 of its exact file; ternary LoRA within 3 % in 65 KB; HiWi's dense change loses most.
Peer: PEFT's LoRA r=9 on query and value, and full fine-tuning.
Note: Seasons 1 to 8 train, 9 chooses the rate, the scale alpha and nothing else, 10 is the test. Segments of 64 tokens within an episode. Each
    method has three or four rates, rising over 4 steps and falling to zero. Intervals are over segments, of one training each; they do not tell how
    much another seed would change.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import harness
import inputs
import sterna
from causal_lm import load
from harness import Estimate, ratio
from sterna.demo.assets import asset_path, cache_folder, settle
from sterna.demo.data import read_tab
from sterna.needs import quiet

STEPS, BATCH, TOKENS, WARM = 40, 4, 64, 4
VALIDATION, TEST = 32, 128
"""Segments."""
STORED = 518_400
"""Numbers of LoRA r=9 on the 30 layers' query and value projections, and of HiWi's D and U of rank 5 on their three feed-forward matrices."""
LORA, PAFI, HIWI, FULL = "LoRA r=9, query and value", "PaFi", "HiWi weight r=5", "full fine-tuning"
ALPHAS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 10, 14, 20, 28)
TERNARY: dict[str, tuple[float, int, tuple[Literal["global", "tensor"], ...]]] = {
    LORA: (0.2, 3, ("global", "tensor")),
    PAFI: (0.3, 2, ("global",)),
    HIWI: (0.005, 6, ("global",)),
}
"""Density, the scale where the search begins, and scopes. HiWi's change of the weights has 79.6 million entries: at .3 it would take more than D and
U do. LoRA's B begins at zero: after few steps one threshold for all keeps little of it, so both scopes are tried on validation."""


@dataclass(frozen=True, slots=True)
class Segments:
    train: list[torch.Tensor]
    validation: list[torch.Tensor]
    test: list[torch.Tensor]


Losses = list[float]
Ready = Callable[[Any, Path], tuple[Any, Callable[[Path], None]]]
"""Makes a bare model trainable; returns the model to be called and what writes its expert into a folder."""


def _lora(model: Any, base: Path) -> tuple[Any, Callable[[Path], None]]:
    import peft

    with quiet():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=9, lora_alpha=9, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return wrapped, wrapped.save_pretrained


def _full(model: Any, base: Path) -> tuple[Any, Callable[[Path], None]]:
    return model, lambda folder: None


def _tuned(method: sterna.PaFi | sterna.HiWi) -> Ready:
    def ready(model: Any, base: Path) -> tuple[Any, Callable[[Path], None]]:
        tuning = sterna.tune(model, method, base=base)
        return model, lambda folder: tuning.expert().save(folder / "expert.safetensors")

    return ready


METHODS: dict[str, tuple[Ready, tuple[float, ...]]] = {
    LORA: (_lora, (2e-3, 5e-3, 1e-2)),
    PAFI: (_tuned(sterna.PaFi(count=STORED, gradient="sampled")), (5e-3, 1e-2, 2e-2, 4e-2)),
    HIWI: (_tuned(sterna.HiWi(target="weight", rank=5)), (1e-3, 3e-3, 1e-2, 2e-2)),
    FULL: (_full, (3e-5, 1e-4, 3e-4)),
}


def dialogue(base: Path) -> Segments:
    """Segments of TOKENS tokens within episodes, `speaker: line` after `speaker: line`, shuffled; by season 1 to 8, 9 and 10."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    episodes: dict[tuple[str, str], list[str]] = {}
    for cells in read_tab(asset_path("texts") / "friends-transcripts.tab", quoted=True):
        if len(cells) > 5:
            episodes.setdefault((cells[0], cells[1]), []).append(f"{cells[4].strip()}: {cells[5].strip()}")
    found: dict[str, list[torch.Tensor]] = {"train": [], "validation": [], "test": []}
    for (season, _), lines in episodes.items():
        ids = tokenizer("\n".join(lines))["input_ids"]
        part = {"09": "validation", "10": "test"}.get(season, "train")
        found[part] += torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS)
    for segments in found.values():
        random.Random(0).shuffle(segments)
    return Segments(found["train"][: STEPS * BATCH], found["validation"][:VALIDATION], found["test"][:TEST])


def losses(model: Any, segments: Sequence[torch.Tensor]) -> Losses:
    """Nats a token of each segment."""
    model.eval()
    found: Losses = []
    with torch.no_grad():
        for start in range(0, len(segments), 8):
            batch = torch.stack(list(segments[start : start + 8]))
            scores = model(input_ids=batch).logits[:, :-1].transpose(1, 2)
            found += torch.nn.functional.cross_entropy(scores, batch[:, 1:], reduction="none").mean(1).tolist()
    return found


def perplexity(found: Losses) -> Estimate:
    return ratio(np.exp(found), np.ones(len(found)))


def against(found: Losses, reference: Losses) -> Estimate:
    """Ratio of two perplexities on the same segments."""
    return ratio(np.exp(found), np.exp(reference))


def trained(name: str, rate: float, base: Path, segments: Segments, steps: int) -> Path:
    """A folder with the expert (or PEFT's adapter) and run.json, kept in the cache; trained now where it is not there."""
    label = name.replace(",", "").replace(" ", "-").lower()
    version = torch.__version__.split("+")[0]
    target = cache_folder() / "benchmarks" / "causal-lm-training" / f"{label}-{rate:g}-{steps}-{BATCH}x{TOKENS}-torch{version}"
    if target.is_dir():
        return target
    torch.manual_seed(0)
    model, save = METHODS[name][0](load(base), base)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM, (steps - step) / max(steps - WARM, 1)))
    model.train()
    curve: Losses = []
    started = time.process_time()  # one thread; trainings may be made beside other work
    for step in range(steps):
        batch = torch.stack(segments.train[step * BATCH : (step + 1) * BATCH])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    seconds = time.process_time() - started
    run = {"trained": sum(p.numel() for p in parameters), "seconds": seconds, "losses": curve, "validation": losses(model, segments.validation)}
    if name == FULL:  # nothing else is kept of it
        run["test"] = losses(model, segments.test)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial, quiet():
        whole = Path(partial) / target.name
        whole.mkdir()
        save(whole)
        (whole / "run.json").write_text(json.dumps(run))
        settle(whole, target)
    harness.note(f"{name}, rate {rate:g}: validation perplexity {math.exp(np.mean(run['validation'])):.2f}, {seconds / steps:.2f} s a step")
    return target


def run_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def tested(folder: Path, base: Path, model: Any, segments: Segments) -> Losses:
    """Test losses of what was stored, put onto the base anew."""
    if (folder / "adapter_config.json").exists():
        import peft

        with quiet():
            return losses(peft.PeftModel.from_pretrained(load(base), folder), segments.test)
    if (folder / "expert.safetensors").exists():
        with sterna.attached(model, folder / "expert.safetensors"):
            return losses(model, segments.test)
    return run_of(folder)["test"]


def stored_bytes(folder: Path) -> int | None:
    """Of the weights on disk, without configurations."""
    return next((file.stat().st_size for file in sorted(folder.glob("*.safetensors"))), None)


def ternary(name: str, folder: Path, base: Path, model: Any, segments: Segments) -> sterna.Expert:
    """The compressed expert that does best on validation: for each scope, alpha is climbed to."""
    density, start, scopes = TERNARY[name]
    source = folder if (folder / "adapter_config.json").exists() else folder / "expert.safetensors"
    found: list[tuple[float, sterna.Expert]] = []
    for scope in scopes:

        @cache
        def at(place: int, scope: Literal["global", "tensor"] = scope) -> tuple[float, sterna.Expert]:
            expert = sterna.compress(base, source, density=density, alpha=ALPHAS[place], scope=scope)
            with sterna.attached(model, expert):
                return float(np.mean(losses(model, segments.validation))), expert

        place = ALPHAS.index(start)
        for direction in (1, -1):  # the curve over scales has one valley
            while 0 <= place + direction < len(ALPHAS) and at(place + direction)[0] < at(place)[0]:
                place += direction
        found.append(at(place))
    return min(found, key=lambda pair: pair[0])[1]


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base = inputs.causal_lm(options)
    if base is None:
        raise SystemExit("the causal language model is needed: python -m sterna.demo.assets --all; pip install gguf")
    segments, steps = dialogue(base), STEPS
    if options.quick:
        segments, steps = Segments(segments.train, segments.validation[:8], segments.test[:8]), 3
    chosen: dict[str, tuple[float, Path]] = {}
    rates = []
    for name, (_, tried) in METHODS.items():
        tried = tried[:1] if options.quick else tried
        folders = {rate: trained(name, rate, base, segments, steps) for rate in tried}
        scores = {rate: math.exp(np.mean(run_of(folder)["validation"])) for rate, folder in folders.items()}
        rate = min(scores, key=lambda rate: scores[rate])
        chosen[name] = rate, folders[rate]
        rates += [[name, f"{rate:g}", score, "chosen" if rate == chosen[name][0] else ""] for rate, score in scores.items()]
    model = load(base)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    bare = losses(model, segments.test)
    found = {name: tested(folder, base, model, segments) for name, (_, folder) in chosen.items()}
    reference = found[LORA]
    rows: list[list[Any]] = [["base", "", "", "", "", "", perplexity(bare), against(bare, reference)]]
    for name, (rate, folder) in chosen.items():
        run, size = run_of(folder), stored_bytes(folder)
        label, size = (f"{name}, exact", size) if size else (f"{name}, as a 16-bit delta", 2 * numbers)
        shown = perplexity(found[name]), against(found[name], reference)
        rows.append([label, f"{rate:g}", run["trained"], size, "", run["seconds"] / steps, *shown])
    for name in TERNARY:
        expert = ternary(name, chosen[name][1], base, model, segments)
        with sterna.attached(model, expert):
            kept = losses(model, segments.test)
        facts = expert.facts
        how = f"{name}, ternary, density {facts.density:g}" + (", by tensor" if facts.scope == "tensor" else "")
        rows.append([how, "", "", sterna.inspect(expert).bytes, f"{facts.alpha:g}", "", perplexity(kept), against(kept, reference)])
    columns = ("expert", "rate", "trained numbers", "bytes on disk", "alpha", "s a step", "test perplexity", "its ratio to exact LoRA's")
    title = f"SmolLM2-135M after {steps} steps of {BATCH} x {TOKENS} tokens on dialogue; {len(segments.test)} test segments"
    report.table(title, columns, rows, "Exact values are float32. A step's time is the mean of its training, processor time of one thread.")
    edge = [name for name, (rate, _) in chosen.items() if rate in (min(METHODS[name][1]), max(METHODS[name][1]))]
    note = f"Best at the lowest or highest rate tried: {'; '.join(edge)}." if edge else ""
    report.table("Rates", ("method", "rate", "validation perplexity", ""), rates, note)
    report.write()


if __name__ == "__main__":
    main()
