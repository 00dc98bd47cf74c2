"""LoRA experts of a causal language model, one a speaker of Friends, composed for a speaker that none of them knows.

Question: SmolLM2-135M with one LoRA expert for each of six speakers (40 steps of 4 x 64 tokens of their lines). Each speaker is left out in turn,
    and the experts of the other five are composed from eight segments of that speaker: what is the perplexity on other segments of the speaker,
    beside the base, the best expert alone, LoRA trained on the same eight segments, and the speaker's own expert?
Goal: None of its own.
Predicted: The five share what dialogue is, so each alone takes the base from 45 to 26; composed with weights that add up to more than 1, 25; LoRA on
    eight segments 30; the speaker's own expert 25. Compressed experts (density .2, by tensor) within 3 % of that.
Peer: PEFT's LoRA of rank 9 on query and value, trained on the speaker itself.
Note: Lines of a speaker in a row, as `speaker: line`; segments of 64 tokens. Uncompressed experts are the exact products, added by dense sums. The
    rate is not tuned here: 5e-3, the best of causal_lm_training.py. The model runs in bfloat16 (autocast). Intervals are over test segments.

    python benchmarks/lorahub_causal_lm.py           about 20 minutes on one core; trained experts and finished speakers are kept
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import harness
import inputs
import sterna
from causal_lm import load
from causal_lm_training import BATCH, STEPS, TOKENS, WARM, Losses, losses, perplexity
from harness import ratio
from lorahub import DensePool
from sterna.composing.pool import Pool
from sterna.composing.search import best, search, trial_of
from sterna.demo.assets import asset_path, cache_folder, settle
from sterna.demo.data import read_tab
from sterna.needs import quiet

SPEAKERS = ("Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross")
SHOTS, TEST = 8, 64
RATE, RANK = 5e-3, 9
DENSITY, ALPHA = 0.2, 3.0


def segments(base: Path) -> dict[str, list[torch.Tensor]]:
    """Each speaker's lines, in order, as segments of TOKENS tokens, shuffled."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    lines: dict[str, list[str]] = {speaker: [] for speaker in SPEAKERS}
    for cells in read_tab(asset_path("texts") / "friends-transcripts.tab", quoted=True):
        if len(cells) > 5 and cells[4].strip() in lines:
            lines[cells[4].strip()].append(f"{cells[4].strip()}: {cells[5].strip()}")
    found = {}
    for speaker, spoken in lines.items():
        ids = tokenizer("\n".join(spoken))["input_ids"]
        found[speaker] = list(torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS))
        random.Random(0).shuffle(found[speaker])
    return found


def trained(label: str, base: Path, rows: Sequence[torch.Tensor], steps: int) -> Path:
    """A PEFT folder in the cache, trained on batches of the rows, over and over; now where it is not there."""
    import peft

    target = cache_folder() / "benchmarks" / "lorahub-causal-lm" / f"{label}-{steps}x{BATCH}x{TOKENS}-{RATE:g}-torch{torch.__version__.split('+')[0]}"
    if target.is_dir():
        return target
    torch.manual_seed(0)
    with quiet():
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(load(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM, (steps - step) / max(steps - WARM, 1)))
    model.train()
    for step in range(steps):
        batch = torch.stack([rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)])
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial, quiet():
        whole = Path(partial) / target.name
        model.save_pretrained(whole)
        settle(whole, target)
    harness.note(f"trained {label}")
    return target


