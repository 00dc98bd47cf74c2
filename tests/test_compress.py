"""`sterna.compress` against the specification written densely, over dtypes, sources, names and everything else that a tuned model can look like."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import transformers
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import sterna
from models import (
    MODELS,
    bert_classifier,
    bert_config,
    bert_encoder,
    bert_pretraining,
    llama_classifier,
    made,
    noise,
    tuned,
)
from sterna.codings import CHUNK
from sterna.errors import InvalidArgument, InvalidFile, NotFound, PairingError, Unsupported
from sterna.expert.changes import Add, Set

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
State = dict[str, torch.Tensor]


# The specification, section 1, on flat vectors


def reference(base: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], density: float, alpha: float, scope: str) -> dict[str, Any]:
    """{name: (levels, scale)} of methods.md, section 1, steps 1 to 3."""
    tau = {}
    for name in sorted(base):
        narrower = base[name].dtype != after[name].dtype and after[name].dtype != F32
        before = base[name].to(after[name].dtype) if narrower else base[name]
        tau[name] = (after[name].float() - before.float()).detach()
    found = {}
    for names in [[name] for name in tau] if scope == "tensor" else [list(tau)]:
        flat = torch.cat([tau[name].flatten() for name in names])
        wanted = min(int((flat != 0).sum()), math.floor(Decimal(str(density)) * flat.numel()))
        gamma = torch.zeros_like(flat)
        kept = torch.sort(flat.abs(), descending=True, stable=True).indices[:wanted]
        gamma[kept] = flat[kept].sign()
        deviation = float(flat.double().std()) if flat.numel() > 1 else 0.0
        for name, levels in zip(names, gamma.split([tau[n].numel() for n in names]), strict=True):
            found[name] = (levels.reshape(tau[name].shape), float(np.float32(alpha * deviation)))
    return found


def added(expert: sterna.Expert) -> dict[str, Add]:
    return {change.name: change for change in expert.changes if isinstance(change, Add)}


def exact(expert: sterna.Expert) -> dict[str, Set]:
    return {change.name: change for change in expert.changes if isinstance(change, Set)}


def check(
    expert: sterna.Expert, base: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], density: float, alpha: float, scope: str = "global"
) -> None:
    """The expert's ternary tensors are those of the reference over the tensors given (by the base's names), and no others."""
    wanted = reference(base, after, density, alpha, scope)
    found = added(expert)
    assert list(found) == sorted(wanted)
    for name, (levels, scale) in wanted.items():
        np.testing.assert_array_equal(found[name].levels.levels(), levels.numpy(), err_msg=name)
        assert found[name].levels.scale == scale, name
    assert expert.facts.parameters == sum(t.numel() for t in base.values())
    assert expert.facts.scale == (found[min(wanted)].levels.scale if scope == "global" else 0.0)


def some_state(seed: int, dtype: torch.dtype = F32) -> State:
    """Tensors of the shapes that models have, from one entry to several rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (30, 8),
        "block.0.weight": (8, 8),
        "block.0.bias": (8,),
        "block.1.weight": (8, 2, 3, 3),
        "norm.weight": (8,),
        "one": (1,),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def moved(base: Mapping[str, torch.Tensor], dtype: torch.dtype, seed: int = 1, size: float = 0.02) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: (t.float() + noise(t, generator, size)).to(dtype) for name, t in base.items()}


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 1])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("after_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("base_dtype", [F32, F16, BF16], ids=str)
def test_levels_and_scale_are_those_of_the_specification(base_dtype: torch.dtype, after_dtype: torch.dtype, scope: Any, density: float) -> None:
    for alpha in (0.5, 4.0):
        base = some_state(0, base_dtype)
        after = moved(base, after_dtype)
        check(sterna.compress(base, after, density=density, alpha=alpha, scope=scope), base, after, density, alpha, scope)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_dtypes_may_differ_from_tensor_to_tensor(scope: Any) -> None:
    dtypes = [F32, F16, BF16, F32, BF16, F16]
    base = {name: t.to(dtype) for (name, t), dtype in zip(some_state(3).items(), dtypes, strict=True)}
    after = {name: t.to(dtype) for (name, t), dtype in zip(moved(base, F32).items(), reversed(dtypes), strict=True)}
    check(sterna.compress(base, after, density=0.3, scope=scope), base, after, 0.3, 4.0, scope)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.33, 0.7])
def test_ties_run_across_tensors_and_are_cut_by_lowest_index(density: float) -> None:
    base = {name: (t * 64).round() / 64 for name, t in some_state(5).items()}
    after = {name: t + (torch.randn(t.shape, generator=torch.Generator().manual_seed(9)) / 2).round() / 64 for name, t in base.items()}
    check(sterna.compress(base, after, density=density), base, after, density, 4.0)


def test_a_narrower_copy_has_true_zeros() -> None:
    """Without rounding the base first, every entry of a bfloat16 copy would differ."""
    base = some_state(7)
    after = {name: t.to(BF16) for name, t in base.items()}
    after["embed.weight"] = (base["embed.weight"] + 0.05 * torch.eye(30, 8)).to(BF16)
    expert = sterna.compress(base, after, density=1.0)
    assert sum(change.levels.count for change in added(expert).values()) == int((after["embed.weight"] != base["embed.weight"].to(BF16)).sum()) == 8


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_memory_layout_does_not_matter(layout: str) -> None:
    base = some_state(8)
    after = moved(base, F32)
    loose = {
        name: t.T.contiguous().T if layout == "transposed" and t.dim() == 2 else t.repeat_interleave(2, -1)[..., ::2] for name, t in after.items()
    }
    assert not loose["embed.weight"].is_contiguous()
    assert sterna.compress(base, loose).content_digest == sterna.compress(base, after).content_digest


