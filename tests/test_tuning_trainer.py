"""transformers' Trainer and accelerate over a tuned model: small checkpoints, resuming to the bit, two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import sterna
from models import made, same_state, state_of
from sterna.errors import InvalidFile
from sterna.tuning.checkpoints import last_checkpoint

ROWS = [{"input_ids": [(7 * i + j) % 40 for j in range(3 + i % 3)], "labels": i % 3} for i in range(24)]
METHODS: dict[str, Any] = {
    "pafi": sterna.PaFi(density=0.2, gradient="sampled"),
    "hiwi bias": sterna.HiWi(target="bias", rank=2),
    "hiwi weight": sterna.HiWi(target="weight", rank=2),
}


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def trainer_over(folder: Path, method: Any, kind: type = sterna.Trainer, **arguments: Any) -> tuple[nn.Module, sterna.Tuning, Any]:
    model = made("bert")
    torch.manual_seed(1)
    tuning = sterna.tune(model, method)
    usual = {"max_steps": 8, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 2}
    settings = transformers.TrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no", **{**usual, **arguments}
    )
    extra = {"tuning": tuning} if kind is sterna.Trainer else {}
    trainer = kind(model, settings, train_dataset=ROWS, eval_dataset=ROWS, data_collator=padded, **extra)
    return model, tuning, trainer


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_checkpoints_are_small_and_go_on_to_the_bit(method: Any, tmp_path: Path) -> None:
    model, tuning, trainer = trainer_over(tmp_path / "whole", method)
    trainer.train()
    wanted = tuning.expert()
    files = {file.name for file in (tmp_path / "whole" / "checkpoint-6").iterdir()}
    assert "sterna_tuning.safetensors" in files
    assert not {name for name in files if name.startswith("model")}
    other, again, resumed = trainer_over(tmp_path / "again", method)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    (tmp_path / "again" / "checkpoint-6").mkdir()  # killed while this one was written
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert again.expert().content_digest == wanted.content_digest
    assert same_state(other, state_of(model))


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    arguments = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 3e-1}
    model, tuning, trainer = trainer_over(tmp_path, METHODS["pafi"], **arguments)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    other, again, _ = trainer_over(tmp_path / "other", METHODS["pafi"])
    again.load(best / "sterna_tuning.safetensors")
    assert same_state(model, state_of(other))
    assert tuning.expert().content_digest == again.expert().content_digest


def test_a_folder_without_a_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    _, _, trainer = trainer_over(tmp_path, METHODS["pafi"])
    (tmp_path / "checkpoint-1").mkdir()
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(InvalidFile, match="expected a checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_plain_trainer_trains_the_same(tmp_path: Path) -> None:
    """Ours only makes checkpoints small."""
    _, tuning, trainer = trainer_over(tmp_path / "ours", METHODS["pafi"])
    trainer.train()
    _, other, plain = trainer_over(tmp_path / "plain", METHODS["pafi"], transformers.Trainer, save_strategy="no")
    plain.train()
    assert tuning.expert().content_digest == other.expert().content_digest


def test_without_a_tuning_it_is_the_plain_trainer(tmp_path: Path) -> None:
    model = made("bert")
    settings = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True)
    sterna.Trainer(model, settings, train_dataset=ROWS, data_collator=padded).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["pafi", "hiwi"])
def test_two_processes_send_only_what_is_trained(kind: str, tmp_path: Path) -> None:
    """Both end with one expert: that of one process over the whole batch. What travels is counted in the gradient buckets themselves."""
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1)]
    assert reports[0] == reports[1]
    assert reports[0]["travelled"] == reports[0]["trained"]
    model = made("bert")
    torch.manual_seed(1)
    tuning = sterna.tune(model, METHODS["pafi" if kind == "pafi" else "hiwi weight"])
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.05)
    for _ in range(3):
        (model(input_ids=(torch.arange(24).reshape(4, 6) * 7) % 40).logits - 1).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    alone = tuning.state_dict()
    tuning.load(tmp_path / "tuning.safetensors")
    for name, tensor in tuning.state_dict().items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-6)
