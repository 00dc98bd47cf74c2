"""Tuning a live model by PaFi and HiWi: invariants over models, methods and ways to train, each against dense torch."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import sterna
from models import MODELS, answer, bert_classifier, inputs_for, made, same_state, state_of
from sterna.errors import AlreadyAttached, AlreadyTuned, InvalidArgument, InvalidFile, TuningError, Unsupported, WrongBase
from sterna.tuning.eligible import feed_forward
from sterna.tuning.parts import Adapter, Entries
from sterna.tuning.sampled import sampled_product

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS: dict[str, Any] = {
    "pafi sampled": sterna.PaFi(density=0.2, gradient="sampled"),
    "pafi dense": sterna.PaFi(density=0.2, gradient="dense"),
    "pafi random": sterna.PaFi(density=0.2, order="random", seed=7, gradient="sampled"),
    "hiwi bias": sterna.HiWi(target="bias", rank=2),
    "hiwi weight": sterna.HiWi(target="weight", rank=2),
}
PAFI = METHODS["pafi sampled"]


def tuned(name: str, method: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, sterna.Tuning]:
    """The model of that name under tuning; skipped where the method has nothing to act on there."""
    model = made(name, dtype)
    torch.manual_seed(1)
    try:
        return model, sterna.tune(model, method)
    except Unsupported:
        pytest.skip("no feed-forward layers of that kind")


def loss_of(model: nn.Module, plain: nn.Module | None = None) -> torch.Tensor:
    kind = plain or model
    dtype = next(kind.parameters()).dtype
    out = model(**{key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs_for(kind).items()})
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return (logits.float() - 1).pow(2).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(tuning: sterna.Tuning, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tuning.parameters(), lr=rate, weight_decay=0.1)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    return METHODS[request.param]


# What tuning leaves alone


@pytest.mark.parametrize("name", MODELS)
def test_a_tuned_model_looks_and_answers_as_before(name: str, method: Any) -> None:
    model = made(name)
    before, said, tree = state_of(model), answer(model), [(path, type(module)) for path, module in model.named_modules()]
    required = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    try:
        tuning = sterna.tune(model, method)
    except Unsupported:
        pytest.skip("no feed-forward layers of that kind")
    assert same_state(model, before)
    assert torch.equal(answer(model), said)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in tuning.parameters()}
    train(model, adamw(tuning))
    assert list(model.state_dict()) == list(before)
    assert not torch.equal(answer(model), said)
    tuning.discard()
    assert same_state(model, before)
    assert [(path, type(module)) for path, module in model.named_modules()] == tree
    assert {path: parameter.requires_grad for path, parameter in model.named_parameters()} == required
    assert all(parameter.grad is None for parameter in model.parameters())


def optimizers() -> Iterator[tuple[str, Callable[[Any], torch.optim.Optimizer]]]:
    yield "sgd", lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.1)
    yield "adam", lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1)
    yield "adamw", lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1)
    yield "adafactor", lambda ps: torch.optim.Adafactor(ps, lr=1e-2, weight_decay=0.1)
    yield "adafactor of transformers", lambda ps: transformers.Adafactor(ps, lr=1e-2, weight_decay=0.1, relative_step=False, scale_parameter=False)
    yield "lion", lambda ps: importlib.import_module("lion_pytorch").Lion(ps, lr=1e-2, weight_decay=0.1)
    yield "8-bit adam", lambda ps: importlib.import_module("bitsandbytes").optim.Adam8bit(ps, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer", dict(optimizers()))
def test_outside_the_mask_every_weight_stays_to_the_bit(optimizer: str, dtype: torch.dtype) -> None:
    module = {"lion": "lion_pytorch", "8-bit adam": "bitsandbytes"}.get(optimizer)
    if module is not None:
        pytest.importorskip(module)
    model, tuning = tuned("bert", sterna.PaFi(density=0.3), dtype)
    before = state_of(model)
    train(model, dict(optimizers())[optimizer](tuning.parameters()))
    expert = tuning.expert()
    tuning.finish()
    (masked,) = [change for change in expert.changes if type(change).__name__ == "Masked"]
    eligible = torch.cat([before[f"bert.{name.removeprefix('bert.')}"].flatten().float().abs() for name in masked.rule.names])
    chosen = np.sort(np.argsort(eligible.numpy(), kind="stable")[: masked.rule.count])
    moved = torch.cat([(model.state_dict()[name] != before[name]).flatten() for name in masked.rule.names])
    assert 0 < int(moved.sum()) <= masked.rule.count == len(chosen)
    assert not np.setdiff1d(moved.nonzero().flatten().numpy(), chosen).size
    others = set(before) - set(masked.rule.names) - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in others)


def test_nothing_dense_is_kept() -> None:
    model, tuning = tuned("bert", PAFI)
    optimizer = adamw(tuning)
    loss_of(model).backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimizer.step()
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    assert held == 2 * (tuning.trained + tuning.trained_head)
    assert sum(t.numel() for t in tuning.state_dict().values()) == tuning.trained + tuning.trained_head


# The gradients


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["pafi sampled", "pafi dense", "pafi random"])
def test_masked_gradients_are_the_dense_ones_at_the_mask(name: str, kind: str) -> None:
    plain = made(name)
    loss_of(plain).backward()
    dense = {id(p): p.grad for p in plain.parameters()}
    places = dict(plain.named_parameters(remove_duplicate=False))
    model, tuning = tuned(name, METHODS[kind])
    loss_of(model).backward()
    for part in tuning.parts:
        assert isinstance(part, Entries)
        own = next(path for path, p in model.named_parameters(remove_duplicate=False) if p is part.slots[0].tensor)
        wanted = dense[id(places[own])].flatten()[part.tap.on(part.slots[0].tensor)[0]]
        torch.testing.assert_close(part.values.grad, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 7, 256, 257, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_products_are_the_dense_ones(tokens: int, dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(tokens, width, generator=generator).to(dtype) for width in (33, 21))
    index = torch.randperm(33 * 21, generator=generator)[:100].sort().values
    found = sampled_product(left, right, index // 21, index % 21)
    wanted = (left.double().T @ right.double()).flatten()[index]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_custom_operator_is_well_formed() -> None:
    index = torch.tensor([1, 5, 9])
    torch.library.opcheck(sampled_product, (torch.randn(4, 5), torch.randn(4, 3), index // 3, index % 3))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("target", ["bias", "weight"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_hiwi_trains_as_its_formula_does(name: str, target: Any, activation: Any) -> None:
    """Against W + s * act(W D) U made dense and put into a plain model by torch's functional_call."""
    model, tuning = tuned(name, sterna.HiWi(target=target, rank=3, activation=activation, scale=0.7))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in tuning.parts:
            for factor in part.parameters.values():
                factor.copy_(torch.randn(factor.shape, generator=generator) / 3)
    loss_of(model).backward()
    plain, swapped, factors = made(name), {}, {}
    act = {"relu": torch.relu, "gelu": nn.functional.gelu, "identity": lambda x: x}[activation]
    for part in tuning.parts:
        assert isinstance(part, Adapter)
        own = next(path for path, p in model.named_parameters() if p is part.slots[0].tensor)
        D, U = (factor.detach().clone().requires_grad_() for factor in (part.tap.D, part.tap.U))
        W = plain.get_parameter(own).detach()
        transposed = getattr(part.tap, "transposed", False)
        swapped[own] = W + 0.7 * (act(W.T @ D) @ U).T if transposed else W + 0.7 * act(W @ D) @ U
        factors[part.name] = (part, D, U)
    out = torch.func.functional_call(plain, swapped, kwargs=inputs_for(plain), tie_weights=True)
    ((out if isinstance(out, torch.Tensor) else out.logits) - 1).pow(2).mean().backward()
    for part, D, U in factors.values():
        torch.testing.assert_close(part.tap.D.grad, D.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(part.tap.U.grad, U.grad, rtol=1e-3, atol=1e-6)


def values_after(name: str, method: Any, how: Callable[[nn.Module, sterna.Tuning], None]) -> dict[str, torch.Tensor]:
    model, tuning = tuned(name, method)
    how(model, tuning)
    return {key: parameter.detach().clone() for key, parameter in tuning.named_parameters()}


def plainly(model: nn.Module, tuning: sterna.Tuning) -> None:
    train(model, torch.optim.SGD(tuning.parameters(), lr=0.05), 2)


def by_checkpoints(reentrant: bool) -> Callable[[nn.Module, sterna.Tuning], None]:
    def how(model: nn.Module, tuning: sterna.Tuning) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
                module.dropout = 0.0
        plainly(model, tuning)

    return how


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama, tied head", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(name: str, reentrant: bool, method: Any) -> None:
    wanted = values_after(name, method, plainly)
    found = values_after(name, method, by_checkpoints(reentrant))
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "pafi sampled"), ("bert", "pafi dense"), ("bert", "hiwi bias"), ("gpt2", "pafi sampled"), ("gpt2", "hiwi weight"),
     ("llama, tied head", "pafi sampled"), ("shared block", "pafi sampled"), ("convolutions", "pafi sampled")],
)  # fmt: skip
def test_compiled_models_train_the_same(name: str, kind: str) -> None:
    """The whole graph is compiled, backward too: no break, and the eager values."""
    method = METHODS[kind]

    def how(model: nn.Module, tuning: sterna.Tuning) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.05)
        for _ in range(2):
            loss_of(compiled, model).backward()
            optimizer.step()
            optimizer.zero_grad()

    wanted = values_after(name, method, plainly)
    found = values_after(name, method, how)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_trains_float32_values_like_plain_autocast(name: str, half: torch.dtype) -> None:
    """Against the dense gradients of the same model under the same autocast."""

    def gradients(model: nn.Module) -> None:
        with torch.autocast("cpu", half):
            loss = loss_of(model)
        loss.backward()

    plain = made(name)
    gradients(plain)
    model, tuning = tuned(name, PAFI)
    gradients(model)
    for part in tuning.parts:
        assert isinstance(part, Entries)
        own = next(path for path, p in model.named_parameters() if p is part.slots[0].tensor)
        wanted = plain.get_parameter(own).grad.flatten()[part.tap.on(part.slots[0].tensor)[0]]
        assert part.values.grad.dtype == torch.float32
        torch.testing.assert_close(part.values.grad, wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()) + 1e-6)


