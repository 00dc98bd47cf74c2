"""How large is a tuned checkpoint as a patch of its base's bits, and how fast is it made and undone?

Question: For an optimizer step in bfloat16, and full fine-tunes in bfloat16 and in float32: the bytes of a lossless expert, and the time to encode
    and decode it, against general compressors on what they do best with: the XOR of the two, the two files, the planes of our own differences.
Goal: At most 0.9 times the smallest of them in bfloat16 and no larger than it in float32, at 5 times that one's encoding speed or more.
Predicted: 0.66 of zstd on the XOR and 0.85 of zstd on the planes in bfloat16: the entropies of changes given the exponent. 0.97 in float32, whose
    low bits are noise. 12 million entries a second where most change, 50 where few do: 5 to 20 times zstd -19.
Peer: zstd -19 and ZipNN on the XOR, xdelta3 -9 on the two files, zstd -19 on byte planes of the zigzagged differences of the ordered views. A peer
    that is not installed is left out: pip install zstandard zipnn; xdelta3 is a Debian package.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import causal_lm
import harness
import inputs
import sterna
from harness import Report
from sterna.demo.assets import cache_folder
from sterna.demo.options import DemoOptions, checked
from sterna.demo.run import tasks_of
from sterna.expert.file import file_pieces, from_bytes
from sterna.training.models import load_tokenizer

STEPS, BATCH, RATE, TOKENS = 8, 16, 2e-5, 128
LAYERS = (0, 15)
"""Layers of the causal language model that are measured: on all thirty, zstd -19 takes a quarter of an hour for each of its rows."""
WORDS = {torch.bfloat16: (torch.int16, np.uint16), torch.float32: (torch.int32, np.uint32)}
GOALS = {"step": 0.9, "causal": 0.9, "encoder": 1.0}
State = dict[str, torch.Tensor]
Coder = tuple[Callable[[], bytes], Callable[[bytes], object]]


def step(options: argparse.Namespace) -> tuple[str, State, State]:
    """The encoder in bfloat16 before and after one AdamW step: weights of float32 trained on real texts, rounded as they are sent."""
    tokenizer = load_tokenizer(inputs.base_folder(options))
    train = tasks_of(checked(DemoOptions()), cache_folder())[0].train
    torch.manual_seed(0)
    model: Any = inputs.classifier(options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    order = torch.randperm(len(train.texts))[: STEPS * BATCH].view(STEPS, BATCH).tolist()
    with harness.threads(harness.CORES):
        for rows in order:
            batch = tokenizer([train.texts[i] for i in rows], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
            model(**batch, labels=torch.tensor([train.labels[i] for i in rows])).loss.backward()
            before = in_bfloat16(model.bert.state_dict())
            optimizer.step()
            optimizer.zero_grad()
    after = in_bfloat16(model.bert.state_dict())
    return f"One AdamW step of the encoder, bfloat16 (step {STEPS} at rate {RATE:g})", before, after


def causal(options: argparse.Namespace) -> tuple[str, State, State]:
    base = inputs.causal_lm(options)
    if base is None:
        raise SystemExit("the causal language model is needed: python -m sterna.demo.assets --all; pip install gguf")
    tuned = causal_lm.tuned_folder(base, causal_lm.dialogue(base), causal_lm.STEPS)
    kept = tuple(f"model.layers.{layer}." for layer in LAYERS)
    both = [{name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name.startswith(kept)} for folder in (base, tuned)]
    return f"SmolLM2-135M fine-tuned {causal_lm.STEPS} steps, bfloat16, two of its thirty layers", in_bfloat16(both[0]), in_bfloat16(both[1])


def encoder(options: argparse.Namespace) -> tuple[str, State, State]:
    base, tuned = inputs.in_memory(inputs.base_folder(options)), inputs.in_memory(inputs.tuned_folder(options))
    pairs = inputs.task_pairs(base, tuned)
    title = "Full fine-tune of the encoder, float32"
    return title, {name: ours for name, ours, _ in pairs}, {name: theirs for name, _, theirs in pairs}


SETS = {"step": step, "causal": causal, "encoder": encoder}


def in_bfloat16(state: State) -> State:
    return {name: tensor.detach().bfloat16() for name, tensor in state.items() if tensor.is_floating_point()}


def words(state: State) -> np.ndarray:
    """All bit patterns, flat."""
    integers, kind = WORDS[next(iter(state.values())).dtype]
    return np.concatenate([tensor.contiguous().view(integers).numpy().view(kind).ravel() for tensor in state.values()])


def planes(patterns: np.ndarray) -> bytes:
    """The lowest bytes of all, then the next ones."""
    return np.ascontiguousarray(patterns.view(np.uint8).reshape(-1, patterns.itemsize).T).tobytes()


def differences(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Zigzagged differences of the ordered views, in words of the same size (modulo their range)."""
    sign, full = 1 << (8 * before.itemsize - 1), (1 << 8 * before.itemsize) - 1

    def ordered(patterns: np.ndarray) -> np.ndarray:
        wide = patterns.astype(np.int64)
        return np.where(wide & sign, full - wide, wide + sign)

    change = ordered(after) - ordered(before)
    return np.where(change >= 0, 2 * change, -2 * change - 1).astype(before.dtype)


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        harness.note(f"without {name}: {error}")
        return None


