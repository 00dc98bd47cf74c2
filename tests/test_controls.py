"""Controls: each packing against a dense formula written here, bytes from files, and a run on tiny models of every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save

import models
import sterna
import trainable
from sterna.errors import InvalidArgument
from sterna.expert.changes import Masked
from sterna.scoring.bench import open_bench
from sterna.scoring.controls import TITLES, TunedVector, controls, sixteen_bit
from sterna.scoring.dense import dare, prune_only
from sterna.scoring.evaluate import evaluate
from sterna.scoring.packing import Halves, Layout, OneBit, Rounded, Sparse
from sterna.scoring.scales import climb

SHAPES = ((5, 7), (6,), (3, 4, 2), (), (0,), (9, 3))
LAYOUT = Layout(SHAPES, (True, False, False, False, False, False))


def vector(seed: int = 0, size: float = 1e-4) -> torch.Tensor:
    """Heavy-tailed, with a row of zeros and a few more."""
    generator = torch.Generator().manual_seed(seed)
    tau = size * torch.randn(sum(LAYOUT.sizes), generator=generator) ** 3
    tau[:7] = 0
    tau[::11] = 0
    return tau


def through_a_file(packing: Any, tau: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    (tmp_path / "packed.safetensors").write_bytes(save(packing.pack(tau, LAYOUT)))
    read: torch.Tensor = packing.unpack(load_file(tmp_path / "packed.safetensors"), LAYOUT)
    assert read.shape == tau.shape
    assert read.dtype == torch.float32
    return read


def pieces(tau: torch.Tensor) -> list[np.ndarray]:
    flat, done, found = tau.numpy().astype(np.float64), 0, []
    for shape in SHAPES:
        size = int(np.prod(shape, dtype=int))
        found.append(flat[done : done + size].reshape(shape))
        done += size
    return found


def joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e3])
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_halves_are_the_vector_to_eleven_bits(size: float, factor: float, tmp_path: Path) -> None:
    tau = vector(size=size)
    read = through_a_file(Halves(factor), tau, tmp_path)
    large = tau.abs() > 1e-4 * tau.abs().max()
    assert torch.allclose(read[large], factor * tau[large], rtol=2**-11, atol=0)
    assert torch.allclose(read, factor * tau, rtol=2**-11, atol=2**-25 * float(tau.abs().max()))


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_sparse_keeps_positions_and_signs_exactly(density: float, tmp_path: Path) -> None:
    tau = vector()
    order = np.argsort(-np.abs(tau.numpy()), kind="stable")[: int(density * tau.numel())]
    wanted = np.zeros(tau.numel())
    wanted[order] = tau.numpy()[order]
    read = through_a_file(Sparse(), prune_only(tau, density), tmp_path).numpy()
    assert np.array_equal(np.sign(read), np.sign(wanted))
    assert np.allclose(read, wanted, rtol=2**-10, atol=2**-24 * np.abs(wanted).max())


@pytest.mark.parametrize("embeddings", [False, True])
def test_one_bit_is_sign_times_mean_magnitude_of_each_matrix(embeddings: bool, tmp_path: Path) -> None:
    tau = vector()
    wanted = []
    for number, part in enumerate(pieces(tau)):
        if part.ndim > 1 and (embeddings or number != 0):
            wanted.append(np.where(part > 0, 1, -1) * np.abs(part).mean())
        else:
            wanted.append(part)
    read = through_a_file(OneBit(embeddings=embeddings), tau, tmp_path).numpy()
    assert np.allclose(read, joined(wanted), rtol=2**-11, atol=2**-24 * float(tau.abs().max()))


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_the_nearest_step_of_each_row(bits: int, tmp_path: Path) -> None:
    tau = vector()
    largest = 127 if bits == 8 else 7
    read = pieces(through_a_file(Rounded(bits), tau, tmp_path))
    for part, got in zip(pieces(tau), read, strict=True):
        rows, found = (side.reshape(side.shape[0] if side.ndim > 1 else 1, -1) for side in (part, got))
        for row, stored in zip(rows, found, strict=True):
            if not row.size:
                continue
            step = np.abs(row).max() / largest
            assert np.abs(row - stored).max() <= 0.503 * step + 1e-12  # half a step, and the scale's own rounding
            assert len(np.unique(np.abs(stored).round(12))) <= largest + 1
            if step:
                assert np.allclose(stored / step, np.round(stored / step), atol=0.07)


def test_dare_keeps_a_share_and_the_sum() -> None:
    tau = torch.ones(200_000)
    kept = dare(tau, 0.2, seed=3)
    assert set(kept.unique().tolist()) == {0.0, 5.0}
    assert float((kept > 0).float().mean()) == pytest.approx(0.2, abs=0.004)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(kept, dare(tau, 0.2, seed=3))
    assert not torch.equal(kept, dare(tau, 0.2, seed=4))


def test_a_vector_of_zeros_and_one_without_matrices_survive(tmp_path: Path) -> None:
    for packing in (Halves(), Sparse(), OneBit(), Rounded(8), Rounded(4)):
        assert not through_a_file(packing, torch.zeros(sum(LAYOUT.sizes)), tmp_path).any()
        flat = Layout(((6,), ()), (False, False))
        tau = torch.tensor([1.0, -2.0, 0.0, 4.0, -0.5, 1.0, 8.0])
        assert torch.allclose(packing.unpack(packing.pack(tau, flat), flat), tau, atol=0.6)


@pytest.mark.parametrize("peak", range(9))
def test_climbing_finds_the_peak_with_few_steps(peak: int) -> None:
    seen: list[float] = []

    def rank(value: float) -> float:
        seen.append(value)
        return -abs(value - peak)

    assert climb(range(9), 4, rank) == peak
    assert len(seen) == len(set(seen)) <= 7


# On models


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    trainable.save_base("bert", folder / "bert")
    trainable.save_csv(folder / "rows.csv", 60)
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "num_labels": 2}
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", **names)
    models.tuned(model, size=0.05).save_pretrained(folder / "full")
    trainable.tokenizer("bert").save_pretrained(folder / "full")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    lora.save_pretrained(folder / "lora")
    pafi: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", **names)
    tuning = sterna.tune(pafi, sterna.PaFi(density=0.1), base=folder / "bert")
    with torch.no_grad():
        for parameter in pafi.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    tuning.expert().save(folder / "pafi.safetensors")
    return folder


TUNED = ("full", "lora", "pafi.safetensors")


def logits(place: Path, expert: Any) -> torch.Tensor:
    bench = open_bench(place / "bert", place / "rows.csv", like=place / "full", device="cpu")
    found = bench.outputs(expert)
    assert found.logits is not None
    return torch.tensor(found.logits)


@pytest.mark.parametrize("tuned", TUNED)
def test_a_tuned_vector_put_on_the_base_is_the_tuned_model(place: Path, tuned: str) -> None:
    made = TunedVector.of(place / "bert", place / tuned)
    assert torch.allclose(logits(place, made.expert(made.tau)), logits(place, place / tuned), atol=1e-5)
    moved = logits(place, made.expert(torch.zeros_like(made.tau)))
    assert not torch.allclose(moved, logits(place, place / tuned), atol=1e-3)


@pytest.mark.parametrize("tuned", TUNED)
def test_controls_are_worth_what_their_files_hold(place: Path, tuned: str, tmp_path: Path) -> None:
    """Every file is read again here, without the packings' owner, and put on the base by its dense vector."""
    made = TunedVector.of(place / "bert", place / tuned)
    found = {one.name: one for one in controls(made, tmp_path, density=0.2, alpha=3.0, rank=lambda expert: 0.0)}
    there = [name for name in TITLES if name != "bitdelta_all" or any(made.layout.embeddings)]
    assert list(found) == there
    dense = {
        "rescaled": made.tau,
        "prune": prune_only(made.tau, 0.2),
        "stc": torch.where(prune_only(made.tau, 0.2) != 0, made.tau.sign() * made.tau[prune_only(made.tau, 0.2) != 0].abs().mean(), 0.0),
        "compeft": torch.where(prune_only(made.tau, 0.2) != 0, made.tau.sign() * 3 * made.tau.double().std().float(), 0.0),
        "dare": dare(made.tau, 0.2, 0),
    }
    for name, control in found.items():
        path = tmp_path / f"{name}.safetensors"
        assert control.bytes == path.stat().st_size
        if name in dense:
            assert torch.allclose(logits(place, control.expert), logits(place, made.expert(dense[name])), atol=2e-3), name
        with safe_open(path, "pt") as stored:
            if name not in ("stc", "compeft"):
                assert json.loads(stored.metadata()["control"])["control"] == name
                kept = [key for key in stored.keys() if key.startswith("exact.")]  # noqa: SIM118
                assert len(kept) == len(made.exact)
    assert found["int4"].bytes < found["int8"].bytes < found["rescaled"].bytes
    if tuned == "full":  # of the others the header is the most
        assert found["compeft"].bytes < found["prune"].bytes
    assert 2 * made.tau.numel() < found["rescaled"].bytes


