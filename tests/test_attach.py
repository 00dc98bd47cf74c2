"""Attach, swap and detach on live models: the tuned weights to the bit, the base again to the bit, whatever happens in between."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import sterna
from coded import ternary_of
from models import (
    MODELS,
    ConvNet,
    answer,
    bert_classifier,
    bert_config,
    bert_encoder,
    inputs_for,
    llama_classifier,
    made,
    same_state,
    state_of,
    tuned,
)
from sterna.errors import AlreadyAttached, InvalidFile, PatchError, Unsupported, WrongBase, WrongModel
from sterna.expert.changes import Add, Change, Factors, Multiply, Set, Ternary
from sterna.expert.facts import BaseFacts, Facts
from sterna.expert.file import file_pieces, from_bytes
from sterna.fingerprint import fingerprint
from sterna.live import head, kernels, update
from sterna.live.update import Overwrite, ScatteredAdd, SparseAdd

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, BF16, F16]


# What attaching must give, by the dense formula


def stored(model: nn.Module, name: str) -> str:
    """The name that files give to a tensor; transformers 5 renames ViT's in memory."""
    if type(model).__name__ != "ViTForImageClassification":
        return name
    from transformers.core_model_loading import revert_weight_conversion

    (found,) = revert_weight_conversion(model, {name: torch.empty(0)})
    return str(found)