def test_empty_tensors_and_tensors_of_one_entry() -> None:
    base = {"empty.weight": torch.empty(0, 4), "scalar": torch.tensor(2.0), "weight": torch.ones(5, 5)}
    after = {"empty.weight": torch.empty(0, 4), "scalar": torch.tensor(2.5), "weight": torch.ones(5, 5) + torch.eye(5) / 8}
    for scope in ("global", "tensor"):
        check(sterna.compress(base, after, density=0.5, scope=scope), base, after, 0.5, 4.0, scope)


def test_a_tuned_model_that_is_its_base_changes_nothing_and_says_so() -> None:
    said: list[str] = []
    expert = sterna.compress(some_state(0), some_state(0), warn=said.append)
    assert all(change.levels.count == 0 for change in added(expert).values())
    assert any("changes nothing" in message for message in said)


# Exclusion


def test_excluded_tensors_leave_the_vector() -> None:
    base = some_state(0)
    after = moved(base, F32)
    expert = sterna.compress(base, after, exclude=["embed.*", "*.bias"], density=0.2)
    left = [name for name in base if not name.startswith("embed") and not name.endswith("bias")]
    check(expert, {n: base[n] for n in left}, {n: after[n] for n in left}, 0.2, 4.0)
    assert expert.facts.excluded == ("block.0.bias", "embed.weight")
    assert set(expert.fingerprint.names) == set(base)


def test_an_excluded_head_is_not_carried() -> None:
    base, after = made("bert"), tuned(made("bert"))
    assert not exact(sterna.compress(base, after, exclude=["classifier.*"]))
    encoder = bert_encoder()
    encoder.load_state_dict(base.bert.state_dict(), strict=False)
    assert not exact(sterna.compress(encoder, after, exclude=["classifier.*"]))


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names() -> None:
    with pytest.raises(InvalidArgument, match=r"embeds\.weight.*embed\.weight"):
        sterna.compress(some_state(0), moved(some_state(0), F32), exclude=["embeds.weight"])


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(PairingError, match="nothing is left"):
        sterna.compress(some_state(0), moved(some_state(0), F32), exclude=["*"])


# Heads


def test_a_head_that_the_base_lacks_is_exact() -> None:
    after = made("bert")
    base = bert_encoder()
    base.load_state_dict({n: t for n, t in tuned(after, 5).bert.state_dict().items() if not n.startswith("pooler")}, strict=False)
    expert = sterna.compress(base, after)
    head = exact(expert)
    assert {name: change.role for name, change in head.items()} == {"classifier.bias": "head", "classifier.weight": "head"}
    assert torch.equal(head["classifier.weight"].value, after.classifier.weight)
    assert expert.facts.prefixes == ("", "bert.")
    assert expert.facts.architecture == "BertForSequenceClassification"


@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_is_exact_whatever_shape_the_base_has_for_it(labels: int) -> None:
    base = made("bert")
    after = bert_classifier(labels)
    after.bert.load_state_dict(tuned(base).bert.state_dict())
    expert = sterna.compress(base, after)
    assert set(exact(expert)) == {"classifier.bias", "classifier.weight"}
    names = [name for name in base.state_dict() if not name.startswith("classifier")]
    check(expert, {n: base.state_dict()[n] for n in names}, {n: after.state_dict()[n] for n in names}, 0.1, 4.0)


def test_a_score_head_is_exact_and_the_language_head_is_dropped() -> None:
    base = made("llama")
    after = llama_classifier()
    after.model.load_state_dict(tuned(base).model.state_dict())
    expert = sterna.compress(base, after)
    assert set(exact(expert)) == {"score.weight"}
    assert expert.facts.dropped == ("lm_head.weight",)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_language_head_is_an_ordinary_tensor(name: str) -> None:
    base = made(name)
    if name == "t5":
        base.config.tie_word_embeddings = False
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach() + 1)
    expert = sterna.compress(base, tuned(base))
    assert "lm_head.weight" in added(expert)
    assert not exact(expert)


# Buffers


def test_buffers_that_differ_are_exact_and_the_rest_is_left_alone() -> None:
    base = made("convolutions")
    after = tuned(base)
    expert = sterna.compress(base, after)
    buffers = {name: change for name, change in exact(expert).items() if change.role == "buffer"}
    assert set(buffers) == {f"body.{i}.{kind}" for i in (1, 4) for kind in ("num_batches_tracked", "running_mean", "running_var")}
    for name, change in buffers.items():
        assert torch.equal(change.value, after.state_dict()[name])
        assert change.value.dtype == after.state_dict()[name].dtype
    parameters = [name for name, _ in base.named_parameters() if not name.startswith("classifier")]
    check(expert, {n: base.state_dict()[n] for n in parameters}, {n: after.state_dict()[n] for n in parameters}, 0.1, 4.0)


