"""transformers' Trainer, made thin: its checkpoints hold what a tuning trains, never the whole model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from sterna.errors import InvalidFile
from sterna.tuning.tuning import Tuning

CHECKPOINT = "sterna_tuning.safetensors"
_WHOLE = "sterna_whole"
"""An empty file that is the last to come into a checkpoint: without it the checkpoint may be half-written."""


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """transformers.Trainer for a tuned model: `Trainer(model, args, ..., tuning=tuning)`. Without a tuning it is transformers' own.

    Checkpoints hold the trained values, the head, and the states of optimizer, scheduler and generators; `resume_from_checkpoint` goes on from
    them to the bit, and True finds the last one that was written to its end.
    """

    def __init__(self, *arguments: Any, tuning: Tuning | None = None, **keywords: Any) -> None:
        self.tuning = tuning
        super().__init__(*arguments, **keywords)

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any) -> Any:
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir)
            resume_from_checkpoint = os.fspath(found) if found else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.tuning is None:
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.tuning.save(folder / CHECKPOINT)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / _WHOLE).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.tuning is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.tuning.load(_checkpoint_file(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.tuning is None:
            super()._load_best_model()
            return
        self.tuning.load(_checkpoint_file(str(self.state.best_model_checkpoint)))


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The last checkpoint in a Trainer's output folder that was written to its end, or None."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{_WHOLE}") if path.parent.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _checkpoint_file(folder: str) -> Path:
    path = Path(folder) / CHECKPOINT
    if not path.is_file():
        raise InvalidFile(f"{folder} holds no {CHECKPOINT}; expected a checkpoint that sterna.Trainer wrote")
    return path
