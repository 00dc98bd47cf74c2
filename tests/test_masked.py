"""Experts of PaFi and HiWi: attached, applied, compressed and refused, each against a dense formula by numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import sterna
from coded import random_levels, ternary_of
from models import bert_classifier, made, same_state, state_of, tuned
from sterna import mask as mask_module
from sterna.commands import app
from sterna.compression import base_facts, base_fingerprint
from sterna.errors import InvalidArgument, WrongBase, WrongModel
from sterna.expert.changes import Activation, Add, Change, Folded, Masked, MaskRule, Order, Set, Ternary
from sterna.expert.expert import Expert, rounded
from sterna.expert.facts import Facts, MaskFacts
from sterna.expert.file import file_pieces, from_bytes
from sterna.fingerprint import Fingerprint
from sterna.live import update
from sterna.sources.checkpoint import open_checkpoint
from test_mask import chosen

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, BF16, F16, F64]
MODELS = ["bert", "llama, tied head", "gpt2", "vit", "t5", "convolutions", "shared block"]


# Experts over a model, and what they are to give


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the model's floating-point tensors by the names that its expert gives them."""
    checkpoint = open_checkpoint(model)
    return {name: checkpoint.read(name).detach().clone() for name, info in checkpoint.tensors.items() if info.dtype.is_floating_point}


def over(model: nn.Module, changes: list[Change], **fields: Any) -> Expert:
    """An exact expert with those changes over the model."""
    checkpoint = open_checkpoint(model)
    mark = base_fingerprint(checkpoint)
    rules = [change.rule for change in changes if isinstance(change, Masked)]
    usual: dict[str, Any] = {"method": "exact", "source": "pafi", "density": None, "alpha": None, "scope": "global", "scale": 0.0}
    usual |= {"mask": MaskFacts(rules[0].order, 0.01, rules[0].seed) if rules else None, "tuning": {"method": "pafi"}}
    facts = Facts(**(usual | {"base": base_facts(checkpoint, mark), "writer": "test", "parameters": 1} | fields))
    return Expert(facts, mark, tuple(sorted(changes, key=lambda change: (change.name, isinstance(change, Set)))))


def pafi(model: nn.Module, values: torch.dtype | str = F32, order: Order = "smallest", share: float = 0.05, seed: int = 4) -> Expert:
    """A PaFi expert whose mask lies over most of the model's tensors."""
    base = tensors_of(model)
    left_out = ("embed", "running", "wte", "shared", "classifier")
    names = tuple(name for name in sorted(base) if not any(word in name for word in left_out))
    count = max(int(share * sum(base[name].numel() for name in names)), 1)
    rule = MaskRule(order, count, names, seed=11 if order == "random" else 0)
    if values == "ternary":
        levels = ternary_of(random_levels((count,), 0.4, seed), float(np.float32(0.0123)))
        return over(model, [Masked(rule, levels)], method="compeft", density=0.4, alpha=1.0, scale=levels.scale)
    assert isinstance(values, torch.dtype)
    new = torch.randn(count, generator=torch.Generator().manual_seed(seed)) / 50
    return over(model, [Masked(rule, new.to(values))])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def to_bfloat16(wide: NDArray[np.float64]) -> torch.Tensor:
    """Rounded once to 8 significant bits, half to even."""
    fraction, exponent = np.frexp(wide)
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(fraction, 8)), exponent - 8)).bfloat16()


def once(wide: NDArray[np.float64], dtype: torch.dtype) -> torch.Tensor:
    """numpy rounds float64 to float16 and float32 at once."""
    if dtype == BF16:
        return to_bfloat16(wide)
    return torch.from_numpy(wide.astype({F16: np.float16, F32: np.float32, F64: np.float64}[dtype]))


def folded(change: Folded, old: torch.Tensor) -> torch.Tensor:
    """W + s act(W D) U in float64 by numpy, rounded once."""
    W, D, U = (tensor.double().numpy() for tensor in (old, change.D, change.U))
    acts: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        "relu": lambda x: np.maximum(x, 0),
        "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "identity": lambda x: x,
    }
    W = W.T if change.transposed else W
    new = W + change.scale * acts[change.activation](W @ D) @ U
    return once(new.T if change.transposed else new, old.dtype)