def test_buffers_that_do_not_differ_are_not_carried() -> None:
    base = made("convolutions")
    after = tuned(base)
    for (_, now), (_, before) in zip(after.named_buffers(), base.named_buffers(), strict=True):
        now.copy_(before)
    assert set(exact(sterna.compress(base, after))) == {"classifier.bias", "classifier.weight"}


def test_torchs_buffers_are_told_by_name_where_there_is_no_module(tmp_path: Path) -> None:
    base = made("convolutions")
    after = tuned(base)
    wanted = sterna.compress(base, after).content_digest
    assert sterna.compress(base.state_dict(), after.state_dict()).content_digest == wanted
    for name, model in (("base", base), ("after", after)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    assert sterna.compress(tmp_path / "base.safetensors", tmp_path / "after.safetensors").content_digest == wanted
    assert sterna.compress(base, tmp_path / "after.safetensors").content_digest == wanted


def test_a_modules_own_buffers_are_buffers_whatever_they_are_called() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("gain", torch.ones(4))
            self.register_buffer("scratch", torch.ones(4), persistent=False)

    torch.manual_seed(0)
    base, after = Scaled(), Scaled()
    after.load_state_dict(moved(base.state_dict(), F32))
    expert = sterna.compress(base, after)
    assert set(exact(expert)) == {"gain"}
    assert set(added(expert)) == {"weight", "bias"}


def test_buffers_that_versions_store_or_not_do_not_matter() -> None:
    base = made("bert").state_dict()
    after = tuned(made("bert")).state_dict()
    wanted = sterna.compress(base, after).content_digest
    older = {**after, "bert.embeddings.position_ids": torch.arange(16)[None]}
    assert sterna.compress(base, older).content_digest == wanted
    expert = sterna.compress({**base, "bert.embeddings.position_ids": torch.arange(16)[None]}, after)
    assert expert.content_digest == wanted
    assert expert.facts.dropped == ("bert.embeddings.position_ids",)


# Rows that an embedding gained


@pytest.mark.parametrize("name", ["llama", "llama, tied head", "gpt2"])
def test_gained_rows_are_exact_and_old_rows_ordinary(name: str) -> None:
    base = made(name)
    after = tuned(base)
    after.resize_token_embeddings(44, mean_resizing=False)
    expert = sterna.compress(base, after)
    rows = exact(expert)
    assert rows
    for key, change in rows.items():
        assert change.role == "rows"
        assert change.first_row == 40
        assert torch.equal(change.value, after.state_dict()[key][40:])
    state = dict(base.named_parameters())
    check(expert, state, {n: after.state_dict()[n][: len(t)] for n, t in state.items()}, 0.1, 4.0)
    assert expert.facts.config["vocab_size"] == 44


# Ties


@pytest.mark.parametrize("name", ["llama, tied head", "gpt2", "t5", "shared block"])
def test_shared_tensors_count_once(name: str, tmp_path: Path) -> None:
    base = made(name)
    after = tuned(base)
    expert = sterna.compress(base, after)
    unique = dict(base.named_parameters())
    assert expert.facts.parameters == sum(parameter.numel() for parameter in unique.values())
    assert len(expert.fingerprint.names) == len(unique)
    check(expert, {n: base.state_dict()[n] for n in added(expert)}, {n: after.state_dict()[n] for n in added(expert)}, 0.1, 4.0)
    for model, file in ((base, "base"), (after, "after")):
        save_model(model, str(tmp_path / f"{file}.safetensors"))
    assert sterna.compress(tmp_path / "base.safetensors", tmp_path / "after.safetensors").facts.parameters == expert.facts.parameters


def test_a_file_that_stores_a_tied_tensor_twice_counts_it_once(tmp_path: Path) -> None:
    for seed, name in ((0, "base"), (1, "after")):
        model = made("llama, tied head") if seed == 0 else tuned(made("llama, tied head"))
        save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
    expert = sterna.compress(tmp_path / "base.safetensors", tmp_path / "after.safetensors")
    assert "lm_head.weight" in added(expert)  # the first of the sorted names
    assert "model.embed_tokens.weight" not in added(expert)
    assert expert.facts.parameters == sum(p.numel() for p in made("llama, tied head").parameters())
    assert expert.facts.dropped == ()


def test_tied_tensors_meet_under_whatever_name_either_side_keeps(tmp_path: Path) -> None:
    """save_pretrained keeps embed_tokens, a sorted state dict keeps lm_head: the levels are the same ones."""
    for name in ("llama, tied head", "gpt2", "t5"):
        base, after = made(name), tuned(made(name))
        base.save_pretrained(tmp_path / name / "base")
        after.save_pretrained(tmp_path / name / "after")
        for ours in (base, tmp_path / name / "base", base.state_dict()):
            experts = [sterna.compress(ours, theirs) for theirs in (after, tmp_path / name / "after", after.state_dict())]
            assert len({expert.content_digest for expert in experts}) == 1
            assert all(not exact(expert) and not expert.facts.dropped for expert in experts)
            assert experts[0].facts.parameters == sum(p.numel() for p in base.parameters())
        digests = {sterna.compress(ours, after).content_digest for ours in (base, tmp_path / name / "base")}
        assert len(digests) == 1


@pytest.mark.parametrize("source", ["module", "folder", "state dict"])
@pytest.mark.parametrize("name", ["llama, tied head", "gpt2", "t5"])
def test_a_tuned_model_that_unties_has_its_copy_kept_exact_with_a_warning(name: str, source: str, tmp_path: Path) -> None:
    base = made(name)
    after = tuned(base)
    after.config.tie_word_embeddings = False
    after.lm_head.weight = nn.Parameter(after.lm_head.weight.detach() + 0.01)
    base.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "after")
    said: list[str] = []
    ours: Any = {"module": base, "folder": tmp_path / "base", "state dict": load_file(tmp_path / "base" / "model.safetensors")}[source]
    theirs: Any = {"module": after, "folder": tmp_path / "after", "state dict": after.state_dict()}[source]
    expert = sterna.compress(ours, theirs, warn=said.append)
    assert {n: c.role for n, c in exact(expert).items()} == {"lm_head.weight": "untied"}
    assert torch.equal(exact(expert)["lm_head.weight"].value, after.lm_head.weight)
    assert any("lm_head.weight" in message and "tied" in message for message in said)
    assert expert.facts.parameters == sum(p.numel() for p in base.parameters())