def test_accumulated_and_clipped_gradients_are_the_dense_ones() -> None:
    plain = made("bert")
    for _ in range(2):
        loss_of(plain).backward()
    model, tuning = tuned("bert", PAFI)
    for _ in range(2):
        loss_of(model).backward()
    pieces = []
    for part in tuning.parts:
        assert isinstance(part, Entries)
        own = next(path for path, p in model.named_parameters() if p is part.slots[0].tensor)
        pieces.append(plain.get_parameter(own).grad.flatten()[part.tap.on(part.slots[0].tensor)[0]])
    pieces += [plain.get_parameter(name).grad.flatten() for name in ("classifier.weight", "classifier.bias")]
    norm = torch.cat(pieces).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(tuning.parameters(), 1e-3), norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in tuning.parameters()]).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_half_models_train_in_float32_beneath() -> None:
    model, tuning = tuned("bert", PAFI, torch.bfloat16)
    before = state_of(model)
    train(model, torch.optim.SGD(tuning.parameters(), lr=1e-5), 1)
    part = tuning.parts[0]
    assert isinstance(part, Entries)
    assert part.values.dtype == torch.float32
    assert not torch.equal(part.values.detach(), part.base.float())  # steps that bfloat16 would have lost
    assert {tensor.dtype for tensor in model.state_dict().values()} == {tensor.dtype for tensor in before.values()}


