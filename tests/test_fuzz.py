"""Mutated files through load and decode: nothing but a SternaError comes out, quickly, in little memory; and what is accepted is read as specified.

STERNA_FUZZ=1000000 pytest tests/test_fuzz.py        # more files than the 200,000 of every run
python tests/test_fuzz.py COUNT SEED FOLDER          # the loop alone; a file that breaks it is left in FOLDER
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lossless_reader
import plain_reader
import sterna
from coded import SCALE, expert_of, low_rank, opened, random_levels, stream_of, ternary_of
from hostile.craft import SPECIMENS
from hostile.guard import Guarded
from hostile.mutate import Seed, mutated
from sterna.codings import CHUNK, PADDING, lossless
from sterna.codings.fast import FAST
from sterna.errors import InvalidArgument, InvalidFile, SternaError
from sterna.expert.changes import Add, Change, Factors, Joined, Lossless, Masked, MaskRule, Multiply, Set, Ternary
from sterna.expert.container import parse
from sterna.expert.expert import Expert
from sterna.expert.file import file_pieces, from_bytes, from_container
from sterna.expert.table import name_fault
from sterna.fingerprint import Fingerprint
from sterna.live import update
from sterna.live.update import sparse_adds

FILES = int(os.environ.get("STERNA_FUZZ", "200000"))
WORKERS = 2
MEMORY = 512 << 20
"""Address space that a worker may take beyond what it has after its imports."""


def bytes_of(expert: Expert) -> bytes:
    return b"".join(bytes(piece) for piece in file_pieces(expert))


def seeds() -> list[Seed]:
    """Sound files of 0.6 to 3 KB: the specimens, and some that the library wrote, with streams of many densities."""
    torch.manual_seed(0)
    files = [make().file() for make in SPECIMENS.values()]
    for scope, densities in (("global", (0.01, 0.1, 0.5)), ("tensor", (0.03, 0.3, 1.0))):
        changes: list[Change] = [Add(f"layer.{i}.weight", ternary_of(random_levels((16, 150), k, seed=i))) for i, k in enumerate(densities)]
        changes.append(Factors("layer.3.weight", "m", ternary_of(random_levels((4, 64), 0.2)), ternary_of(random_levels((32, 4), 0.4)), 0.5))
        changes.append(Multiply("layer.4.weight", "n", ternary_of(random_levels((60, 1), 0.4)), 0, "layer.4.bias"))
        changes.append(Set("score.weight", torch.randn(2, 8).bfloat16(), "head"))
        scale = {"scale": SCALE} if scope == "global" else {"scale": 0.0}
        files.append(bytes_of(expert_of(changes, ("layer.0.weight", "layer.1.weight", "layer.2.weight", "layer.4.weight"), scope=scope, **scale)))
    small = [Add(f"layer.{i}.weight", ternary_of(low_rank((40, 30), k, seed=i))) for i, k in enumerate((0.02, 0.2, 0.9))]
    small.append(Add("layer.3.bias", ternary_of(random_levels((300,), 0.1))))
    files.append(bytes_of(sterna.recode(expert_of(small), "small")))
    files.append(bytes_of(sterna.recode(expert_of(changes, scope="tensor", scale=0.0), "small")))
    files.append(bytes_of(expert_of([Add("embedding", ternary_of(random_levels((CHUNK + 5000,), 0.0004)))])))
    assert all(500 < len(file) < 3500 for file in files)
    return [Seed.of(file) for file in files]


# The loop, in a process of its own


def worker(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Read `count` mutated files; how far they came, and how long the slowest took. Whatever is no SternaError ends it."""
    faulthandler.enable()
    torch.set_num_threads(1)
    random = Random(seed)
    sound = seeds()
    room = Guarded()
    for one in sound:
        room.expert(one.file).check()
        compared(one.file, room.expert(one.file))
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    reached: Counter[str] = Counter()
    slowest = 0.0
    for number in range(count):
        file = mutated(sound, random)
        began = time.thread_time()
        try:
            reached[_stage(file, room)] += 1
            slowest = max(slowest, time.thread_time() - began)
            if number % 8 == 0:
                _further(file, room)
        except BaseException:
            (folder / f"broke-{seed}-{number}.safetensors").write_bytes(file)
            raise
    return {"reached": reached, "slowest": slowest}


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _stage(file: bytes, room: Guarded) -> str:
    """How far a file came: `refused` before or with its checksum, `read` and refused by the inner parsers, `decoded` and refused, `accepted`."""
    stage = "refused"
    try:
        container = parse(room.lay(file))
        stage = "read"
        expert = from_container(container)
        stage = "decoded"
        expert.check()
        stage = "accepted"
    except SternaError as error:
        message = str(error)
        assert len(message) < 500
        assert message.isprintable()
    return stage


