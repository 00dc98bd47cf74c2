"""PEFT folders read without PEFT: the merged weights equal PEFT's own for every kind of module, and what is not plain is refused by its field."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sterna.errors import InvalidArgument, InvalidFile, NotFound, PairingError, SternaError, Unsupported
from sterna.sources.adapter import (
    Adapter,
    adapter_tensors,
    is_adapter,
    is_feedforward,
    part_names,
    read_adapter,
    stored_transposed,
    write_adapter,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


# Tiny models


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )
    config.tie_word_embeddings = tied
    return transformers.LlamaForCausalLM(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(6, 6, 3)
        self.point = nn.Conv2d(6, 5, 1)
        self.three = nn.Conv3d(2, 4, 3)
        self.head = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def lora(*targets: str, **fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets)} | fields)


def ia3(*targets: str, feedforward: Any = (), **fields: Any) -> Any:
    sides = feedforward if isinstance(feedforward, str) else list(feedforward)
    return peft.IA3Config(target_modules=list(targets), feedforward_modules=sides, **fields)


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    config: Callable[[], Any]
    changed: int
    saved: int = 0
    beside: int = 0
    keep_embeddings: bool | str = "auto"


CASES = {
    "lora": Case(bert, lambda: lora("query", "value"), 4),
    "lora, task head": Case(bert, lambda: lora("query", "dense", task_type="SEQ_CLS"), 9, saved=2),
    "lora, everything linear": Case(llama, lambda: lora(target_modules="all-linear", task_type="CAUSAL_LM"), 14),
    "rslora": Case(llama, lambda: lora("q_proj", "down_proj", use_rslora=True, task_type="CAUSAL_LM"), 4),
    "patterns": Case(
        bert,
        lambda: lora(
            "query",
            "key",
            "output.dense",
            rank_pattern={"1.attention.self.key": 5, r"layer\.1\.attention.*": 3, "query": 2},
            alpha_pattern={r"^bert\.encoder\.layer\.0\..*": 7, "ey": 5, "key": 2},
        ),
        8,
    ),
    "patterns and rslora": Case(llama, lambda: lora("q_proj", "o_proj", use_rslora=True, rank_pattern={"o_proj": 2}, alpha_pattern={"1.*": 3}), 4),
    "Conv1D": Case(gpt2, lambda: lora("c_attn", "c_proj", "c_fc", task_type="CAUSAL_LM"), 8),
    "Conv1D, flag set": Case(gpt2, lambda: lora("c_attn", "c_proj", fan_in_fan_out=True), 6),
    "Conv1D, square ones only": Case(gpt2, lambda: lora("attn.c_proj"), 2),
    "Conv1D and the head": Case(gpt2, lambda: lora("c_attn", "c_proj", "lm_head"), 7, beside=1),
    "embedding": Case(bert, lambda: lora("word_embeddings", "position_embeddings", "query"), 4),  # the positions are square
    "embedding and head": Case(llama, lambda: lora("embed_tokens", "lm_head", "q_proj"), 4, beside=2),
    "embedding of a tied model": Case(lambda: llama(tied=True), lambda: lora("embed_tokens", "q_proj"), 3, beside=1),
    "embedding in Conv1D": Case(gpt2, lambda: lora("wte", "wpe", "c_attn"), 4),
    "embeddings on request": Case(llama, lambda: lora("q_proj"), 2, beside=2, keep_embeddings=True),
    "modules to save": Case(llama, lambda: lora("q_proj", modules_to_save=["embed_tokens", "norm"]), 2, saved=6),  # the layers' norms end alike
    "convolutions": Case(Convolutions, lambda: lora("one", "two", "point", modules_to_save=["head"]), 3, saved=7),
    "convolution in three dimensions": Case(Convolutions, lambda: lora("three", use_rslora=True), 1),
    "a harmless init": Case(bert, lambda: lora("query", init_lora_weights="orthogonal"), 2),
    "minor components": Case(bert, lambda: lora("query", init_lora_weights="mica"), 2),
    "ia3": Case(bert, lambda: ia3("key", "value"), 4),
    "ia3, feed-forward": Case(bert, lambda: ia3("key", "output.dense", feedforward=["output.dense"], task_type="SEQ_CLS"), 6, saved=2),
    "ia3, feed-forward by its end": Case(llama, lambda: ia3("k_proj", "v_proj", "down_proj", feedforward=["down_proj"]), 6),
    "ia3, feed-forward by a pattern": Case(bert, lambda: ia3("key", "output.dense", feedforward=r"bert\.encoder\.layer\.1\..*dense"), 6),
    "ia3, PEFT's targets": Case(llama, lambda: peft.IA3Config(task_type="CAUSAL_LM"), 6),
    "ia3, Conv1D": Case(gpt2, lambda: peft.IA3Config(task_type="CAUSAL_LM"), 4),
    "ia3, Conv1D, square ones": Case(gpt2, lambda: ia3("c_proj", "c_attn", feedforward=["c_proj"]), 6),
    "ia3, convolutions": Case(Convolutions, lambda: ia3("two", "point", "three", feedforward=["point"]), 3),
    "ia3, module to save": Case(Convolutions, lambda: ia3("two", modules_to_save=["head.0"]), 1, saved=2),
}


def quiet(work: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)


@dataclass(frozen=True)
class Tuned:
    """A folder that PEFT saved, the base it was made on, and the weights that PEFT merges from the two."""

    case: Case
    folder: Path
    base: nn.Module
    merged: dict[str, torch.Tensor]

    def from_pretrained(self, folder: Path) -> dict[str, torch.Tensor]:
        return quiet(lambda: peft.PeftModel.from_pretrained(copy.deepcopy(self.base), str(folder)).merge_and_unload().state_dict())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tuned]:
    made: dict[str, Tuned] = {}

    def make(name: str) -> Tuned:
        if name not in made:
            case = CASES[name]
            torch.manual_seed(0)
            base = case.model().eval()
            model = quiet(lambda: peft.get_peft_model(copy.deepcopy(base), case.config()))
            randomise(model)
            folder = tmp_path_factory.mktemp("adapter")
            quiet(lambda: model.save_pretrained(folder, save_embedding_layers=case.keep_embeddings))
            made[name] = Tuned(case, folder, base, quiet(lambda: model.merge_and_unload().state_dict()))
        return made[name]

    return make


def shapes_of(state: Mapping[str, torch.Tensor], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {module.key: tuple(state[f"{module.key}.weight"].shape) for module in (*adapter.factors, *adapter.vectors)}


def dense(base: nn.Module, adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tuned weights in ten lines: W + s * B A for LoRA, W * v for (IA)3, and the saved modules as they are."""
    storages: dict[int, torch.Tensor] = {}
    state = {name: storages.setdefault(tensor.data_ptr(), tensor.clone()) for name, tensor in base.state_dict().items()}  # ties stay ties
    flipped = stored_transposed(adapter, shapes_of(state, adapter))
    for factor in adapter.factors:
        delta = factor.scaling * (factor.B.flatten(1) @ factor.A.flatten(1))
        weight = state[f"{factor.key}.weight"]
        weight += (delta.T if flipped[factor.key] else delta).reshape(weight.shape)
    for vector in adapter.vectors:
        weight = state[f"{vector.key}.weight"]
        side = [1] * weight.ndim
        side[vector.axis(flipped[vector.key])] = -1
        weight *= vector.vector.reshape(side)
        if not vector.feedforward and f"{vector.key}.bias" in state:
            state[f"{vector.key}.bias"] *= vector.vector
    state.update(adapter.saved)
    return state