def test_an_untied_copy_inside_a_layer_is_untied_too(tmp_path: Path) -> None:
    """BertForPreTraining ties its decoder inside cls.predictions, among tensors that both have."""
    torch.manual_seed(0)
    base = bert_pretraining()
    after = tuned(base)
    after.cls.predictions.decoder.weight = nn.Parameter(after.cls.predictions.decoder.weight.detach() + 0.01)
    expert = sterna.compress(base, after)
    assert {n: c.role for n, c in exact(expert).items()} == {"cls.predictions.decoder.weight": "untied"}


def test_a_tuned_model_that_ties_what_the_base_holds_apart_moves_both() -> None:
    base = made("llama")
    after = tuned(base)
    after.lm_head.weight = after.model.embed_tokens.weight
    expert = sterna.compress(base, after, force=True)
    state = dict(base.named_parameters())
    check(expert, state, {n: after.state_dict()[n] for n in state}, 0.1, 4.0)


def test_one_block_that_stands_in_twelve_layers(tmp_path: Path) -> None:
    base = made("shared block")
    expert = sterna.compress(base, tuned(base))
    assert [name for name in added(expert) if name.startswith("layers")] == [f"layers.0.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]


# Names


def forms(model: nn.Module, folder: Path) -> dict[str, Any]:
    """One model as everything that `compress` takes."""
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(folder / "folder")
    model.save_pretrained(folder / "shards", max_shard_size="5KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    save_file(load_file(folder / "folder" / "model.safetensors"), folder / "alone.safetensors")
    return {
        "module": model,
        "state dict": load_file(folder / "folder" / "model.safetensors"),
        "folder": folder / "folder",
        "folder as text": str(folder / "folder"),
        "file": folder / "folder" / "model.safetensors",
        "file alone": folder / "alone.safetensors",
        "shards": folder / "shards",
        "DataParallel": nn.DataParallel(model),
        "compiled": torch.compile(model),
        "wrapped": nn.ModuleDict({"module": model}),
    }


@pytest.mark.parametrize("name", ["bert", "llama, tied head", "llama", "gpt2", "vit", "t5"])
def test_every_source_gives_the_same_content(name: str, tmp_path: Path) -> None:
    base, after = made(name), tuned(made(name))
    wanted = sterna.compress(base, after)
    ours, theirs = forms(base, tmp_path / "base"), forms(after, tmp_path / "after")
    for form in ours:
        assert sterna.compress(base, theirs[form]).content_digest == wanted.content_digest, form
        if form == "wrapped":  # other names of the base, so another fingerprint and other names in the expert
            assert {n.removeprefix("module.") for n in added(sterna.compress(ours[form], theirs[form]))} == set(added(wanted))
        else:
            assert sterna.compress(ours[form], theirs[form]).content_digest == wanted.content_digest, form


def test_a_class_that_names_its_tensors_otherwise_in_memory_meets_its_files(tmp_path: Path) -> None:
    base, after = made("vit"), tuned(made("vit"))
    base.save_pretrained(tmp_path)
    if set(load_file(tmp_path / "model.safetensors")) != set(base.state_dict()):  # transformers 5 renames these
        assert sterna.compress(tmp_path, after).content_digest == sterna.compress(base, after).content_digest
        assert set(added(sterna.compress(base, after))) <= set(load_file(tmp_path / "model.safetensors"))


def same_levels(one: sterna.Expert, two: sterna.Expert, rename: Callable[[str], str]) -> bool:
    ones, twos = added(one), added(two)
    return {rename(name) for name in ones} == set(twos) and all(
        np.array_equal(change.levels.levels(), twos[rename(name)].levels.levels()) and change.levels.scale == twos[rename(name)].levels.scale
        for name, change in ones.items()
    )


@pytest.mark.parametrize("form", ["module", "state dict"])
def test_a_bare_encoder_and_its_classifier_meet_both_ways(form: str) -> None:
    large = made("bert")
    small = bert_encoder()
    small.load_state_dict(large.bert.state_dict())
    large_after, small_after = tuned(large), tuned(large).bert
    pick: Callable[[Any], Any] = (lambda model: model) if form == "module" else (lambda model: model.state_dict())
    bare = sterna.compress(pick(small), pick(small_after))
    up = sterna.compress(pick(small), pick(large_after))
    assert up.facts.prefixes == ("", "bert.")
    assert set(exact(up)) == {"classifier.bias", "classifier.weight"}
    assert same_levels(up, bare, lambda name: name)
    down = sterna.compress(pick(large), pick(small_after))
    assert down.facts.prefixes == ("bert.", "")
    assert down.facts.dropped == ("classifier.bias", "classifier.weight")
    assert same_levels(down, bare, lambda name: name.removeprefix("bert."))


def test_a_bare_decoder_and_its_causal_model_meet_both_ways() -> None:
    large = made("llama, tied head")
    after = tuned(large)
    small = sterna.compress(large.model, after.model)
    assert same_levels(sterna.compress(large.model, after), small, lambda name: name)
    assert same_levels(sterna.compress(large, after.model), small, lambda name: name.removeprefix("model."))


def test_a_prefix_two_deep() -> None:
    base = made("bert")
    deep = nn.ModuleDict({"trainer": nn.ModuleDict({"backbone": tuned(base)})})
    assert sterna.compress(base, deep).content_digest == sterna.compress(base, tuned(base)).content_digest


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "base_model.model."])
def test_wrappers_around_either_side(wrapper: str) -> None:
    base, after = made("bert").state_dict(), tuned(made("bert")).state_dict()
    wanted = sterna.compress(base, after)
    assert sterna.compress(base, {wrapper + n: t for n, t in after.items()}).content_digest == wanted.content_digest
    assert same_levels(sterna.compress({wrapper + n: t for n, t in base.items()}, after), wanted, lambda name: name.removeprefix(wrapper))