def expected(model: nn.Module, expert: sterna.Expert, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """round_to_dtype(fp32(base) + scale * level) for every tensor of the state dict, and the exact tensors as they are."""
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict().items():
        tied.setdefault(tensor.data_ptr(), []).append(name)
    together = {name: [stored(model, other) for other in names] for names in tied.values() for name in names}
    wanted = {name: tensor.clone() for name, tensor in base.items()}
    for change in sorted(expert.changes, key=lambda change: isinstance(change, Set)):
        for name, tensor in wanted.items():
            if change.name in together[name]:
                if isinstance(change, Add):
                    levels = torch.from_numpy(change.levels.levels().astype(np.float32))
                    wanted[name] = (tensor.float() + levels * torch.tensor(change.levels.scale, dtype=F32)).to(tensor.dtype)
                elif isinstance(change, Set):
                    value = torch.cat([tensor.float(), change.value.float()]) if change.role == "rows" else change.value
                    wanted[name] = value.to(tensor.dtype)
    return wanted


def anatomy(model: nn.Module) -> list[Any]:
    """Everything about a model that attaching must leave alone, but for values: modules, parameters, attributes, hooks."""
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        hooks = [len(value) for key, value in sorted(module.__dict__.items()) if "hook" in key and hasattr(value, "__len__")]
        plain = {key: value for key, value in module.__dict__.items() if isinstance(value, int | float | str | bool)}
        parameters = [(n, id(p), p.requires_grad, p.dtype, p.shape, p.stride()) for n, p in module._parameters.items() if p is not None]
        buffers = [(n, id(b), b.dtype, b.shape) for n, b in module._buffers.items() if b is not None]
        found.append((path, id(module), type(module), sorted(module.__dict__), hooks, sorted(plain.items()), parameters, buffers))
    config = getattr(model, "config", None)
    return [*found, json.dumps(config.to_dict(), sort_keys=True, default=str) if config is not None else None]


def mixed(model: nn.Module, expert: sterna.Expert) -> sterna.Expert:
    """An expert whose changes are dense: LoRA factors, (IA)3 vectors and a saved tensor, over the same base."""
    generator = torch.Generator().manual_seed(7)
    matrices = [change for change in expert.changes if isinstance(change, Add) and len(change.levels.shape) == 2]

    def ternary(*shape: int) -> Ternary:
        return ternary_of(torch.randint(-1, 2, shape, generator=generator).to(torch.int8).numpy(), float(np.float32(0.037)))

    (a_out, a_in), (b_out, b_in), (c_out, _) = (change.levels.shape for change in matrices[:3])
    made_up: list[Change] = [
        Factors(matrices[0].name, "one", ternary(3, a_in), ternary(a_out, 3), 0.5),
        Factors(matrices[1].name, "two", ternary(2, b_out), ternary(b_in, 2), 0.25, transposed=True),
        Multiply(matrices[2].name, "three", ternary(c_out), 0),
        Set(matrices[3].name, torch.randn(matrices[3].levels.shape, generator=generator), "saved"),
    ]
    facts = dataclasses.replace(expert.facts, source="lora", scope="tensor", scale=0.0, config={})
    return sterna.Expert(facts, expert.fingerprint, tuple(sorted(made_up, key=lambda change: change.name)))


def dense(expert: sterna.Expert, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + scaling * B A, W * (1 + scale * v) and the saved tensor, each operation in float32 by numpy, rounded once to the live dtype."""
    wanted = {name: tensor.clone() for name, tensor in base.items()}
    for change in expert.changes:
        old = wanted[change.name].float().numpy()
        if isinstance(change, Factors):
            product = change.B.levels().astype(np.int64) @ change.A.levels().astype(np.int64)
            scale = np.float32(change.A.scale * change.B.scale * change.scaling)
            new = old + (product.T if change.transposed else product).astype(np.float32) * scale
        elif isinstance(change, Multiply):
            new = old * (np.float32(1) + change.vector.levels().astype(np.float32) * np.float32(change.vector.scale))[:, None]
        else:
            assert isinstance(change, Set)
            new = change.value.numpy()
        wanted[change.name] = torch.from_numpy(new).to(wanted[change.name].dtype)
    return wanted


def expert_over(base: Mapping[str, torch.Tensor], changes: list[Change]) -> sterna.Expert:
    """An expert with those changes over those base tensors."""
    mark = fingerprint(base)
    facts = Facts("compeft", "full", 0.1, 4.0, "tensor", 0.0, BaseFacts("base", mark.hex, 1), "test", 1)
    return sterna.Expert(facts, mark, tuple(changes))


# The matrix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_attached_weights_are_the_base_plus_the_task_vector_rounded_once(name: str, dtype: torch.dtype) -> None:
    base = made(name, dtype)
    before, body, said = state_of(base), anatomy(base), answer(base)
    for seed, size, scope in ((1, 3e-3, "global"), (2, 3e-2, "tensor")):
        expert = sterna.compress(base, tuned(base, seed, size), density=0.2, scope=scope)
        patch = sterna.attach(base, expert)
        assert same_state(base, expected(base, expert, before))
        assert not torch.equal(answer(base), said)
        assert sterna.attached_to(base) is patch
        assert patch.expert is expert
        patch.detach()
        assert same_state(base, before)
        assert anatomy(base) == body
        assert torch.equal(answer(base), said)
        assert sterna.attached_to(base) is None


@pytest.mark.parametrize("dtype", [*DTYPES, F64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_an_expert_of_a_narrower_base_fits_every_wider_load(name: str, dtype: torch.dtype) -> None:
    small = made(name, F16 if dtype in (F16, F32) else BF16)
    expert = sterna.compress(small, tuned(small))
    wide = copy.deepcopy(small).to(dtype)
    before = state_of(wide)
    with sterna.attached(wide, expert):
        assert same_state(wide, expected(wide, expert, before))
    assert same_state(wide, before)


@pytest.mark.parametrize("source", ["lone file", "loaded", "path"])
def test_an_expert_or_its_file(source: str, tmp_path: Path) -> None:
    base = made("bert")
    before = state_of(base)
    expert = sterna.compress(base, tuned(base))
    file = tmp_path / "expert.safetensors"
    expert.save(file)
    given: Any = {"lone file": str(file), "loaded": sterna.load(file), "path": file}[source]
    with sterna.attached(base, given) as patch:
        assert same_state(base, expected(base, expert, before))
        patch.swap(given)
        assert same_state(base, expected(base, expert, before))
    assert same_state(base, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_changes_follow_their_formulas(dtype: torch.dtype) -> None:
    base = made("bert", dtype)
    before, body = state_of(base), anatomy(base)
    expert = mixed(base, sterna.compress(base, tuned(base)))
    with sterna.attached(base, expert) as patch:
        assert same_state(base, dense(expert, before))
        touched = [before[change.name] for change in expert.changes]
        assert patch.undo_bytes == sum(t.numel() * t.element_size() for t in touched)
    assert same_state(base, before)
    assert anatomy(base) == body


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("convolutions", "shared block")])
def test_an_expert_made_from_folders_fits_the_model_that_they_load(name: str, tmp_path: Path) -> None:
    base = made(name)
    base.save_pretrained(tmp_path / "base")
    tuned(base).save_pretrained(tmp_path / "tuned")
    expert = sterna.compress(tmp_path / "base", tmp_path / "tuned")
    assert set(expert.fingerprint.names) <= set(load_file(tmp_path / "base" / "model.safetensors"))
    live = type(base).from_pretrained(tmp_path / "base").eval()
    before = state_of(live)
    with sterna.attached(live, expert):
        assert same_state(live, expected(live, expert, before))
    assert same_state(live, before)


def test_an_expert_without_a_head_fits_the_bare_encoder_and_every_class_around_it() -> None:
    whole = made("bert")
    expert = sterna.compress(whole, tuned(whole), exclude=["classifier.*"])
    bare = bert_encoder()
    bare.load_state_dict(whole.bert.state_dict())
    question = transformers.BertForQuestionAnswering(bert_config()).eval()
    question.bert.load_state_dict({n: t for n, t in whole.bert.state_dict().items() if not n.startswith("pooler")})
    with pytest.raises(WrongModel, match="pooler"):
        sterna.attach(question, expert)
    before = state_of(bare)
    with sterna.attached(bare, expert):
        for name, tensor in expected(whole, expert, state_of(whole)).items():
            if name.startswith("bert."):
                assert torch.equal(bare.state_dict()[name.removeprefix("bert.")], tensor)
    assert same_state(bare, before)


def test_wrapped_models_are_patched_inside() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    before = state_of(base)
    wrappers: list[Callable[[nn.Module], nn.Module]] = [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
        lambda model: nn.ModuleDict({"module": model}),
        lambda model: nn.ModuleDict({"outer": nn.ModuleDict({"inner": model})}),
    ]
    for wrap in wrappers:
        with sterna.attached(wrap(base), expert):
            assert same_state(base, expected(base, expert, before))
        assert same_state(base, before)


def test_a_compiled_model_answers_as_the_expert_and_as_the_base() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    compiled = torch.compile(base, backend="eager")
    plain = answer(base)
    assert torch.equal(answer(compiled), plain)
    with sterna.attached(compiled, expert):
        assert torch.equal(answer(compiled), answer(base))
        assert not torch.equal(answer(compiled), plain)
        assert sterna.attached_to(base) is sterna.attached_to(compiled) is not None
    assert torch.equal(answer(compiled), plain)


# Ties, gained rows, untied copies


@pytest.mark.parametrize("name", ["llama, tied head", "gpt2"])
def test_gained_rows_lengthen_the_table_and_what_is_tied_to_it(name: str) -> None:
    base = made(name)
    after = tuned(base)
    after.resize_token_embeddings(44, mean_resizing=False)
    expert = sterna.compress(base, after)
    before, body = state_of(base), anatomy(base)
    with sterna.attached(base, expert):
        assert same_state(base, expected(base, expert, before))
        assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
        assert base.get_input_embeddings().num_embeddings == base.get_output_embeddings().out_features == base.config.vocab_size == 44
        assert answer(base).shape[-1] == 44
    assert same_state(base, before)
    assert anatomy(base) == body


@pytest.mark.parametrize("rows", [40, 44])
@pytest.mark.parametrize("name", ["llama, tied head", "gpt2", "t5"])
def test_an_untied_copy_is_untied_while_the_expert_is_on(name: str, rows: int) -> None:
    base = made(name)
    after = tuned(base)
    after.config.tie_word_embeddings = False
    after.lm_head.weight = nn.Parameter(after.lm_head.weight.detach() + 0.01)
    after.resize_token_embeddings(rows, mean_resizing=False)
    expert = sterna.compress(base, after)
    before, body = state_of(base), anatomy(base)
    with sterna.attached(base, expert):
        assert torch.equal(base.lm_head.weight, after.lm_head.weight)
        embeddings = base.get_input_embeddings().weight
        assert embeddings is not base.lm_head.weight
        assert len(embeddings) == rows
        assert not torch.equal(embeddings, base.lm_head.weight)
        assert torch.equal(embeddings[40:], after.get_input_embeddings().weight[40:])
    assert same_state(base, before)
    assert anatomy(base) == body


def test_tables_that_the_base_holds_apart_are_not_added_twice_to_a_tied_model() -> None:
    apart = made("llama")
    apart.lm_head.weight = nn.Parameter(apart.model.embed_tokens.weight.detach().clone())
    after = tuned(apart)
    expert = sterna.compress(apart, after)
    together = made("llama, tied head")
    together.load_state_dict(apart.state_dict())
    before = state_of(together)
    with pytest.raises(WrongModel, match=r"ties lm_head\.weight and model\.embed_tokens\.weight"):
        sterna.attach(together, expert)
    assert same_state(together, before)


def test_a_block_that_stands_in_twelve_layers_is_changed_once() -> None:
    base = made("shared block")
    before = state_of(base)
    expert = sterna.compress(base, tuned(base), density=1.0)
    with sterna.attached(base, expert) as patch:
        assert same_state(base, expected(base, expert, before))
        assert patch.undo_bytes == 4 * sum(p.numel() for p in base.parameters())
    assert same_state(base, before)


# Heads


def two_tasks(labels: tuple[int, int] = (20, 2)) -> tuple[nn.Module, list[sterna.Expert], list[nn.Module]]:
    """A live classifier over one base with a fresh head, and experts of two tasks with other numbers of classes."""
    encoder = bert_encoder()
    encoder.load_state_dict(made("bert").bert.state_dict())
    models = []
    for seed, count in enumerate(labels):
        torch.manual_seed(seed)
        model = bert_classifier(count)
        model.bert.load_state_dict(tuned(encoder, seed + 1, 2e-2).state_dict())
        model.config.id2label = {i: f"task {seed} class {i}" for i in range(count)}
        model.config.label2id = {f"task {seed} class {i}": i for i in range(count)}
        models.append(model)
    live = transformers.BertForSequenceClassification(bert_config(2)).eval()
    live.bert.load_state_dict(encoder.state_dict())
    return live, [sterna.compress(encoder, model) for model in models], models


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapping_between_twenty_classes_and_two(dtype: torch.dtype) -> None:
    live, experts, models = two_tasks()
    live.to(dtype)
    before, body = state_of(live), anatomy(live)
    patch = sterna.attach(live, experts[0], allow_narrower=True)
    for step in range(1, 7):
        model, count = models[(step - 1) % 2], (20, 2)[(step - 1) % 2]
        assert torch.equal(live.classifier.weight, model.classifier.weight.to(dtype))
        assert torch.equal(live.classifier.bias, model.classifier.bias.to(dtype))
        assert isinstance(live.classifier.weight, nn.Parameter)
        assert live.classifier.weight.requires_grad
        assert live.classifier.out_features == live.num_labels == live.config.num_labels == count
        assert live.classifier.in_features == 16
        assert live.config.id2label == model.config.id2label
        assert live.config.label2id == model.config.label2id
        assert answer(live).shape == (2, count)
        assert list(live.state_dict()) == list(before)
        loss = live(**inputs_for(live), labels=torch.tensor([count - 1, 0])).loss
        assert torch.isfinite(loss)
        live.config.problem_type = None
        patch.swap(experts[step % 2], allow_narrower=True)
    patch.detach()
    assert same_state(live, before)
    assert anatomy(live) == body


def test_a_head_behaves_as_the_tuned_models_own() -> None:
    """The logits are those of the tuned model's head over the body that attaching made."""
    live, experts, models = two_tasks()
    with sterna.attached(live, experts[0]):
        copied = copy.deepcopy(models[0])
        copied.bert.load_state_dict(live.bert.state_dict())
        assert torch.equal(answer(live), answer(copied))


def test_a_model_without_the_head_is_told_which_class_to_load() -> None:
    live, experts, _ = two_tasks()
    bare = live.bert
    before = state_of(bare)
    with pytest.raises(WrongModel, match=r"BertModel.*no classifier\.bias, classifier\.weight.*load the base as BertForSequenceClassification"):
        sterna.attach(bare, experts[0])
    assert same_state(bare, before)
    with sterna.attached(live, experts[1]) as patch:
        score = sterna.compress(made("llama"), _classifier_of(made("llama")))
        with pytest.raises(WrongModel, match="BertForSequenceClassification"):
            patch.swap(score)
        assert patch.expert is experts[1]


def _classifier_of(causal: nn.Module) -> nn.Module:
    model = llama_classifier()
    model.model.load_state_dict(tuned(causal).model.state_dict())
    return model


def test_a_score_head_of_another_size() -> None:
    causal = made("llama")
    expert = sterna.compress(causal, _classifier_of(causal))
    live = llama_classifier(labels=7)
    live.model.load_state_dict(causal.model.state_dict())
    before, body = state_of(live), anatomy(live)
    with sterna.attached(live, expert):
        assert live.score.weight.shape == (3, 16)
        assert live.score.out_features == live.config.num_labels == live.num_labels == 3
    assert same_state(live, before)
    assert anatomy(live) == body


def test_a_head_on_a_plain_torch_module() -> None:
    base = made("convolutions")
    after = ConvNet(classes=11)
    after.body.load_state_dict(tuned(base).body.state_dict())
    expert = sterna.compress(base, after)
    before, body = state_of(base), anatomy(base)
    with sterna.attached(base, expert):
        assert torch.equal(base.classifier.weight, after.classifier.weight)
        assert base.classifier.out_features == 11
        assert answer(base).shape == (2, 11)
        assert base.body[1].num_batches_tracked == 7
        assert torch.equal(base.body[4].running_var, after.body[4].running_var)
    assert same_state(base, before)
    assert anatomy(base) == body


@pytest.mark.parametrize("name", ["bert", "convolutions"])
def test_swapping_to_an_expert_that_leaves_heads_and_buffers_alone(name: str) -> None:
    base = made(name)
    before = state_of(base)
    everything = sterna.compress(base, tuned(base))
    less = tuned(base, 5)
    for (_, now), (_, old) in zip(less.named_buffers(), base.named_buffers(), strict=True):
        now.copy_(old)
    body_only = sterna.compress(base, less, exclude=["classifier.*"])
    patch = sterna.attach(base, everything)
    for expert in (body_only, everything, body_only):
        patch.swap(expert)
        assert same_state(base, expected(base, expert, before))
    patch.detach()
    assert same_state(base, before)


# Ten thousand steps


class Small(nn.Module):
    """Few tensors and a head, with the attributes and the configuration that transformers' classifiers have."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(id2label={i: f"{labels} classes, {i}" for i in range(labels)})
        self.num_labels = labels
        self.body = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)), nn.BatchNorm1d(8))
        self.classifier = nn.Linear(8, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_thousand_random_steps_end_where_they_began(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = Small(2).to(dtype)
    experts = []
    for labels in (2, 5, 2):
        model = Small(labels).to(dtype)
        model.body.load_state_dict(tuned(base, len(experts), 3e-2).body.state_dict())
        experts.append(sterna.compress(base, model, density=(0.05, 0.3, 1.0)[len(experts)]))
    experts.append(mixed(base, experts[0]))
    before, body = state_of(base), anatomy(base)
    wanted = [expected(base, expert, before) for expert in experts[:3]]
    with sterna.attached(base, experts[3]):
        wanted.append(state_of(base))
    chance = random.Random(0)
    patch: sterna.Patch | None = None
    for step in range(10_000):
        chosen = chance.randrange(len(experts))
        if patch is None:
            patch, on = sterna.attach(base, experts[chosen]), chosen
        elif chance.random() < 0.5:
            patch.swap(experts[chosen])
            on = chosen
        else:
            patch.detach()
            patch = None
            assert same_state(base, before), step
        if patch is not None and step % 7 == 0:
            assert same_state(base, wanted[on]), step
            assert base.num_labels == base.config.num_labels == base.classifier.out_features == (2, 5, 2, 2)[on]
    if patch is not None:
        patch.detach()
    assert same_state(base, before)
    assert anatomy(base) == body


# The wrong base, the wrong model


def test_another_base_is_refused_and_its_first_tensors_named() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.bias[3] += 1e-6
        other.bert.embeddings.LayerNorm.weight[0] += 1e-6
    before = state_of(other)
    with pytest.raises(WrongBase, match=r"2 of 39 tensors differ, the first: bert\.embeddings\.LayerNorm\.weight, bert\.encoder\.layer\.1\.output"):
        sterna.attach(other, expert)
    with pytest.raises(WrongBase, match="39 of 39"):
        sterna.attach(made("bert", seed=5), expert)
    assert same_state(other, before)
    assert sterna.attached_to(other) is None
    sterna.attach(base, expert).detach()


def test_the_heads_own_values_do_not_make_another_base() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    with torch.no_grad():
        base.classifier.weight.normal_()
    before = state_of(base)
    with sterna.attached(base, expert):
        assert same_state(base, expected(base, expert, before))
    assert same_state(base, before)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_narrower_load_needs_leave(dtype: torch.dtype) -> None:
    base = made("bert")
    experts = [sterna.compress(base, tuned(base, seed)) for seed in (1, 2)]
    narrow = copy.deepcopy(base).to(dtype)
    before = state_of(narrow)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(WrongBase, match=rf"{name}.*narrower.*allow_narrower=True"):
        sterna.attach(narrow, experts[0])
    patch = sterna.attach(narrow, experts[0], allow_narrower=True)
    assert same_state(narrow, expected(narrow, experts[0], before))
    with pytest.raises(WrongBase, match="narrower"):
        patch.swap(experts[1])
    assert same_state(narrow, expected(narrow, experts[0], before))
    patch.swap(experts[1], allow_narrower=True)
    assert same_state(narrow, expected(narrow, experts[1], before))
    patch.detach()
    assert same_state(narrow, before)


@pytest.mark.parametrize("other", ["gpt2", "t5", "vit", "convolutions"])
def test_another_family_is_a_wrong_model(other: str) -> None:
    base, live = made("bert"), made(other)
    before = state_of(live)
    with pytest.raises((WrongModel, WrongBase)):
        sterna.attach(live, sterna.compress(base, tuned(base)))
    assert same_state(live, before)


def test_another_size_is_a_wrong_model() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    config = bert_config()
    config.intermediate_size = 20
    with pytest.raises(WrongModel, match=r"shape \(20,\) in the model, \(24,\) in the expert"):
        sterna.attach(transformers.BertForSequenceClassification(config), expert)


# One expert at a time


def test_a_second_expert_is_refused_on_the_model_its_parts_and_its_wrappers() -> None:
    base = made("bert")
    experts = [sterna.compress(base, tuned(base, seed), exclude=["classifier.*"]) for seed in (1, 2)]
    before = state_of(base)
    whole = nn.ModuleDict({"model": base})
    with sterna.attached(base, experts[0]):
        for part in (base, base.bert, whole, nn.DataParallel(base), torch.compile(base, backend="eager")):
            with pytest.raises(AlreadyAttached, match=r"merge the two experts first|detach it first"):
                sterna.attach(part, experts[1])
        assert same_state(base, expected(base, experts[0], before))
    with sterna.attached(base.bert, experts[0]), pytest.raises(AlreadyAttached):
        sterna.attach(base, experts[1])
    with sterna.attached(whole, experts[0]), pytest.raises(AlreadyAttached):
        sterna.attach(base.bert, experts[1])
    assert same_state(base, before)
    sterna.attach(base, experts[1]).detach()
    assert same_state(base, before)


def test_a_swap_does_not_reach_for_what_another_patch_has() -> None:
    base = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    before = state_of(base)
    experts = [sterna.compress(base, tuned(base), exclude=[f"{other}.*"], density=0.5) for other in ("two", "one")]
    inner = sterna.attach(base["one"], experts[0])
    outer = sterna.attach(base, experts[1])
    with pytest.raises(AlreadyAttached):
        outer.swap(experts[0])
    inner.detach()
    outer.swap(experts[0])
    outer.detach()
    assert same_state(base, before)


def test_two_models_that_share_weights_are_one() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    twin = bert_classifier()
    for path, module in twin.named_modules():
        for name in module._parameters:
            if module._parameters[name] is not None:
                setattr(module, name, base.get_submodule(path)._parameters[name])
    with sterna.attached(base, expert), pytest.raises(AlreadyAttached):
        sterna.attach(twin, expert)
    sterna.attach(twin, expert).detach()


def test_of_many_threads_that_attach_one_wins() -> None:
    base = made("bert")
    before = state_of(base)
    experts = [sterna.compress(base, tuned(base, seed)) for seed in range(4)]
    for _ in range(20):
        patches: list[sterna.Patch] = []
        refused: list[Exception] = []
        gate = threading.Barrier(len(experts))

        def work(expert: sterna.Expert, patches: list[sterna.Patch] = patches, refused: list[Exception] = refused, gate: Any = gate) -> None:
            gate.wait()
            try:
                patches.append(sterna.attach(base, expert))
            except AlreadyAttached as error:
                refused.append(error)

        in_threads([lambda expert=expert: work(expert) for expert in experts])
        assert (len(patches), len(refused)) == (1, 3)
        assert same_state(base, expected(base, patches[0].expert, before))
        patches[0].detach()
        assert same_state(base, before)


def test_a_detached_patch_says_so() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    patch = sterna.attach(base, expert)
    assert patch.attached
    assert "Patch" in repr(patch)
    patch.detach()
    assert not patch.attached
    assert "detached" in repr(patch)
    with contextlib.ExitStack() as stack:
        for use in (patch.detach, lambda: patch.swap(expert), lambda: patch.expert, lambda: patch.swallowed, lambda: patch.undo_bytes):
            with pytest.raises(PatchError, match="detached"):
                use()
        with pytest.raises(PatchError, match="detached"):
            stack.enter_context(patch.reading())


def test_leaving_the_block_detaches_whatever_happened_in_it() -> None:
    base = made("bert")
    before = state_of(base)
    experts = [sterna.compress(base, tuned(base, seed)) for seed in (1, 2)]

    def fails() -> None:
        with sterna.attached(base, experts[0]) as patch:
            patch.swap(experts[1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert same_state(base, before)
    with sterna.attached(base, experts[0]) as patch:
        patch.detach()
    assert same_state(base, before)


# What cannot be patched


def test_tensors_that_cannot_be_patched_are_refused(tmp_path: Path) -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))

    def refused(model: nn.Module, words: str) -> None:
        with pytest.raises(Unsupported, match=words):
            sterna.attach(model, expert)
        assert sterna.attached_to(model) is None

    refused(copy.deepcopy(base).to("meta"), "meta device")
    half_loaded = copy.deepcopy(base)
    half_loaded.bert.pooler.to("meta")
    refused(half_loaded, "meta device")
    with torch.inference_mode():
        refused(copy.deepcopy(base), "inference_mode")
    quantized = copy.deepcopy(base)
    quantized.config.quantization_config = {"load_in_4bit": True}
    refused(quantized, "quantized")
    eighth = copy.deepcopy(base)
    eighth.bert.pooler.dense.weight.data = eighth.bert.pooler.dense.weight.data.to(torch.float8_e4m3fn)
    refused(eighth, r"pooler\.dense\.weight is quantized")

    class Packed(nn.Parameter):
        """As bitsandbytes keeps four-bit weights: another shape, values elsewhere."""

    packed = copy.deepcopy(base)
    packed.bert.pooler.dense.weight = Packed(torch.zeros(128, 1), requires_grad=False)
    refused(packed, r"pooler\.dense\.weight.*Packed.*dequantize")
    assert same_state(half_loaded.bert.encoder, state_of(base.bert.encoder))


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    offloaded = cpu_offload(copy.deepcopy(base), execution_device="cpu")
    with pytest.raises(Unsupported, match="offload"):
        sterna.attach(offloaded, expert)


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    from torch.distributed.tensor import distribute_tensor

    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        dense_layer = base.bert.pooler.dense
        dense_layer.weight = nn.Parameter(distribute_tensor(dense_layer.weight.detach(), mesh))
        with pytest.raises(Unsupported, match=r"pooler\.dense\.weight.*DTensor"):
            sterna.attach(base, expert)
    finally:
        torch.distributed.destroy_process_group()


# Failures in the middle


class Broken(Exception):
    """What the fault injection raises."""


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, when: str, error: BaseException) -> list[int]:
    """Have call `number` of owner.name raise before or after its work, and once only; returns the calls as they are made."""
    calls: list[int] = []
    inner = getattr(owner, name)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        calls.append(len(calls))
        mine = len(calls) - 1 == number
        if mine and when == "before":
            raise error
        result = inner(*arguments, **named)
        if mine:
            raise error
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def damaged(expert: sterna.Expert, number: int) -> sterna.Expert:
    """The expert with a block, counted over all added tensors, whose positions are found to lie outside it."""
    changes = list(expert.changes)
    for place, change in enumerate(changes):
        if isinstance(change, Add):
            if 0 <= number < len(change.levels.blocks):
                size = change.levels.blocks.size.copy()
                size[number] = 0
                blocks = dataclasses.replace(change.levels.blocks, size=size)
                changes[place] = dataclasses.replace(change, levels=dataclasses.replace(change.levels, blocks=blocks))
            number -= len(change.levels.blocks)
    return dataclasses.replace(expert, changes=tuple(changes))


def everything_at_once() -> tuple[nn.Module, sterna.Expert, sterna.Expert]:
    """A model and two experts whose patches take every kind of step: sparse and scattered adds, overwrites, replacements and configuration."""
    live, experts, _ = two_tasks((5, 2))
    live.bert.embeddings.word_embeddings.weight.data = live.bert.embeddings.word_embeddings.weight.data.T.contiguous().T
    live.bert.encoder.layer[0].intermediate.dense.weight.data = live.bert.encoder.layer[0].intermediate.dense.weight.data.T.contiguous().T
    return live, experts[0], experts[1]


STEPS = [(SparseAdd, "apply"), (ScatteredAdd, "apply"), (Overwrite, "apply"), (head.Replace, "apply"), (head.Configure, "apply")]


def test_the_failing_models_patches_take_every_kind_of_step() -> None:
    live, one, two = everything_at_once()
    taken = set()
    for expert in (one, two):
        with sterna.attached(live, expert) as patch:
            taken |= {type(step) for step in patch._now().steps}
    assert taken == {owner for owner, _ in STEPS}


@pytest.mark.parametrize("error", [Broken("here"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=lambda p: getattr(p, "__name__", p))
def test_a_failure_at_any_step_leaves_everything_as_it_was(owner: Any, name: str, when: str, error: BaseException) -> None:
    live, one, two = everything_at_once()
    before, body = state_of(live), anatomy(live)
    for first, second in ((one, two), (two, one)):
        with sterna.attached(live, first):
            on, on_body = state_of(live), anatomy(live)
        reached = 0
        for number in range(20):
            with pytest.MonkeyPatch.context() as monkeypatch:
                calls = fail_at(monkeypatch, owner, name, number, when, error)
                try:
                    patch = sterna.attach(live, first)
                except type(error):
                    reached += 1
                    assert same_state(live, before)
                    assert anatomy(live) == body
                    assert sterna.attached_to(live) is None
                else:
                    assert len(calls) <= number
                    patch.detach()
                    break
        patch = sterna.attach(live, first)
        for number in range(20):
            with pytest.MonkeyPatch.context() as monkeypatch:
                calls = fail_at(monkeypatch, owner, name, number, when, error)
                try:
                    patch.swap(second)
                except type(error):
                    reached += 1
                    assert same_state(live, on)
                    assert [part[:6] for part in anatomy(live)[:-1]] == [part[:6] for part in on_body[:-1]]
                    assert patch.expert is first
                    assert sterna.attached_to(live) is patch
                else:
                    break
        patch.detach()
        assert same_state(live, before)
        assert anatomy(live) == body
    assert reached


@pytest.mark.parametrize("error", [Broken("here"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("owner", [owner for owner, _ in STEPS], ids=lambda owner: owner.__name__)
def test_an_interrupted_undo_is_taken_up_again(owner: Any, when: str, error: BaseException) -> None:
    live, one, two = everything_at_once()
    before, body = state_of(live), anatomy(live)
    reached = 0
    for first, second in ((one, two), (two, one)):
        for number in range(20):
            patch = sterna.attach(live, first)
            on = state_of(live)
            with pytest.MonkeyPatch.context() as monkeypatch:
                fail_at(monkeypatch, owner, "revert", number, when, error)
                try:
                    patch.swap(second)
                except type(error):
                    reached += 1
                    assert same_state(live, on)
                    assert patch.expert is first
            with pytest.MonkeyPatch.context() as monkeypatch:
                fail_at(monkeypatch, owner, "revert", number, when, error)
                try:
                    patch.detach()
                except type(error):
                    reached += 1
            if patch.attached:
                patch.detach()
            elif number:
                assert same_state(live, before)
                break
            assert same_state(live, before)
            assert anatomy(live) == body
    assert reached


@pytest.mark.parametrize("name", ["bert", "convolutions", "gpt2", "one matrix"])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_failure_in_any_block_leaves_everything_as_it_was(name: str, scattered: bool) -> None:
    base = nn.Linear(300, 301) if name == "one matrix" else made(name)
    if scattered:
        for parameter in base.parameters():
            parameter.data = spread(parameter.data)
    before = state_of(base)
    first, second = (sterna.compress(base, tuned(base, seed), density=0.3) for seed in (1, 2))
    with sterna.attached(base, first):
        on = state_of(base)
    blocks = len(second.adds.blocks)
    assert blocks > 4
    for number in range(blocks):
        with pytest.raises(InvalidFile, match="does not decode"):
            sterna.attach(base, damaged(second, number))
        assert same_state(base, before)
    patch = sterna.attach(base, first)
    for number in range(0, blocks, 3):
        with pytest.raises(InvalidFile, match="does not decode"):
            patch.swap(damaged(second, number))
        assert same_state(base, on)
    patch.detach()
    assert same_state(base, before)


def resigned(data: bytearray) -> bytes:
    """The file's bytes with a checksum that fits them."""
    import hashlib

    return bytes(data[:-32]) + hashlib.sha256(data[:-32]).digest()


def test_a_damaged_stream_in_a_file_that_is_signed_again_changes_nothing() -> None:
    base = made("bert")
    before = state_of(base)
    good = sterna.compress(base, tuned(base), density=0.3)
    data = b"".join(bytes(piece) for piece in file_pieces(good))
    end = len(data) - 32
    streams = sum(ternary.stream.size for ternary in good.ternaries)
    patch = sterna.attach(base, good)
    damaged = 0
    for at in range(end - streams, end, 5):
        for value in (0, 255):
            bad = bytearray(data)
            bad[at] = value
            try:
                expert = from_bytes(resigned(bad))
                expert.check()
            except InvalidFile:
                damaged += 1
            else:
                continue
            try:
                expert = from_bytes(resigned(bad))
            except InvalidFile:
                continue
            with pytest.raises(InvalidFile):
                patch.swap(expert)
            assert same_state(base, expected(base, good, before))
            patch.detach()
            with pytest.raises(InvalidFile):
                sterna.attach(base, expert)
            assert same_state(base, before)
            patch = sterna.attach(base, good)
    patch.detach()
    assert same_state(base, before)
    assert damaged > 20


# Others change the weights meanwhile


MEDDLING: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda model: model.bert.pooler.dense.weight.detach().add_(1),
    "one entry": lambda model: model.bert.pooler.dense.weight.detach()[0, 0].fill_(5),
    "load_state_dict": lambda model: model.load_state_dict(state_of(made("bert", seed=3))),
    "load_state_dict, assigned": lambda model: model.load_state_dict(state_of(made("bert", seed=3)), assign=True),
    "a new parameter": lambda model: setattr(model.bert.pooler.dense, "weight", nn.Parameter(torch.ones(16, 16))),
    "a new head": lambda model: setattr(model, "classifier", nn.Linear(16, 4)),
    "a new head's weight": lambda model: setattr(model.classifier, "weight", nn.Parameter(torch.ones(4, 16))),
    "other data": lambda model: setattr(model.bert.pooler.dense.weight, "data", torch.ones(16, 16)),
    "a cast there and back": lambda model: model.half().float(),
    "an optimizer": lambda model: trained(model),
}


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(**inputs_for(model)).logits.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("meddle", MEDDLING.values(), ids=MEDDLING.keys())
def test_weights_changed_meanwhile_are_noticed_and_force_goes_on(meddle: Callable[[nn.Module], object]) -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    patch = sterna.attach(base, expert)
    meddle(base)
    now = state_of(base)
    for undo in (patch.detach, lambda: patch.swap(expert)):
        with pytest.raises(PatchError, match=r"changed under the expert.*force=True"):
            undo()
        assert same_state(base, now)
        assert patch.attached
    patch.detach(force=True)
    assert not patch.attached
    assert sterna.attached_to(base) is None


def test_force_restores_what_was_saved_and_the_rest_is_hashed_again() -> None:
    base = made("bert")
    before = state_of(base)
    expert = sterna.compress(base, tuned(base))
    patch = sterna.attach(base, expert)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(1.0)
    patch.detach(force=True)
    for change in expert.changes:
        if isinstance(change, Add):
            touched = torch.from_numpy(change.levels.levels() != 0)
            now = base.state_dict()[change.name]
            assert torch.equal(now[touched], before[change.name][touched])
            assert torch.equal(now[~touched], (expected(base, expert, before)[change.name] + 1.0)[~touched])
        else:
            assert torch.equal(base.state_dict()[change.name], before[change.name])
    with pytest.raises(WrongBase, match="39 of 39"):
        sterna.attach(base, expert)


def test_a_model_that_left_the_machine_is_noticed() -> None:
    base = made("bert")
    patch = sterna.attach(base, sterna.compress(base, tuned(base)))
    base.to("meta")
    with pytest.raises(PatchError, match="changed under the expert"):
        patch.detach()
    patch.detach(force=True)
    assert sterna.attached_to(base) is None
    assert all(tensor.is_meta for tensor in base.state_dict().values())


MOVES: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "half": (lambda model: model.half(), lambda model: model.float()),
    "bfloat16": (lambda model: model.bfloat16(), lambda model: model.float()),
    "double": (lambda model: model.double(), lambda model: model.float()),
    "channels last": (lambda model: model.to(memory_format=torch.channels_last), lambda model: model.to(memory_format=torch.contiguous_format)),
}


