"""The Fisher information that an allocation is made by: held against gradients of transformers' own models, and what it does to the levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import models
import sterna
import trainable
from models import same_state
from sterna.compression import match
from sterna.errors import InvalidArgument
from sterna.scoring.bench import Bench, open_bench
from sterna.searching.candidates import Maker, Setting
from sterna.searching.fisher import ROWS, mean_fisher

CASES: dict[str, tuple[str, type[Any], dict[str, Any]]] = {
    "classification": ("bert", transformers.AutoModelForSequenceClassification, {"id2label": {0: "b", 1: "a"}, "label2id": {"b": 0, "a": 1}}),
    "regression": ("bert", transformers.AutoModelForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}),
    "causal-lm": ("llama", transformers.AutoModelForCausalLM, {}),
    "seq2seq": ("t5", transformers.AutoModelForSeq2SeqLM, {}),
}
OPTIONS: dict[str, dict[str, Any]] = {"regression": {"label": "rating"}, "causal-lm": {"max_length": 9}, "seq2seq": {"target": "summary"}}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Bench]:
    """A task, a folder with a base and its fine-tune, and a bench over the base."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    kind, loader, options = CASES[task]
    trainable.save_base(kind, folder / "base")
    torch.manual_seed(1)
    models.tuned(loader.from_pretrained(folder / "base", **options), size=0.05).save_pretrained(folder / "tuned")
    trainable.tokenizer(kind).save_pretrained(folder / "tuned")
    rows = trainable.rows(80)
    return task, folder, open_bench(folder / "base", rows, like=folder / "tuned", task=task, device="cpu", **OPTIONS.get(task, {}))


def maker_of(folder: Path, bench: Bench | None) -> Maker:
    asked = None if bench is None else lambda tuned, names: mean_fisher(bench, tuned, names)
    return Maker(match(folder / "base", folder / "tuned"), "fast", fisher=asked)


def reference(task: str, folder: Path, bench: Bench) -> dict[str, float]:
    """Mean squared gradients of the tuned model as transformers loads it, by its own losses, row by row."""
    model: Any = CASES[task][1].from_pretrained(folder / "tuned").eval()
    sums = dict.fromkeys(dict(model.named_parameters()), 0.0)
    rows = bench.evaluation.rows[:ROWS]
    for row in rows:
        label: Any = row["labels"]
        if task == "classification":
            label = model.config.label2id[bench.classes[label]]
        wanted = torch.tensor([label], dtype=torch.float32 if task == "regression" else torch.long)
        model.zero_grad()
        model(**{name: torch.tensor([row[name]]) for name in row if name != "labels"}, labels=wanted).loss.backward()
        for name, parameter in model.named_parameters():
            sums[name] += 0.0 if parameter.grad is None else float((parameter.grad**2).sum())
    return {name: sums[name] / len(rows) / parameter.numel() for name, parameter in model.named_parameters()}


def test_it_is_the_mean_squared_gradient_of_each_tensor(case: tuple[str, Path, Bench]) -> None:
    task, folder, bench = case
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    found = maker_of(folder, bench)
    wanted = reference(task, folder, bench)
    names = [piece.name for piece in found.matched.task.pieces]
    assert len(set(found.fisher)) > 5
    for name, value in zip(names, found.fisher, strict=True):
        own = next((wanted[full] for full in (name, f"bert.{name}") if full in wanted), None)
        assert own is not None, name
        assert value == pytest.approx(own, rel=0.06)  # two digits
    assert same_state(bench.model, before)
    assert all(parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in bench.model.parameters())


def test_what_is_kept_is_over_one_threshold_of_weighted_magnitudes(case: tuple[str, Path, Bench]) -> None:
    _, folder, bench = case
    maker = maker_of(folder, bench)
    tuned = {change.name: change for change in maker.tuned().changes}
    kept, left, count, entries = [], [], 0, 0
    levels = maker.expert(Setting(0.1, 1.0, "fisher")).task_vector()
    base = dict(bench.model.state_dict())
    for piece, weight in zip(maker.matched.task.pieces, maker.fisher, strict=True):
        whole = tuned[piece.name].exact[0][1]
        original = base.get(piece.name, base.get(f"bert.{piece.name}"))
        magnitude = (whole - original).abs().flatten() * weight**0.25
        mask = levels[piece.name].flatten() != 0
        kept.append(magnitude[mask])
        left.append(magnitude[~mask])
        count, entries = count + int(mask.sum()), entries + mask.numel()
    assert 0.95 * 0.1 * entries <= count <= 0.1 * entries
    assert float(torch.cat(kept).min()) * (1 + 2 / 256) >= float(torch.cat(left).max()) * (1 - 2 / 256)


def test_without_rows_or_for_an_adapter_there_is_none(tmp_path: Path) -> None:
    base = models.made("bert")
    maker = Maker(match(base, models.tuned(base)), "fast")
    assert not maker.has_fisher
    with pytest.raises(InvalidArgument, match="'fisher'"):
        maker.expert(Setting(0.1, 1.0, "fisher"))
    model = models.made("bert")
    tuning = sterna.tune(model, sterna.PaFi(density=0.05))
    with torch.no_grad():
        for value in tuning.parameters():
            value.add_(0.01)
    pafi = Maker(match(base, tuning.expert()), "fast", fisher=lambda tuned, names: [1.0] * len(names))
    assert not pafi.has_fisher


def test_a_search_tries_it_and_says_so(case: tuple[str, Path, Bench]) -> None:
    task, folder, _ = case
    rows = trainable.rows(60)
    result = sterna.search(folder / "base", folder / "tuned", data=rows, max_bytes=30_000, task=task, device="cpu", **OPTIONS.get(task, {}))
    assert "fisher" in {trial.setting.allocation for trial in result.trials}