def wanted(expert: Expert, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every tensor of the base becomes, by sorting for the mask and numpy for the rest."""
    after = {name: tensor.clone() for name, tensor in base.items()}
    for change in expert.changes:
        match change:
            case Masked(rule=rule, values=values):
                positions = chosen(rule, [base[name] for name in rule.names])
                at = 0
                for name, listed in zip(rule.names, positions, strict=True):
                    flat, entries = after[name].view(-1), slice(at, at + len(listed))
                    at += len(listed)
                    if isinstance(values, Ternary):
                        signs = torch.from_numpy(values.levels()[entries].astype(np.float32))
                        moved = (flat[listed].float() + signs * torch.tensor(values.scale)).to(flat.dtype)
                        flat[listed] = torch.where(signs != 0, moved, flat[listed])
                    else:
                        flat[listed] = values[entries].to(flat.dtype)
            case Folded():
                after[change.name] = folded(change, base[change.name])
            case Set(role="tuned"):
                after[change.name] = change.value.to(base[change.name].dtype)
    return after


def agrees(model: nn.Module, expected: Mapping[str, torch.Tensor]) -> bool:
    now = tensors_of(model)
    return now.keys() == expected.keys() and all(torch.equal(bits(now[name]), bits(expected[name])) for name in now)


def through_a_file(expert: Expert) -> Expert:
    return from_bytes(b"".join(bytes(piece) for piece in file_pieces(expert)))


# Attach, apply


@pytest.mark.parametrize("values", [F32, F16, BF16, "ternary"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_masked_entries_and_no_others_are_changed(name: str, dtype: torch.dtype, values: torch.dtype | str, tmp_path: Path) -> None:
    model = made(name, dtype)
    expert = through_a_file(pafi(model, values))
    before, expected = state_of(model), wanted(expert, tensors_of(model))
    with sterna.attached(model, expert) as patch:
        assert agrees(model, expected)
        word = torch.empty(0, dtype=dtype).element_size()
        entries = sum(ternary.count for ternary in expert.ternaries) or expert.changes[0].rule.count
        assert patch.undo_bytes == entries * (8 + word)
        assert 0 <= patch.swallowed < 1
    assert same_state(model, before)
    if dtype != F64:
        sterna.apply(model, expert, tmp_path / "out")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(bits(written[key]), bits(tensor)) for key, tensor in expected.items())


@pytest.mark.parametrize("order", ["smallest", "largest", "random"])
@pytest.mark.parametrize("values", [F32, "ternary"], ids=str)
def test_every_order(order: Order, values: torch.dtype | str) -> None:
    model = made("bert")
    expert = pafi(model, values, order)
    with sterna.attached(model, expert):
        assert agrees(model, wanted(expert, tensors_of(made("bert"))))


@pytest.mark.parametrize("values", [F32, "ternary"], ids=str)
@pytest.mark.parametrize("narrow", [BF16, F16], ids=str)
def test_a_lossless_wider_load_is_the_same_base(narrow: torch.dtype, values: torch.dtype | str) -> None:
    expert = pafi(made("bert", narrow), values)
    for wide in (F32, F64):
        model = made("bert", narrow).to(wide)
        before = state_of(model)
        with sterna.attached(model, expert):
            assert agrees(model, wanted(expert, {name: tensor.to(wide) for name, tensor in tensors_of(made("bert", narrow)).items()}))
        assert same_state(model, before)


@pytest.mark.parametrize("values", [F32, "ternary"], ids=str)
def test_any_layout(values: torch.dtype | str) -> None:
    model = made("bert")
    expert, expected = pafi(model, values), wanted(pafi(model, values), tensors_of(model))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.T.contiguous().T
    before = state_of(model)
    with sterna.attached(model, expert):
        assert agrees(model, expected)
        assert not model.bert.encoder.layer[0].output.dense.weight.is_contiguous()
    assert same_state(model, before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded_weights_are_computed_in_float64_and_rounded_once(
    dtype: torch.dtype, activation: Activation, transposed: bool, tmp_path: Path
) -> None:
    model = made("bert", dtype)
    layer = "bert.encoder.layer.0.intermediate.dense"
    n = 24 if transposed else 16
    generator = torch.Generator().manual_seed(5)
    D, U = torch.randn(n, 3, generator=generator), torch.randn(3, n, generator=generator) / 30
    bias = Set(f"{layer}.bias", torch.randn(24, generator=generator), "tuned")
    expert = through_a_file(over(model, [Folded(f"{layer}.weight", D, U.half(), activation, 0.7, transposed), bias], source="hiwi"))
    before, expected = state_of(model), wanted(expert, tensors_of(model))
    with sterna.attached(model, expert) as patch:
        if dtype == F64:  # where two libraries' products may differ in the last bit
            torch.testing.assert_close(tensors_of(model), expected, rtol=1e-14, atol=1e-15)
        else:
            assert agrees(model, expected)
        assert patch.swallowed == 0
    assert same_state(model, before)
    assert not torch.equal(expected[f"{layer}.weight"], tensors_of(model)[f"{layer}.weight"])
    if dtype != F64:
        sterna.apply(model, expert, tmp_path / "out")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(bits(written[key]), bits(tensor)) for key, tensor in expected.items())
    task = expert.task_vector(model)
    base = tensors_of(model)
    assert torch.equal(task[f"{layer}.bias"], bias.value - base[f"{layer}.bias"].float())
    wide = folded(expert.changes[1], base[f"{layer}.weight"].double()) - base[f"{layer}.weight"].double()
    torch.testing.assert_close(task[f"{layer}.weight"].double(), wide, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_rounding_happens_once(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    wide = generator.standard_normal(20_000) * 2.0 ** generator.integers(-12, 12, 20_000)
    near = once(wide, dtype).double().numpy()
    halfway = (near + np.nextafter(near.astype(np.float32), np.inf)) / 2  # so near a tie of 16 bits that float32 says it is one
    tie = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, 1 + 2**-11 + 2**-40, 1 + 2**-11 - 2**-40, -1 - 2**-8 - 2**-40, 1 + 2**-8, 0.0, 1e-9])
    for values in (wide, halfway, tie):
        assert torch.equal(rounded(torch.from_numpy(values), dtype), once(values, dtype))


def test_a_head_in_8_bit_is_worth_its_levels_times_the_scale_of_its_row(tmp_path: Path) -> None:
    model = bert_classifier()
    levels, scales = torch.randint(-127, 128, (5, 16)).to(torch.int8), torch.rand(5)
    changes: list[Change] = [Set("classifier.weight", levels, "head", scales=scales), Set("classifier.bias", torch.rand(5).half(), "head")]
    expert = through_a_file(over(model, changes))
    before = state_of(model)
    with sterna.attached(model, expert):
        assert torch.equal(model.classifier.weight, levels * scales[:, None])
        assert model.classifier.weight.dtype == F32
        assert model.classifier.out_features == 5
    assert same_state(model, before)
    sterna.apply(model, expert, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"], levels * scales[:, None])


def test_swaps_between_all_kinds_end_where_they_began() -> None:
    model = made("bert")
    layer = "bert.encoder.layer.1.output.dense"
    hiwi: list[Change] = [
        Set(f"{layer}.bias", torch.randn(16), "tuned"),
        Folded(f"{layer}.weight", torch.randn(24, 2), torch.randn(2, 24) / 9, "relu", 1.0),
    ]
    experts = [pafi(model), pafi(model, "ternary"), sterna.compress(model, tuned(model)), over(model, hiwi), pafi(model, BF16, "largest")]
    before, alone = state_of(model), []
    for expert in experts:
        with sterna.attached(model, expert):
            alone.append(state_of(model))
        assert same_state(model, before)
    mask_module._masks._kept.clear()  # made again while swapping
    patch = sterna.attach(model, experts[0])
    rng = np.random.default_rng(1)
    for i in rng.integers(0, len(experts), 60):
        patch.swap(experts[i])
        assert same_state(model, alone[i])
    patch.detach()
    assert same_state(model, before)


# Refusals and failures


def refused(model: nn.Module, expert: Expert, error: type[Exception], phrase: str, **options: Any) -> None:
    before = state_of(model)
    with pytest.raises(error, match=phrase):
        sterna.attach(model, expert, **options)
    assert same_state(model, before)
    assert sterna.attached_to(model) is None


def test_a_narrower_load_is_refused_with_leave_too(tmp_path: Path) -> None:
    expert = pafi(made("bert"))
    for leave in (False, True):
        refused(made("bert", BF16), expert, WrongBase, "the expert's mask is made of the base's magnitudes", allow_narrower=leave)
        with pytest.raises(WrongBase, match="mask is made of"):
            sterna.verify(expert, made("bert", BF16), allow_narrower=leave)
        with pytest.raises(WrongBase, match="mask is made of"):
            sterna.apply(made("bert", BF16), expert, tmp_path / "out", allow_narrower=leave)
    with pytest.raises(WrongBase, match="mask is made of"):
        expert.task_vector(made("bert", BF16))
    bias = Set("bert.encoder.layer.0.output.dense.bias", torch.randn(16), "tuned")
    with sterna.attached(made("bert", BF16), over(made("bert"), [bias]), allow_narrower=True):
        pass


def test_another_base_is_refused_before_a_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = pafi(made("bert"))
    monkeypatch.setattr(mask_module, "choose", None)
    refused(made("bert", seed=3), expert, WrongBase, "is not the expert's base")
    with pytest.raises(WrongBase):
        expert.task_vector(made("bert", seed=3))


def test_a_tuned_bias_is_of_the_base_that_was_hashed() -> None:
    model = made("bert")
    name = "bert.encoder.layer.0.output.dense.bias"
    expert = over(model, [Set(name, torch.randn(16), "tuned")])
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[3] += 1
    refused(model, expert, WrongBase, f"1 of .* the first: {name}")
    refused(made("bert"), over(made("bert"), [Set(name, torch.randn(17), "tuned")]), WrongModel, r"shape \(16,\) in the model, \(17,\)")


def test_a_mask_of_more_entries_than_there_are_is_refused(tmp_path: Path) -> None:
    model = made("bert")
    rule = MaskRule("smallest", 1 << 13, ("bert.encoder.layer.0.output.dense.weight",))
    expert = over(model, [Masked(rule, torch.zeros(rule.count))])
    refused(model, expert, WrongBase, "8,192 masked entries; the 1 tensors of its mask have 384")
    for work in (lambda: expert.task_vector(model), lambda: sterna.apply(model, expert, tmp_path / "out"), lambda: sterna.compress(model, expert)):
        with pytest.raises(WrongBase, match="8,192 masked entries"):
            work()


def test_a_mask_wants_all_its_tensors() -> None:
    model = made("bert")
    expert = pafi(model)
    del model.bert.pooler
    model.bert.pooler = None
    refused(model, expert, WrongModel, r"has no bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight")


def test_a_mask_over_tensors_that_the_model_ties_is_refused() -> None:
    apart = made("llama")
    with torch.no_grad():
        apart.lm_head.weight.copy_(apart.model.embed_tokens.weight)
    tied = made("llama, tied head")
    tied.load_state_dict(apart.state_dict())
    base = tensors_of(apart)
    rule = MaskRule("smallest", 30, tuple(sorted(base)))
    refused(tied, over(apart, [Masked(rule, torch.zeros(30))]), WrongModel, "ties .*embed_tokens.* holds apart|ties lm_head")


def test_folds_of_another_size_are_refused() -> None:
    model = made("bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    refused(model, over(model, [Folded(name, torch.ones(16, 2), torch.ones(2, 16), "relu", 1.0)]), WrongModel, r"\(16, 24\) in the model, \(16, 16\)")
    wrong = over(model, [Folded(name, torch.ones(24, 2), torch.ones(2, 24), "relu", 1.0, transposed=True)])
    refused(model, wrong, WrongModel, r"\(16, 24\) in the model, \(24, 24\)")
    with pytest.raises(WrongBase, match=r"\(24, 24\)"):
        wrong.task_vector(model)
    bias = name.replace("weight", "bias")
    refused(model, over(model, [Folded(bias, torch.ones(16, 2), torch.ones(2, 16), "relu", 1.0)]), WrongModel, r"\(16,\) in the model")


def test_a_base_that_is_no_numbers_is_refused_and_left() -> None:
    model = made("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    rule = MaskRule("smallest", 3, ("bert.encoder.layer.0.output.dense.weight",))
    expert = over(model, [Masked(rule, torch.zeros(3))])
    with pytest.raises(InvalidArgument, match="NaN or infinity"):
        sterna.attach(model, expert)
    assert sterna.attached_to(model) is None


def test_a_file_that_lies_about_its_base_does_not_spoil_the_masks_of_others() -> None:
    """Its short digests are those of the model at hand, which lacks a tensor, and its fingerprint is another base's."""
    victim, other = made("bert"), made("bert", seed=7)
    honest = pafi(victim)
    del other.bert.pooler
    other.bert.pooler = None
    names = tuple(name for name in honest.changes[0].rule.names if "pooler" not in name)
    marks = [base_fingerprint(open_checkpoint(model)) for model in (other, victim)]
    shorts = np.array([marks[0].shorts[marks[0].names.index(n)] if n in marks[0].names else marks[1].shorts[i] for i, n in enumerate(marks[1].names)])
    rule = replace(honest.changes[0].rule, names=names)
    liar = replace(honest, fingerprint=Fingerprint(marks[1].names, marks[1].digest, shorts), changes=(Masked(rule, torch.zeros(rule.count)),))
    with sterna.attached(other, liar):
        pass
    expert = replace(honest, changes=(Masked(rule, torch.ones(rule.count)),))
    with sterna.attached(victim, expert):
        assert agrees(victim, wanted(expert, tensors_of(made("bert"))))


@pytest.mark.parametrize("values", [F32, "ternary"], ids=str)
@pytest.mark.parametrize("error", [RuntimeError("here"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_failure_at_any_tensor_leaves_everything_as_it_was(
    values: torch.dtype | str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("bert")
    one, two = pafi(model, values), pafi(model, F16, "random")
    before = state_of(model)
    inner, calls = update.masked_value, [0]

    def failing(at: int) -> Callable[..., torch.Tensor]:
        calls[0] = 0

        def wrapper(*arguments: Any) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == at:
                raise error
            return inner(*arguments)

        return wrapper

    for at in (1, 2, 7):
        monkeypatch.setattr(update, "masked_value", failing(at))
        with pytest.raises(type(error)):
            sterna.attach(model, one)
        assert same_state(model, before)
    monkeypatch.setattr(update, "masked_value", inner)
    patch = sterna.attach(model, two)
    on = state_of(model)
    for at in (1, 9):
        monkeypatch.setattr(update, "masked_value", failing(at))
        with pytest.raises(type(error)):
            patch.swap(one)
        assert same_state(model, on)
        assert patch.expert is two
    patch.detach()
    assert same_state(model, before)


# The task vector, compression, sizes


@pytest.mark.parametrize("values", [F32, F16, "ternary"], ids=str)
def test_the_task_vector_is_the_difference_to_the_base(values: torch.dtype | str) -> None:
    model = made("bert")
    expert, base = pafi(model, values), tensors_of(model)
    with pytest.raises(InvalidArgument, match="difference to the base"):
        expert.task_vector()
    task, after = expert.task_vector(model), wanted(expert, base)
    assert task.keys() == set(expert.changes[0].rule.names)
    for name, difference in task.items():
        torch.testing.assert_close(difference, after[name] - base[name], rtol=0, atol=2e-7)
        assert torch.equal(difference != 0, after[name] != base[name])


def trained_classifier() -> tuple[nn.Module, Expert]:
    model = made("bert")
    exact = pafi(model)
    head: list[Change] = [Set("classifier.weight", torch.randn(3, 16), "head"), Set("classifier.bias", torch.randn(3), "head")]
    return model, over(model, [*exact.changes, *head], metadata={"task": "news"}, config={"id2label": {"0": "a"}})


@pytest.mark.parametrize("head", ["exact", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_compeft_over_the_masked_deltas(density: float, head: Any, tmp_path: Path) -> None:
    model, exact = trained_classifier()
    exact.save(tmp_path / "exact.safetensors")
    expert = sterna.compress(model, tmp_path / "exact.safetensors", density=density, alpha=2.0, head=head, metadata={"mine": 1})
    assert expert.content_digest == sterna.compress(model, exact, density=density, alpha=2.0, head=head).content_digest
    before = next(change for change in exact.changes if isinstance(change, Masked))
    after = next(change for change in expert.changes if isinstance(change, Masked))
    base = tensors_of(model)
    positions = chosen(before.rule, [base[name] for name in before.rule.names])
    old = torch.cat([base[name].reshape(-1)[listed] for name, listed in zip(before.rule.names, positions, strict=True)])
    assert isinstance(before.values, torch.Tensor)
    assert isinstance(after.values, Ternary)
    delta = (before.values - old).numpy()
    kept = np.argsort(-np.abs(delta), kind="stable")[: int(density * delta.size)]
    levels = np.zeros(delta.size, np.int8)
    levels[kept] = np.sign(delta[kept])
    assert np.array_equal(after.values.levels(), levels)
    assert after.values.scale == np.float32(2.0 * np.std(delta.astype(np.float64), ddof=1))
    assert after.rule == before.rule
    facts = expert.facts
    assert (facts.method, facts.source, facts.density, facts.alpha, facts.parameters) == ("compeft", "pafi", density, 2.0, delta.size)
    assert (facts.mask, facts.tuning, facts.config) == (exact.facts.mask, exact.facts.tuning, exact.facts.config)
    assert facts.metadata == {"task": "news", "mine": 1}
    if density == 1:
        assert len(after.values.stream) == math.ceil(delta.size / 8) + 5  # bare signs, and the index of one block
    for change in expert.changes:
        if isinstance(change, Set):
            whole = next(other for other in exact.changes if other.name == change.name)
            assert isinstance(whole, Set)
            check_head(whole.value, change, head)
    with sterna.attached(model, through_a_file(expert)):
        assert agrees_but_head(model, wanted(expert, base))


def agrees_but_head(model: nn.Module, expected: Mapping[str, torch.Tensor]) -> bool:
    now = tensors_of(model)
    return all(torch.equal(bits(now[name]), bits(tensor)) for name, tensor in expected.items() if "classifier" not in name)


def check_head(whole: torch.Tensor, change: Set, head: str) -> None:
    dtype = {"exact": F32, "fp16": F16, "bf16": BF16, "int8": F16}[head]
    if head == "int8" and whole.dim() > 1:
        rows = whole.numpy()
        scales = np.abs(rows).max(1) / np.float32(127)
        assert change.scales is not None
        assert np.array_equal(change.scales.numpy(), scales)
        assert np.array_equal(change.value.numpy(), np.rint(rows / scales[:, None]).astype(np.int8))
        assert np.abs(change.tensor.numpy() - rows).max() <= scales.max() / 2 * 1.001
        return
    assert change.scales is None
    assert torch.equal(change.value, whole.to(dtype))
    assert change.value.dtype == dtype


@pytest.mark.parametrize("transposed", [False, True])
def test_compeft_over_tuned_biases_and_folded_weights(transposed: bool) -> None:
    model = made("bert")
    layer = "bert.encoder.layer.0.intermediate.dense"
    n = 24 if transposed else 16
    fold = Folded(f"{layer}.weight", torch.randn(n, 3), torch.randn(3, n) / 30, "gelu", 1.0, transposed)
    exact = over(model, [Set(f"{layer}.bias", torch.randn(24), "tuned"), fold], source="hiwi", tuning={"method": "hiwi"})
    expert = sterna.compress(model, exact, density=0.2, alpha=1.5)
    assert [type(change) for change in expert.changes] == [Add, Add]
    base, after = tensors_of(model), wanted(exact, tensors_of(model))
    delta = np.concatenate([(after[change.name] - base[change.name]).numpy().reshape(-1) for change in expert.changes])
    assert expert.facts.parameters == delta.size == 24 + 24 * 16
    assert expert.facts.scale == pytest.approx(1.5 * np.std(delta, ddof=1), rel=1e-4)
    kept = np.sort(np.argsort(-np.abs(delta), kind="stable")[: int(0.2 * delta.size)])
    assert np.array_equal(np.flatnonzero(np.concatenate([ternary.levels().reshape(-1) for ternary in expert.ternaries])), kept)
    with sterna.attached(model, expert):
        pass
    assert sterna.compress(model, exact, density=0.2, scope="tensor").facts.scope == "tensor"


def test_what_cannot_be_compressed_is_refused() -> None:
    model, exact = trained_classifier()
    expert = sterna.compress(model, exact)
    with pytest.raises(InvalidArgument, match="an expert of method 'compeft'; expected an exact one"):
        sterna.compress(model, expert)
    with pytest.raises(InvalidArgument, match="exclude does not apply to an expert"):
        sterna.compress(model, exact, exclude=["*bias"])
    with pytest.raises(WrongBase):
        sterna.compress(made("bert", seed=5), exact)
    with pytest.raises(InvalidArgument, match="head is 'int4'; expected one of exact, fp16, bf16, int8"):
        sterna.compress(model, exact, head="int4")  # type: ignore[arg-type]
    for value in (1e6, math.inf, math.nan):
        broken = replace(exact, changes=(exact.changes[0], Set("classifier.bias", torch.tensor([1.0, value, 0.0]), "head")))
        with pytest.raises(InvalidArgument, match="values that are not finite in fp16"):
            sterna.compress(model, broken, head="fp16")


def test_heads_of_full_fine_tunes_are_stored_as_asked() -> None:
    torch.manual_seed(0)
    base, after = {"body.weight": torch.randn(8, 8)}, {"body.weight": torch.randn(8, 8), "head.weight": torch.zeros(4, 8), "head.bias": torch.ones(4)}
    after["head.weight"][1:] = torch.randn(3, 8)
    expert = sterna.compress(base, after, head="int8", force=True)
    stored = {change.name: change for change in expert.changes if isinstance(change, Set)}
    assert stored["head.weight"].scales is not None
    assert stored["head.weight"].scales[0] == 0
    assert torch.equal(stored["head.weight"].tensor[0], torch.zeros(8))
    assert stored["head.bias"].value.dtype == F16
    assert through_a_file(expert).content_digest == expert.content_digest


def test_inspect_and_verify_and_the_command_line(tmp_path: Path) -> None:
    model, exact = trained_classifier()
    save_file(state_of(model), tmp_path / "base.safetensors")
    exact.save(tmp_path / "exact.safetensors")
    sterna.verify(tmp_path / "exact.safetensors", tmp_path / "base.safetensors")
    summary = sterna.inspect(exact)
    count = (
        exact.changes[0].rule.count if isinstance(exact.changes[0], Masked) else next(c.rule.count for c in exact.changes if isinstance(c, Masked))
    )
    assert summary.mask is not None
    assert (summary.mask.order, summary.mask.density, summary.mask.count, summary.mask.values) == ("smallest", 0.01, count, "float32")
    assert summary.bytes_head == 4 * (3 * 16 + 3)
    assert summary.bytes_exact == summary.bytes_head + 4 * count
    assert summary.bytes == len(b"".join(bytes(piece) for piece in file_pieces(exact)))
    run = CliRunner()
    shown = run.invoke(app, ["inspect", str(tmp_path / "exact.safetensors")], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    assert "exact values of a PaFi run" in shown.output
    assert f"smallest, density 0.01, {count:,} entries of" in " ".join(shown.output.split())
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "exact", "small")]
    options = ["--density", "0.3", "--alpha", "2", "--head", "int8", "--json"]
    done = run.invoke(app, ["compress", files[0], files[1], "-o", files[2], *options])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["mask"]["values"] == "ternary"
    assert told["facts"]["mask"]["density"] == 0.01
    assert told["bytes_head"] == 3 * 16 + 3 * 4 + 3 * 2
    assert run.invoke(app, ["inspect", str(tmp_path / "small.safetensors")]).exit_code == 0
    assert run.invoke(app, ["verify", str(tmp_path / "small.safetensors"), "--base", str(tmp_path / "base.safetensors")]).exit_code == 0
