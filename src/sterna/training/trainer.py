"""The Trainer of a run: checkpoints of what is trained, a stop that loses nothing, a bar with the loss."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from sterna.errors import InvalidFile
from sterna.progress import Progress
from sterna.tuning.trainer import Trainer

TRAINED = "trained.safetensors"


class RunTrainer(Trainer):
    """`sterna.Trainer` for a run: without a tuning, its checkpoints hold the parameters that are trained and the buffers, whatever PEFT saves.

    (PEFT's own checkpoints do not hold all of every method: of a prefix tuning with a projection, for one, only the result.)
    `seconds` is what earlier parts of the run took.
    """

    def __init__(self, *arguments: Any, seconds: float = 0.0, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.tuning is not None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(self.model).items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.tuning is not None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, own = load_file(Path(resume_from_checkpoint) / TRAINED), trained_state(self.model)
        if saved.keys() != own.keys():
            raise InvalidFile(f"{resume_from_checkpoint} holds other tensors than the model trains; start over with --restart")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that require a gradient, and the buffers that a state dict has, by name; tied ones once."""
    buffers = set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: dict[str, torch.Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return state | {name: value for name, value in model.named_buffers() if name in buffers}


@dataclass(slots=True)
class Stop:
    """Whether someone asked the training to stop, and by which signal."""

    signal: int | None = None
    told: Callable[[str], None] = field(default=lambda message: None)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self.told("stopping after this step, with a checkpoint; once more stops at once")


@contextlib.contextmanager
def stoppable(told: Callable[[str], None]) -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM set a flag in place of ending the process; in a thread that is not the main one signals are left alone."""
    stop = Stop(told=told)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells of every step with the last loss, stops where that is asked for, and does what AdaLoRA wants after each step."""

    def __init__(self, progress: Progress, stop: Stop, checkpoints: bool) -> None:
        self.progress, self.stop, self.checkpoints = progress, stop, checkpoints
        self.note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.progress("training", state.global_step, state.max_steps, "steps", self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.4g}"

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        tuner = getattr(model, "base_model", None)
        if tuner is not None and hasattr(type(tuner), "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.progress("training", state.global_step, state.max_steps, "steps", self.note)
        if self.stop.signal is not None:
            control.should_save = self.checkpoints
            control.should_training_stop = True