def _further(file: bytes, room: Guarded) -> None:
    """What a reader goes on to do with a file: digests, dense tensors within a limit, saving; and the plain reader's view of it."""
    try:
        expert = room.expert(file)
        expert.check()
    except SternaError:
        return
    assert bytes_of(from_bytes(bytes_of(expert))) == bytes_of(expert)
    assert from_bytes(bytes_of(expert)).content_digest == expert.content_digest
    with contextlib.suppress(SternaError):
        expert.task_vector(max_bytes=1 << 22)
    compared(file, expert)
    for change in expert.changes:
        if isinstance(change, Lossless) and math.prod(change.shape) <= 1 << 16:
            _rebuilt(change)


def _rebuilt(change: Lossless) -> None:
    """Lossless streams decode with a base; where the kernel takes one, the slow reader reads the same of it, where it is small."""
    words = np.zeros(math.prod(change.shape), np.uint32 if change.dtype == torch.float32 else np.uint16)
    base = words.tolist()
    try:
        for band in lossless.bands(change.data, change.start, change.stop, change.shape):
            lossless.decode(change.data, band, words[band.start : band.stop], change.shape)
    except InvalidFile:
        return
    if words.size <= 256:
        assert lossless_reader.read(change.stream.tobytes(), change.shape, base, 8 * words.itemsize) == words.tolist()


def compared(file: bytes, expert: Expert) -> None:
    """What the library accepts, the reader made from the specification reads alike."""
    if sum(ternary.size << 8 * ternary.coding.sequential for ternary in expert.ternaries) > 1 << 22:
        return  # the plain readers are slow
    _, shorts, changes = plain_reader.read(file)
    assert tuple(shorts) == expert.fingerprint.names
    read = [levels for several in changes.values() for change in several for levels in change if isinstance(levels, tuple)]
    for ternary, (levels, scale) in zip(expert.ternaries, read, strict=True):
        assert np.array_equal(ternary.levels(), levels)
        assert ternary.scale == scale
    for change in expert.changes:
        if isinstance(change, Masked):
            kind, order, seed, eligible, _ = changes[change.name][0]
            assert (kind, MaskRule(order, change.rule.count, tuple(eligible), seed)) == ("masked", change.rule)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory and guards it as Linux does")
def test_mutated_files_are_refused_or_read_as_specified(tmp_path: Path) -> None:
    share = [FILES // WORKERS + (i < FILES % WORKERS) for i in range(WORKERS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    began = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(count), str(seed), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed, count in enumerate(share)
    ]
    reached: Counter[str] = Counter()
    slowest = 0.0
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, f"{err[-3000:]}\nthe file is in {tmp_path}"
        result = json.loads(out)
        reached += Counter(result["reached"])
        slowest = max(slowest, result["slowest"])
    assert sum(reached.values()) == FILES
    print(f"{FILES} files in {time.monotonic() - began:.0f} s: {dict(reached)}, the slowest in {1000 * slowest:.1f} ms")
    assert slowest < 1
    for stage, at_least in {"refused": 0.02, "read": 0.3, "decoded": 0.03, "accepted": 0.1}.items():
        assert reached[stage] > at_least * FILES, f"too few files came to be {stage}: {reached}"


# Properties


@st.composite
def levels(draw: st.DrawFn) -> tuple[int, list[int], list[bool]]:
    """(entries, ascending positions, signs): any density, runs of non-zeros, positions beside the ends of chunks."""
    entries = draw(st.one_of(st.integers(0, 300), st.integers(CHUNK - 3, CHUNK + 3), st.integers(2 * CHUNK - 2, 2 * CHUNK + 70_000)))
    near = [p for end in (0, CHUNK, 2 * CHUNK, entries) for p in range(end - 2, end + 2) if 0 <= p < entries]
    chosen = set(draw(st.lists(st.one_of(st.sampled_from(near), st.integers(0, entries - 1)), max_size=200))) if entries else set()
    for start, length in draw(st.lists(st.tuples(st.integers(0, max(entries - 1, 0)), st.integers(0, 400)), max_size=3)):
        chosen.update(range(start, min(start + length, entries)))
    positions = sorted(chosen)
    return entries, positions, draw(st.lists(st.booleans(), min_size=len(positions), max_size=len(positions)))