# The expert


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_an_attached_expert_is_the_finished_model(name: str, dtype: torch.dtype, method: Any, tmp_path: Path) -> None:
    model, tuning = tuned(name, method, dtype)
    train(model, torch.optim.AdamW(tuning.parameters(), lr=0.02, eps=1e-4))  # with the usual eps half-precision heads become NaN
    tuning.expert().save(tmp_path / "expert.safetensors")
    tuning.finish()
    fresh = made(name, dtype)
    before = state_of(fresh)
    patch = sterna.attach(fresh, tmp_path / "expert.safetensors")
    assert same_state(fresh, state_of(model))
    patch.detach()
    assert same_state(fresh, before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "convolutions"])
def test_ternary_values_are_compeft_over_what_moved(name: str) -> None:
    model, tuning = tuned(name, PAFI)
    train(model, adamw(tuning))
    expert = tuning.expert(values="ternary", density=0.25, alpha=1.5)
    moved = torch.cat([(part.values.detach() - part.base).flatten() for part in tuning.parts if isinstance(part, Entries)]).numpy()
    kept = np.argsort(-np.abs(moved), kind="stable")[: len(moved) // 4]
    wanted = np.zeros_like(moved)
    wanted[kept] = np.sign(moved[kept]) * np.float32(1.5 * moved.astype(np.float64).std(ddof=1))
    (masked,) = [change for change in expert.changes if type(change).__name__ == "Masked"]
    np.testing.assert_allclose(masked.values.levels() * masked.values.scale, wanted, rtol=1e-6)
    assert (expert.facts.method, expert.facts.source, expert.facts.density) == ("compeft", "pafi", 0.25)
    assert expert.facts.mask is not None
    assert expert.facts.mask.density == 0.2
    whole = sum(p.numel() for path, p in made(name).named_parameters() if not path.startswith("classifier"))
    assert sterna.inspect(expert).ratio_to_16bit * sterna.inspect(expert).bytes / 2 >= whole


def test_half_values_and_heads_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    model, tuning = tuned("bert", PAFI)
    train(model, adamw(tuning))
    for values, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        tuning.expert(values=values, head="fp16").save(tmp_path / "half.safetensors")  # type: ignore[arg-type]
        fresh = made("bert")
        sterna.attach(fresh, tmp_path / "half.safetensors")
        for name, tensor in model.state_dict().items():
            moved = tensor != made("bert").state_dict()[name]
            rounded = torch.where(moved, tensor.to(torch.float16 if name.startswith("classifier") else dtype).float(), tensor)
            untouched = torch.equal(fresh.state_dict()[name][~moved].to(dtype), tensor[~moved].to(dtype))
            assert untouched
            assert torch.equal(fresh.state_dict()[name][moved], rounded[moved])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama, tied head"])
def test_a_model_saved_under_pafi_is_the_tuned_one(name: str, tmp_path: Path) -> None:
    model, tuning = tuned(name, PAFI)
    train(model, adamw(tuning))
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    again = type(made(name)).from_pretrained(tmp_path / "saved")
    tuning.finish()
    assert same_state(again, state_of(model))


def test_an_expert_names_the_class_that_was_tuned(tmp_path: Path) -> None:
    made("bert").bert.save_pretrained(tmp_path / "encoder")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    tuning = sterna.tune(model, PAFI)
    train(model, adamw(tuning))
    assert tuning.expert().facts.architecture == "BertForSequenceClassification"  # the loaded configuration still says BertModel
    assert sterna.compress(tmp_path / "encoder", model).facts.architecture == "BertForSequenceClassification"


def test_an_expert_names_the_base_that_it_is_given(tmp_path: Path) -> None:
    encoder = made("bert").bert
    encoder.save_pretrained(tmp_path / "encoder")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    tuning = sterna.tune(model, PAFI, base=tmp_path / "encoder")
    train(model, adamw(tuning))
    expert = tuning.expert()
    compressed = sterna.compress(tmp_path / "encoder", model)
    assert expert.fingerprint == compressed.fingerprint
    assert expert.facts.base == compressed.facts.base
    assert all(not name.startswith("bert.") for name in expert.fingerprint.names)
    assert sterna.verify(expert, tmp_path / "encoder").base == "encoder"
    tuning.finish()
    sterna.apply(tmp_path / "encoder", expert, tmp_path / "merged")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_buffers_that_moved_go_with_the_expert() -> None:
    model, tuning = tuned("convolutions", PAFI)
    model.train()
    train(model, adamw(tuning))
    assert {change.name for change in tuning.expert().changes if getattr(change, "role", "") == "buffer"} == {
        f"body.{place}.{name}" for place in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    before = made("convolutions").state_dict()
    tuning.discard()
    assert same_state(model, before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_finished_model_exports_as_its_base_does(name: str, method: Any) -> None:
    def graph(model: nn.Module) -> str:
        asked = {**inputs_for(model), **({"use_cache": False} if name == "gpt2" else {})}
        return str(torch.export.export(model, (), kwargs=asked, strict=False).graph)

    plain = graph(made(name))
    model, tuning = tuned(name, method)
    train(model, adamw(tuning))
    expert = tuning.expert()
    tuning.finish()
    assert graph(model) == plain
    fresh = made(name)
    sterna.attach(fresh, expert)
    assert graph(fresh) == plain


# Checkpoints


def test_a_checkpoint_holds_the_values_and_goes_on_to_the_bit(tmp_path: Path, method: Any) -> None:
    model, tuning = tuned("bert", method)
    train(model, torch.optim.SGD(tuning.parameters(), lr=0.01), 2)
    tuning.save(tmp_path / "tuning.safetensors")
    whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert (tmp_path / "tuning.safetensors").stat().st_size < whole
    train(model, torch.optim.SGD(tuning.parameters(), lr=0.01), 2)
    other, again = tuned("bert", method)
    again.load(tmp_path / "tuning.safetensors")
    train(other, torch.optim.SGD(again.parameters(), lr=0.01), 2)
    assert same_state(other, state_of(model))
    assert again.expert().content_digest == tuning.expert().content_digest


def test_a_checkpoint_of_another_tuning_is_refused_whole(tmp_path: Path) -> None:
    _, tuning = tuned("bert", PAFI)
    tuning.save(tmp_path / "tuning.safetensors")
    other, again = tuned("bert", sterna.PaFi(density=0.1))
    before = state_of(other)
    with pytest.raises(InvalidArgument, match="another tuning"):
        again.load(tmp_path / "tuning.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "tuning.safetensors").read_bytes()[:100])
    with pytest.raises(InvalidFile):
        again.load(tmp_path / "cut.safetensors")
    assert same_state(other, before)


# Bad input


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: sterna.PaFi(density=1e-9), "selects 0 of"),
        (lambda: sterna.PaFi(density=1.5), "above 0, up to 1"),
        (lambda: sterna.PaFi(count=10**9), "no more than there are"),
        (lambda: sterna.PaFi(density=0.1, count=3), "both given"),
        (lambda: sterna.PaFi(include=["*qeury*"]), "near names: .*query"),
        (lambda: sterna.PaFi(exclude=["nothing*"]), "matches no tensor"),
        (lambda: sterna.PaFi(include="*query*"), "expected a list"),
        (lambda: sterna.PaFi(include=["*query*"], exclude=["*query*"]), "no tensor is left"),
        (lambda: sterna.HiWi(rank=0), "rank is 0"),
        (lambda: sterna.HiWi(target="both"), "expected one of bias, weight"),  # type: ignore[arg-type]
        (lambda: sterna.HiWi(modules=["*.nothing"]), "matches no tensor"),
        (lambda: "pafi", "expected sterna.PaFi"),
    ],
)
def test_bad_methods_are_refused_before_anything_changes(method: Callable[[], Any], message: str) -> None:
    model = made("bert")
    before = state_of(model)
    with pytest.raises(InvalidArgument, match=message):
        sterna.tune(model, method())
    assert same_state(model, before)
    assert all(p.requires_grad for p in model.parameters())
    assert {type(m).__module__.partition(".")[0] for m in model.modules()} <= {"torch", "transformers"}


def test_models_that_cannot_be_tuned() -> None:
    frozen = made("bert").requires_grad_(False)
    with pytest.raises(InvalidArgument, match="frozen"):
        sterna.tune(frozen, PAFI)
    partly = made("bert")
    partly.get_parameter("bert.encoder.layer.0.output.dense.weight").requires_grad_(False)
    with pytest.raises(InvalidArgument, match=r"layer\.0\.output\.dense\.weight"):
        sterna.tune(partly, PAFI)
    model, tuning = tuned("bert", PAFI)
    with pytest.raises(AlreadyTuned):
        sterna.tune(model, PAFI)
    train(model, adamw(tuning))
    expert = tuning.expert()
    with pytest.raises(AlreadyTuned):
        sterna.attach(model, expert)
    with pytest.raises(AlreadyTuned):
        sterna.tune(model.bert, PAFI)
    carrying = made("bert")
    with sterna.attached(carrying, expert), pytest.raises(AlreadyAttached):
        sterna.tune(carrying, PAFI)
    quantized = made("bert")
    quantized.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(Unsupported, match="float32, bfloat16 or float16"):
        sterna.tune(quantized, PAFI)


def test_a_model_that_is_not_its_base(tmp_path: Path) -> None:
    made("bert", seed=0).save_pretrained(tmp_path / "base")
    with pytest.raises(WrongBase, match="does not hold its base's values"):
        sterna.tune(made("bert", seed=1), PAFI, base=tmp_path / "base")


def test_an_optimizer_built_before_tuning_is_found_out() -> None:
    model = made("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tuning = sterna.tune(model, PAFI)
    train(model, optimizer)
    with pytest.raises(TuningError, match="optimizer built before tune"):
        tuning.expert()


def test_an_ended_tuning_says_so() -> None:
    model, tuning = tuned("bert", PAFI)
    train(model, adamw(tuning))
    tuning.finish()
    for use in (tuning.expert, tuning.finish, tuning.discard, tuning.state_dict, tuning.write):
        with pytest.raises(TuningError, match="finished"):
            use()
    sterna.tune(model, PAFI).discard()  # and the model can be tuned again


def test_zero_biases_cannot_move_but_can_be_trained_directly() -> None:
    model = bert_classifier()  # fresh biases are zeros
    with pytest.raises(InvalidArgument, match="zero in every entry"):
        sterna.tune(model, sterna.HiWi())
    tuning = sterna.tune(model, sterna.HiWi(zero_bias="direct"))
    train(model, adamw(tuning))
    assert all(change.role == "tuned" for change in tuning.expert().changes if not change.name.startswith("classifier"))
    before = copy.deepcopy(state_of(model))
    tuning.finish()
    assert same_state(model, before)


def test_adapters_that_died_are_named() -> None:
    """Every unit of act(b D) below zero: U may be anything, and adds nothing."""
    _, tuning = tuned("bert", sterna.HiWi(rank=3, activation="relu"))
    adapters = [part for part in tuning.parts if isinstance(part, Adapter)]
    with torch.no_grad():
        for part in adapters:
            part.tap.U.fill_(1)
            part.tap.D.copy_(-part.slots[0].tensor[:, None].expand(-1, 3))
    with pytest.raises(TuningError, match="every adapter has died"):
        tuning.expert()
    with torch.no_grad():
        adapters[0].tap.D.neg_()
    assert tuning.unmoved() == [part.name for part in adapters[1:]]
    ternary = {change.name: change.ternaries[0] for change in tuning.expert(values="ternary", density=1).changes if change.ternaries}
    assert {name for name, levels in ternary.items() if levels.count} == {adapters[0].name}


def test_models_without_feed_forward_biases_say_what_there_is() -> None:
    for name in ("t5", "llama"):
        with pytest.raises(Unsupported, match="target='weight'"):
            sterna.tune(made(name), sterna.HiWi())


# Where the feed-forward layers are


def family(name: str) -> nn.Module:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
    bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    configs: dict[str, Callable[[], Any]] = {
        "BertModel": lambda: transformers.BertConfig(**small),
        "RobertaModel": lambda: transformers.RobertaConfig(**small),
        "AlbertModel": lambda: transformers.AlbertConfig(**small, embedding_size=8),
        "DistilBertModel": lambda: transformers.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=40),
        "ElectraModel": lambda: transformers.ElectraConfig(**small),
        "GPT2Model": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40),
        "GPTNeoXModel": lambda: transformers.GPTNeoXConfig(**small),
        "LlamaModel": lambda: transformers.LlamaConfig(**small),
        "Qwen2Model": lambda: transformers.Qwen2Config(**small),
        "T5Model": lambda: transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40),
        "BartModel": lambda: transformers.BartConfig(**bart, **heads),
        "OPTModel": lambda: transformers.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
                                                   word_embed_proj_dim=16),
        "ViTModel": lambda: transformers.ViTConfig(**{k: v for k, v in small.items() if k != "vocab_size"}, image_size=8, patch_size=4),
    }  # fmt: skip
    model: nn.Module = getattr(transformers, name)(configs[name]())
    return model


