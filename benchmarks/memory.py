"""How much memory does compression take on large checkpoints?

Question: What is the peak of anonymous memory of sterna.compress and save above the level after imports, on sharded checkpoints of growing size?
Goal: At most 1 GB plus one row block (4 MB), whatever the checkpoint.
Predicted: 60 MB at every size: chunks of 4 MB for base, tuned and difference, histograms, and a few megabytes of Python; tensors are mapped from
    their files, and the coded streams go to a temporary file, a tenth of a gigabyte for 4 GB, that is mapped too.
Peer: The dense procedure would hold tau and |tau|: twice the checkpoint.
Note: The checkpoints hold normal noise in float32 shards of half a gigabyte. A process of its own compresses each; this one watches its RssAnon.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file

import harness

GIGABYTE = 1 << 30
ROW_BLOCK = 4 << 20
SHAPE = (8192, 4096)  # 128 MB a tensor
PER_SHARD = 4
WORK = """
import sys, time
import torch, sterna
torch.set_num_threads(1)
small = {"weight": torch.zeros(64, 64)}, {"weight": torch.ones(64, 64) * torch.arange(64)}
sterna.compress(*small, density=0.1, force=True).digest  # compiled kernels are loaded from their cache
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
sterna.compress(sys.argv[1], sys.argv[2], density=0.05).save(sys.argv[3])
print(time.perf_counter() - started, flush=True)
sys.stdin.readline()
"""


def write_checkpoints(folder: Path, tensors: int) -> tuple[Path, Path]:
    """A base and a tuned folder of that many tensors each, in shards with an index."""
    sides = folder / "base", folder / "tuned"
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for side in sides:
        side.mkdir()
    for first in range(0, tensors, PER_SHARD):
        names = [f"layers.{i:04}.weight" for i in range(first, min(first + PER_SHARD, tensors))]
        file = f"model-{first // PER_SHARD + 1:05}-of-{-(-tensors // PER_SHARD):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        base = {name: torch.rand(SHAPE, generator=generator) for name in names}
        save_file(base, sides[0] / file)
        for tensor in base.values():
            tensor += 1e-3 * torch.randn(SHAPE, generator=generator)
        save_file(base, sides[1] / file)
    for side in sides:
        (side / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sides


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process holds now."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this system does not tell RssAnon: the benchmark needs Linux")


def peak(base: Path, tuned: Path, into: Path) -> tuple[int, int, float]:
    """(level after imports, peak, seconds) of one compress and save in a process of its own, looked at every 2 ms."""
    command = [sys.executable, "-c", WORK, str(base), str(tuned), str(into)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdout.readline()
        level = highest = anonymous(worker.pid)
        worker.stdin.write("go\n")
        reader = worker.stdout
        while not _ready(reader):
            highest = max(highest, anonymous(worker.pid))
        seconds = float(reader.readline())
        worker.stdin.write("done\n")
    return level, highest, seconds


def _ready(stream: IO[str]) -> bool:
    return bool(select.select([stream], [], [], 0.002)[0])


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    rows, above = [], {}
    for gigabytes in (0.5, 1) if options.quick else (1, 2, 4):
        tensors = int(gigabytes * GIGABYTE / (4 * SHAPE[0] * SHAPE[1]))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            sides = write_checkpoints(Path(folder), tensors)
            harness.note(f"{gigabytes:g} GB written in {time.perf_counter() - started:.0f} s")
            file = Path(folder) / "expert.safetensors"
            level, highest, seconds = peak(*sides, file)
            entries = tensors * SHAPE[0] * SHAPE[1]
            above[gigabytes] = highest - level
            megabytes = [round(size / 1e6) for size in (level, highest, highest - level, file.stat().st_size)]
            rows.append([f"{gigabytes:g} GB", tensors, *megabytes, round(seconds, 1), round(entries / seconds / 1e6, 1)])
    worst = max(above.values())
    report.goal("peak above the level after imports, the largest", round(worst / 1e9, 3), at_most=round((1e9 + ROW_BLOCK) / 1e9, 3), unit="GB")
    columns = ("each checkpoint", "tensors", "after imports, MB", "peak, MB", "above, MB", "expert, MB", "seconds", "million parameters/s")
    report.table("Anonymous memory of compress and save, density 0.05, one thread", columns, rows)
    report.write()


if __name__ == "__main__":
    main()
