"""How a density is spent over tensors, residual planes, and candidates: held against dense formulas and against `compress`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sterna
from models import made, noise, state_of, tuned
from sterna.compression import match
from sterna.errors import InvalidArgument
from sterna.expert.palette import Palette
from sterna.searching.allocation import ALLOCATIONS, AllocationName, closed_form_alpha
from sterna.searching.candidates import Maker, Setting

DENSITIES = (0.01, 0.1, 0.5, 1.0)


def uneven(model: torch.nn.Module) -> torch.nn.Module:
    """A fine-tune that moves some tensors much more than others."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for place, parameter in enumerate(other.parameters()):
            parameter.add_(noise(parameter, generator, 3e-4 * (1 + place % 7) ** 1.5))
    return other


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    base = made("bert")
    return base, uneven(base)


@pytest.fixture(scope="module")
def maker(pair: tuple[torch.nn.Module, torch.nn.Module]) -> Maker:
    return Maker(match(*pair), "fast")


def vectors(maker: Maker) -> dict[str, torch.Tensor]:
    """The task vector, dense, tensor by tensor."""
    found = {}
    for piece in maker.matched.task.pieces:
        out = np.empty(piece.size, np.float32)
        piece.read(0, piece.size, out)
        found[piece.name] = torch.from_numpy(out)
    return found


def coded(maker: Maker, setting: Setting) -> dict[str, torch.Tensor]:
    names = {piece.name for piece in maker.matched.task.pieces}
    return {name: value.flatten() for name, value in maker.expert(setting).task_vector().items() if name in names}


def largest(tau: torch.Tensor, kept: int) -> torch.Tensor:
    mask = torch.zeros_like(tau, dtype=torch.bool)
    mask[torch.sort(tau.abs(), descending=True, stable=True).indices[:kept]] = True
    return mask & (tau != 0)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("coding", ["fast", "small"])
def test_plain_allocations_are_what_compress_makes(pair: tuple[torch.nn.Module, torch.nn.Module], scope: Any, density: float, coding: str) -> None:
    maker = Maker(match(*pair), coding)
    for alpha in (0.7, 3.0):
        theirs = sterna.compress(*pair, density=density, alpha=alpha, scope=scope, coding=coding, head="fp16")
        assert maker.expert(Setting(density, alpha, scope, head="fp16")).digest == theirs.digest


@pytest.mark.parametrize("density", DENSITIES)
def test_scaled_keeps_what_global_keeps_and_each_tensors_norm(maker: Maker, density: float) -> None:
    alpha, tau = 1.7, vectors(maker)
    kept = largest(torch.cat(list(tau.values())), int(density * maker.entries)).split([value.numel() for value in tau.values()])
    for (name, value), mask in zip(tau.items(), kept, strict=True):
        count = int(mask.sum())
        scale = alpha * math.sqrt(density * float((value.double() ** 2).sum()) / count) if count else 0.0
        wanted = torch.where(mask, value.sign() * scale, 0.0)
        found = coded(maker, Setting(density, alpha, "scaled"))[name]
        assert torch.equal(found != 0, mask)
        # the scale's count is that of whole bins: a bin is 1/256 of a magnitude
        torch.testing.assert_close(found, wanted, rtol=0.12 if count < 20 else 0.03, atol=0.0)


@pytest.mark.parametrize("density", DENSITIES)
def test_balanced_lies_between_global_and_tensor(maker: Maker, density: float) -> None:
    alpha, tau = 1.7, vectors(maker)
    found = coded(maker, Setting(density, alpha, "balanced"))
    kept = {name: int((value != 0).sum()) for name, value in found.items()}
    assert sum(kept.values()) <= density * maker.entries
    assert sum(kept.values()) >= 0.95 * density * maker.entries - 1
    lowest = []
    for name, value in tau.items():
        assert torch.equal(found[name] != 0, largest(value, kept[name]))  # of each tensor the largest
        weighted = value.abs() / value.std() ** 0.5
        if 0 < kept[name] < value.numel():
            lowest += [(float(weighted[found[name] != 0].min()), float(weighted[found[name] == 0].max()))]
    if lowest:  # one threshold over the weighted magnitudes, to the width of a bin
        assert min(kept for kept, _ in lowest) * (1 + 2 / 256) >= max(left for _, left in lowest) * (1 - 2 / 256)
    norms = {name: float(found[name].norm()) for name in tau if kept[name]}
    for name, norm in norms.items():
        assert norm == pytest.approx(alpha * math.sqrt(density) * float(tau[name].double().norm()), rel=1e-4)