@pytest.mark.parametrize(("there", "back"), MOVES.values(), ids=MOVES.keys())
def test_a_model_that_moved_meanwhile_must_be_moved_back(there: Callable[[nn.Module], object], back: Callable[[nn.Module], object]) -> None:
    """The saved words are those of another dtype or layout: not even force may write them there."""
    base = made("convolutions")
    expert = sterna.compress(base, tuned(base))
    patch = sterna.attach(base, expert)
    there(base)
    now = [(t.dtype, t.device.type, t.stride()) for t in base.state_dict().values()]
    for undo in (patch.detach, lambda: patch.detach(force=True), lambda: patch.swap(expert)):
        with pytest.raises(PatchError, match="move it back"):
            undo()
    assert [(t.dtype, t.device.type, t.stride()) for t in base.state_dict().values()] == now
    assert patch.attached
    back(base)
    patch.detach(force=True)
    assert sterna.attached_to(base) is None


def test_a_lossless_cast_there_and_back_ends_at_the_base_by_force() -> None:
    base = made("bert")
    before = state_of(base)
    expert = sterna.compress(base, tuned(base))
    patch = sterna.attach(base, expert)
    base.double().float()
    patch.detach(force=True)
    assert same_state(base, before)
    sterna.attach(base, expert).detach()
    patch = sterna.attach(base, expert)
    base.half().float()
    patch.detach(force=True)
    with pytest.raises(WrongBase):
        sterna.attach(base, expert)


