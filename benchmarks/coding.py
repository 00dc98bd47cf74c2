"""How small and how quick are the codings, beside plain layouts and general compressors of the same levels?

Question: Bytes, encoding and decoding speed of `small` and `fast`, of the two bit masks as they are, by zstd -19 and by LZMA, of int32 positions with
    16-bit values and of BitDelta's one bit a weight: without structure, on real full fine-tunes, LoRA adapters and a PaFi run.
Goal: The small file, exact tensors not counted, at most .68, .70 and .75 times the i.i.d. entropy at densities .05, .10 and .20 on full fine-tunes of
    the encoder; its streams at most .90 times on LoRA and PaFi experts, with a file at most 3 KB more; 1.01 times on positions without structure.
    8 million parameters a second a thread or more, encoding and decoding.
Predicted: .56, .59 and .62 on 20 newsgroups, on which the model was made; less on the causal LM, whose few steps leave an update of lower rank. LoRA
    .80 to .85; PaFi 1.00: its rows and columns hold too few trained entries to tell one from another. 25 to 60 million parameters a second.
Peer: zstandard -19 and LZMA (preset 9) of the two masks; int32 positions with 16-bit values; BitDelta's layout.
"""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import causal_lm
import causal_lm_training
import harness
import inputs
import pafi_ternary
import sterna
from harness import Side
from sterna.codings import AnyCoding, by_name
from sterna.expert.changes import Ternary
from sterna.recoding import recoded, stream_of
from sterna.summary import ternary_entropy

LIMITS = {0.05: 0.68, 0.1: 0.70, 0.2: 0.75}
COLUMNS = ("layout", "KB", "bits a parameter", "of the i.i.d. entropy", "encoding, M parameters/s", "decoding, M parameters/s")
CHART = Path(__file__).parents[1] / "docs" / "coding.svg"


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to keep the levels of an expert: bytes, and the seconds that it takes to make them and to read them."""

    name: str
    bytes: float
    encoding: float | None
    decoding: float | None


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The least of some rounds, on this thread."""
    return min(Side(work).seconds() for _ in range(rounds))


def masks(levels: np.ndarray) -> bytes:
    """All positives, then all negatives, a bit each."""
    return np.packbits(levels > 0, bitorder="little").tobytes() + np.packbits(levels < 0, bitorder="little").tobytes()


def coded(ternaries: list[Ternary], coding: AnyCoding) -> Layout:
    """Streams of a coding, from positions and back to positions."""
    codes = [ternary.codes() for ternary in ternaries]
    new = recoded(ternaries, coding)

    def encode() -> None:
        for ternary, positions in zip(ternaries, codes, strict=True):
            stream_of(positions, ternary.shape, coding)

    def decode() -> None:
        for ternary in new:
            ternary.codes()

    return Layout(coding.name, sum(t.stop - t.start for t in new), seconds(encode), seconds(decode))


def plain(ternaries: list[Ternary]) -> Iterator[Layout]:
    """What the same levels take without a coding of ours."""
    levels = np.concatenate([ternary.levels().ravel() for ternary in ternaries])
    packed = masks(levels)
    half = len(packed) // 2

    def unpack(data: bytes = packed) -> np.ndarray:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").view(np.int8)
        return bits[: 8 * half] - bits[8 * half :]

    yield Layout("two bit masks", len(packed), seconds(lambda: masks(levels)), seconds(unpack))
    for name, compress, decompress in compressors():
        started = time.perf_counter()
        small = compress(packed)
        yield Layout(f"masks, {name}", len(small), time.perf_counter() - started, seconds(lambda small=small, undo=decompress: undo(small)))
    count = int(np.count_nonzero(levels))
    yield Layout("int32 positions, 16-bit values", 6 * count, seconds(lambda: np.flatnonzero(levels).astype(np.int32)), None)
    matrices = sum(len(ternary.shape) > 1 for ternary in ternaries)
    yield Layout("BitDelta: a bit a weight, a scale a matrix", levels.size / 8 + 4 * matrices, None, None)


