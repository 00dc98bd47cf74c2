"""Applying an expert writes a checkpoint that from_pretrained loads, equal to the live model with the expert attached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import models
import sterna
import sterna.applying
from sterna.errors import CannotWrite, InvalidFile, NotFound, WrongBase

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_bare_encoder_becomes_a_classifier(dtype: torch.dtype, scope: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = models.tuned(classifier := models.bert_classifier(labels=5))
    classifier.bert.to(dtype).save_pretrained(tmp_path / "base")
    tuned.to(dtype).save_pretrained(tmp_path / "tuned")
    expert = sterna.compress(tmp_path / "base", tmp_path / "tuned", density=0.2, scope=scope)
    assert sterna.apply(tmp_path / "base", expert, tmp_path / "out") == tmp_path / "out"
    written = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=dtype)
    live = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=dtype)
    sterna.attach(live, expert)
    assert models.same_state(written, models.state_of(live))
    assert written.config.id2label == live.config.id2label == tuned.config.id2label
    assert written.config.label2id == live.config.label2id == tuned.config.label2id


@pytest.mark.parametrize("name", models.MODELS)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    base = models.made(name)
    tuned = models.tuned(base)
    expert = sterna.compress(base, tuned, density=0.1)
    sterna.apply(base, expert, tmp_path / "out")
    sterna.attach(base, expert)
    if isinstance(base, transformers.PreTrainedModel):
        assert models.same_state(type(base).from_pretrained(tmp_path / "out"), models.state_of(base))
        return
    written = load_file(tmp_path / "out" / "model.safetensors")
    live = models.state_of(base)
    assert all(torch.equal(live[key], tensor) for key, tensor in written.items())
    pointers = {base.state_dict()[key].data_ptr() for key in written}
    assert all(tensor.data_ptr() in pointers for tensor in base.state_dict().values())  # what is not written is tied to something that is


def test_shards_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.made("llama")
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    tuned = models.tuned(base)
    expert = sterna.compress(tmp_path / "base", tuned, density=0.1)
    monkeypatch.setattr(sterna.applying, "SHARD_BYTES", 5000)
    sterna.apply(tmp_path / "base", expert, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in base.state_dict().values())
    written = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    sterna.attach(base, expert)
    assert models.same_state(written, models.state_of(base))


def test_a_grown_vocabulary_and_its_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    base = models.llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    grown = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(42)
    models.tuned(grown).save_pretrained(tmp_path / "tuned")
    words.add_tokens(["<legal>", "<brief>"])
    words.save(str(tmp_path / "tuned" / "tokenizer.json"))
    expert = sterna.compress(tmp_path / "base", tmp_path / "tuned", density=0.2)
    assert [token["content"] for token in expert.facts.tokens] == ["<legal>", "<brief>"]
    sterna.apply(tmp_path / "base", expert, tmp_path / "out")
    written = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert written.get_input_embeddings().weight.shape[0] == written.config.vocab_size == 42
    tuned = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    assert torch.equal(written.get_input_embeddings().weight[40:], tuned.lm_head.weight[40:])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["<legal>", "<brief>"]) == [40, 41]
    live = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with sterna.attached(live, expert):
        assert models.same_state(live, models.state_of(written))
        assert live.get_input_embeddings().weight is live.lm_head.weight


def test_verify(tmp_path: Path) -> None:
    base, other = models.made("llama"), models.made("llama", seed=1)
    expert = sterna.compress(base, models.tuned(base), density=0.1)
    expert.save(tmp_path / "expert.safetensors")
    base.save_pretrained(tmp_path / "base")
    found = sterna.verify(tmp_path / "expert.safetensors", tmp_path / "base")
    assert (found.digest, found.narrower, found.absent) == (expert.digest, (), ())
    assert sterna.verify(expert, base.to(torch.float64)).narrower == ()
    with pytest.raises(WrongBase, match=r"tensors differ, the first: lm_head"):
        sterna.verify(expert, other)
    with pytest.raises(WrongBase, match="bfloat16, narrower"):
        sterna.verify(expert, base.to(torch.bfloat16))
    assert len(sterna.verify(expert, base, allow_narrower=True).narrower) > 5
    damaged = bytearray((tmp_path / "expert.safetensors").read_bytes())
    damaged[-100] ^= 4
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(InvalidFile, match="checksum"):
        sterna.verify(tmp_path / "damaged.safetensors")
    with pytest.raises(NotFound):
        sterna.verify(tmp_path / "nothing.safetensors")


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.made("bert")
    expert = sterna.compress(base, models.tuned(base), density=0.1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(CannotWrite, match="exists already"):
        sterna.apply(base, expert, tmp_path / "full")
    with pytest.raises(CannotWrite, match="not a folder"):
        sterna.apply(base, expert, tmp_path / "no" / "such" / "out")
    with pytest.raises(WrongBase):
        sterna.apply(models.made("bert", seed=4), expert, tmp_path / "out")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sterna.applying, "_write_surroundings", fails)
    with pytest.raises(CannotWrite, match="No space left"):
        sterna.apply(base, expert, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