def products(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's task vector: scaling * B A by the base model's own names."""
    import peft

    with quiet():
        model = load(base)
        before = {name: tensor.detach().clone() for name, tensor in model.base_model.named_parameters()}
        after = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().base_model
    return {name: tensor.detach() - before[name] for name, tensor in after.named_parameters() if not torch.equal(tensor, before[name])}


def tested(model: Any, rows: Sequence[torch.Tensor]) -> Losses:
    with torch.autocast("cpu", torch.bfloat16):
        return losses(model, rows)


def composed(pool: Any, model: Any, count: int, shots: Sequence[torch.Tensor], test: Sequence[torch.Tensor]) -> dict[str, Any]:
    def scored(weights: Sequence[float]) -> float:
        pool.weigh(weights)
        return -float(np.mean(tested(model, shots)))

    alone = [trial_of([float(i == j) for j in range(count)], scored, 0.05) for i in range(count)]
    trials = search(count, scored)
    found = {}
    for name, trial in (("base", trials[0]), ("single", best(alone)), ("composed", best([*trials, *alone]))):
        pool.weigh(trial.weights)
        found[name] = {"weights": list(trial.weights), "score": trial.score, "test": tested(model, test)}
    return found


def with_adapter(base: Path, folder: Path, test: Sequence[torch.Tensor]) -> Losses:
    import peft

    with quiet():
        return tested(peft.PeftModel.from_pretrained(load(base), folder), test)


def speaker_result(speaker: str, base: Path, rows: dict[str, list[torch.Tensor]], folders: dict[str, Path]) -> dict[str, Any]:
    """Everything that is compared for one unseen speaker; kept in the cache."""
    kept = cache_folder() / "benchmarks" / "lorahub-causal-lm" / f"{speaker}-{SHOTS}-{TEST}-{STEPS}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    others = [other for other in SPEAKERS if other != speaker]
    held = rows[speaker][STEPS * BATCH :]  # what the speaker's own expert has not seen either
    shots, test = held[:SHOTS], held[SHOTS : SHOTS + TEST]
    model = load(base)
    experts = [sterna.compress(base, folders[other], density=DENSITY, alpha=ALPHA, scope="tensor") for other in others]
    with Pool(model, experts) as pool:
        result: dict[str, Any] = {"compressed": composed(pool, model, len(others), shots, test)}
    dense = DensePool(model, [products(base, folders[other]) for other in others])
    result["uncompressed"] = composed(dense, model, len(others), shots, test)
    few = trained(f"{speaker}-few", base, shots, max(SHOTS // BATCH * 5, 1))
    result |= {"few": with_adapter(base, few, test), "own": with_adapter(base, folders[speaker], test)}
    kept.write_text(json.dumps(result))
    harness.note(f"{speaker}: base {np.exp(np.mean(result['compressed']['base']['test'])):.1f}")
    return result


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base = inputs.causal_lm(options)
    if base is None:
        raise SystemExit("the causal language model is needed: python -m sterna.demo.assets --all; pip install gguf")
    rows = segments(base)
    folders = {speaker: trained(speaker, base, rows[speaker][: STEPS * BATCH], STEPS) for speaker in SPEAKERS}
    found = {speaker: speaker_result(speaker, base, rows, folders) for speaker in SPEAKERS[: 1 if options.quick else None]}
    lines = []
    for side in ("compressed", "uncompressed"):
        gathered = {name: [loss for one in found.values() for loss in one[side][name]["test"]] for name in ("base", "single", "composed")}
        gains = [ratio(np.exp(gathered["composed"]), np.exp(gathered[name])) for name in ("base", "single")]
        lines.append([side, *(perplexity(gathered[name]) for name in gathered), *gains])
    columns = ("experts", "base", "best expert alone", "composed", "composed over base", "composed over best alone")
    report.table(f"Perplexity on {TEST} segments of each unseen speaker, {len(found)} speakers, {SHOTS} segments to search by", columns, lines)
    names = {"few": f"LoRA on the {SHOTS} segments", "own": f"its own expert, {STEPS * BATCH} segments"}
    tuned = [[name, perplexity([loss for one in found.values() for loss in one[key]])] for key, name in names.items()]
    report.table("Trained on the speaker", ("", "perplexity"), tuned)
    weights = [
        [speaker, *(", ".join(f"{weight:.2f}" for weight in one[side]["composed"]["weights"]) for side in ("compressed", "uncompressed"))]
        for speaker, one in found.items()
    ]
    report.table("Weights found, of the other speakers by name", ("unseen speaker", "compressed", "uncompressed"), weights)
    report.write()



if __name__ == "__main__":
    main()