@pytest.mark.parametrize("inner", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_inside(inner: str) -> None:
    base, after = made("bert").state_dict(), tuned(made("bert")).state_dict()
    inside = {re.sub(r"(layer\.\d\.)", rf"\1{inner}", n): t for n, t in after.items()}
    assert sterna.compress(base, inside).content_digest == sterna.compress(base, after).content_digest


def legacy(state: Mapping[str, torch.Tensor]) -> State:
    return {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in state.items()}


def test_legacy_norm_names_on_either_side() -> None:
    base, after = made("bert").state_dict(), tuned(made("bert")).state_dict()
    wanted = sterna.compress(base, after)
    assert sterna.compress(base, legacy(after)).content_digest == wanted.content_digest
    old = sterna.compress(legacy(base), after)
    assert any(name.endswith("LayerNorm.gamma") for name in added(old))
    renamed = {"gamma": "weight", "beta": "bias"}
    assert {re.sub("(gamma|beta)$", lambda m: renamed[m[0]], name) for name in added(old)} == set(added(wanted))
    assert sum(c.levels.count for c in added(old).values()) == sum(c.levels.count for c in added(wanted).values())


# What is not there on the other side


def test_a_dropped_pretraining_head_and_pooler_are_listed() -> None:
    torch.manual_seed(0)
    base = bert_pretraining()
    after = transformers.BertModel(bert_config(), add_pooling_layer=False)
    after.load_state_dict(tuned(base).bert.state_dict(), strict=False)
    expert = sterna.compress(base, after)
    kept = set(after.state_dict())
    assert set(expert.facts.dropped) == {n for n in dict(base.named_parameters()) if n.removeprefix("bert.") not in kept}
    assert {n.removeprefix("bert.") for n in added(expert)} == kept


def without(state: Mapping[str, torch.Tensor], *parts: str) -> State:
    return {name: t for name, t in state.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    "part", ["layer.1.attention.self.query.weight", "layer.0.intermediate.dense", "layer.1.output.LayerNorm", "encoder.layer.1."]
)
def test_a_tensor_missing_inside_a_layer_is_an_error_with_both_lists(part: str) -> None:
    base, after = made("bert").state_dict(), tuned(made("bert")).state_dict()
    with pytest.raises(PairingError) as lost:
        sterna.compress(base, without(after, part))
    assert part in str(lost.value)
    assert re.search(r"only in the base: .+; only in the tuned model: none", str(lost.value))
    with pytest.raises(PairingError) as gained:
        sterna.compress(without(base, part), after)
    assert part in str(gained.value)
    assert re.search(r"only in the base: none; only in the tuned model: .+", str(gained.value))


def test_two_families_have_nothing_in_common() -> None:
    with pytest.raises(PairingError, match="no tensor of the two models agrees"):
        sterna.compress(made("bert"), made("gpt2"))


def test_two_sizes_of_one_family_are_two_models() -> None:
    wide = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(PairingError, match=r"two models, not a base|no tensor of the two models agrees"):
        sterna.compress(made("bert"), wide)


def test_strangers_are_refused_and_force_goes_on() -> None:
    said: list[str] = []
    base, stranger = some_state(0), some_state(1)
    with pytest.raises(PairingError, match=r"1\.\d+ times as large as the base.*force"):
        sterna.compress(base, stranger)
    check(sterna.compress(base, stranger, force=True, warn=said.append), base, stranger, 0.1, 4.0)
    assert any("times as large" in message for message in said)


@pytest.mark.parametrize(("size", "refused"), [(0.499, False), (0.501, True)])
def test_strangers_begin_at_half_the_base(size: float, refused: bool) -> None:
    base = {"a.weight": torch.full((10, 10), 2.0), "b.weight": torch.full((5, 5), -2.0)}
    after = {name: t * (1 + size) for name, t in base.items()}
    if refused:
        with pytest.raises(PairingError):
            sterna.compress(base, after)
    else:
        sterna.compress(base, after)


def test_over_a_base_of_zeros_everything_is_strange() -> None:
    with pytest.raises(PairingError, match="inf times"):
        sterna.compress({"a.weight": torch.zeros(4, 4)}, {"a.weight": torch.ones(4, 4)})


# Labels, configuration


def test_a_label_is_never_a_path(tmp_path: Path) -> None:
    secret = tmp_path / "home of somebody" / "my model"
    base, after = made("bert"), tuned(made("bert"))
    base.save_pretrained(secret / "base")
    after.save_pretrained(secret / "after")
    loaded = transformers.BertForSequenceClassification.from_pretrained(secret / "base")
    hub = copy.deepcopy(base)
    hub.config._name_or_path = "some-org/some-model"
    labels = {
        "base": [secret / "base", str(secret / "base") + "/", secret / "base" / "model.safetensors", loaded],
        "some-org/some-model": [hub],
        "BertForSequenceClassification": [base],
        "state dict": [base.state_dict()],
    }
    for label, sources in labels.items():
        for source in sources:
            expert = sterna.compress(source, secret / "after")
            assert expert.facts.base.name == label
            expert.save(tmp_path / "expert.safetensors")
            written = (tmp_path / "expert.safetensors").read_bytes()
            for part in ("home of somebody", "my model", str(tmp_path)):
                assert part.encode() not in written


def test_a_snapshot_in_the_hubs_cache_keeps_its_id_and_commit(tmp_path: Path) -> None:
    base = made("bert")
    commit = "0123456789abcdef0123456789abcdef01234567"
    base.save_pretrained(tmp_path / "models--some-org--some-model" / "snapshots" / commit)
    expert = sterna.compress(tmp_path / "models--some-org--some-model" / "snapshots" / commit, tuned(base))
    assert (expert.facts.base.name, expert.facts.base.revision) == ("some-org/some-model", commit)


@pytest.mark.parametrize("form", ["module", "folder"])
def test_changed_fields_of_the_configuration_are_carried(form: str, tmp_path: Path) -> None:
    base = made("bert")
    after = bert_classifier(5)
    after.bert.load_state_dict(tuned(base).bert.state_dict())
    after.config.id2label = {i: f"topic {i}" for i in range(5)}
    after.config.label2id = {f"topic {i}": i for i in range(5)}
    after.config.problem_type = "single_label_classification"
    after.config.hidden_dropout_prob = 0.25
    base.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "after")
    expert = sterna.compress(base, after) if form == "module" else sterna.compress(tmp_path / "base", tmp_path / "after")
    assert expert.facts.config == {
        "id2label": {str(i): f"topic {i}" for i in range(5)},
        "problem_type": "single_label_classification",
        "hidden_dropout_prob": 0.25,
    }
    assert expert.facts.architecture == "BertForSequenceClassification"


