"""Tiny models with a tokenizer of their own, saved as folders, and tiny data for each task."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

import models
import sterna

WORDS = [f"w{i}" for i in range(34)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no turn for ' + m.role) }}{% endif %}"
    "{{ 'w30' if m.role == 'user' else 'w31' }} {{ m.content }} [EOS] {% endfor %}{% if add_generation_prompt %}w31 {% endif %}"
)
"""A chat template in the words of the vocabulary: w30 begins a turn of the user, w31 one of the assistant, [EOS] ends both."""


def tokenizer(kind: str) -> Any:
    """Whole words; an encoder's adds [CLS] and [SEP], a T5's the end of text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = tokenizers.processors.TemplateProcessing
    if kind == "bert":
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        made.post_processor = template(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    elif kind == "t5":
        made.post_processor = template(single="$A [EOS]", special_tokens=[("[EOS]", 4)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def save_base(kind: str, folder: Path) -> Path:
    """A bare encoder ("bert"), a causal LM ("llama", "gpt2") or a T5 ("t5"), with weights of a seed, and its tokenizer."""
    torch.manual_seed(0)
    model: Any = {"bert": models.bert_encoder, "llama": models.llama, "gpt2": models.gpt2, "t5": models.t5}[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 16)
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts whose words tell the label (a or b), the score (how many words come from the first half) and the target (the first word)."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        label = "ab"[i % 2]
        words = draw.choices(WORDS[:12] if label == "a" else WORDS[10:24], k=6)
        early = sum(WORDS.index(word) < 12 for word in words)
        found.append({"text": " ".join(words), "other": " ".join(words[:2]), "label": label, "rating": f"{early / 6:.3f}", "summary": words[0]})
    return found


def save_csv(path: Path, count: int, seed: int = 0) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "other", "label", "rating", "summary"])
        writer.writeheader()
        writer.writerows(rows(count, seed))
    return path


def completions(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of one to six words; the completion is the last of them, and a word that it decides."""
    draw = random.Random(seed)
    prompts = [draw.choices(WORDS[:24], k=draw.randint(1, 6)) for _ in range(count)]
    return [{"prompt": " ".join(words), "completion": f"{words[-1]} w{24 + WORDS.index(words[-1]) % 4}"} for words in prompts]


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as a turn of the user and one of the assistant."""
    turns = [(row["prompt"], row["completion"]) for row in completions(count, seed)]
    return [{"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]} for prompt, answer in turns]


def save_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_chatting(folder: Path, base: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    made = tokenizer("llama")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def save_experts(folder: Path, tasks: Mapping[str, str]) -> None:
    """Of each task, over the encoder in `folder`/bert: a classifier with a class a letter, `<task>-tuned`, and its expert `<task>.safetensors`."""
    for seed, (name, labels) in enumerate(tasks.items(), 1):
        names = dict(enumerate(labels))
        torch.manual_seed(seed)
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder / "bert", id2label=names, label2id={v: k for k, v in names.items()}, num_labels=len(labels)
        )
        model = models.tuned(model, seed=seed, size=0.1)
        with torch.no_grad():
            model.classifier.weight.mul_(20)
        model.save_pretrained(folder / f"{name}-tuned")
        tokenizer("bert").save_pretrained(folder / f"{name}-tuned")
        sterna.compress(folder / "bert", folder / f"{name}-tuned", density=0.5).save(folder / f"{name}.safetensors")