def test_the_scale_is_chosen_by_rank_and_left_out_without_one(place: Path, tmp_path: Path) -> None:
    made = TunedVector.of(place / "bert", place / "full")
    wanted = 1.2 * made.tau

    def rank(expert: Any) -> float:
        query = next(change for change in expert.changes if change.name.endswith("layer.0.attention.self.query.weight"))
        own = next(i for i, piece in enumerate(made.matched.task.pieces) if piece.name == query.name)
        base = made.matched.base.read(query.name)
        return -float((query.value - base - made.layout.split(wanted)[own]).abs().sum())

    (control,) = controls(made, tmp_path, names=["rescaled"], rank=rank)
    assert control.detail == {"factor": 1.2}
    assert list(controls(made, tmp_path, names=["rescaled"])) == []
    assert sixteen_bit(made) == 2 * (made.tau.numel() + sum(change.value.numel() for change in made.exact))


def test_controls_of_masked_values_stay_masked(place: Path) -> None:
    made = TunedVector.of(place / "bert", place / "pafi.safetensors")
    assert any(isinstance(change, Masked) for change in made.expert(made.tau).changes)


@pytest.mark.parametrize(("options", "said"), [({"names": ["prun"]}, "no control 'prun'"), ({"density": 0.0}, "density is 0")])
def test_bad_options_are_refused_before_a_file_is_written(place: Path, tmp_path: Path, options: Any, said: str) -> None:
    made = TunedVector.of(place / "bert", place / "full")
    with pytest.raises(InvalidArgument, match=said):
        list(controls(made, tmp_path, **options))
    assert not list(tmp_path.iterdir())


def test_an_evaluation_with_controls_keeps_rows_apart(place: Path) -> None:
    found = evaluate(place / "bert", [], data=place / "rows.csv", tuned=place / "full", controls=True, metric=["accuracy", "loss"])
    (task,) = found.tasks
    assert (task.rows, task.selection) == (48, 12)
    assert [entry.name for entry in task.entries] == ["base", "full", *TITLES.values()]
    assert task.entry("8 bits, scales by row").outcomes["loss"].value == pytest.approx(task.entry("full").outcomes["loss"].value, rel=0.05)
    with pytest.raises(InvalidArgument, match="made of the tuned model"):
        evaluate(place / "bert", [], data=place / "rows.csv", controls=True)
