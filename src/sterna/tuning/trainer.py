"""transformers' Trainer, made thin: its checkpoints hold what a tuning trains, never the whole model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from sterna.errors import InvalidFile
from sterna.tuning.checkpoints import MARK, last_checkpoint, mark, remove_older
from sterna.tuning.tuning import Tuning

CHECKPOINT = "sterna_tuning.safetensors"


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """transformers.Trainer for a tuned model: `Trainer(model, args, ..., tuning=tuning)`. Without a tuning it is transformers' own.

    Checkpoints hold the trained values, the head, and the states of optimizer, scheduler and generators; `resume_from_checkpoint` goes on from
    them to the bit, and True finds the last one that was written to its end. `save_total_limit` removes older ones only then.
    """

    def __init__(self, *arguments: Any, tuning: Tuning | None = None, **keywords: Any) -> None:
        self.tuning = tuning
        super().__init__(*arguments, **keywords)

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any) -> Any:
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir)
            resume_from_checkpoint = os.fspath(found.folder) if found else None
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
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        (checkpoint / MARK).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # nothing older goes before this one counts
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            mark(checkpoint, self.seconds)
            if limit:
                remove_older(folder, limit, self.state.best_model_checkpoint)

    @property
    def seconds(self) -> float:
        """What the run took so far, for the checkpoint's mark."""
        return 0.0

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


def _checkpoint_file(folder: str) -> Path:
    path = Path(folder) / CHECKPOINT
    if not path.is_file():
        raise InvalidFile(f"{folder} holds no {CHECKPOINT}; expected a checkpoint that sterna.Trainer wrote")
    return path
