"""One of two processes that tune a model together, by accelerate's DistributedDataParallel over gloo. Started by test_tuning_trainer.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import sterna
from models import made


def main(kind: str, target: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = made("bert")
    torch.manual_seed(1)
    method: Any = {"pafi": sterna.PaFi(density=0.2, gradient="sampled"), "hiwi": sterna.HiWi(target="weight", rank=2)}[kind]
    tuning = sterna.tune(model, method)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.05)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    travelled = []

    def counted(state, bucket):  # torch checks annotations and takes no strings
        travelled.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, counted)
    rows = (torch.arange(24).reshape(4, 6) * 7) % 40
    mine = rows[2 * accelerator.process_index :][:2]
    for _ in range(3):
        travelled.clear()
        loss = (wrapped(input_ids=mine).logits - 1).pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    digest = tuning.expert().content_digest
    if accelerator.is_main_process:
        tuning.save(target / "tuning.safetensors")
    report = {"travelled": sum(travelled), "trained": tuning.trained + tuning.trained_head, "digest": digest}
    (target / f"{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