# Lifetimes and copies


@pytest.mark.parametrize("name", MODELS)
def test_a_patch_does_not_keep_its_model_alive(name: str) -> None:
    base = made(name)
    after = tuned(base)
    if hasattr(after, "config"):
        after.config.id2label = {0: "a", 1: "b"}
    expert = sterna.compress(base, after)
    patch = sterna.attach(base, expert)
    alive = weakref.ref(base)
    del base
    gc.collect()
    assert alive() is None
    with pytest.raises(PatchError, match="gone"):
        patch.swap(expert)
    patch.detach()
    assert not patch.attached


def test_a_patch_that_nobody_holds_stays_on_its_model() -> None:
    base = made("bert")
    before = state_of(base)
    expert = sterna.compress(base, tuned(base))
    sterna.attach(base, expert)
    gc.collect()
    found = sterna.attached_to(base)
    assert found is not None
    assert same_state(base, expected(base, expert, before))
    found.detach()
    assert same_state(base, before)


def test_a_copy_of_a_patched_model_is_a_tuned_model_without_a_patch() -> None:
    base = made("bert")
    before = state_of(base)
    expert = sterna.compress(base, tuned(base))
    with sterna.attached(base, expert):
        twin = copy.deepcopy(base)
        on = state_of(base)
        assert sterna.attached_to(twin) is None
        with pytest.raises(WrongBase):
            sterna.attach(twin, expert)
    assert same_state(base, before)
    assert same_state(twin, on)