def compressors() -> Iterator[tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    try:
        import zstandard
    except ImportError:
        harness.note("without zstd: pip install zstandard")
    else:
        yield "zstd -19", zstandard.ZstdCompressor(level=19).compress, zstandard.ZstdDecompressor().decompress
    yield "LZMA -9", lambda data: lzma.compress(data, preset=9), lzma.decompress


def profile(report: harness.Report, title: str, expert: sterna.Expert, general: bool = True) -> dict[str, Layout]:
    """The table of one expert. What is decoded are positions under our codings, masks under the others."""
    ternaries = list(expert.ternaries)
    entries, count = sum(t.size for t in ternaries), sum(t.count for t in ternaries)
    entropy = entries * ternary_entropy(count / entries) / 8
    layouts = [coded(ternaries, by_name(name)) for name in ("small", "fast")]
    layouts += plain(ternaries) if general else ()
    speed = [[None if s is None else round(entries / s / 1e6, 1) for s in (layout.encoding, layout.decoding)] for layout in layouts]
    rows = [
        [layout.name, round(layout.bytes / 1e3, 1), f"{8 * layout.bytes / entries:.4f}", f"{layout.bytes / entropy:.3f}", *pair]
        for layout, pair in zip(layouts, speed, strict=True)
    ]
    report.table(f"{title}: {entries:,} parameters, density {count / entries:.3g}", COLUMNS, rows)
    found = {layout.name: layout for layout in layouts}
    for side, s in (("encoding", found["small"].encoding), ("decoding", found["small"].decoding)):
        if entries > 1_000_000 and s:
            report.goal(f"small, {side}, {title}", round(entries / s / 1e6, 1), at_least=8, unit="M parameters/s")
    return found


def file_goal(report: harness.Report, title: str, expert: sterna.Expert, limit: float) -> None:
    """The whole file but its exact tensors, against the i.i.d. entropy of its levels."""
    sizes = sterna.inspect(sterna.recode(expert, "small"))
    entropy = sizes.parameters * ternary_entropy(sizes.nonzeros / sizes.parameters) / 8
    report.goal(f"small file / entropy, {title}", round((sizes.bytes - sizes.bytes_exact) / entropy, 4), at_most=limit)


def streams_goal(report: harness.Report, title: str, expert: sterna.Expert) -> None:
    """Streams against the entropy, and what the file has beside them."""
    sizes = sterna.inspect(sterna.recode(expert, "small"))
    entropy = sizes.parameters * ternary_entropy(sizes.nonzeros / sizes.parameters) / 8
    report.goal(f"small streams / entropy, {title}", round(sizes.bytes_streams / entropy, 4), at_most=0.90)
    report.goal(f"the file beside them, {title}", sizes.bytes - sizes.bytes_exact - sizes.bytes_streams, at_most=3000, unit="bytes")


def uniform(report: harness.Report, base: inputs.State) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    normal = inputs.normal_tuned(zeros, scale=1.0)
    for density in (0.01, 0.05, 0.2, 0.5):
        expert = sterna.compress(zeros, normal, density=density, force=True)
        sizes = sterna.inspect(sterna.recode(expert, "small"))
        entropy = sizes.parameters * ternary_entropy(sizes.nonzeros / sizes.parameters) / 8
        report.goal(f"small streams / entropy, uniform positions, density {density:g}", round(sizes.bytes_streams / entropy, 4), at_most=1.01)
        if density == 0.05:
            profile(report, "uniform positions", expert)


def chart(found: dict[str, dict[str, Layout]], entries: dict[str, int]) -> None:
    """Size against decoding speed, both on logarithmic axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sterna", "font.size": 8}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axis = figure.subplots()
        for (title, layouts), mark in zip(found.items(), "osD^v", strict=False):
            shown = [layout for layout in layouts.values() if layout.decoding]
            sizes = [8 * layout.bytes / entries[title] for layout in shown]
            speeds = [entries[title] / (layout.decoding or 1) / 1e6 for layout in shown]
            axis.scatter(speeds, sizes, marker=mark, label=title, alpha=0.8)
            if mark == "o":
                for layout, x, y in zip(shown, speeds, sizes, strict=True):
                    axis.annotate(layout.name, (x, y), textcoords="offset points", xytext=(6, 3))
        axis.set(xscale="log", yscale="log", xlabel="decoding, million parameters a second, one thread", ylabel="bits a parameter")
        axis.margins(x=0.2)
        axis.set_yticks([0.2, 0.3, 0.5, 0.75, 1, 2])
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
        axis.legend(frameon=False, loc="upper left")
        figure.savefig(CHART, metadata={"Date": None})


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base = inputs.in_memory(inputs.base_folder(options))
    found: dict[str, dict[str, Layout]] = {}
    entries: dict[str, int] = {}

    def shown(title: str, expert: sterna.Expert) -> None:
        found[title] = profile(report, title, expert)
        entries[title] = sum(ternary.size for ternary in expert.ternaries)

    for task, folder in (("20 newsgroups", inputs.tuned_folder(options)), ("election tweets", inputs.second_folder(options))):
        tuned = inputs.in_memory(folder)
        for density, limit in LIMITS.items():
            expert = sterna.compress(base, tuned, density=density)
            file_goal(report, f"full fine-tune on {task}, density {density:g}", expert, limit)
            if density == 0.05 or (density == 0.2 and task == "20 newsgroups"):
                shown(f"full fine-tune on {task}, density {density:g}", expert)
    uniform(report, base)
    pafi = sterna.compress(inputs.base_folder(options), pafi_ternary.trained("PaFi .005"), density=0.3, alpha=2.0)
    streams_goal(report, "PaFi .005 of the encoder, density .3", pafi)
    profile(report, "PaFi .005 of the encoder", pafi)
    adapter = sterna.compress(inputs.base_folder(options), inputs.adapter_folder(options), density=0.1)
    streams_goal(report, "LoRA r=8 of the encoder, density 0.1", adapter)
    profile(report, "LoRA r=8 of the encoder", adapter)
    if folder := inputs.causal_lm(options):
        trained = causal_lm_training.trained(causal_lm_training.LORA, 5e-3, folder, causal_lm_training.dialogue(folder), causal_lm_training.STEPS)
        for density in LIMITS:
            adapter = sterna.compress(folder, trained, density=density)
            streams_goal(report, f"LoRA r=9 of the causal LM, density {density:g}", adapter)
        profile(report, "LoRA r=9 of the causal LM", adapter)
        whole = causal_lm.tuned_folder(folder, causal_lm.dialogue(folder), causal_lm.STEPS)
        for density, limit in LIMITS.items():
            expert = sterna.compress(folder, whole, density=density)
            file_goal(report, f"full fine-tune of the causal LM, density {density:g}", expert, limit)
            if density == 0.05:
                profile(report, "full fine-tune of the causal LM", expert, general=not options.quick)
    chart(found, entries)
    report.write()


if __name__ == "__main__":
    main()
