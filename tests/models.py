"""Tiny models of many kinds, made on the spot, and what fine-tuning might do to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()


def bert_config(labels: int = 3, **fields: Any) -> Any:
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    names = {i: f"class {i}" for i in range(labels)}
    return transformers.BertConfig(**shape, max_position_embeddings=16, id2label=names, label2id={v: k for k, v in names.items()}, **fields)


def bert_classifier(labels: int = 3) -> nn.Module:
    return transformers.BertForSequenceClassification(bert_config(labels)).eval()


def bert_encoder() -> nn.Module:
    return transformers.BertModel(bert_config()).eval()


def bert_pretraining() -> nn.Module:
    return transformers.BertForPreTraining(bert_config()).eval()


def llama(tied: bool = True) -> nn.Module:
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=24, tie_word_embeddings=tied)).eval()


def llama_classifier(labels: int = 3) -> nn.Module:
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shape, intermediate_size=24, num_labels=labels)).eval()


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16)).eval()


def vit() -> nn.Module:
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**shape, num_labels=3)).eval()


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).eval()


class ConvNet(nn.Module):
    """Convolutions and batch norms: its running statistics and its counters are buffers."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.classifier(self.body(x).mean((2, 3)))
        return out


class SharedBlock(nn.Module):
    """One block that stands in twelve layers, as in ALBERT and universal transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        block = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.layers = nn.ModuleList([block] * 12)
        self.leave = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = x + layer(x)
        out: torch.Tensor = self.leave(x)
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert_classifier,
    "llama, tied head": lambda: llama(tied=True),
    "llama": lambda: llama(tied=False),
    "gpt2": gpt2,
    "vit": vit,
    "t5": t5,
    "convolutions": ConvNet,
    "shared block": SharedBlock,
}


def made(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The model of that name with weights of a seed, rounded to `dtype`. No two tensors are alike: biases and norms are random too."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 16)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape))
    return model.to(dtype)


def noise(tensor: torch.Tensor, generator: torch.Generator, size: float) -> torch.Tensor:
    """Heavy-tailed differences, of size about `size`: a few entries move far more than the rest, as in a real fine-tune."""
    normal = torch.randn(tensor.shape, generator=generator)
    return size * normal * torch.rand(tensor.shape, generator=generator) ** 2


def tuned(model: nn.Module, seed: int = 1, size: float = 3e-3, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model whose parameters and float buffers moved, its counters too; stored in `dtype`."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.float() + noise(parameter, generator, size))
        for name, buffer in other.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer += 7
            elif "running" in name:
                buffer.copy_(buffer.float() + noise(buffer, generator, size).abs())
    return other.to(dtype) if dtype is not None else other


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the state dict, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: Mapping[str, torch.Tensor]) -> bool:
    """Whether the state dict has the same names in the same order, and the same values, shapes and dtypes."""
    now = model.state_dict()
    return list(now) == list(before) and all(now[name].dtype == before[name].dtype and torch.equal(now[name], before[name]) for name in before)


def inputs_for(model: nn.Module) -> dict[str, torch.Tensor]:
    """Something that the model's forward takes."""
    tokens = (torch.arange(12).reshape(2, 6) * 7) % 40
    match type(model).__name__:
        case "ViTForImageClassification":
            return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}
        case "T5ForConditionalGeneration":
            return {"input_ids": tokens, "decoder_input_ids": tokens}
        case "ConvNet":
            return {"x": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}
        case "SharedBlock":
            return {"x": torch.linspace(-1, 1, 10).reshape(2, 5)}
    return {"input_ids": tokens}


def answer(model: nn.Module) -> torch.Tensor:
    """The model's logits for its inputs."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        out = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_for(model).items()})
    return out if isinstance(out, torch.Tensor) else out.logits