def test_a_patched_model_saves_as_the_tuned_model(tmp_path: Path) -> None:
    live, experts, _ = two_tasks()
    with sterna.attached(live, experts[0]):
        live.save_pretrained(tmp_path)
        on, said = state_of(live), answer(live)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert same_state(loaded, on)
    assert torch.equal(answer(loaded), said)
    assert loaded.config.num_labels == 20


# Layouts, devices, modes


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between them in memory."""
    return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor


@pytest.mark.parametrize("dtype", [*DTYPES, F64], ids=str)
@pytest.mark.parametrize("name", ["bert", "convolutions"])
def test_both_ways_to_add_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    small = made(name, dtype if dtype != F64 else F32)
    expert = sterna.compress(small, tuned(small, size=1e-2), density=0.4)
    results = []
    for loose in (False, True):
        base = copy.deepcopy(small).to(dtype)
        if loose:
            for parameter in base.parameters():
                parameter.data = spread(parameter.data)
        before, body = state_of(base), anatomy(base)
        with sterna.attached(base, expert) as patch:
            kinds = {type(step) for step in patch._now().steps}
            assert (ScatteredAdd in kinds, SparseAdd in kinds) == (loose, not loose)
            results.append((state_of(base), patch.swallowed, patch.undo_bytes))
        assert same_state(base, before)
        assert anatomy(base) == body
    (tight, lost, undo), (scattered, *rest) = results
    assert all(torch.equal(tight[n].view(-1), scattered[n].reshape(-1)) for n in tight)
    assert [lost, undo] == rest


@pytest.mark.parametrize("dtype", [*DTYPES, F64], ids=str)
def test_both_ways_to_add_round_alike_at_the_edges(dtype: torch.dtype) -> None:
    """Subnormals, ties between two neighbours, overflow to infinity."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([
        torch.randn(4000, generator=generator) * 10.0 ** torch.randint(-9, 5, (4000,), generator=generator),
        torch.linspace(-1, 1, 2001) * min(info.max, 3e38),
        torch.arange(-500, 500) * info.smallest_normal / 64 if dtype != F64 else torch.zeros(1000),
    ])  # fmt: skip
    base = values.to(dtype)
    for scale in (3e-8, 6e-5, 2.0**-9, 1.0, 40.0, 6e4):
        levels = torch.randint(-1, 2, base.shape, generator=generator).to(torch.int8)
        ternary = ternary_of(levels.numpy(), float(np.float32(scale)))
        wanted = torch.where(levels == 0, base, (base.float() + levels.float() * torch.tensor(ternary.scale, dtype=F32)).to(dtype))
        live = nn.ParameterDict({"tight": base.clone(), "loose": spread(base.clone())}).requires_grad_(False)
        expert = expert_over({"tight": base, "loose": base}, [Add("loose", ternary), Add("tight", ternary)])
        with sterna.attached(live, expert) as patch:
            assert {type(step) for step in patch._now().steps} == {SparseAdd, ScatteredAdd}
            for tensor in live.values():
                assert torch.equal(tensor, wanted)
        for tensor in live.values():
            assert torch.equal(tensor.contiguous().view(torch.uint8), base.view(torch.uint8))