@settings(max_examples=200, deadline=None)
@given(levels())
@example((0, [], []))
@example((1, [0], [True]))
@example((CHUNK + 1, [CHUNK - 1, CHUNK], [False, True]))
def test_any_levels_come_back(drawn: tuple[int, list[int], list[bool]]) -> None:
    entries, positions, negative = drawn
    raw = stream_of(np.array(positions, np.int64), np.array(negative, bool), entries)
    ternary = opened(raw, (entries,))
    assert ternary.codes().tolist() == [2 * p + n for p, n in zip(positions, negative, strict=True)]
    assert np.array_equal(plain_reader.stream_levels(raw, entries), ternary.levels())


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=60), st.one_of(st.integers(0, 100), st.integers(CHUNK - 1, CHUNK + 50)), st.sampled_from([1, 2]))
def test_any_bytes_are_a_stream_or_refused(raw: bytes, entries: int, coding: int) -> None:
    try:
        read = opened(raw, (entries,), coding={1: "rice", 2: "fast"}[coding])
        codes = read.codes()
    except InvalidFile:
        return
    assert np.array_equal(plain_reader.stream_levels(raw, entries, coding), read.levels())
    assert codes.size == 0 or (np.all(np.diff(codes >> 1) > 0) and codes[0] >> 1 >= 0 and codes[-1] >> 1 < entries)
    assert np.array_equal(opened(stream_of(codes >> 1, (codes & 1).astype(bool), entries), (entries,)).codes(), codes)


SIZES = st.one_of(st.integers(0, 40), st.integers(4090, 4110), st.integers(60_000, 70_000))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(SIZES, st.sampled_from([0.0, 0.001, 0.02, 0.05, 0.3, 1.0])), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 3),
    st.integers(0, 1 << 30),
)
@example([(1, 1.0)], torch.float32, 1, 0)
@example([(0, 0.0), (4096, 1.0), (4097, 0.05)], torch.bfloat16, 2, 0)
def test_any_levels_are_added_where_they_belong_and_taken_off(tensors: list[tuple[int, float]], dtype: torch.dtype, threads: int, seed: int) -> None:
    """The kernel of attach beside the dense formula, in the middle of memory that must stay as it is."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.randn(sum(size for size, _ in tensors) + 40 * (len(tensors) + 1), generator=generator).to(dtype)
    wanted, before = room.clone(), room.clone()
    parts, levels, start, same = [], [], 40, 0
    for number, (size, density) in enumerate(tensors):
        one = random_levels((size,), density, seed + number)
        part = slice(start, start + size)
        wanted[part] = (room[part].float() + SCALE * torch.from_numpy(one)).to(dtype)
        same += int(((wanted[part] == before[part]) & (torch.from_numpy(one) != 0)).sum())
        parts.append(room[part])
        levels.append(one)
        start += size + 40
    streams = [stream_of(np.flatnonzero(one), one[one != 0] < 0, one.size) for one in levels]
    data = np.frombuffer(b"".join(streams) + bytes(PADDING), np.uint8)
    stops = np.cumsum([len(raw) for raw in streams]).tolist()
    coded = [Ternary.open((one.size,), SCALE, FAST, data, stop - len(raw), stop) for one, raw, stop in zip(levels, streams, stops, strict=True)]
    count, least = torch.get_num_threads(), update._THREAD
    torch.set_num_threads(threads)
    update._THREAD = 100
    try:
        (step,) = sparse_adds(parts, Joined.of(coded))
        step.apply()
        assert torch.equal(room, wanted)
        assert step.swallowed == same
        step.revert()
        assert torch.equal(room, before)
        step.revert()
        assert torch.equal(room, before)
    finally:
        torch.set_num_threads(count)
        update._THREAD = least


def depth(value: Any) -> int:
    """How many objects and arrays the deepest value lies in."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(depth, inside), default=-1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=12), JSON, max_size=5))
def test_any_metadata_comes_back_or_is_not_written(metadata: dict[str, Any]) -> None:
    if depth(metadata) > 8:
        with pytest.raises(InvalidArgument, match="at most 8 deep"):
            expert_of([], metadata=metadata)
        return
    raw = bytes_of(expert_of([], metadata=metadata))
    assert from_bytes(raw).facts.metadata == metadata
    assert plain_reader.read(raw)[0].get("metadata", {}) == metadata


NAME = st.lists(st.one_of(st.sampled_from(["layer", "0", "1", "weight", "bias", ""]), st.text(max_size=6)), min_size=1, max_size=5).map(".".join)


@settings(max_examples=300, deadline=None)
@given(st.sets(NAME, max_size=12), st.integers(0, 1 << 30))
def test_any_names_come_back_or_are_not_written(names: set[str], seed: int) -> None:
    ordered = tuple(sorted(names))
    shorts = np.frombuffer(Random(seed).randbytes(9 * len(names)), np.uint8).reshape(len(names), 3, 3)
    expert = expert_of([])
    expert = Expert(expert.facts, Fingerprint(ordered, expert.fingerprint.digest, shorts), ())
    if any(map(name_fault, names)):
        with pytest.raises(InvalidArgument):
            bytes_of(expert)
        return
    read = from_bytes(bytes_of(expert))
    assert read.fingerprint == expert.fingerprint
    assert list(plain_reader.read(bytes_of(expert))[1]) == list(ordered)


if __name__ == "__main__":
    print(json.dumps(worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
