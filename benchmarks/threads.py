"""What does a second thread give?

Question: How much faster are two threads than one at encoding levels, at decoding them to positions, and at attach, on the causal LM's 134.5 million
    parameters?
Goal: At least 1.6 times on encoding and on decoding to positions.
Predicted: 1.9 times on both: chunks and batches are independent, the kernels release the GIL, and Python takes 10 us of each millisecond. Attach 1.5
    times, since both threads write to one memory. All of compress 1.7 times: SHA-256 of the embedding, a fifth of the model, is one tensor.
Peer: One thread.
Note: Sterna takes its threads from torch.get_num_threads(). Encoding runs as compress runs it. Decoding to positions has no function of its own in
    Sterna that takes threads, so its coding is given to a pool here, in batches of 262,144 non-zeros.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

import harness
import inputs
import sterna
from harness import Side, milliseconds, ratio
from sterna import streaming
from sterna.codings import CHUNK, PADDING, default_coding
from sterna.expert.changes import Ternary

ENTRIES, DENSITY = 134_515_008, 0.05


@dataclass(frozen=True, slots=True)
class Chunk:
    """Codes of one chunk of uniform positions."""

    codes: np.ndarray
    size: int


def uniform_chunks(entries: int) -> list[Chunk]:
    random = np.random.default_rng(0)
    chunks = []
    for start in range(0, entries, CHUNK):
        size = min(CHUNK, entries - start)
        positions = np.flatnonzero(random.random(size, np.float32) < DENSITY).astype(np.uint32)
        chunks.append(Chunk(positions << 1 | random.integers(0, 2, positions.size, np.uint32), size))
    return chunks


class Decoding:
    """All codes of a tensor, into memory that is there already: each thread decodes one run of blocks with one call, which holds no lock."""

    def __init__(self, ternary: Ternary, threads: int) -> None:
        self.ternary = ternary
        ends = np.cumsum(ternary.blocks.count)
        edges = np.searchsorted(ends, np.linspace(0, ternary.count, threads + 1)[1:-1]).tolist()
        self.shares = list(zip([0, *edges], [*edges, len(ends)], strict=True))
        self.codes = [np.zeros(int(ternary.blocks.count[first:last].sum()) + 8, np.uint32) for first, last in self.shares]
        self.pool = ThreadPoolExecutor(threads)

    def share(self, worker: int) -> None:
        self.ternary.coding.decode(self.ternary.data, self.ternary.blocks, *self.shares[worker], self.codes[worker])

    def __call__(self) -> None:
        if len(self.shares) == 1:
            self.share(0)
        else:
            list(self.pool.map(self.share, range(len(self.shares))))


def both(report: harness.Report, rows: list[list[object]], name: str, one: Side, two: Side, rounds: int, goal: bool) -> None:
    times = harness.in_turn({"one": one, "two": two}, rounds, warm=1)
    found = ratio(times["one"], times["two"])
    rows.append([name, milliseconds(times["one"]), milliseconds(times["two"]), found])
    if goal:
        report.goal(f"two threads against one, {name}", found, at_least=1.6)


def with_threads(count: int, work: object) -> Side:
    def run() -> None:
        with harness.threads(count):
            work()

    return Side(run, wall=True)


def streams(report: harness.Report, rows: list[list[object]], entries: int, rounds: int) -> None:
    coding, chunks = default_coding(), uniform_chunks(entries)

    def encode() -> bytes:
        return b"".join(record for _, record in streaming.ordered(lambda chunk: coding.encode(chunk.codes, chunk.size), chunks))

    both(report, rows, "encoding", with_threads(1, encode), with_threads(2, encode), rounds, goal=True)
    stream = encode()
    data = np.frombuffer(stream + bytes(PADDING), np.uint8)
    ternary = Ternary.open((entries,), 1.0, coding, data, 0, len(stream))
    both(report, rows, "decoding to positions", *(Side(Decoding(ternary, count), wall=True) for count in (1, 2)), rounds, goal=True)


def causal_lm(report: harness.Report, rows: list[list[object]], options: object, rounds: int) -> None:
    folder = inputs.causal_lm(options)
    if folder is None:
        return
    from transformers import AutoModelForCausalLM

    base = inputs.in_memory(folder)
    tuned = inputs.normal_tuned(base)
    compress = [with_threads(count, lambda: sterna.compress(base, tuned, density=DENSITY)) for count in (1, 2)]
    both(report, rows, "compress, causal LM", *compress, rounds // 2, goal=False)
    expert = sterna.compress(base, tuned, density=DENSITY)
    recode = [with_threads(count, lambda: sterna.recode(expert, "small")) for count in (1, 2)]
    both(report, rows, "recode to small, causal LM", *recode, 3, goal=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def off() -> None:
        sterna.attached_to(model).detach()

    attach, detach = [], []
    for count in (1, 2):
        on = with_threads(count, lambda: sterna.attach(model, expert)).work
        attach.append(Side(on, after=off, wall=True))
        detach.append(Side(with_threads(count, off).work, before=on, wall=True))
    both(report, rows, "attach, causal LM", *attach, rounds, goal=False)
    both(report, rows, "detach, causal LM", *detach, rounds, goal=False)


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    rows: list[list[object]] = []
    streams(report, rows, ENTRIES // 4 if options.quick else ENTRIES, 5 if options.quick else 21)
    causal_lm(report, rows, options, 4 if options.quick else 15)
    columns = ("what", "one thread, ms", "two threads, ms", "times as fast")
    report.table(f"Threads, density {DENSITY:g}", columns, rows, f"The machine has {harness.CORES} cores.")
    report.write()


if __name__ == "__main__":
    main()