def test_threads_share_the_work_and_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "_THREAD", 500)
    generator = torch.Generator().manual_seed(0)
    base = nn.ModuleDict({str(i): nn.Linear(60, 70) for i in range(9)}).to(BF16)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    before = state_of(base)
    expert = sterna.compress(base, tuned(base, size=0.1), density=0.5)
    for _ in range(5):
        with sterna.attached(base, expert) as patch:
            assert same_state(base, expected(base, expert, before))
            assert patch.swallowed == dense_swallowed(expert, before)
        assert same_state(base, before)


def test_a_failure_in_a_worker_thread_undoes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "_THREAD", 100)
    base = made("bert")
    before = state_of(base)
    expert = sterna.compress(base, tuned(base), density=0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for number in range(0, 36, 3):
            with pytest.raises(InvalidFile, match="does not decode"):
                sterna.attach(base, damaged(expert, number))
            assert same_state(base, before)
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=BF16),
    "another default device": lambda: torch.device("meta"),
    "another default dtype": lambda: default_dtype(F64),
    "deterministic algorithms": lambda: contextlib.nullcontext(torch.use_deterministic_algorithms(True)),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_the_callers_torch_modes_do_not_matter(mode: Callable[[], Any]) -> None:
    live, experts, _ = two_tasks()
    experts.append(mixed(live, experts[0]))
    before, body = state_of(live), anatomy(live)
    wanted = []
    for expert in experts:
        with sterna.attached(live, expert):
            wanted.append(state_of(live))
    live = copy.deepcopy(live)
    body = anatomy(live)
    try:
        with mode():
            patch = sterna.attach(live, experts[0])
            for expert, state in zip([*experts[1:], experts[0]], [*wanted[1:], wanted[0]], strict=True):
                patch.swap(expert)
                assert all(torch.equal(live.state_dict()[name], value) for name, value in state.items())
        assert not any(tensor.is_inference() for tensor in live.state_dict().values())
        with mode():
            patch.detach()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_state(live, before)
    assert anatomy(live) == body