def test_tokens_that_the_tuned_tokenizer_gained_are_carried(tmp_path: Path) -> None:
    base, after = made("bert"), tuned(made("bert"))
    token = {"id": 40, "content": "<new>", "special": True}
    known = {"id": 0, "content": "[PAD]", "special": True}
    for model, name, tokens in ((base, "base", [known]), (after, "after", [known, token])):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert sterna.compress(tmp_path / "base", tmp_path / "after").facts.tokens == (token,)


def test_metadata_is_carried_and_does_not_count_as_content(tmp_path: Path) -> None:
    base, after = some_state(0), moved(some_state(0), F32)
    plain = sterna.compress(base, after)
    told = sterna.compress(base, after, metadata={"task": "legal", "score": 0.7})
    assert told.content_digest == plain.content_digest
    assert told.digest != plain.digest
    told.save(tmp_path / "expert.safetensors")
    assert sterna.load(tmp_path / "expert.safetensors").facts.metadata == {"task": "legal", "score": 0.7}


# Bad input


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan, math.inf])
def test_a_density_out_of_range(density: float) -> None:
    with pytest.raises(InvalidArgument, match="density"):
        sterna.compress(some_state(0), some_state(0), density=density)


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf, 1e6])
def test_an_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(InvalidArgument, match="alpha"):
        sterna.compress(some_state(0), some_state(0), alpha=alpha)


def test_an_unknown_scope_or_coding() -> None:
    with pytest.raises(InvalidArgument, match="scope"):
        sterna.compress(some_state(0), some_state(0), scope="layer")
    with pytest.raises(InvalidArgument, match="rice"):
        sterna.compress(some_state(0), some_state(0), coding="morse")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_weights_that_are_not_finite_are_refused_by_name(side: str, value: float, dtype: torch.dtype) -> None:
    base = some_state(0, dtype)
    after = moved(base, dtype)
    (base if side == "base" else after)["block.1.weight"][1, 1, 1, 1] = value
    with pytest.raises(InvalidArgument, match=r"block\.1\.weight.*NaN or infinity"):
        sterna.compress(base, after)


