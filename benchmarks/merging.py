"""How long does it take to merge eight experts, and how much memory, beside mergekit on checkpoints and PEFT on adapters?

Question: Eight experts of a causal language model of 135 million parameters, at density .1, merged and written: seconds, and the peak of anonymous
    memory above the level after imports. Of full fine-tunes by TIES, beside mergekit on the eight full checkpoints; of LoRA of rank 16 on all linear
    layers by stacking, by SVD and by TIES cut to rank 16, beside PEFT's add_weighted_adapter on folders with the same factors.
Goal: At most a tenth of mergekit's time and an eighth of its memory above imports; the same of PEFT.
Predicted: 3 s and 60 MB beside 100 s and 1 GB: 108 million non-zeros are decoded twice at 2 ns and 77 million coded at 5 ns; mergekit sorts every
    tensor of every parent, and holds the embedding nine times. LoRA: 1 s stacked and 3 s by SVD of factors, beside PEFT's 10 s to load and a dense
    SVD of each of 210 matrices, 60 s; TIES of 106 million entries at 150 ns, 15 s beside 100.
Peer: mergekit's ties, with density .1 and its defaults, in an environment of its own (make mergekit), on bfloat16 checkpoints; PEFT's cat, svd and
    ties_svd (density .2), which need the base in memory.
Note: The base has the shapes of SmolLM2-135M and normal noise; each parent is the base plus noise. Reading and writing are part of all. One thread
    each. What is lost is held against the method's own result on the dense products, in the first layer.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file, save_file

import harness
import sterna
from memory import anonymous
from sterna.sources.adapter import CONFIG as CONFIG_NAME
from sterna.sources.adapter import PREFIX, WEIGHTS, part_names, write_adapter

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


LORA = """
import sys, time
import torch
import sterna
torch.set_num_threads(1)
method, form, out, *paths = sys.argv[1:]
cut = {"parameters": {"lora": "svd", "rank": 16}}
options = {"cat": {}, "svd": cut, "ties_svd": cut | {"density": 0.2, "semantics": "peft"}}
sterna.merge(paths[:1], method, **options[form]).digest  # compiled kernels are loaded from their cache
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
sterna.merge(paths, method, **options[form]).save(out)
print(time.perf_counter() - started, flush=True)
sys.stdin.readline()
"""
PEFT = """
import sys, time
import peft, torch, transformers
torch.set_num_threads(1)
form, out, base, *paths = sys.argv[1:]
options = {"cat": {}, "svd": {"svd_rank": 16}, "ties_svd": {"svd_rank": 16, "density": 0.2}}
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), paths[0], adapter_name="task0")
for number, path in enumerate(paths[1:], 1):
    model.load_adapter(path, f"task{number}")
model.add_weighted_adapter([f"task{number}" for number in range(len(paths))], [1.0] * len(paths), "merged", combination_type=form, **options[form])
model.save_pretrained(out, selected_adapters=["merged"])
print(time.perf_counter() - started, flush=True)
sys.stdin.readline()
"""
FORMS = {"cat": "task_arithmetic", "svd": "task_arithmetic", "ties_svd": "ties"}
"""PEFT's names of combinations, and the method that does the same here."""
RANK = 16


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


def write_adapters(folder: Path, base: Path, layers: int) -> tuple[list[Path], list[Path]]:
    """Experts of LoRA adapters of noise, and PEFT folders with just the factors that they have."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    experts, folders = [], []
    for number in range(PARENTS):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (out, inner) in ((name, shape) for name, shape in shapes(layers).items() if "_proj" in name):
            names = part_names(name.removesuffix(".weight"), "lora")
            sizes = ((RANK, inner), (out, RANK))
            tensors |= {part: 0.02 * torch.randn(size, generator=generator) for part, size in zip(names, sizes, strict=True)}
        made = folder / f"adapter{number}"
        made.mkdir()
        write_adapter(made, config, tensors)
        experts.append(folder / f"lora{number}.safetensors")
        expert = sterna.compress(base, made, density=DENSITY)
        expert.save(experts[-1])
        folders.append(sterna.apply(base, expert, folder / f"coded{number}"))
    return experts, folders


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """What an expert, or a PEFT folder of one, adds to the linear layers of the first layer, dense."""
    if path.is_file():
        expert = sterna.load(path)
        first = tuple(change for change in expert.changes if ".layers.0." in change.name)
        return replace(expert, changes=first).task_vector()
    config, tensors = json.loads((path / CONFIG_NAME).read_text()), load_file(path / WEIGHTS)
    found = {}
    for name, A in tensors.items():
        if ".layers.0." in name and name.endswith("lora_A.weight"):
            B, module = tensors[name.replace("lora_A", "lora_B")], name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            rank, alpha = ((config.get(f"{key}_pattern") or {}).get(module, config[whole]) for key, whole in (("rank", "r"), ("alpha", "lora_alpha")))
            found[f"{module}.weight"] = alpha / rank * (B @ A)
    return found


def lost(path: Path, form: str, parents: list[dict[str, torch.Tensor]]) -> float:
    """|M - M'| / |M| over the first layer, with M what the method makes of the dense products."""
    from peft.utils.merge_utils import ties

    made, squares, difference = deltas(path), 0.0, 0.0
    for name in parents[0]:
        dense = [parent[name] for parent in parents]
        wanted = ties(dense, torch.ones(len(dense)), density=0.2) if form == "ties_svd" else torch.stack(dense).double().sum(0)
        squares += float((wanted.double() ** 2).sum())
        difference += float(((wanted.double() - made[name].double()) ** 2).sum())
    return (difference / squares) ** 0.5


def merge_adapters(report: harness.Report, folder: Path, base: Path, layers: int, rounds: int) -> None:
    """LoRA experts by every form, beside PEFT."""
    experts, folders = write_adapters(folder, base, layers)
    parents = [deltas(path) for path in experts]
    rows = []
    for form, method in FORMS.items():
        times: dict[str, list[float]] = {"sterna": [], "PEFT": []}
        peaks: dict[str, list[int]] = {"sterna": [], "PEFT": []}
        for number in range(rounds):
            ours, theirs = folder / f"{form}{number}.safetensors", folder / f"{form}{number}"
            sides = {"sterna": (LORA, method, form, ours, *experts), "PEFT": (PEFT, form, theirs, base, *folders)}
            for side, (program, *arguments) in sides.items():
                seconds, above = watched(sys.executable, program, *arguments)
                times[side].append(seconds)
                peaks[side].append(above)
                harness.note(f"{form}, {side}: {seconds:.1f} s, {above / 1e6:.0f} MB")
        report.goal(f"{form}: time over PEFT's", harness.ratio(times["sterna"], times["PEFT"]), at_most=0.1)
        report.goal(f"{form}: memory above imports over PEFT's", round(max(peaks["sterna"]) / min(peaks["PEFT"]), 4), at_most=0.125)
        for side, path in (("sterna", ours), ("PEFT", theirs / "merged")):
            size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
            seconds_, above_ = (round(min(times[side]), 2), round(max(times[side]), 2)), round(max(peaks[side]) / 1e6)
            rows.append([f"{form}, {side}", *seconds_, above_, f"{lost(path, form, parents):.2g}", round(size / 1e6, 2)])
    columns = ("", "seconds, least", "seconds, most", "anonymous memory above imports, MB", "lost, relative", "file, MB")
    report.table(f"{PARENTS} LoRA experts of rank {RANK} on {7 * layers} linear layers, merged, one thread", columns, rows)


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
        merge_adapters(report, folder, base, 3 if options.quick else LAYERS, rounds)
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