# Autograd


def test_gradients_are_wanted_as_before() -> None:
    live, experts, _ = two_tasks()
    live.bert.embeddings.requires_grad_(False)
    live.classifier.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in live.named_parameters()}
    with sterna.attached(live, experts[0]) as patch:
        assert {name: p.requires_grad for name, p in live.named_parameters()} == wanted
        patch.swap(experts[1])
        assert {name: p.requires_grad for name, p in live.named_parameters()} == wanted
    assert {name: p.requires_grad for name, p in live.named_parameters()} == wanted
    assert all(p.grad_fn is None and p.is_leaf for p in live.parameters())


@pytest.mark.parametrize("loose", [False, True])
def test_a_graph_built_before_cannot_be_walked_after_its_weights_changed(loose: bool) -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base), exclude=["classifier.*"])
    if loose:
        for parameter in base.parameters():
            parameter.data = spread(parameter.data)
    for change in (lambda: sterna.attach(base, expert), lambda: sterna.attached_to(base).detach()):
        loss = base(**inputs_for(base)).logits.sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gradients_flow_through_the_expert_and_through_the_base_after_it() -> None:
    live, experts, _ = two_tasks()
    live.requires_grad_(True)

    def gradients(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs_for(model)).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(live)
    with sterna.attached(live, experts[0]):
        twin = copy.deepcopy(live)
        assert all(torch.equal(a, b) for a, b in zip(gradients(live), gradients(twin), strict=True))
        live.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(gradients(live), plain, strict=True))


# What the patch reports


