"""The base model of the demo: located, named by a digest of its files, and loaded with a new head of any size."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sterna.demo.needs import needed, quiet
from sterna.errors import InvalidFile, NotFound

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_folder(model: str) -> Path:
    """A model folder, or the local copy of a hub id (downloaded on the first call).

    Raises:
        NotFound: neither a folder nor a hub id that can be reached.
        InvalidFile: a folder without config.json or without safetensors weights.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = _from_hub(model)
    if not (folder / "config.json").is_file():
        raise InvalidFile(f"{model} has no config.json: give the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise InvalidFile(f"{model} has no .safetensors weights: load it with transformers and save it with save_pretrained(folder)")
    return folder


def _from_hub(model: str) -> Path:
    if not HUB_ID.fullmatch(model):
        raise NotFound(f"there is no model folder {model}")
    hub = needed("huggingface_hub")
    try:
        return Path(hub.snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub's client raises a dozen unrelated kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFound(f"{model} is neither a folder nor a model that the hub gives ({reason})") from error


def model_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the configuration, the weights and the tokenizer."""
    whole = hashlib.sha256()
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.txt"))):
        with path.open("rb") as file:
            whole.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    with quiet():
        tokenizer = needed("transformers").AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(folder: Path, classes: Sequence[str] | None, tokenizer: Any) -> torch.nn.Module:
    """The model as a sequence classifier in fp32 (training in a half type would round the small steps away), in evaluation mode.

    With `classes`, its head has one row for each and is new unless the folder's fits; without, the head is the folder's own.
    """
    transformers = needed("transformers")
    labels: dict[str, Any] = {}
    if classes is not None:
        labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}, "num_labels": len(classes)}
    with quiet():
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
            )
        except (ValueError, KeyError, OSError) as error:
            raise InvalidFile(f"{folder.name} does not load as a sequence classifier: {str(error).strip().splitlines()[0]}") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    result: torch.nn.Module = model.eval()
    return result.cuda() if torch.cuda.is_available() else result
