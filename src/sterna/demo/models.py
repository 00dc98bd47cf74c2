"""The base model of the demo: located, named by a digest of its files, and loaded with a new head of any size."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sterna.demo.needs import needed, quiet
from sterna.errors import InvalidFile, SternaError
from sterna.sources.checkpoint import resolve


def model_folder(model: str) -> Path:
    """A model folder, or the local copy of a hub id (downloaded on the first call).

    Raises:
        NotFound: neither a folder nor a hub id that can be reached.
        InvalidFile: not a folder, or one without config.json or without safetensors weights.
    """
    folder = resolve(Path(model).expanduser() if model.startswith("~") else model)
    if not (folder / "config.json").is_file():
        raise InvalidFile(f"{model} has no config.json: give the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise InvalidFile(f"{model} has no .safetensors weights: load it with transformers and save it with save_pretrained(folder)")
    return folder


def first_line(error: Exception) -> str:
    """What a library said, short enough for one line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def model_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the configuration, the weights and the tokenizer."""
    whole = hashlib.sha256()
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.txt"))):
        with path.open("rb") as file:
            whole.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


@contextlib.contextmanager
def loading(folder: Path, what: str) -> Iterator[None]:
    """Quiet, and one error of ours for the many that transformers raises for a folder that it cannot read."""
    try:
        with quiet():
            yield
    except SternaError:
        raise
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise InvalidFile(f"{folder.name} does not load as {what}: {first_line(error)}") from error


def load_tokenizer(folder: Path) -> Any:
    with loading(folder, "a tokenizer"):
        tokenizer = needed("transformers").AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def length_limit(folder: Path, tokenizer: Any, wanted: int) -> int:
    """`wanted` tokens, or fewer where the tokenizer or the model's positions end before."""
    with loading(folder, "a model configuration"):
        config = needed("transformers").AutoConfig.from_pretrained(folder)
    positions = getattr(config, "max_position_embeddings", None) or wanted
    return min(wanted, int(tokenizer.model_max_length), int(positions))


def load_classifier(folder: Path, classes: Sequence[str] | None, tokenizer: Any) -> torch.nn.Module:
    """The model as a sequence classifier in fp32 (training in a half type would round the small steps away), in evaluation mode.

    With `classes`, its head has one row for each and is new unless the folder's fits; without, the head is the folder's own.
    """
    labels: dict[str, Any] = {}
    if classes is not None:
        labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}, "num_labels": len(classes)}
    with loading(folder, "a sequence classifier"):
        auto = needed("transformers").AutoModelForSequenceClassification
        model = auto.from_pretrained(folder, dtype=torch.float32, ignore_mismatched_sizes=True, **labels)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    result: torch.nn.Module = model.eval()
    return result.cuda() if torch.cuda.is_available() else result