@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_another_alpha_only_scales(maker: Maker, name: AllocationName) -> None:
    one, other = (coded(maker, Setting(0.1, alpha, name)) for alpha in (1.0, 2.5))
    for tensor, value in one.items():
        torch.testing.assert_close(other[tensor], 2.5 * value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_planes_are_the_sum_of_what_each_left(maker: Maker, density: float, count: int) -> None:
    tau = torch.cat(list(vectors(maker).values()))
    left, total, first = tau.clone(), torch.zeros_like(tau), None
    for _ in range(count):
        mask = largest(left, int(density * tau.numel()))
        mean = float(left[mask].abs().double().mean())
        first = first or mean
        plane = torch.where(mask, left.sign() * mean, 0.0)
        left, total = left - plane, total + plane
    found = torch.cat(list(coded(maker, Setting(density, 2.0, planes=count)).values()))
    wanted = total / first * 2.0 * float(tau.double().std())
    # means are taken over bins of 1/256 of a magnitude, so a few entries near the next threshold may fall to either side
    assert float(((found - wanted).abs() > 0.01 * wanted.abs().max()).float().mean()) < 0.002
    assert len(found.abs().unique()) <= (3**count - 1) // 2 + 1


def test_planes_leave_less_than_one_of_the_same_entries(maker: Maker) -> None:
    tau = torch.cat(list(vectors(maker).values()))

    def error(setting: Setting) -> float:
        """What is left of the vector at the best scale."""
        found = torch.cat(list(coded(maker, setting).values()))
        return float((tau - found * (tau @ found) / (found @ found)).norm())

    errors = [error(Setting(0.1, 1.0, planes=planes)) for planes in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]


def test_planes_survive_their_file_and_come_off_to_the_bit(pair: tuple[torch.nn.Module, torch.nn.Module], maker: Maker, tmp_path: Path) -> None:
    expert = maker.expert(Setting(0.2, 2.0, planes=2, head="int8"))
    assert any(isinstance(change, Palette) for change in expert.changes)
    expert.save(tmp_path / "planes.safetensors")
    loaded = sterna.load(tmp_path / "planes.safetensors")
    assert loaded.content_digest == expert.content_digest
    model, before = copy.deepcopy(pair[0]), state_of(pair[0])
    with sterna.attached(model, loaded):
        now = state_of(model)
        for name, update in expert.task_vector().items():
            own = name if name in now else f"bert.{name}"
            torch.testing.assert_close(now[own], before[own] + update)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("head", ["exact", "int8"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("coding", ["fast", "small"])
def test_bytes_are_those_of_the_file(pair: tuple[torch.nn.Module, torch.nn.Module], head: Any, planes: int, coding: str, tmp_path: Path) -> None:
    maker, setting = Maker(match(*pair), coding), Setting(0.1, 2.0, planes=planes, head=head)
    maker.expert(setting).save(tmp_path / "x.safetensors")
    assert maker.bytes(setting) == (tmp_path / "x.safetensors").stat().st_size
    assert sterna.load(tmp_path / "x.safetensors").facts.density == 0.1


def lora(base: torch.nn.Module, folder: Path) -> Path:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise(parameter, generator, 0.05))
    model.save_pretrained(folder)
    return folder


def pafi(base: torch.nn.Module, folder: Path) -> Path:
    model = copy.deepcopy(base)
    tuning = sterna.tune(model, sterna.PaFi(density=0.2))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(noise(parameter, torch.Generator().manual_seed(5), 0.02))
    tuning.expert().save(folder / "pafi.safetensors")
    return folder / "pafi.safetensors"


@pytest.mark.parametrize("source", [lora, pafi])
def test_adapters_and_trained_experts_are_candidates_too(source: Callable[[torch.nn.Module, Path], Path], tmp_path: Path) -> None:
    base = made("bert")
    path = source(base, tmp_path)
    maker = Maker(match(base, path), "fast")
    assert not maker.of_whole_tensors
    assert maker.expert(Setting(0.3, 2.0)).digest == sterna.compress(base, path, density=0.3, alpha=2.0).digest
    for name in ALLOCATIONS:
        with sterna.attached(copy.deepcopy(base), maker.expert(Setting(0.3, 2.0, name))):
            pass
    with pytest.raises(InvalidArgument, match="planes is 2"):
        maker.expert(Setting(0.3, 2.0, planes=2))


def test_the_tuned_model_itself_is_an_expert_in_memory(tmp_path: Path) -> None:
    base = made("bert")
    ids = {"input_ids": torch.arange(12).reshape(2, 6)}
    after = tuned(base)
    with sterna.attached(model := copy.deepcopy(base), Maker(match(base, after), "fast").tuned()):
        assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in model.state_dict().items())
    import peft

    folder = lora(base, tmp_path)
    wanted = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(**ids).logits
    with sterna.attached(model := copy.deepcopy(base), Maker(match(base, folder), "fast").tuned()):
        torch.testing.assert_close(model(**ids).logits, wanted)


def test_the_digest_tells_task_vectors_apart(pair: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    base, after = pair
    other = copy.deepcopy(after)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    digests = [Maker(match(base, one), "fast").digest() for one in (after, after, other)]
    assert digests[0] == digests[1] != digests[2]


def test_the_closed_form_falls_as_density_grows() -> None:
    alphas = [closed_form_alpha(density) for density in (0.01, 0.05, 0.1, 0.3, 1.0)]
    assert alphas == sorted(alphas, reverse=True)
    assert closed_form_alpha(0.1) == pytest.approx(4.1)