@pytest.mark.parametrize("where", ["folder", "file"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_refused_with_the_way_to_convert_them(name: str, where: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04 never opened")
    with pytest.raises(Unsupported, match=r"pickled.*save_pretrained"):
        sterna.compress(tmp_path if where == "folder" else tmp_path / name, some_state(0))
    with pytest.raises(Unsupported, match=r"pickled.*save_pretrained"):
        sterna.compress(some_state(0), tmp_path if where == "folder" else tmp_path / name)


def broken_folders(folder: Path) -> Iterator[tuple[str, Path, type[Exception], str]]:
    made("bert").save_pretrained(folder / "sharded", max_shard_size="10KB")
    made("bert").save_pretrained(folder / "whole")

    def copied(name: str, of: str = "sharded") -> Path:
        target = folder / name
        target.mkdir()
        for file in (folder / of).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    lost = copied("lost shard")
    sorted(lost.glob("*.safetensors"))[1].unlink()
    yield "a shard is gone", lost, NotFound, "does not exist"
    for name, target in (("outside", "../whole/model.safetensors"), ("absolute", str(folder / "whole" / "model.safetensors"))):
        outside = copied(name)
        index = json.loads((outside / "model.safetensors.index.json").read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], target)
        (outside / "model.safetensors.index.json").write_text(json.dumps(index))
        yield f"a shard is {name}", outside, InvalidFile, "same folder"
    liar = copied("liar")
    index = json.loads((liar / "model.safetensors.index.json").read_text())
    index["weight_map"]["made.up"] = next(iter(index["weight_map"].values()))
    (liar / "model.safetensors.index.json").write_text(json.dumps(index))
    yield "the index lies", liar, InvalidFile, "made.up"
    for name, text in (("no json", "{"), ("a list", "[]"), ("empty", "{}")):
        bad = copied(f"index {name}")
        (bad / "model.safetensors.index.json").write_text(text)
        yield f"the index is {name}", bad, InvalidFile, "index.json"
    short = copied("short", "whole")
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-100])
    yield "the file is cut short", short, InvalidFile, "not a whole safetensors file"
    (folder / "empty").mkdir()
    yield "nothing is there", folder / "empty", NotFound, "no safetensors weights; found nothing"
    (folder / "run").mkdir()
    (folder / "whole").rename(folder / "run" / "trained")
    yield "the model lies one folder deeper", folder / "run", NotFound, "no safetensors weights; some lie in .*trained"
    (folder / "run" / "trained").rename(folder / "whole")
    (folder / "published").mkdir()
    sterna.compress(made("bert"), tuned(made("bert"))).save(folder / "published" / "expert.safetensors")
    yield "an expert in a folder", folder / "published", InvalidArgument, r"expert\.safetensors is an expert; expected a checkpoint"
    many = copied("many")
    (many / "model.safetensors.index.json").unlink()
    yield "the index is gone", many, InvalidFile, "no index"
    yield "the path leads nowhere", folder / "nowhere", NotFound, "neither a file, a folder nor a hub id"
    quantized = copied("quantized", "whole")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    yield "the configuration says quantized", quantized, Unsupported, "quantized"


def test_broken_folders_are_refused_each_with_its_own_error(tmp_path: Path) -> None:
    good = tuned(made("bert"))
    for what, folder, error, words in broken_folders(tmp_path):
        for sources in ((folder, good), (good, folder)):
            with pytest.raises(error, match=words):
                sterna.compress(*sources)
        assert what


def test_a_whole_file_goes_before_an_index_that_was_left_behind(tmp_path: Path) -> None:
    old, new = made("bert"), tuned(made("bert"), 3)
    old.save_pretrained(tmp_path, max_shard_size="10KB")
    save_file(new.state_dict(), tmp_path / "model.safetensors")
    assert sterna.compress(old, tmp_path).content_digest == sterna.compress(old, new).content_digest


def test_tensors_without_plain_values_are_refused() -> None:
    base = some_state(0)
    meta = {**base, "embed.weight": torch.empty(30, 8, device="meta")}
    eighth = {**base, "embed.weight": base["embed.weight"].to(torch.float8_e4m3fn)}
    complex_ = {**base, "embed.weight": base["embed.weight"].to(torch.complex64)}
    sparse = {**base, "embed.weight": base["embed.weight"].to_sparse()}
    double = {**base, "embed.weight": base["embed.weight"].double()}
    for state, words in ((meta, "meta"), (eighth, "quantized"), (complex_, "dense real"), (sparse, "dense real"), (double, "float64")):
        for sources in ((state, base), (base, state)):
            with pytest.raises(Unsupported, match=rf"embed\.weight.*{words}"):
                sterna.compress(*sources)


def test_a_sharded_tensor_is_refused(tmp_path: Path) -> None:
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        base = some_state(0)
        with pytest.raises(Unsupported, match=r"embed\.weight.*DTensor.*gather"):
            sterna.compress({**base, "embed.weight": distribute_tensor(base["embed.weight"], mesh)}, base)
    finally:
        torch.distributed.destroy_process_group()


