"""Experts made from LoRA and (IA)3: what attaching does equals what PEFT does with the same factors, and everything comes off to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import models
import sterna
from sterna.errors import InvalidArgument, PairingError, Unsupported
from sterna.expert.changes import Factors, Multiply, Set


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(r=4, **fields)


CASES = {
    "bert": (models.bert_encoder, models.bert_classifier, lora(task_type="SEQ_CLS", target_modules=["query", "value"])),
    "bert, all linear": (models.bert_encoder, models.bert_classifier, lora(task_type="SEQ_CLS", target_modules="all-linear", use_rslora=True)),
    "gpt2": (models.gpt2, models.gpt2, lora(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "llama": (
        lambda: models.llama(tied=False),
        lambda: models.llama(tied=False),
        lora(target_modules=["q_proj", "down_proj", "embed_tokens"], rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
    ),
    "bert, ia3": (
        models.bert_encoder,
        models.bert_classifier,
        peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "gpt2, ia3": (
        models.gpt2,
        models.gpt2,
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
}


class Made:
    """A base folder, a PEFT folder over it, and fresh live models of the tuned class on that base."""

    def __init__(self, case: str, folder: Path) -> None:
        make_base, make_live, config = CASES[case]
        torch.manual_seed(3)
        self.base, self.adapter = folder / "base", folder / "adapter"
        make_base().save_pretrained(self.base)
        self.kind = type(make_live())
        model = peft.get_peft_model(self.live(), copy.deepcopy(config))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "ia3_" in name or "modules_to_save" in name:
                    parameter.add_(models.noise(parameter, generator, 0.1))
        model.save_pretrained(self.adapter)

    def live(self) -> Any:
        torch.manual_seed(9)  # the same fresh head every time
        more = {"num_labels": 3} if self.kind is transformers.BertForSequenceClassification else {}
        return self.kind.from_pretrained(self.base, **more).eval()


@pytest.fixture(params=list(CASES))
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    return Made(request.param, tmp_path)


def reference(made: Made, density: float, alpha: float) -> dict[str, torch.Tensor]:
    """What ComPEFT makes of the adapter's tensors, in ten dense lines: one threshold and one scale over all of them, ties by flat index."""
    from safetensors.torch import load_file

    stored = load_file(made.adapter / "adapter_model.safetensors")
    coded = [name for name in sorted(stored) if ".lora_" in name or name.endswith("ia3_l")]
    start = {name: 1.0 if name.endswith("ia3_l") else 0.0 for name in coded}
    tau = torch.cat([(stored[name] - start[name]).flatten() for name in coded])
    keep = int(density * tau.numel() + 1e-9)
    order = torch.argsort(tau.abs(), descending=True, stable=True)[:keep]
    signs = torch.zeros_like(tau)
    signs[order] = tau[order].sign()
    hat = signs * float((alpha * tau.double().std()).float())
    for name, part in zip(coded, hat.split([stored[n].numel() for n in coded]), strict=True):
        stored[name] = part.reshape(stored[name].shape) + start[name]
    return {name: tensor for name, tensor in stored.items() if ".base_layer." not in name}  # the base's own embedding is dropped


def test_attach_equals_peft_with_the_compressed_factors(made: Made, tmp_path: Path) -> None:
    expert = sterna.compress(made.base, made.adapter, density=0.3, alpha=1.5)
    expected = reference(made, 0.3, 1.5)
    sterna.apply(made.base, expert, tmp_path / "peft")
    from safetensors.torch import load_file

    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(written[name], expected[name], rtol=1e-6, atol=0)
    merged = peft.PeftModel.from_pretrained(made.live(), tmp_path / "peft").merge_and_unload().state_dict()
    model = made.live()
    before = models.state_of(model)
    patch = sterna.attach(model, expert)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=2e-6, msg=name)
    assert patch.undo_bytes > 0
    patch.detach()
    assert models.same_state(model, before)


def test_merged_checkpoint_equals_attach(made: Made, tmp_path: Path) -> None:
    expert = sterna.compress(made.base, made.adapter, density=0.5, alpha=1)
    sterna.apply(made.base, expert, tmp_path / "full", merged=True)
    made.base = tmp_path / "full"
    full = made.live().state_dict()
    made.base = tmp_path / "base"
    with sterna.attached(model := made.live(), expert):
        assert all(torch.equal(full[name], tensor) for name, tensor in model.state_dict().items())