def coders(base: State, tuned: State, folder: Path) -> Iterator[tuple[str, Coder]]:
    """Each side by name: what makes its bytes, and what undoes them. Ours takes and gives tensors; the others get their input ready-made."""
    before, after = words(base), words(tuned)

    def ours() -> bytes:
        return b"".join(bytes(piece) for piece in file_pieces(sterna.compress(base, tuned, lossless=True)))

    yield "lossless expert", (ours, lambda data: sterna.verify(from_bytes(data), base))
    if zstandard := installed("zstandard"):
        compressor, expander = zstandard.ZstdCompressor(level=19), zstandard.ZstdDecompressor()
        for name, data in (("zstd -19, XOR", (before ^ after).tobytes()), ("zstd -19, planes of differences", planes(differences(before, after)))):
            yield name, (lambda data=data: compressor.compress(data), expander.decompress)
    if zipnn := installed("zipnn"):
        dtype = "bfloat16" if before.itemsize == 2 else "float32"
        xor = (before ^ after).tobytes()
        coder = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)
        yield "ZipNN, XOR", (lambda: coder.compress(bytearray(xor)), lambda data: coder.decompress(data))
    if shutil.which("xdelta3"):
        paths = [str(folder / name) for name in ("base", "tuned", "delta", "again")]
        before.tofile(paths[0])
        after.tofile(paths[1])

        def encode() -> bytes:
            subprocess.run(["xdelta3", "-9", "-f", "-e", "-B", str(before.nbytes), "-s", *paths[:3]], check=True)
            return Path(paths[2]).read_bytes()

        def decode(data: bytes) -> None:
            Path(paths[2]).write_bytes(data)
            subprocess.run(["xdelta3", "-f", "-d", "-B", str(before.nbytes), "-s", paths[0], paths[2], paths[3]], check=True)

        yield "xdelta3 -9, the two files", (encode, decode)
    else:
        harness.note("without xdelta3: it is not on the path")


def seconds(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """The shortest of `rounds` times, one where that is long; and the result."""
    best, result = float("inf"), None
    for _ in range(rounds):
        started = time.perf_counter()
        result = work()
        taken = time.perf_counter() - started
        best = min(best, taken)
        if taken > 3:
            break
    return best, result


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes and times of every side for one set."""
    title, base, tuned = SETS[name](options)
    sterna.compress({"w": base[next(iter(base))][:2]}, {"w": tuned[next(iter(base))][:2] + 1}, lossless=True)  # the kernel is compiled
    rounds = 1 if options.quick else 3
    before, after = words(base), words(tuned)
    found: dict[str, Any] = {"title": title, "entries": before.size, "changed": int((before != after).sum()), "bytes": before.nbytes, "sides": {}}
    with tempfile.TemporaryDirectory() as folder:
        for side, (encode, decode) in coders(base, tuned, Path(folder)):
            encoding, data = seconds(encode, rounds)
            decoding, _ = seconds(lambda decode=decode, data=data: decode(data), rounds)
            found["sides"][side] = {"bytes": len(data), "encode": encoding, "decode": decoding}
            harness.note(f"{name}: {side}: {len(data):,} bytes, encoded in {encoding:.2f} s, decoded in {decoding:.2f} s")
    return found


def main() -> None:
    extra = ("--sets", {"nargs": "+", "choices": list(SETS), "default": list(SETS), "help": "those to measure; of the others the last results stay"})
    options = harness.options(__doc__, extra)
    report = Report(__file__, __doc__ or "", options.quick)
    last = harness.RESULTS / "lossless.json"
    sets: dict[str, Any] = json.loads(last.read_text(encoding="utf-8"))["sets"] if last.exists() else {}
    sets.update({name: measure(name, options) for name in options.sets})
    report.result["sets"] = sets
    for name in filter(sets.__contains__, SETS):
        one = sets[name]
        ours, peers = one["sides"]["lossless expert"], {side: told for side, told in one["sides"].items() if side != "lossless expert"}
        columns = ("", "MB", "bits an entry", "of the tuned bytes", "encode, MB/s", "decode, MB/s")
        rows = [
            [side, told["bytes"] / 1e6, 8 * told["bytes"] / one["entries"], f"{told['bytes'] / one['bytes']:.4f}"]
            + [one["bytes"] / 1e6 / told[way] for way in ("encode", "decode")]
            for side, told in one["sides"].items()
        ]
        note = "One thread. Ours is a whole file, and its times are those of `compress` and `verify`, with the hashing of base and tuned model."
        report.table(f"{one['title']}: {one['changed'] / one['entries']:.1%} of {one['entries']:,} entries changed", columns, rows, note)
        if peers:
            smallest = min(peers, key=lambda side: peers[side]["bytes"])
            report.goal(
                f"{name}: bytes over the smallest peer's ({smallest})", round(ours["bytes"] / peers[smallest]["bytes"], 4), at_most=GOALS[name]
            )
            report.goal(f"{name}: encoding speed over that peer's", round(peers[smallest]["encode"] / ours["encode"], 2), at_least=5)
    report.write()


if __name__ == "__main__":
    main()