# What PEFT merges


@pytest.mark.parametrize("name", CASES)
def test_the_merged_weights_are_those_that_peft_merges(name: str, tuned: Callable[[str], Tuned]) -> None:
    made = tuned(name)
    adapter = read_adapter(made.folder)
    assert (len(adapter.factors) + len(adapter.vectors), len(adapter.saved), len(adapter.base_embeddings)) == (
        made.case.changed,
        made.case.saved,
        made.case.beside,
    )
    ours = dense(made.base, adapter)
    assert ours.keys() == made.merged.keys()
    for key, weight in made.merged.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    state = made.base.state_dict()
    assert sum(not torch.equal(ours[f"{key}.weight"], state[f"{key}.weight"]) for key in shapes_of(state, adapter)) == made.case.changed


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_is_written_back_means_the_same_to_peft(name: str, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    made = tuned(name)
    adapter = read_adapter(made.folder)
    write_adapter(tmp_path, adapter.config, adapter_tensors(adapter))
    ours, theirs = load_file(tmp_path / "adapter_model.safetensors"), load_file(made.folder / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_adapter(tmp_path).config == adapter.config
    expected, reloaded = made.from_pretrained(made.folder), made.from_pretrained(tmp_path)
    assert expected.keys() == reloaded.keys()
    assert all(torch.equal(expected[key], reloaded[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_tensors_keep_the_dtype_of_the_file(dtype: torch.dtype, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    adapter = read_adapter(tuned("lora, task head").folder)
    write_adapter(tmp_path, adapter.config, {name: tensor.to(dtype) for name, tensor in adapter_tensors(adapter).items()})
    again = read_adapter(tmp_path)
    assert {factor.A.dtype for factor in again.factors} | {tensor.dtype for tensor in again.saved.values()} == {dtype}


def test_an_adapter_with_a_name_is_found_in_its_subfolder(tmp_path: Path) -> None:
    model = quiet(lambda: peft.get_peft_model(bert(), lora("query"), adapter_name="news"))
    model.save_pretrained(tmp_path)
    assert is_adapter(tmp_path)
    assert len(read_adapter(tmp_path).factors) == 2
    quiet(lambda: model.add_adapter("sport", lora("key")))
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidFile, match=r"several adapters.*news, sport"):
        read_adapter(tmp_path)
    assert is_adapter(tmp_path / "sport")
    (tmp_path / "config.json").write_text("{}")
    assert not is_adapter(tmp_path)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert not is_adapter(path)
        with pytest.raises(NotFound, match=r"adapter_config\.json"):
            read_adapter(path)


def test_neither_peft_nor_transformers_is_imported() -> None:
    code = "import sys, sterna.sources.adapter; print([name for name in ('peft', 'transformers', 'huggingface_hub') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Which way round a weight is stored


def test_a_live_model_settles_what_shapes_leave_open(tmp_path: Path) -> None:
    model = quiet(lambda: peft.get_peft_model(gpt2(), lora("c_attn", "attn.c_proj", "lm_head")))
    quiet(lambda: model.save_pretrained(tmp_path))
    adapter, state = read_adapter(tmp_path), gpt2().state_dict()
    shapes = shapes_of(state, adapter)
    square = {key for key in shapes if key.endswith("c_proj")}
    assert adapter.config["fan_in_fan_out"] is False  # the flag of the lm_head, which PEFT wraps last
    with pytest.raises(Unsupported, match="fan_in_fan_out"):
        stored_transposed(adapter, shapes)
    answers = stored_transposed(adapter, shapes, dict.fromkeys(square, True))
    assert answers == {key: key != "lm_head" for key in shapes}
    assert stored_transposed(adapter, shapes, dict.fromkeys(shapes, True)) == answers  # what a shape excludes is not believed


@pytest.mark.parametrize("flag", [False, True])
def test_the_config_decides_where_all_weights_are_square(flag: bool, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    made = tuned("lora")
    adapter = edited(made.folder, tmp_path, {"fan_in_fan_out": flag})
    assert set(stored_transposed(adapter, shapes_of(made.base.state_dict(), adapter)).values()) == {flag}
    assert {factor.transposed for factor in adapter.factors} == {flag}
    made = tuned("convolutions")
    adapter = edited(made.folder, tmp_path, {"fan_in_fan_out": flag})
    assert set(stored_transposed(adapter, shapes_of(made.base.state_dict(), adapter)).values()) == {False}
    assert {factor.transposed for factor in adapter.factors} == {False}


@pytest.mark.parametrize("name", ["rslora", "Conv1D", "embedding", "convolutions", "ia3, feed-forward", "ia3, convolutions"])
def test_a_base_of_another_shape_is_refused(name: str, tuned: Callable[[str], Tuned]) -> None:
    made = tuned(name)
    adapter = read_adapter(made.folder)
    shapes = shapes_of(made.base.state_dict(), adapter)
    for key in shapes:
        with pytest.raises(PairingError, match=key):
            stored_transposed(adapter, shapes | {key: tuple(size + 1 for size in shapes[key])})
        with pytest.raises(PairingError, match=key):
            stored_transposed(adapter, shapes | {key: (*shapes[key], 1)})
        if len(shapes[key]) > 2:  # a convolution is never stored the other way round
            with pytest.raises(PairingError, match=key):
                stored_transposed(adapter, shapes | {key: shapes[key][::-1]})
        with pytest.raises(PairingError, match=key):
            stored_transposed(adapter, {other: shape for other, shape in shapes.items() if other != key})


def test_which_modules_are_feedforward() -> None:
    assert is_feedforward({"feedforward_modules": ["put.dense"]}, "layer.output.dense") is True  # an end, not a whole name
    assert is_feedforward({"feedforward_modules": []}, "output.dense") is False
    assert is_feedforward({"feedforward_modules": "dense"}, "output.dense") is False  # a pattern matches all of it
    assert is_feedforward({"feedforward_modules": ".*dense"}, "output.dense") is True
    assert is_feedforward({}, "output.dense") is None


def test_the_first_pattern_wins_and_not_the_longest(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    folder = tuned("lora").folder
    exact = "bert.encoder.layer.0.attention.self.query"
    first = edited(folder, tmp_path / "a", {"alpha_pattern": {"query": 2, exact: 8}})
    last = edited(folder, tmp_path / "b", {"alpha_pattern": {exact: 8, "query": 2}})
    assert [{factor.key: factor.scaling for factor in adapter.factors}[exact] for adapter in (first, last)] == [0.5, 2.0]
    for name, adapter in (("a", first), ("b", last)):
        model = quiet(lambda name=name: peft.PeftModel.from_pretrained(bert(), str(tmp_path / name)))
        theirs = {key: module.scaling["default"] for key, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
        assert theirs == {factor.key: factor.scaling for factor in adapter.factors}


# What is refused


def edited(source: Path, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | None] | None = None) -> Adapter:
    """The adapter of `source` read again with some fields and tensors (None: dropped) changed; "*" in a name is the first module's."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(json.loads((source / "adapter_config.json").read_text()) | dict(config)))
    weights = load_file(source / "adapter_model.safetensors")
    first = min(weights).partition(".lora_")[0].partition(".ia3_l")[0]
    for name, tensor in (tensors or {}).items():
        weights.pop(name.replace("*", first), None)
        if tensor is not None:
            weights[name.replace("*", first)] = tensor
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return read_adapter(folder)


REFUSED_FIELDS = {
    "peft_type": "ADALORA",
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "trainable_token_indices": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["query"]},
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 4},
    "megatron_config": {"hidden_size": 16},
    "ensure_weight_tying": True,
    "a_field_of_tomorrow": 3,
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_what_is_not_plain_is_refused_by_its_field(field: str, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=f"{field} = .*supported"):
        edited(tuned("lora").folder, tmp_path, {field: REFUSED_FIELDS[field]})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "unheard-of"])
def test_inits_that_rewrite_the_base_are_refused(init: str, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=f"init_lora_weights = '{init}'"):
        edited(tuned("lora").folder, tmp_path, {"init_lora_weights": init})


def test_all_refused_fields_are_named_at_once(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"(?=.*use_dora)(?=.*bias = 'all')(?=.*olora)"):
        edited(tuned("lora").folder, tmp_path, {"use_dora": True, "bias": "all", "init_lora_weights": "olora"})


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_newer_field_that_is_off_is_no_obstacle(value: object, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    fields = dict.fromkeys(["a_field_of_tomorrow", *REFUSED_FIELDS], value)
    del fields["peft_type"], fields["bias"]
    assert len(edited(tuned("lora").folder, tmp_path, fields).factors) == 4


def test_no_field_of_the_installed_peft_is_unheard_of(tuned: Callable[[str], Tuned]) -> None:
    """Each field is harmless, read, or in the list above: a field that PEFT adds must be judged before this passes again."""
    defaults = {name: json.loads((tuned(name).folder / "adapter_config.json").read_text()) for name in ("lora", "ia3")}
    on = {field for config in defaults.values() for field, value in config.items() if value not in (None, False, "", [], {})}
    read_adapter(tuned("lora").folder)
    off = {field for config in defaults.values() for field in config} - on - REFUSED_FIELDS.keys()
    judged = "task_type auto_mapping base_model_name_or_path revision exclude_modules layers_to_transform layers_pattern fan_in_fan_out use_rslora "
    judged += "lora_dropout rank_pattern alpha_pattern modules_to_save loftq_config eva_config corda_config lora_ga_config feedforward_modules"
    assert off <= set(judged.split())


@pytest.mark.parametrize(
    "suffix", ["lora_magnitude_vector", "lora_B.bias", "lora_diag", "lora_A.default.weight", "original_module.weight", "base_layer.o.lora_A.weight"]
)
def test_tensors_that_plain_lora_lacks_are_refused_by_name(suffix: str, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=suffix):
        edited(tuned("lora").folder, tmp_path, {}, {f"*.{suffix}": torch.ones(4, 4)})


@pytest.mark.parametrize("name", ["base_model.model.bert.pooler.dense.bias", "base_model.model.bert.embeddings.LayerNorm.weight", "pooler.weight"])
def test_tensors_that_nothing_explains_are_refused_by_name(name: str, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=name):
        edited(tuned("lora").folder, tmp_path, {}, {name: torch.ones(4)})


def test_older_names_of_saved_modules_are_understood(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    prefix = "base_model.model.classifier.modules_to_save"
    older = {f"{prefix}.weight": torch.ones(3, 16), f"{prefix}.bias": torch.ones(3)}
    assert set(edited(tuned("lora").folder, tmp_path, {}, older).saved) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(InvalidFile, match=r"two tensors for classifier\.bias"):
        edited(tuned("lora, task head").folder, tmp_path, {}, older)


@pytest.mark.parametrize("target", ["conv", "attention"])
def test_modules_that_cannot_be_carried_are_refused(target: str, tmp_path: Path) -> None:
    quiet(lambda: peft.get_peft_model(Grouped(), lora(target)).save_pretrained(tmp_path))
    with pytest.raises(Unsupported, match="groups" if target == "conv" else "attention.base_layer.out_proj"):
        read_adapter(tmp_path)


def test_ia3_on_a_grouped_convolution_is_carried_on_its_output_only(tmp_path: Path) -> None:
    for name, side in (("output", []), ("input", ["conv"])):
        model = quiet(lambda side=side: peft.get_peft_model(Grouped(), ia3("conv", feedforward=side)))
        quiet(lambda model=model, name=name: model.save_pretrained(tmp_path / name))
    assert stored_transposed(read_adapter(tmp_path / "output"), {"conv": (6, 2, 3, 3)}) == {"conv": False}
    with pytest.raises(PairingError, match="grouped"):
        stored_transposed(read_adapter(tmp_path / "input"), {"conv": (6, 2, 3, 3)})


@pytest.mark.parametrize("ending", ["bin", "pt", "pth"])
def test_pickles_are_refused_with_the_way_out(ending: str, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((tuned("lora").folder / "adapter_config.json").read_bytes())
    with pytest.raises(NotFound, match=r"adapter_model\.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / f"adapter_model.{ending}").write_bytes(b"\x80\x02.")
    with pytest.raises(Unsupported, match=rf"adapter_model\.{ending}.*safe_serialization=True"):
        read_adapter(tmp_path)


# What is broken

NAN = torch.full((16, 4), float("nan"))
BROKEN_TENSORS = {
    "A without B": ("lora", {"*.lora_B.weight": None}, "must come together"),
    "B without A": ("lora", {"*.lora_A.weight": None}, "must come together"),
    "A with the B of an embedding": ("lora", {"*.lora_B.weight": None, "*.lora_embedding_B": torch.ones(16, 4)}, "must come together"),
    "another rank than r": ("lora", {"*.lora_A.weight": torch.ones(3, 16), "*.lora_B.weight": torch.ones(16, 3)}, "rank_pattern of .* is 4"),
    "two ranks": ("lora", {"*.lora_A.weight": torch.ones(3, 16)}, "rank"),
    "NaN": ("lora", {"*.lora_B.weight": NAN}, "NaN"),
    "infinity": ("lora", {"*.lora_B.weight": torch.full((16, 4), float("inf"), dtype=torch.bfloat16)}, "infinity"),
    "NaN in a saved module": ("lora, task head", {"base_model.model.classifier.weight": NAN}, "classifier.weight"),
    "integers": ("lora", {"*.lora_B.weight": torch.ones(16, 4, dtype=torch.int8)}, "floating"),
    "a shard": ("lora", {"*.lora_B.weight": torch.ones(0)}, "gathered from all shards"),
    "one axis": ("lora", {"*.lora_A.weight": torch.ones(4)}, "expected floating A"),
    "a kernel in B": ("lora", {"*.lora_A.weight": torch.ones(4, 16, 3, 3), "*.lora_B.weight": torch.ones(16, 4, 3, 3)}, "expected floating A"),
    "an empty side": ("lora", {"*.lora_A.weight": torch.ones(4, 0, 3), "*.lora_B.weight": torch.ones(16, 0, 1)}, "expected floating A"),
    "the other method": ("lora", {"*.ia3_l": torch.ones(4, 1)}, "peft_type is LORA"),
    "the other method's config": ("ia3", {"*.lora_A.weight": torch.ones(4, 1)}, "peft_type is IA3"),
    "a vector on its side": ("ia3", {"*.ia3_l": torch.ones(1, 16)}, "feedforward_modules, which does not list it"),
    "a listed vector on its side": ("ia3, feed-forward", {"*.output.dense.ia3_l": torch.ones(16, 1)}, "feedforward_modules"),
    "a matrix for a vector": ("ia3", {"*.ia3_l": torch.ones(4, 4)}, "feedforward_modules"),
    "a flat vector": ("ia3", {"*.ia3_l": torch.ones(16)}, "feedforward_modules"),
    "a number for a vector": ("ia3", {"*.ia3_l": torch.ones(())}, "feedforward_modules"),
    "an empty vector": ("ia3", {"*.ia3_l": torch.ones(0, 1)}, "floating"),
    "an integer vector": ("ia3", {"*.ia3_l": torch.ones(16, 1, dtype=torch.int64)}, "floating"),
}


@pytest.mark.parametrize("what", BROKEN_TENSORS)
def test_broken_tensors_are_refused_in_one_line(what: str, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    name, tensors, expected = BROKEN_TENSORS[what]
    layer = "base_model.model.bert.encoder.layer.1"
    with pytest.raises(InvalidFile, match=expected) as caught:
        edited(tuned(name).folder, tmp_path, {}, {key.replace("*.output.dense", f"{layer}.output.dense"): tensor for key, tensor in tensors.items()})
    assert "\n" not in str(caught.value)


BROKEN_FIELDS = [
    ("peft_type", None),
    ("peft_type", 3),
    ("r", "8"),
    ("r", 0),
    ("r", True),
    ("r", None),
    ("lora_alpha", "16"),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 10**400),
    ("alpha_pattern", {"query": float("inf")}),
    ("alpha_pattern", {"(": 3}),
    ("alpha_pattern", ["query"]),
    ("rank_pattern", {"query": "4"}),
    ("use_rslora", 1),
    ("fan_in_fan_out", "yes"),
    ("modules_to_save", "classifier"),
    ("modules_to_save", [1]),
    ("feedforward_modules", 3),
    ("feedforward_modules", [None]),
]


@pytest.mark.parametrize(("field", "value"), BROKEN_FIELDS)
def test_broken_fields_are_refused_by_name(field: str, value: object, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=field) as caught:
        edited(tuned("lora").folder, tmp_path, {field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"LORA"', "\ufeff{}", "[" * 100_000, '{"peft_type": ' + "9" * 9999 + "}"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidFile, match=r"adapter_config\.json"):
        read_adapter(tmp_path)


def test_weights_that_are_cut_or_overwritten_are_refused(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    folder = tuned("lora").folder
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    whole = (folder / "adapter_model.safetensors").read_bytes()
    for data in (b"", whole[:7], whole[:100], whole[:-1], whole + b"x", b"PK\x03\x04" + whole[4:]):
        (tmp_path / "adapter_model.safetensors").write_bytes(data)
        with pytest.raises(InvalidFile, match=r"adapter_model\.safetensors"):
            read_adapter(tmp_path)


def test_weights_without_a_factor_are_refused(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((tuned("lora").folder / "adapter_config.json").read_bytes())
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidFile, match=r"<module>\.lora_A\.weight"):
        read_adapter(tmp_path)


# Defaults, and writing


def test_a_minimal_config_has_the_defaults_of_peft(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    weights = {name: torch.ones(shape) for name, shape in zip(part_names("bert.pooler.dense", "lora"), ((8, 16), (16, 8)), strict=True)}
    config = {"peft_type": "LORA", "target_modules": ["pooler.dense"]}
    write_adapter(tmp_path, config, weights)
    (factor,) = read_adapter(tmp_path).factors
    model = quiet(lambda: peft.PeftModel.from_pretrained(bert(), str(tmp_path)))
    assert factor.scaling == model.base_model.model.bert.pooler.dense.scaling["default"] == 1.0


def test_a_vector_needs_no_list_where_its_shape_tells(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    made = tuned("ia3, feed-forward")
    adapter = edited(made.folder, tmp_path / "linear", {"feedforward_modules": None})
    assert [vector.feedforward for vector in adapter.vectors] == [vector.feedforward for vector in read_adapter(made.folder).vectors]
    with pytest.raises(InvalidFile, match="feedforward_modules, which is missing"):
        edited(tuned("ia3, convolutions").folder, tmp_path / "conv", {"feedforward_modules": None})


def test_equal_adapters_are_equal_bytes(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    adapter = read_adapter(tuned("embedding and head").folder)
    tensors = adapter_tensors(adapter)
    previous = os.umask(0o022)
    try:
        for name, order in (("a", sorted(tensors)), ("b", sorted(tensors, reverse=True))):
            (tmp_path / name).mkdir()
            write_adapter(tmp_path / name, adapter.config, {key: tensors[key] for key in order})
    finally:
        os.umask(previous)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).stat().st_mode & 0o777 == 0o644
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tensors = {name: torch.ones(2, 2).T for name in part_names("query", "lora")}
    for config, wrong in (({}, tensors), ({"peft_type": "LORA"}, {"query.lora_A.weight": torch.ones(2)})):
        with pytest.raises(InvalidArgument, match="peft_type must be"):
            write_adapter(tmp_path, config, wrong)
    with pytest.raises(SternaError, match="cannot write"):
        write_adapter(tmp_path / "nowhere", {"peft_type": "LORA"}, tensors)
