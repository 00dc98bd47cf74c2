"""A training from its config to its files: plan, train (from the last checkpoint, if there is one), write the expert, measure both."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sterna.expert.expert import Expert
from sterna.needs import needed, quiet
from sterna.progress import Progress, silent
from sterna.sources.names import some
from sterna.training.errors import Interrupted
from sterna.training.evaluation import Evaluation, evaluation
from sterna.training.methods import Prepared, compressed_expert, keep_trained, prepare, tuned_expert
from sterna.training.models import DTYPES, load_model
from sterna.training.peft_methods import refuse_broken
from sterna.training.plan import Plan, make_plan
from sterna.training.result import TrainingResult, expert_sizes
from sterna.training.runs import begin_run
from sterna.training.tokens import collator
from sterna.writing import refuse_existing, whole_file, whole_folder


def train(
    config: Mapping[str, Any],
    *,
    restart: bool = False,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> TrainingResult:
    """Run the training that a config describes, or go on with it, and write its files (`TrainingResult` names them).

    `config` is what `read_yaml` gives. A run folder of the same config is gone on with from its last checkpoint; `restart` starts over.

    Raises:
        InvalidConfig: the config, the data or the folders are wrong; every fault that could be found before training is in it.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
        MissingDependency: a package of the extra `train` is not installed.
        SternaError: the method does not fit the model, or a file could not be written.
    """
    progress("preparing", 0, 1, "plans")
    plan = make_plan(config, restart=restart)
    progress("preparing", 1, 1, "plans")
    for note in plan.notes:
        warn(note)
    begin_run(plan.run, plan.facts, plan.config, restart)
    try:
        return _run(plan, warn, progress)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(plan)) from None


def _how_to_go_on(plan: Plan) -> str:
    from sterna.tuning.checkpoints import last_checkpoint

    found = last_checkpoint(plan.run.checkpoints)
    if found is None:
        return "interrupted before the first checkpoint; the same command starts again"
    return f"interrupted; the same command goes on from step {found.step}, which lies in {plan.run.path}"


def _run(plan: Plan, warn: Callable[[str], None], progress: Progress) -> TrainingResult:
    started = time.perf_counter()
    config = plan.config
    splits = {name: split for name in ("validation", "test") if (split := getattr(plan.data, name)) is not None}
    size = config.training.per_device_eval_batch_size
    prepared_splits = {name: evaluation(plan.tokenizer, split, plan.task, plan.lengths, size) for name, split in splits.items()}
    prepared, done = _trained(plan, warn, progress)
    trained = _scores(prepared_splits, prepared.model, progress, "the trained model")
    expert = _written(plan, prepared, warn, progress)
    counts = {"trained": prepared.trained, "trained_head": prepared.trained_head}
    device = next(prepared.model.parameters()).device
    because = prepared.folder_because
    del prepared
    gc.collect()
    scores = {"trained": trained}
    if expert is not None:
        scores["expert"] = _with_expert(plan, prepared_splits, device, progress)
    result = TrainingResult(
        output=str(plan.output.folder if expert is None else plan.output.expert),
        metrics_file=str(plan.output.metrics),
        config_file=str(plan.output.config),
        run_dir=str(plan.run.path),
        method=config.method.name,
        task=plan.task,
        ends_as="expert" if expert is not None else "PEFT folder",
        folder_because=because,
        metrics=scores,
        rows={"train": len(plan.data.train), **{name: len(split) for name, split in splits.items()}},
        classes=plan.data.classes,
        sizes=_folder_sizes(plan.output.folder) if expert is None else expert_sizes(expert),
        counts=counts | ({} if expert is None else {"stored": expert_sizes(expert)["stored"]}),
        steps=done.steps,
        resumed_from=done.resumed_from,
        seconds={"training": round(done.seconds, 1), "after": round(time.perf_counter() - started - done.here, 1)},
        versions=plan.facts["versions"],
    )
    _write(plan.output.metrics, json.dumps(result.for_file(), indent=2, ensure_ascii=False) + "\n")
    _write(plan.output.config, config.to_yaml())
    return result


@dataclass(frozen=True, slots=True)
class Done:
    """How a training went: steps in all, where it was gone on from, seconds over all its parts and in this one."""

    steps: int
    resumed_from: int | None
    seconds: float
    here: float


def _trained(plan: Plan, warn: Callable[[str], None], progress: Progress) -> tuple[Prepared, Done]:
    from sterna.training.trainer import RunTrainer, Watch, stoppable
    from sterna.tuning.checkpoints import last_checkpoint

    transformers = needed("transformers")
    started = time.perf_counter()
    config = plan.config
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS then adds in one order
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    checkpoint = last_checkpoint(plan.run.checkpoints)
    if checkpoint is not None:
        warn(f"going on from step {checkpoint.step}")
    transformers.set_seed(config.seed)  # before a head is drawn
    model = load_model(plan.base, plan.task, plan.tokenizer, plan.data.classes or None, DTYPES[config.dtype])
    prepared = prepare(config, model, plan.peft)
    if prepared.adapter:
        longest = sorted(plan.rows, key=lambda row: len(row["input_ids"]))[-2:]
        refuse_broken(prepared.model, collator(plan.tokenizer, plan.task)([dict(row) for row in longest]), config.method.name)
    if prepared.folder_because is not None:
        warn(f"{prepared.folder_because}: this ends as a PEFT folder, {plan.output.folder}, and not as an expert")
        _refuse_taken(plan)
    with stoppable(warn) as stop, quiet():
        trainer = RunTrainer(
            prepared.model,
            plan.arguments,
            train_dataset=plan.rows,
            data_collator=collator(plan.tokenizer, plan.task),
            processing_class=plan.tokenizer,
            tuning=prepared.tuning,
            callbacks=[Watch(progress, stop, plan.resumable)],
            seconds=checkpoint.seconds if checkpoint else 0.0,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if checkpoint is not None and checkpoint.step >= plan.steps:  # asked to go on from its last step, the Trainer would take one more
            trainer._load_from_checkpoint(str(checkpoint.folder))
            trainer.state.global_step = checkpoint.step
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        if stop.signal is not None:
            raise KeyboardInterrupt
    here = time.perf_counter() - started
    return prepared, Done(trainer.state.global_step, checkpoint.step if checkpoint else None, round(trainer.seconds, 1), here)


def _refuse_taken(plan: Plan) -> None:
    """A folder at the output path that no earlier part of this run wrote is not replaced."""
    if not plan.run.trained.is_dir():
        refuse_existing(plan.output.folder)


def _written(plan: Plan, prepared: Prepared, warn: Callable[[str], None], progress: Progress) -> Expert | None:
    """Write the expert, or the PEFT folder of a method that makes none."""
    if prepared.tuning is not None:
        expert: Expert = tuned_expert(prepared, plan.config)
        if still := prepared.tuning.unmoved():
            warn(f"{len(still)} of {len(prepared.tuning.parts)} tensors to be trained ended as they were: {some(still)}")
        prepared.tuning.discard()
    else:
        keep_trained(prepared, plan.tokenizer, plan.run.trained)
        if prepared.folder_because is not None:
            if plan.output.folder.exists():
                shutil.rmtree(plan.output.folder)
            with whole_folder(plan.output.folder) as partial:
                shutil.copytree(plan.run.trained, partial, dirs_exist_ok=True)
            return None
        expert = compressed_expert(prepared, plan.config, plan.run.trained, warn, progress)
    expert.save(plan.output.expert)
    return expert


def _scores(splits: Mapping[str, Evaluation], model: Any, progress: Progress, of: str) -> dict[str, dict[str, float]]:
    return {name: split.scores(model, progress, f"{name} rows, {of}") for name, split in splits.items()}


def _with_expert(plan: Plan, splits: Mapping[str, Evaluation], device: torch.device, progress: Progress) -> dict[str, dict[str, float]]:
    """The scores of the plain base, loaded afresh, with the file that was written on it."""
    from sterna.expert.file import load
    from sterna.live.patch import attached

    if not splits:
        return {}
    needed("transformers").set_seed(plan.config.seed)
    model = load_model(plan.base, plan.task, plan.tokenizer, plan.data.classes or None, DTYPES[plan.config.dtype]).to(device)
    with attached(model, load(plan.output.expert), allow_narrower=plan.config.dtype != "fp32"):
        return _scores(splits, model, progress, "the expert")


def _folder_sizes(folder: Path) -> dict[str, int]:
    files = {path.name: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return {"bytes": sum(files.values()), "bytes_weights": sum(size for name, size in files.items() if name.endswith(".safetensors"))}


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())
