"""sterna train: every task and kind of method on tiny models, configs with faults, runs that are killed, and what comes out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import sklearn.metrics
import torch
import transformers
from safetensors.torch import load_file

import sterna
import trainable
from sterna import commands
from sterna.errors import InvalidArgument, NotFound, SternaError
from sterna.scoring.rows import examples_of, table_of
from sterna.training import metrics
from sterna.training.config import Data, TrainingConfig, merged, parse, read_yaml
from sterna.training.data import load_data
from sterna.training.errors import Faults, Interrupted, InvalidConfig
from sterna.training.run import train
from sterna.training.tokens import Lengths, packed, tokenized
from sterna.tuning.checkpoints import MARK, last_checkpoint

STERNA = str(Path(sys.executable).with_name("sterna"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for kind in ("bert", "llama", "t5"):
        trainable.save_base(kind, folder / kind)
    trainable.save_chatting(folder / "chatting", folder / "llama")
    trainable.save_jsonl(folder / "completions.jsonl", trainable.completions(32))
    trainable.save_jsonl(folder / "chats.jsonl", trainable.chats(32))
    trainable.save_csv(folder / "train.csv", 48)
    trainable.save_csv(folder / "test.csv", 16, seed=1)
    (folder / "texts.txt").write_text("\n".join(row["text"] for row in trainable.rows(40)), encoding="utf-8")
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that has links to the models and the data."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(method: Any = "full", **fields: Any) -> dict[str, Any]:
    """Six steps on the encoder; dotted fields take the place of these."""
    usual = {
        "model": "bert",
        "data": {"train": "train.csv", "test": "test.csv", "validation": 0.25},
        "method": method,
        "training": {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_steps": 2},
        "output": "out",
    }
    return merged(usual, fields)


def run(method: Any = "full", **fields: Any) -> Any:
    return train(config(method, **fields))


def answers(model: Any, texts: list[str], name: str = "bert") -> torch.Tensor:
    inputs = transformers.AutoTokenizer.from_pretrained(name)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out: torch.Tensor = model.eval()(**inputs).logits
    return out


CLASSIFIERS: dict[str, dict[str, Any]] = {
    "pafi": {"method": {"name": "pafi", "density": 0.05}},
    "pafi, ternary": {"method": {"name": "pafi", "density": 0.05}, "compress.values": "ternary", "compress.head": "fp16"},
    "pafi, random, half": {"method": {"name": "pafi", "count": 99, "order": "random", "seed": 3}, "compress.values": "bf16"},
    "hiwi biases": {"method": {"name": "hiwi", "rank": 4}},
    "hiwi weights": {"method": {"name": "hiwi", "target": "weight", "rank": 2}},
    "full": {"method": "full", "compress.density": 0.5},
    "full, mixed, accumulated": {"method": "full", "training.bf16": True, "training.gradient_accumulation_steps": 2, "training.weight_decay": 0.1},
    "pafi, recomputed": {"method": {"name": "pafi", "density": 0.05}, "training.gradient_checkpointing": True, "training.bf16": True},
    "head": {"method": "head"},
    "lora": {"method": {"name": "lora", "r": 2, "target_modules": ["query", "dense"]}},
    "ia3": {"method": "(ia)3"},
    "loha, merged": {"method": {"name": "loha", "target_modules": ["query", "value"]}},
    "adalora, merged": {"method": {"name": "adalora", "target_modules": ["query", "value"]}},
    "dora, merged": {"method": {"name": "lora", "use_dora": True, "target_modules": ["query", "value"]}},
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_method_that_is_a_weight_delta_ends_as_an_expert(kind: str, here: Path) -> None:
    fields = CLASSIFIERS[kind]
    result = train(config(**fields))
    expert = sterna.load("out.safetensors")
    assert result.ends_as == "expert"
    assert result.sizes["bytes"] == Path("out.safetensors").stat().st_size
    assert set(result.metrics) == {"trained", "expert"}
    assert set(result.metrics["expert"]) == {"validation", "test"}
    assert json.loads(Path("out.metrics.json").read_text())["metrics"] == json.loads(json.dumps(result.metrics))
    assert str(here) not in Path("out.metrics.json").read_text() + Path("out.yaml").read_text()
    base = transformers.AutoModelForSequenceClassification.from_pretrained("bert", num_labels=2)
    before = answers(base, ["w1 w2 w3"])
    with sterna.attached(base, expert):
        rows = trainable.rows(16, seed=1)
        right = answers(base, [row["text"] for row in rows]).argmax(1) == torch.tensor(["ab".index(row["label"]) for row in rows])
        assert right.float().mean() == pytest.approx(result.metrics["expert"]["test"]["accuracy"])
        assert base.config.id2label == {0: "a", 1: "b"}
    assert torch.equal(answers(base, ["w1 w2 w3"]), before)
    if "compress.values" not in fields and ("pafi" in kind or "hiwi" in kind or kind == "head"):  # nothing was rounded away
        assert result.metrics["trained"]["test"] == pytest.approx(result.metrics["expert"]["test"], abs=1e-5)
    if kind == "pafi, random, half":
        assert result.counts == {"trained": 99, "trained_head": 34, "stored": 133}
    if kind in ("full", "full, mixed, accumulated", "lora", "ia3"):
        assert (Path("out.run/trained") / ("model.safetensors" if kind.startswith("full") else "adapter_config.json")).is_file()


@pytest.mark.parametrize("data", ["texts.txt", "completions.jsonl"])
@pytest.mark.parametrize("name", ["prefix-tuning", "prompt_tuning"])
def test_a_method_that_is_no_delta_ends_as_a_peft_folder(name: str, data: str, here: Path) -> None:
    raw = config({"name": name, "num_virtual_tokens": 3}, model="llama", task="causal-lm", data={"train": data, "max_length": 8})
    said: list[str] = []
    result = train(raw, warn=said.append)
    assert result.ends_as == "PEFT folder"
    assert any("ends as a PEFT folder" in line for line in said)
    assert not Path("out.safetensors").exists()
    assert peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("llama"), "out").active_adapter == "default"
    assert set(result.metrics) == {"trained"}
    assert train(raw).steps == result.steps  # a finished run is finished again
    shutil.rmtree("out.run")
    with pytest.raises(SternaError, match="exists already"):
        train(raw)


TASKS: dict[str, dict[str, Any]] = {
    "pair": {"data.text_pair": "other"},
    "regression": {"task": "regression", "data.label": "rating"},
    "causal-lm": {"model": "llama", "data": {"train": "texts.txt", "max_length": 8, "test": 0.2}},
    "seq2seq": {"model": "t5", "task": "seq2seq", "data.target_max_length": 4},
    "completions": {"model": "llama", "task": "causal-lm", "data": {"train": "completions.jsonl", "test": 0.2}},
    "chats": {"model": "chatting", "task": "causal-lm", "data": {"train": "chats.jsonl", "test": 0.2}},
}


@pytest.mark.parametrize("method", ["pafi", "lora"])
@pytest.mark.parametrize("kind", TASKS)
def test_every_task(kind: str, method: str, here: Path) -> None:
    lora = {"name": "lora", "target_modules": ["query", "value"] if kind in ("pair", "regression") else "all-linear"}
    result = train(config({"name": "pafi", "density": 0.1} if method == "pafi" else lora, **TASKS[kind]))
    wanted = {
        "pair": {"accuracy", "macro_f1", "matthews", "loss"},
        "regression": {"spearman", "pearson", "mse"},
        **{name: {"perplexity", "loss"} for name in ("causal-lm", "completions", "chats")},
        "seq2seq": {"rouge1", "rouge2", "rougeL", "exact_match", "perplexity", "loss"},
    }
    for scores in (result.metrics["trained"]["test"], result.metrics["expert"]["test"]):
        assert set(scores) == wanted[kind]
        assert all(np.isfinite(value) for value in scores.values())
    assert result.task == {"pair": "classification", "completions": "causal-lm", "chats": "causal-lm"}.get(kind, kind)
    if method == "pafi":
        assert result.metrics["trained"]["test"] == pytest.approx(result.metrics["expert"]["test"], rel=1e-4, abs=1e-6)
    said = yaml_of("out.yaml")
    assert said["data"]["text_pair"] == ("other" if kind == "pair" else None)
    assert said["data"]["target"] == {"seq2seq": "summary", "completions": "completion"}.get(kind)
    if kind in ("completions", "chats"):
        first = Path("out.safetensors").read_bytes()
        shutil.rmtree("out.run")
        assert train(yaml_of("out.yaml")).metrics == result.metrics
        assert Path("out.safetensors").read_bytes() == first


def yaml_of(path: str) -> dict[str, Any]:
    return read_yaml(Path(path))


def test_perplexity_is_that_of_a_plain_loop(here: Path) -> None:
    result = run("full", model="llama", data={"train": "texts.txt", "validation": 0, "test": "texts.txt", "max_length": 8})
    model = transformers.AutoModelForCausalLM.from_pretrained("out.run/trained").eval()
    nats, count = 0.0, 0
    for row in packed(transformers.AutoTokenizer.from_pretrained("llama"), Path("texts.txt").read_text().splitlines(), 8):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert result.metrics["trained"]["test"]["loss"] == pytest.approx(nats / count, rel=1e-5)


def tokens_of(name: str, lengths: Lengths | None = None, rows: Any = None, tokenizer: Any = None) -> list[dict[str, Any]]:
    """What is trained of rows: of a tiny model's tokenizer, or of a given one."""
    examples, _ = examples_of(table_of(rows), "causal-lm")
    return tokenized(tokenizer or transformers.AutoTokenizer.from_pretrained(name), examples, "causal-lm", lengths or Lengths(64))


