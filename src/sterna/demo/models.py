"""The base model of the demo, loaded as a classifier with a head of any size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sterna.training.models import load_model


def load_classifier(folder: Path, classes: Sequence[str] | None, tokenizer: Any) -> torch.nn.Module:
    """The model as a sequence classifier in fp32 (training in a half type would round the small steps away), in evaluation mode.

    With `classes`, its head has one row for each and is new unless the folder's fits; without, the head is the folder's own.
    """
    result: torch.nn.Module = load_model(folder, "classification", tokenizer, classes)
    return result.cuda() if torch.cuda.is_available() else result