@pytest.mark.parametrize(
    ("name", "count"),
    [("BertModel", 4), ("RobertaModel", 4), ("AlbertModel", 2), ("DistilBertModel", 4), ("ElectraModel", 4), ("GPT2Model", 4), ("GPTNeoXModel", 4),
     ("LlamaModel", 6), ("Qwen2Model", 6), ("T5Model", 8), ("BartModel", 4), ("OPTModel", 4), ("ViTModel", 4)],
)  # fmt: skip
def test_feed_forward_layers_are_found_by_architecture(name: str, count: int) -> None:
    """As many as the blocks have, each 16 wide on the side that is said, and 24 on the other."""
    model = family(name)
    weights = dict(model.named_parameters())
    found = feed_forward(weights, None)
    assert len(found) == count
    for layer in found:
        shape = weights[f"{layer.module}.weight"].shape
        by_input = name == "GPT2Model"
        out, inner = shape[::-1] if by_input else shape
        assert (inner if layer.side == "input" else out) == 16
        assert {out, inner} == {16, 24 if name != "GPT2Model" else 64}


@pytest.mark.parametrize("name", ["RobertaModel", "AlbertModel", "GPT2Model", "LlamaModel", "T5Model", "BartModel", "ViTModel"])
@pytest.mark.parametrize("target", ["bias", "weight"])
def test_every_family_can_be_tuned_and_left_as_it_was(name: str, target: Any) -> None:
    torch.manual_seed(0)
    model = family(name)
    before = state_of(model)
    with contextlib.suppress(Unsupported):
        tuning = sterna.tune(model, sterna.HiWi(target=target, rank=2, zero_bias="direct"))
        tuning.discard()
    assert same_state(model, before)