def test_unmerged_adapters_are_refused() -> None:
    base = made("bert").state_dict()
    unmerged = {**base, "bert.encoder.layer.0.attention.self.query.lora_A.default.weight": torch.ones(2, 16)}
    with pytest.raises(Unsupported, match="adapter"):
        sterna.compress(base, unmerged)


def test_a_state_dict_must_map_names_to_tensors() -> None:
    with pytest.raises(InvalidArgument, match="optimizer"):
        sterna.compress(some_state(0), {"optimizer": {"lr": 1}})


# Determinism


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_file_has_the_same_bytes_for_any_number_of_threads(scope: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in {"long": (1500, 1500), "b": (700, 300), "c": (9,)}.items()}
    after = {
        name: (t + noise(t, generator, 0.02) * (1 + 4 * (torch.arange(t.numel()).reshape(t.shape) % 97 == 0))).to(BF16) for name, t in base.items()
    }
    files = set()
    before = torch.get_num_threads()
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        sterna.compress(base, after, scope=scope).save(tmp_path / "expert.safetensors")
        files.add((tmp_path / "expert.safetensors").read_bytes())
    torch.set_num_threads(before)
    assert len(files) == 1


def test_sources_are_left_as_they_were() -> None:
    base, after = made("convolutions"), tuned(made("convolutions"))
    states = [copy.deepcopy(model.state_dict()) for model in (base, after)]
    versions = [[t._version for t in model.state_dict(keep_vars=True).values()] for model in (base, after)]
    sterna.compress(base, after)
    for model, state, version in zip((base, after), states, versions, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert [t._version for t in model.state_dict(keep_vars=True).values()] == version


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_saved_expert_loads_as_it_was(name: str, tmp_path: Path) -> None:
    expert = sterna.compress(made(name), tuned(made(name)))
    expert.save(tmp_path / "expert.safetensors")
    loaded = sterna.load(tmp_path / "expert.safetensors")
    assert loaded.content_digest == expert.content_digest
    assert loaded.digest == expert.digest
    assert loaded.facts == expert.facts
    assert loaded.fingerprint == expert.fingerprint


# Memory

MEASURED = """
import gc, json, sys, threading, time
import torch, sterna

base, tuned, expert, threads = sys.argv[1:]
torch.set_num_threads(int(threads))

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

small = {"weight": torch.arange(9.0).reshape(3, 3)}
sterna.compress(small, {"weight": small["weight"] + torch.eye(3) / 8}, force=True)  # what is imported and compiled on first use
gc.collect()
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
made = sterna.compress(base, tuned)
seconds = time.perf_counter() - started
made.save(expert)
done.set()
watcher.join()
print(json.dumps({"above": peak - before, "parameters": made.facts.parameters, "kept": sum(t.count for t in made.ternaries), "seconds": seconds}))
"""


def write_checkpoints(folder: Path, tensors: int, shape: tuple[int, int], shards: int, dtype: str = "F32") -> int:
    """A base and its fine-tune, written as one block of random bytes over and over; returns the bytes of one of them."""
    rows, columns = shape
    item = {"F32": np.float32, "F16": np.float16}[dtype]
    normal = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    block = {"base": normal, "tuned": normal + np.random.default_rng(1).standard_normal(1 << 20, np.float32) * np.abs(normal) / 16}
    size = rows * columns * np.dtype(item).itemsize
    for side, values in block.items():
        (folder / side).mkdir()
        data = values.astype(item).tobytes()
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard}.safetensors"
            names = [f"layers.{i}.weight" for i in range(tensors) if i % shards == shard]
            weight_map.update(dict.fromkeys(names, file))
            entries = {n: {"dtype": dtype, "shape": list(shape), "data_offsets": [i * size, (i + 1) * size]} for i, n in enumerate(names)}
            header = json.dumps(entries).encode()
            with open(folder / side / file, "wb") as out:
                out.write(len(header).to_bytes(8, "little") + header)
                left = size * len(names)
                while left > 0:
                    left -= out.write(data[:left])
        (folder / side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return size * tensors


def measured(folder: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURED, str(folder / "base"), str(folder / "tuned"), str(folder / "expert.safetensors"), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_memory_does_not_hold_the_task_vector(tmp_path: Path) -> None:
    """240 MB of float32 in three shards: a task vector held whole, or a side read whole, would show."""
    size = write_checkpoints(tmp_path, tensors=6, shape=(5000, 2000), shards=3)
    found = measured(tmp_path, 2)
    assert found["parameters"] == size // 4
    assert found["kept"] == size // 40
    assert found["above"] < 120e6 < size / 1.9, found


def test_memory_does_not_hold_a_wide_copy_of_a_narrow_tensor(tmp_path: Path) -> None:
    """One float16 tensor of 120 MB, 240 MB as float32."""
    size = write_checkpoints(tmp_path, tensors=1, shape=(30_000, 2000), shards=1, dtype="F16")
    assert measured(tmp_path, 1)["above"] < 100e6 < size


@pytest.mark.slow
def test_memory_stays_under_a_gigabyte_and_a_row_block(tmp_path: Path) -> None:
    """1.9 GB of float32 in six shards on either side."""
    size = write_checkpoints(tmp_path, tensors=30, shape=(4000, 4000), shards=6)
    found = measured(tmp_path, 2)
    assert size > 1.9e9
    assert found["above"] < (1 << 30) + 4 * CHUNK