def test_file_keeps_the_content(made: Made, tmp_path: Path) -> None:
    expert = sterna.compress(made.base, made.adapter, density=0.3)
    expert.save(tmp_path / "expert.safetensors")
    loaded = sterna.load(tmp_path / "expert.safetensors")
    assert loaded.content_digest == expert.content_digest
    assert loaded.digest == expert.digest
    assert {type(change) for change in loaded.changes} <= {Factors, Multiply, Set}
    assert str(tmp_path) not in (tmp_path / "expert.safetensors").read_bytes().decode("latin-1")
    task = loaded.task_vector(made.base)
    with sterna.attached(model := made.live(), loaded) as patch:
        live, prefix = model.state_dict(), loaded.facts.prefixes[1]
        base = made.live().state_dict()
        for name, delta in task.items():
            own = name if name in live else prefix + name
            torch.testing.assert_close(live[own], base[own] + delta.reshape(base[own].shape), rtol=0, atol=1e-6, msg=name)
        assert 0 <= patch.swallowed < 0.05


def test_adapter_and_full_expert_swap_on_one_base(tmp_path: Path) -> None:
    made = Made("bert", tmp_path)
    torch.manual_seed(1)
    other = models.bert_classifier(labels=5)
    other.bert.load_state_dict(made.live().bert.state_dict())
    full = sterna.compress(made.base, models.tuned(other), density=0.1)
    adapter = sterna.compress(made.base, made.adapter, density=0.5)
    model = made.live()
    before = models.state_of(model)
    patch = sterna.attach(model, adapter)
    assert model.classifier.out_features == 3
    patch.swap(full)
    assert (model.classifier.out_features, model.num_labels, model.config.num_labels) == (5, 5, 5)
    assert models.answer(model).shape[-1] == 5
    patch.swap(adapter)
    assert models.answer(model).shape[-1] == 3
    patch.detach()
    assert models.same_state(model, before)


def test_grown_vocabulary_beside_an_adapter(tmp_path: Path) -> None:
    base = models.llama(tied=False)
    base.save_pretrained(tmp_path / "base")
    grown = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(44)
    model = peft.get_peft_model(grown, lora(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    expert = sterna.compress(tmp_path / "base", tmp_path / "adapter", density=0.5)
    live = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    before = models.state_of(live)
    with sterna.attached(live, expert):
        assert live.get_input_embeddings().weight.shape[0] == live.get_input_embeddings().num_embeddings == 44
        assert torch.equal(live.get_input_embeddings().weight, grown.get_input_embeddings().weight)
        assert torch.equal(live.lm_head.weight, grown.lm_head.weight)
        assert models.answer(live).shape[-1] == 44
    assert models.same_state(live, before)
    assert live.get_input_embeddings().num_embeddings == 40


def test_bad_adapters(tmp_path: Path) -> None:
    made = Made("bert", tmp_path)
    with pytest.raises(InvalidArgument, match="exclude does not apply"):
        sterna.compress(made.base, made.adapter, exclude=["*query*"])
    shape = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    other = transformers.BertModel(transformers.BertConfig(**shape))
    with pytest.raises(PairingError, match=r"attention\.self\.query"):
        sterna.compress(other, made.adapter)
    unmerged = peft.get_peft_model(made.live(), lora(target_modules=["query"]))
    with pytest.raises(Unsupported, match="adapter folder"):
        sterna.compress(made.base, unmerged)


def test_code_named_in_a_config_does_not_travel(tmp_path: Path) -> None:
    import dataclasses
    import json

    made = Made("bert", tmp_path)
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil.code"}
    (made.adapter / "adapter_config.json").write_text(json.dumps(config))
    expert = sterna.compress(made.base, made.adapter)
    assert "auto_mapping" not in expert.facts.adapter
    for fields in ({"adapter": {"auto_mapping": {"parent_library": "evil"}}}, {"config": {"text_config": {"auto_map": {"AutoModel": "evil.py"}}}}):
        with pytest.raises(InvalidArgument, match="at any depth"):
            dataclasses.replace(expert.facts, **fields)


def test_names_of_output_files_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    base = models.made("bert")
    expert = sterna.compress(base, models.tuned(base))
    name = "e" * 243 + ".safetensors"
    expert.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
