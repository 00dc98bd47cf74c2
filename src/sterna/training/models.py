"""Model folders: located, and loaded for a task with the tokenizer, the padding and the head that it needs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sterna.errors import InvalidFile, SternaError
from sterna.needs import needed, quiet
from sterna.sources.checkpoint import resolve
from sterna.training.tasks import TaskName

CLASSES: dict[TaskName, tuple[str, str]] = {
    "classification": ("AutoModelForSequenceClassification", "a sequence classifier"),
    "regression": ("AutoModelForSequenceClassification", "a sequence classifier"),
    "causal-lm": ("AutoModelForCausalLM", "a causal language model"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "a sequence-to-sequence model"),
}
"""The class of transformers that loads a model for each task, and what it is called."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def model_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the configuration, the weights and the tokenizer."""
    whole = hashlib.sha256()
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.txt"))):
        with path.open("rb") as file:
            whole.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def first_line(error: Exception) -> str:
    """What a library said, short enough for one line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
    """The folder's tokenizer; one without a padding token pads with the end of text. Raises InvalidFile."""
    with loading(folder, "a tokenizer"):
        tokenizer = needed("transformers").AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_settings(folder: Path) -> Any:
    """The folder's configuration as transformers reads it. Raises InvalidFile."""
    with loading(folder, "a model configuration"):
        return needed("transformers").AutoConfig.from_pretrained(folder)


def length_limit(folder: Path, tokenizer: Any, wanted: int) -> int:
    """`wanted` tokens, or fewer where the tokenizer or the model's positions end before."""
    positions = getattr(load_settings(folder), "max_position_embeddings", None) or wanted
    return min(wanted, int(tokenizer.model_max_length), int(positions))


def load_model(folder: Path, task: TaskName, tokenizer: Any, classes: Sequence[str] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model for the task, in evaluation mode, on the CPU; a head that the folder lacks is drawn by torch's generator, so seed it before.

    With `classes` a classifier has one output for each, and a new head unless the folder's fits; without, the folder's own. Raises InvalidFile.
    """
    fields: dict[str, Any] = {}
    if task == "regression":
        fields = {"num_labels": 1, "problem_type": "regression", "ignore_mismatched_sizes": True}
    elif task == "classification":
        fields = {"ignore_mismatched_sizes": True}
        if classes is not None:
            names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
            fields |= {"num_labels": len(classes), "problem_type": "single_label_classification", **names}
    loader, what = CLASSES[task]
    with loading(folder, what):
        model = getattr(needed("transformers"), loader).from_pretrained(folder, dtype=dtype, **fields)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval()