def test_labels_are_those_of_the_completion_alone(here: Path) -> None:
    rows = trainable.completions(20)
    made = tokens_of("llama", rows=rows)
    word = {word: number for number, word in enumerate([*trainable.SPECIAL, *trainable.WORDS])}
    for row, found in zip(rows, made, strict=True):
        prompt, answer = ([word[part] for part in row[key].split()] for key in ("prompt", "completion"))
        assert found == {"input_ids": [*prompt, *answer, word["[EOS]"]], "labels": [*[-100] * len(prompt), *answer, word["[EOS]"]]}
    chats = trainable.chats(20)
    for row, found in zip(chats, tokens_of("chatting", rows=chats), strict=True):
        user, answer = ([word[part] for part in message["content"].split()] for message in row["messages"])
        prompt = [word["w30"], *user, word["[EOS]"], word["w31"]]
        assert found == {"input_ids": [*prompt, *answer, word["[EOS]"]], "labels": [*[-100] * len(prompt), *answer, word["[EOS]"]]}
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in chats]
    assert tokens_of("chatting", rows=pairs) == tokens_of("chatting", rows=chats)
    more = {"role": "user", "content": "w9"}, {"role": "assistant", "content": "w8", "weight": None}
    (found,) = tokens_of("chatting", rows=[{"messages": [*chats[0]["messages"], *more]}])
    assert sum(label != -100 for label in found["labels"]) == 2  # the last answer, not the first
    assert {tuple(row["labels"]) for row in tokens_of("llama", rows=[{"text": "w1 w2", "summary": "w3"}])} == {(word["w1"], word["w2"], 4)}


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_special_tokens_stand_where_the_tokenizer_has_them_and_once(kind: str) -> None:
    (found,) = tokens_of("", rows=[{"prompt": "w1 w2", "completion": "w3"}], tokenizer=trainable.tokenizer(kind))
    start = [2] if kind == "bert" else []
    assert found == {"input_ids": [*start, 6, 7, 8, 4], "labels": [*[-100] * (len(start) + 2), 8, 4]}
    (again,) = tokens_of("", rows=[{"prompt": "[CLS] w1 w2" if start else "w1 w2", "completion": "w3 [EOS]"}], tokenizer=trainable.tokenizer(kind))
    assert again == found


