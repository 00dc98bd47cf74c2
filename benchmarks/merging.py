"""How long does it take to merge eight experts by TIES, and how much memory, beside mergekit on the checkpoints that they came from?

Question: Eight experts of a causal language model of 135 million parameters, at density .1, merged by TIES and written: seconds, and the peak of
    anonymous memory above the level after imports; beside mergekit on the eight full checkpoints.
Goal: At most a tenth of mergekit's time and an eighth of its memory above imports.
Predicted: 3 s and 60 MB beside 100 s and 1 GB: 108 million non-zeros are decoded twice at 2 ns and 77 million coded at 5 ns; mergekit sorts every
    tensor of every parent, and holds the embedding nine times.
Peer: mergekit's ties, with density .1 and its defaults, in an environment of its own (make mergekit), on bfloat16 checkpoints.
Note: The base has the shapes of SmolLM2-135M and normal noise; each parent is the base plus noise. Writing is part of both. One thread each.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file

import harness
import sterna
from memory import anonymous

MERGEKIT = Path(os.environ.get("STERNA_MERGEKIT_PYTHON", Path(__file__).parents[1] / ".venv-mergekit" / "bin" / "python"))
PARENTS, DENSITY, ROUNDS = 8, 0.1, 2
HIDDEN, INNER, VALUES, VOCABULARY, LAYERS = 576, 1536, 192, 49152, 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": VOCABULARY, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
OURS = """
import sys, time
import numpy, torch
import sterna
torch.set_num_threads(1)
method, out, *paths = sys.argv[1:]
small = [sterna.compress({"w": torch.zeros(64, 64)}, {"w": torch.randn(64, 64)}, density=0.1, force=True) for _ in range(2)]
sterna.merge(small, method, tasks=["a", "b"]).digest  # compiled kernels are loaded from their cache
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
sterna.merge(paths, method).save(out)
print(time.perf_counter() - started, flush=True)
sys.stdin.readline()
"""
THEIRS = """
import sys, time
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
torch.set_num_threads(1)
method, density, out, base, *paths = sys.argv[1:]
models = [{"model": path, "parameters": {"weight": 1.0, "density": float(density)}} for path in paths]
config = MergeConfiguration.model_validate({"merge_method": method, "base_model": base, "models": models, "dtype": "bfloat16"})
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
run_merge(config, out, MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
print(time.perf_counter() - started, flush=True)
sys.stdin.readline()
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        part = f"model.layers.{layer}."
        found |= {
            f"{part}self_attn.{name}_proj.weight": (rows, HIDDEN) for name, rows in (("q", HIDDEN), ("k", VALUES), ("v", VALUES), ("o", HIDDEN))
        }
        found |= {f"{part}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        found |= {f"{part}mlp.down_proj.weight": (HIDDEN, INNER)}
        found |= {f"{part}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return found


def write(folder: Path, layers: int) -> tuple[Path, list[Path], list[Path]]:
    """The base's folder, the tuned ones', and their experts."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes(layers).items()}
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    folders = [folder / name for name in ("base", *(f"tuned{number}" for number in range(PARENTS)))]
    experts = [folder / f"expert{number}.safetensors" for number in range(PARENTS)]
    for number, place in enumerate(folders):
        place.mkdir()
        (place / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        tensors = base if not number else {n: (t + 0.002 * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in base.items()}
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        if number:
            sterna.compress(folders[0], place, density=DENSITY).save(experts[number - 1])
    return folders[0], folders[1:], experts


def watched(python: str | Path, program: str, *arguments: object) -> tuple[float, int]:
    """(seconds, peak of anonymous memory above the level after imports) of a program that says when it is ready, looked at every 2 ms."""
    command = [str(python), "-c", program, *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or str(python) == sys.executable}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        _line(worker.stdout, "ready")
        level = highest = anonymous(worker.pid)
        worker.stdin.write("go\n")
        while not select.select([worker.stdout], [], [], 0.002)[0]:
            highest = max(highest, anonymous(worker.pid))
        seconds = float(_line(worker.stdout))
        worker.stdin.write("done\n")
    return seconds, highest - level


def _line(stream: IO[str], wanted: str = "") -> str:
    line = stream.readline()
    while wanted and line and line.strip() != wanted:
        line = stream.readline()
    if not line:
        raise SystemExit("a side of the benchmark ended early")
    return line


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    rounds = 1 if options.quick else ROUNDS
    times: dict[str, list[float]] = {"sterna": [], "mergekit": []}
    peaks: dict[str, list[int]] = {"sterna": [], "mergekit": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tuned, experts = write(folder, 3 if options.quick else LAYERS)
        for number in range(rounds):
            sides = {"sterna": (sys.executable, OURS, "ties", folder / "merged.safetensors", *experts)}
            if MERGEKIT.exists():
                sides["mergekit"] = (MERGEKIT, THEIRS, "ties", DENSITY, folder / f"merged{number}", base, *tuned)
            for side, (python, program, *arguments) in sides.items():
                seconds, above = watched(python, program, *arguments)
                times[side].append(seconds)
                peaks[side].append(above)
                harness.note(f"{side}: {seconds:.1f} s, {above / 1e6:.0f} MB")
        size = (folder / "merged.safetensors").stat().st_size
    if times["mergekit"]:
        report.goal("time over mergekit's", harness.ratio(times["sterna"], times["mergekit"]), at_most=0.1)
        report.goal("memory above imports over mergekit's", round(max(peaks["sterna"]) / min(peaks["mergekit"]), 4), at_most=0.125)
    rows = [[side, *(round(value, 2) for value in (min(of), max(of))), round(max(peaks[side]) / 1e6)] for side, of in times.items() if of]
    columns = ("", "seconds, least", "seconds, most", "anonymous memory above imports, MB")
    report.table(
        f"TIES of {PARENTS} experts of 135 million parameters at density {DENSITY}, one thread; ours takes {size / 1e6:.1f} MB", columns, rows
    )
    report.write()


if __name__ == "__main__":
    main()