def dense_swallowed(expert: sterna.Expert, base: Mapping[str, torch.Tensor]) -> float:
    """Share of non-zero updates after which the rounded value is the old one."""
    lost = total = 0
    for change in expert.changes:
        if isinstance(change, Add):
            old = base[change.name]
            levels = torch.from_numpy(change.levels.levels().astype(np.float32))
            new = (old.float() + levels * change.levels.scale).to(old.dtype)
            total += int((levels != 0).sum())
            lost += int(((levels != 0) & (new == old)).sum())
    return lost / total if total else 0.0


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swallowed_updates_are_counted(dtype: torch.dtype, size: float) -> None:
    wide = made("bert")
    expert = sterna.compress(wide, tuned(wide, size=size), density=0.5, alpha=0.5)
    base = copy.deepcopy(wide).to(dtype)
    before = state_of(base)
    with sterna.attached(base, expert, allow_narrower=True) as patch:
        assert patch.swallowed == pytest.approx(dense_swallowed(expert, before), abs=1e-12)
        if (dtype, size) == (BF16, 1e-5):
            assert patch.swallowed > 0.2
    assert same_state(base, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_undo_takes_a_word_an_entry(dtype: torch.dtype) -> None:
    base = made("bert", dtype)
    expert = sterna.compress(base, tuned(base), density=0.25)
    heads = sum(change.value.numel() for change in expert.changes if isinstance(change, Set))
    kept = sum(ternary.count for ternary in expert.ternaries)
    with sterna.attached(base, expert) as patch:
        assert patch.undo_bytes == base.dtype.itemsize * (kept + heads)


def test_an_expert_that_changes_nothing_changes_nothing() -> None:
    base = made("convolutions")
    expert = sterna.compress(base, copy.deepcopy(base), exclude=["classifier.*"])
    before = state_of(base)
    with sterna.attached(base, expert) as patch:
        assert same_state(base, before)
        assert patch.swallowed == patch.undo_bytes == 0


# Readers and swaps


def in_threads(work: Sequence[Callable[[], None]], seconds: float = 60) -> None:
    """Run all at once; an error in one is raised here, and one that does not end is an error too."""
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"


def test_no_reader_sees_half_an_expert() -> None:
    live, experts, _ = two_tasks((5, 2))
    patch = sterna.attach(live, experts[0])
    outputs = []
    for expert in experts:
        patch.swap(expert)
        outputs.append(answer(live))
    stop = threading.Event()
    seen = [0, 0]

    def read() -> None:
        while not stop.is_set():
            with patch.reading():
                which = experts.index(patch.expert)
                found = answer(live)
            assert torch.equal(found, outputs[which])
            seen[which] += 1

    def swap() -> None:
        try:
            for i in range(300):
                reads = sum(seen)
                patch.swap(experts[i % 2])
                while sum(seen) == reads:
                    time.sleep(0)
        finally:
            stop.set()

    in_threads([read, read, read, swap])
    assert min(seen) >= 100
    patch.detach()


def test_reading_inside_reading_does_not_wait_for_a_swap_that_waits() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    patch = sterna.attach(base, expert)
    inside, waiting = threading.Event(), threading.Event()
    order: list[str] = []

    def read() -> None:
        with patch.reading():
            inside.set()
            assert waiting.wait(10)
            with patch.reading(), patch.reading():
                order.append("inner")
            order.append("outer")

    def swap() -> None:
        assert inside.wait(10)
        threading.Timer(0.1, waiting.set).start()
        patch.swap(expert)
        order.append("swapped")

    in_threads([read, swap])
    assert order == ["inner", "outer", "swapped"]
    patch.detach()


def test_a_swap_or_detach_inside_reading_is_refused_in_the_same_thread() -> None:
    base = made("bert")
    expert = sterna.compress(base, tuned(base))
    patch = sterna.attach(base, expert)
    with patch.reading():
        for change in (lambda: patch.swap(expert), patch.detach, lambda: patch.detach(force=True)):
            with pytest.raises(PatchError, match=r"patch\.reading"):
                change()
        with patch.reading():
            pass
        with pytest.raises(PatchError, match=r"patch\.reading"):
            patch.detach()
    patch.detach()


@pytest.mark.parametrize("what", ["detach", "swap"])
def test_writers_wait_for_readers_and_new_readers_for_a_waiting_writer(what: str) -> None:
    base = made("bert")
    experts = [sterna.compress(base, tuned(base, seed)) for seed in (1, 2)]
    patch = sterna.attach(base, experts[0])
    reading, leave = threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with patch.reading():
            reading.set()
            assert leave.wait(10)
            order.append("first reader")

    def write() -> None:
        assert reading.wait(10)
        threading.Timer(0.2, leave.set).start()
        if what == "detach":
            patch.detach()
        else:
            patch.swap(experts[1])
        order.append("writer")

    def second() -> None:
        assert reading.wait(10)
        while not patch._lock._waiting and not leave.is_set():
            pass
        if what == "detach":
            with pytest.raises(PatchError), patch.reading():
                pass
        else:
            with patch.reading():
                assert patch.expert is experts[1]
        order.append("second reader")

    in_threads([first, write, second])
    assert order[0] == "first reader"
    assert set(order[1:]) == {"writer", "second reader"}
    if patch.attached:
        patch.detach()


def test_an_error_in_a_reader_leaves_the_lock_free() -> None:
    base = made("bert")
    patch = sterna.attach(base, sterna.compress(base, tuned(base)))
    with pytest.raises(ZeroDivisionError), patch.reading():
        raise ZeroDivisionError
    in_threads([patch.detach])
    assert not patch.attached


# Rounding


def all_halves() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16)


def many_floats() -> np.ndarray:
    """A million bit patterns of every exponent, the halves' neighbourhoods, the ties between them, and what is special."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 1_000_000, np.uint32)
    halves = np.concatenate([torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(kind).float().numpy() for kind in (F16, BF16)])
    bits = halves.view(np.uint32)
    ties = (bits.astype(np.uint64) + np.uint64(0x1000)).astype(np.uint32), (bits.astype(np.uint64) + np.uint64(0x8000)).astype(np.uint32)
    near = [bits + np.uint32(1), bits - np.uint32(1), *ties, *(t + np.uint32(1) for t in ties), *(t - np.uint32(1) for t in ties)]
    small = rng.integers(0x33000000 - 1000, 0x38800000 + 1000, 200_000, np.uint32)
    edges = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x477FEFFF, 0x477FF000, 0x477FF001, 0x7F7FFFFF, 1], np.uint32)
    return np.concatenate([anything, bits, *near, small, small | np.uint32(0x80000000), edges])


def converted(kernel: Any, values: np.ndarray, out: type) -> np.ndarray:
    from numba import njit

    @njit
    def loop(values, found):
        for i in range(values.size):
            found[i] = kernel(values[i])

    found = np.empty(values.size, out)
    loop(values, found)
    return found


@pytest.mark.parametrize(("kernel", "dtype"), [(kernels.float_to_fp16, F16), (kernels.float_to_bf16, BF16)], ids=["float16", "bfloat16"])
def test_rounding_to_half_precision_is_torchs(kernel: Any, dtype: torch.dtype) -> None:
    bits = many_floats()
    values = bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        found = torch.from_numpy(converted(kernel, values, np.uint16)).view(dtype)
    wanted = torch.from_numpy(values).to(dtype)
    numbers = ~torch.isnan(wanted)
    assert torch.equal(torch.isnan(found), ~numbers)
    assert torch.equal(found[numbers].view(torch.int16), wanted[numbers].view(torch.int16))


@pytest.mark.parametrize(("kernel", "dtype"), [(kernels.fp16_to_float, F16), (kernels.bf16_to_float, BF16)], ids=["float16", "bfloat16"])
def test_widening_all_halves_is_torchs(kernel: Any, dtype: torch.dtype) -> None:
    halves = all_halves()
    wanted = torch.from_numpy(halves).view(dtype).float()
    found = torch.from_numpy(converted(kernel, halves, np.float32))
    numbers = ~torch.isnan(wanted)
    assert torch.equal(torch.isnan(found), ~numbers)
    assert torch.equal(found[numbers].view(torch.int32), wanted[numbers].view(torch.int32))
