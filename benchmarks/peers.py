"""PEFT beside us: adapters of its own kinds, made and saved by it, and models that carry them."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import inputs
from sterna.needs import quiet

warnings.filterwarnings("ignore", message="Sparse invariant checks")

ATTENTION, LINEAR = ("query", "value"), ("query", "key", "value", "dense")


@dataclass(frozen=True, slots=True)
class Kind:
    """A PEFT method with a rank, on some of the encoder's linear layers."""

    method: str
    rank: int
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.method} r={self.rank}, {'all linear' if self.targets == LINEAR else 'query and value'}"

    def configuration(self) -> Any:
        import peft

        made = peft.LoraConfig if self.method == "LoRA" else peft.ShiraConfig
        return made(task_type="SEQ_CLS", r=self.rank, target_modules=list(self.targets))


LORA, LORA_ATTENTION = Kind("LoRA", 8, LINEAR), Kind("LoRA", 8, ATTENTION)
SHIRA, SHIRA_16 = Kind("SHiRA", 32, LINEAR), Kind("SHiRA", 16, LINEAR)
"""PEFT's default ranks; its default layers for BERT are query and value. An expert of density .05 changes 1.14 million entries of the encoder,
SHiRA 1.37 million at rank 32 and .68 million at rank 16."""


def saved_adapters(options: argparse.Namespace, kind: Kind, folder: Path, number: int = 2) -> list[Path]:
    """Adapter folders with random values of a trained one's size, as PEFT saves them; two classes."""
    import peft

    folders = []
    for seed in range(number):
        torch.manual_seed(seed)
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(inputs.classifier(options, classes=2), kind.configuration())
            for name, parameter in model.named_parameters():
                if "lora_" in name or "shira_" in name:
                    parameter.data += 0.03 * torch.randn_like(parameter)  # as large as A begins
            folders.append(folder / f"{kind.method}-{kind.rank}-{len(kind.targets)}-{seed}")
            model.save_pretrained(folders[-1])
    return folders


class Carrying:
    """A live classifier under PEFT, with the first adapter loaded and the second one coming and going."""

    def __init__(self, options: argparse.Namespace, adapters: list[Path], dtype: torch.dtype = torch.float32) -> None:
        import peft

        self.adapters = adapters
        bare = inputs.classifier(options, classes=2, dtype=dtype)
        self.weights = {name: weight for name, weight in bare.named_parameters() if not name.startswith("classifier.")}
        self.base = {name: weight.detach().clone() for name, weight in self.weights.items()}
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model: Any = peft.PeftModel.from_pretrained(bare, adapters[0], adapter_name="first").eval()

    def cycle(self) -> None:
        """Load the second adapter, merge it, unmerge it."""
        self.model.load_adapter(self.adapters[1], "second")
        self.model.set_adapter("second")
        self.merge_and_unmerge()

    def merge_and_unmerge(self) -> None:
        """The same with the adapter loaded already."""
        self.model.base_model.merge_adapter()
        self.model.base_model.unmerge_adapter()

    def drop(self) -> None:
        """Forget the second adapter."""
        self.model.set_adapter("first")
        self.model.delete_adapter("second")

    def changed(self) -> tuple[int, int, int]:
        """How many of the base's entries are no longer what they were; how many PEFT targets, and how many there are."""
        targeted = [name for name in self.weights if name.split(".")[-2] in LINEAR and name.endswith("weight")]
        changed = sum(int((weight != self.base[name]).sum()) for name, weight in self.weights.items())
        return changed, sum(self.base[name].numel() for name in targeted), sum(weight.numel() for weight in self.base.values())