def byte_pairs() -> Any:
    """Words with the space before them as one token, as GPT-2 has it."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["Q: yes no yes no A: yes"] * 9, tokenizers.trainers.BpeTrainer(special_tokens=["[EOS]"], initial_alphabet=alphabet))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[EOS]")


@pytest.mark.parametrize(
    ("prompt", "completion", "whole", "learned"),
    [
        ("Q: A:", "yes", "Q: A: yes", " yes"),
        ("Q: A:", " yes", "Q: A: yes", " yes"),
        ("Q: A: ", "yes", "Q: A: yes", " yes"),  # the space is of the word's token
        ("Q: A:\n", "yes", "Q: A:\nyes", "yes"),
        ("Q: A:", "\nyes\n", "Q: A:\nyes\n", "\nyes\n"),
        ("  Q: A:  ", "  yes", "  Q: A:    yes", None),
        ("日本", "語", "日本 語", " 語"),
    ],
)
def test_a_prompt_and_its_completion_are_joined_as_they_stand(prompt: str, completion: str, whole: str, learned: str | None) -> None:
    tokenizer = byte_pairs()
    (row,) = tokens_of("", rows=[{"prompt": prompt, "completion": completion}], tokenizer=tokenizer)
    assert tokenizer.decode(row["input_ids"]) == f"{whole}[EOS]"
    assert row["input_ids"] == [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]  # no token that the text has not
    if learned is not None:
        assert tokenizer.decode([label for label in row["labels"] if label != -100]) == f"{learned}[EOS]"


def test_long_prompts_are_cut_from_the_left_and_completions_kept() -> None:
    rows = [{"prompt": "w1 w2 w3 w4", "completion": "w5 w6"}]
    ids = {limit: tokens_of("", Lengths(limit), rows, trainable.tokenizer("bert"))[0] for limit in (2, 3, 4, 5, 7, 8, 20)}
    assert {limit: row["input_ids"] for limit, row in ids.items()} == {
        2: [2, 10],
        3: [2, 10, 11],
        4: [2, 10, 11, 4],
        5: [2, 9, 10, 11, 4],
        7: [2, 7, 8, 9, 10, 11, 4],
        8: [2, 6, 7, 8, 9, 10, 11, 4],
        20: [2, 6, 7, 8, 9, 10, 11, 4],
    }
    assert all(row["labels"][0] == -100 and row["labels"][-1] == row["input_ids"][-1] for row in ids.values())
    with pytest.raises(InvalidArgument, match="1 of 1 rows are longer than max_length = 7"):
        tokens_of("", Lengths(7, truncation=False), rows, trainable.tokenizer("bert"))


USER, ASSISTANT = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ([USER], "the last of 1 messages has the role 'user'; expected 'assistant'"),
        ([ASSISTANT], "after the messages that it answers"),
        ([USER, "w2"], "message 2 is a str, expected a mapping"),
        ([USER, {"role": "assistant"}], "message 2: content is missing"),
        ([USER, {"role": "assistant", "content": None}], "content is nothing, expected a text"),
        ([{"from": "human", "value": "w1"}, ASSISTANT], "message 1: role is missing"),
        ([{"role": "user", "content": [{"type": "text", "text": "w1"}]}, ASSISTANT], "content is a list"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "is not plain text"),
        ([{**USER, "seen": {1, 2}}, ASSISTANT], "is not plain text and JSON"),
        ([{"role": "wizard", "content": "w1"}, ASSISTANT], "the chat template refuses the chat that ends in 'w2': no turn for wizard"),
        ("w1", "holds a str, expected a list of messages"),
        ([], "no row with everything"),
        ([USER, {"role": "assistant", "content": " "}], "no row with everything"),
    ],
)
def test_a_malformed_chat_is_one_line(cell: Any, says: str, here: Path) -> None:
    good = [] if "no row" in says else [{"messages": [USER, ASSISTANT]}]
    with pytest.raises(SternaError, match=says.replace("[", r"\[")) as caught:
        tokens_of("chatting", rows=[*good, {"messages": cell}])
    assert len(str(caught.value).splitlines()) == 1
    if good and "template" not in says:
        assert "the given rows, row 2: 'messages'" in str(caught.value)


def test_a_tokenizer_without_a_template_and_a_template_that_rewrites(here: Path) -> None:
    with pytest.raises(SternaError, match=r"data\.train: the rows are chats, and the tokenizer has no chat template"):
        run(model="llama", task="causal-lm", data={"train": "chats.jsonl"})
    tokenizer = trainable.tokenizer("llama")
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(InvalidArgument, match="writes the messages otherwise once they are answered"):
        tokens_of("", rows=trainable.chats(2), tokenizer=tokenizer)


def test_chats_of_every_kind_of_file_are_the_same(here: Path) -> None:
    import datasets

    rows = trainable.chats(12)
    rows[0]["messages"].insert(0, {"role": "user", "content": "w3", "name": "someone"})  # Parquet then has the key everywhere
    trainable.save_jsonl(Path("rows.jsonl"), rows)
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    digests = set()
    for given in ("rows.jsonl", "rows.parquet"):
        faults = Faults()
        found = load_data(Data(train=given), "causal-lm", faults)
        assert not faults.found
        assert found is not None
        digests.add(found.digest())
    assert len(digests) == 1


def test_metrics_against_references() -> None:
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(50, 3)).astype(np.float32), draw.integers(0, 3, 50)
    scores = metrics.classification(logits, labels)
    assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, logits.argmax(1)))
    assert scores["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))), rel=1e-6)
    x = draw.normal(size=40)
    assert metrics.regression(x, 2 * x + 1) == pytest.approx({"spearman": 1.0, "pearson": 1.0, "mse": float(np.mean((x + 1) ** 2))})
    assert metrics.regression(np.ones(4), x[:4])["spearman"] == 0.0
    assert metrics.language(np.array([2.0, 4.0]), np.array([1, 2]))["perplexity"] == pytest.approx(np.exp(2.0))
    told = metrics.generation(["the cat sat", "no"], ["the cat sat ", "yes"])
    assert told["exact_match"] == 0.5
    assert told["rougeL"] == pytest.approx(0.5)


def test_every_fault_is_listed(here: Path) -> None:
    raw = {
        "modle": "bert",
        "model": "nowhere",
        "data": {"train": "train.csv", "label": "lable", "validation": 2, "max_length": "long", "test": "missing.csv"},
        "method": {"name": "pafi", "density": 3, "inclde": []},
        "learning_rate": 1e-3,
        "training": {"optim": "adamm", "lr_scheduler_type": "liner", "bf16": "perhaps", "warmup_ratio": 1.5},
        "compress": {"alpha": 3, "values": "fp8"},
        "output": "no/such/out",
    }
    with pytest.raises(InvalidConfig) as caught:
        train(raw)
    assert isinstance(caught.value, ValueError)
    said = {fault.partition(": ")[0]: fault for fault in caught.value.faults}
    expected = {
        "modle": "did you mean model?",
        "model": "neither a file, a folder nor a hub id",
        "data.label": "'text', 'other', 'label', 'rating', 'summary'",
        "data.validation": "fraction below 1",
        "data.max_length": "'long' is not valid; expected a valid integer",
        "data.test": "there is no file missing.csv",
        "method.density": "3 is not valid; expected less than or equal to 1",
        "method.inclde": "did you mean method.include?",
        "learning_rate": "did you mean training.learning_rate?",
        "training.optim": "adam",
        "training.lr_scheduler_type": "near: linear",
        "training.bf16": "'perhaps' is not valid",
        "training.warmup_ratio": "1.5 is not valid",
        "compress.values": "'fp8' is not valid",
        "compress.alpha": "ternary step",
        "output": "no/such is not a folder",
    }
    assert set(said) == set(expected)
    for field, words in expected.items():
        assert words in said[field], said[field]
    assert not Path("out.run").exists()


@pytest.mark.parametrize(
    ("method", "fields", "says"),
    [
        ("lroa", {}, "method.name: 'lroa' is no method; did you mean lora"),
        ({"name": "lora", "ranks": 8}, {}, "method.ranks: LoraConfig has no such field; near: "),
        ({"name": "lora", "task_type": "SEQ_CLS"}, {}, "method.task_type: set by the other fields"),
        ({"name": "lora", "init_lora_weights": "loftq"}, {}, "method: PEFT refuses the config"),
        ("full", {"compress.values": "bf16"}, "compress.values: 'bf16' is for pafi and hiwi"),
        ("head", {"task": "causal-lm", "model": "llama", "data": {"train": "texts.txt"}}, "causal-lm has none"),
        ("pafi", {"compress.scope": "tensor"}, "compress.scope"),
        ({"name": "pafi", "density": 0.1, "count": 3}, {}, "method: density 0.1 and count 3 are both given"),
        ("full", {"data.max_length": 99}, "data.max_length: 99 is not valid; the model takes 16 tokens"),
        ("full", {"data.max_length": 4, "data.truncation": False}, "longer than max_length = 4"),
        ("full", {"task": "regression"}, "'label' is 'a', expected a finite number"),
        ("full", {"task": "seq2seq"}, "InvalidConfig|does not load"),
        ("full", {"data.label": "text"}, "is 'text' the label, or is the task a regression"),
        ("full", {"training.bf16": True, "training.fp16": True}, "training: "),
        ("pafi", {"dtype": "bf16"}, "dtype: 'bf16' is not what the base is stored in"),
        ({"name": "p_tuning", "num_virtual_tokens": 30}, {}, "method: p_tuning does not run on this model with peft"),
        ({"name": "lora", "target_modules": ["querry"]}, {}, "method: PEFT cannot put lora on this model"),
        ("full", {"output": None}, "output: missing"),
        ("full", {"data": None}, "data: None is not valid"),
    ],
)
def test_a_fault_names_its_field(method: Any, fields: dict[str, Any], says: str, here: Path) -> None:
    with pytest.raises(SternaError) as caught:
        run(method, **fields)
    assert any(word in f"{type(caught.value).__name__} {caught.value}" for word in says.split("|")), caught.value


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: x\nmethod: lora\ndata: a.csv\ntraining: {learning_rate: 5e-5}\n")
    faults = Faults()
    found = parse(read_yaml(path), faults)
    assert (found.training.learning_rate, found.method.name, found.data.train, faults.found) == (5e-5, "lora", "a.csv", [])
    assert parse(merged(read_yaml(path), {"method.name": "pafi", "training.max_steps": 3}), faults).training.learning_rate == 5e-5
    assert TrainingConfig.model_validate(TrainingConfig(model="x").to_dict()) == TrainingConfig(model="x")
    for text, says in (("a: [", "line"), ("seed: 1\nseed: 2", "given twice"), ("- a", "not a list"), ("1: 2", "no text")):
        path.write_text(text)
        with pytest.raises(InvalidConfig, match=says):
            read_yaml(path)
    with pytest.raises(NotFound, match="cannot be read"):
        read_yaml(tmp_path / "b.yaml")


def test_data_from_every_kind_of_file_is_the_same(here: Path) -> None:
    rows = trainable.rows(48)
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("set").mkdir()
    shutil.copy("rows.jsonl", "set/train.jsonl")
    import datasets

    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    digests = set()
    for given in ("train.csv", "rows.jsonl", "rows.parquet", "set"):
        faults = Faults()
        found = load_data(Data(train=given, test=0.1), "classification", faults)
        assert not faults.found
        assert found is not None
        digests.add(found.digest())
        assert [len(part) for part in (found.train, found.validation, found.test) if part] == [38, 5, 5]
        assert abs(sum(found.train.answers or ()) - 19) <= 1  # type: ignore[arg-type]
        texts = [set(part.texts) for part in (found.train, found.validation, found.test) if part]
        assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert len(digests) == 1


def test_a_config_of_results_reproduces_them_and_options_override(here: Path) -> None:
    run({"name": "pafi", "density": 0.05}, seed=4)
    first = Path("out.safetensors").read_bytes()
    shutil.rmtree("out.run")
    Path("out.safetensors").unlink()
    again = train(read_yaml(Path("out.yaml")))
    assert Path("out.safetensors").read_bytes() == first
    assert again.config_file == "out.yaml"
    with pytest.raises(InvalidConfig, match=r"out\.run holds another run: seed was 4, now 5\. Start over with --restart"):
        train(merged(read_yaml(Path("out.yaml")), {"seed": 5}))
    assert Path("out.safetensors").read_bytes() == first
    train(merged(read_yaml(Path("out.yaml")), {"seed": 5}), restart=True)
    assert Path("out.safetensors").read_bytes() != first


def test_a_folder_or_config_of_others_is_left_alone(here: Path) -> None:
    Path("mine").mkdir()
    (Path("mine") / "thesis.tex").write_text("")
    with pytest.raises(InvalidConfig, match=r"mine is a folder of something else"):
        train(config(run_dir="mine"), restart=True)
    assert (Path("mine") / "thesis.tex").exists()
    Path("out.yaml").write_text("model: bert\n")
    with pytest.raises(InvalidConfig, match=r"out\.yaml, where the full config goes"):
        run()
    assert Path("out.yaml").read_text() == "model: bert\n"


ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "MKL_NUM_THREADS": "1"}
KILLED = {
    "between checkpoints": "trainer.Watch.on_step_end = at(trainer.Watch.on_step_end, 5)",
    "while a checkpoint is written": "trainer.RunTrainer._save_rng_state = at(trainer.RunTrainer._save_rng_state, 2)",
}
CODE = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from sterna.training import trainer
from sterna.training.run import train
def at(function, call, count=[0]):
    def wrapped(*given, **more):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **more)
    return wrapped
exec(sys.argv[2])
train(json.loads(sys.argv[1]))
"""
METHODS: dict[str, Any] = {
    "between checkpoints": {"name": "pafi", "density": 0.05},
    "while a checkpoint is written": "full",
}


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_goes_on_to_the_same_bytes(moment: str, here: Path) -> None:
    method = METHODS[moment]
    whole = run(method, output="whole")
    raw = config(method, output="cut")
    killed = subprocess.run([sys.executable, "-c", CODE, json.dumps(raw), KILLED[moment]], env={**os.environ, **ENVIRONMENT}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not Path("cut.safetensors").exists()
    found = sorted(path.name for path in Path("cut.run/checkpoints").iterdir())
    assert found == (["checkpoint-4"] if moment == "between checkpoints" else ["checkpoint-2", "checkpoint-4"])
    result = train(raw)
    assert result.resumed_from == (4 if moment == "between checkpoints" else 2)
    assert Path("cut.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    assert result.metrics == whole.metrics


def test_a_checkpoint_cut_short_does_not_count(here: Path) -> None:
    run({"name": "pafi", "density": 0.05})
    checkpoints = Path("out.run/checkpoints")
    last = last_checkpoint(checkpoints)
    assert last is not None
    assert last.step == 6
    assert not list(last.folder.glob("model*.safetensors"))  # no whole model
    shutil.copytree(last.folder, checkpoints / "checkpoint-8")
    (checkpoints / "checkpoint-8" / "optimizer.pt").write_bytes(b"")
    shutil.copytree(last.folder, checkpoints / "checkpoint-9")
    (checkpoints / "checkpoint-9" / MARK).write_text("{")
    assert last_checkpoint(checkpoints) == last


def sterna_train(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([STERNA, "train", *words], capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT}, **more)


def test_the_command_line(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "bert", "--data", "train.csv", "--test", "test.csv", "--method", "pafi", "--density", "0.05", "--max-steps", "2"]
    done = sterna_train(*words, "--set", "training.warmup_ratio=0.5", "-o", "expert.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["output"] == "expert.safetensors"
    assert value["steps"] == 2
    assert yaml_of("expert.yaml")["training"]["warmup_ratio"] == 0.5
    assert yaml_of("expert.yaml")["method"]["density"] == 0.05
    words = ["expert.yaml", "--method", "lroa", "--epochs", "-1", "--validation", "nothing.csv", "--values", "ternary"]
    monkeypatch.setattr(sys, "argv", ["sterna", "train", *words])
    with pytest.raises(SystemExit) as left:
        commands.main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["training.num_train_epochs", "data.validation", "method.name"]
    assert all(line.startswith("sterna: ") for line in lines)


def test_interrupt_says_how_to_go_on(here: Path) -> None:
    words = ["--model", "bert", "--data", "train.csv", "--method", "pafi", "--max-steps", "20000", "--save-steps", "5", "-o", "long", "--restart"]
    process = subprocess.Popen(
        [STERNA, "train", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    )
    limit = time.monotonic() + 60
    while not list(Path().glob("long.run/checkpoints/*/" + MARK)) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), said
    last = last_checkpoint(Path("long.run/checkpoints"))
    assert last is not None
    lines = said.splitlines()
    assert lines[0] == "sterna: stopping after this step, with a checkpoint; once more stops at once"
    assert f"goes on from step {last.step}" in lines[-1]
    assert lines[-1].endswith("sterna train " + " ".join(words[:-1]))
    assert set(load_file(next(last.folder.glob("*.safetensors"))))


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ({"name": "lora", "lora_dropout": 0.2, "target_modules": ["query"]}, {}),
        ({"name": "hiwi", "rank": 2}, {}),
        ("head", {}),
        ({"name": "pafi", "density": 0.05}, TASKS["completions"]),
        ({"name": "lora", "lora_dropout": 0.2, "target_modules": "all-linear"}, TASKS["chats"]),
    ],
    ids=str,
)
def test_an_interrupted_call_goes_on_to_the_same_bytes(method: Any, fields: dict[str, Any], here: Path) -> None:
    def stop(step: str, done: int, total: int, unit: str, note: str = "") -> None:
        if step == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="goes on from step 2"):
        train(config(method, **fields), progress=stop)
    said: list[tuple[int, str]] = []
    train(config(method, **fields), progress=lambda step, done, total, unit, note="": said.append((done, note)) if step == "training" else None)
    assert said[0][0] == 2
    assert said[-1][0] == 6
    assert said[-1][1].startswith("loss ")
    run(method, output="whole", **fields)
    assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_an_argument_that_is_no_pair(here: Path) -> None:
    from sterna.commands.train import _settings

    assert _settings(["training.learning_rate=1e-4", "data.text=body"]) == {"training.learning_rate": 1e-4, "data.text": "body"}
    with pytest.raises(InvalidArgument, match="FIELD=VALUE"):
        _settings(["oops"])
