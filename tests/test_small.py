"""Coding 3, small: against a slow reader written from the specification, over shapes, densities and structure; sizes; recoding; limits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import small_reader
import sterna
from coded import low_rank
from sterna.codings import ENTRIES_A_BYTE, I64, PADDING, by_name
from sterna.codings.small import NONZEROS_A_BYTE, SMALL
from sterna.errors import InvalidArgument, InvalidFile
from sterna.expert.file import file_pieces, from_bytes

FORMAT = Path(__file__).parents[1] / "docs" / "format.md"


def codes_of(levels: np.ndarray) -> I64:
    flat = levels.ravel()
    places = np.flatnonzero(flat)
    return (places.astype(np.int64) << 1) | (flat[places] < 0)


def unpacked(stream: bytes, shape: tuple[int, ...]) -> I64:
    data = np.frombuffer(stream + bytes(PADDING), np.uint8)
    return SMALL.unpack(data, 0, len(stream), shape)


def entropy(levels: np.ndarray) -> float:
    """i.i.d., in bytes."""
    k = np.count_nonzero(levels) / levels.size
    return levels.size * (k - sum(p * math.log2(p) for p in (k, 1 - k) if p)) / 8


SHAPES = [(0,), (), (1,), (7,), (0, 4), (1, 9), (9, 1), (2, 2), (5, 3), (3, 5), (40, 70), (70, 40), (64, 64), (6, 4, 3), (3, 4, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 0.9, 1.0])
def test_the_slow_reader_reads_every_stream(shape: tuple[int, ...], density: float) -> None:
    random = np.random.default_rng(math.prod(shape) + int(100 * density))
    levels = (random.choice([-1, 1], shape) * (random.random(shape) < density)).astype(np.int8)
    stream = SMALL.pack(codes_of(levels), shape)
    assert small_reader.read(stream, shape) == levels.ravel().tolist()
    np.testing.assert_array_equal(unpacked(stream, shape), codes_of(levels))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.sampled_from([0.03, 0.1, 0.4, 1.0]), st.integers(0, 2**31))
def test_the_slow_reader_reads_matrices_with_structure(rows: int, cols: int, density: float, seed: int) -> None:
    levels = low_rank((rows, cols), density, seed)
    stream = SMALL.pack(codes_of(levels), levels.shape)
    assert small_reader.read(stream, levels.shape) == levels.ravel().tolist()
    np.testing.assert_array_equal(unpacked(stream, levels.shape), codes_of(levels))


def test_the_vectors_of_the_specification() -> None:
    section = FORMAT.read_text(encoding="utf-8").split("coding 3, *small*")[1]
    vectors = re.findall(r"^\| (\d+) x (\d+) \| (\d+) \| `([0-9a-f ]+)` \|$", section, re.MULTILINE)
    assert len(vectors) >= 3
    for rows, cols, modulus, stream in vectors:
        shape = int(rows), int(cols)
        i, j = np.indices(shape)
        remainder = (i * j + i) % int(modulus)
        levels = np.where(remainder == 1, 1, np.where(remainder == 2, -1, 0)).astype(np.int8)
        assert SMALL.pack(codes_of(levels), shape) == bytes.fromhex(stream)
        assert small_reader.read(bytes.fromhex(stream), shape) == levels.ravel().tolist()


@pytest.mark.parametrize("shape", [(600, 300), (300, 600)])
@pytest.mark.parametrize("density", [0.05, 0.2])
def test_structure_makes_it_smaller_than_the_entropy(shape: tuple[int, int], density: float) -> None:
    levels = low_rank(shape, density, seed=1)
    assert len(SMALL.pack(codes_of(levels), shape)) < 0.6 * entropy(levels)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 0.9])
def test_without_structure_it_stays_at_the_entropy(density: float) -> None:
    random = np.random.default_rng(3)
    levels = (random.choice([-1, 1], (1200, 400)) * (random.random((1200, 400)) < density)).astype(np.int8)
    assert len(SMALL.pack(codes_of(levels), levels.shape)) < 1.01 * entropy(levels)


def models(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base and a tuned one whose differences have structure, and a head."""
    torch.manual_seed(seed)
    base = {f"layer.{n}.weight": torch.randn(96, 64) for n in range(3)} | {"layer.bias": torch.randn(96), "empty": torch.zeros(0, 4)}
    tuned = {name: tensor + 0.01 for name, tensor in base.items()}
    for name in [name for name in base if name.endswith(".weight")]:
        tuned[name] = base[name] + 0.01 * torch.from_numpy(low_rank((96, 64), 0.5, 5))
    return base, tuned | {"classifier.weight": torch.randn(3, 64)}


@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_recoding_keeps_the_content(tmp_path: Path, density: float, scope: str) -> None:
    base, tuned = models()
    fast = sterna.compress(base, tuned, density=density, scope=scope)
    small = sterna.recode(fast, "small")
    small.save(tmp_path / "small.safetensors")
    read = sterna.load(tmp_path / "small.safetensors")
    assert {ternary.coding.name for ternary in read.ternaries} == {"small"}
    assert read.content_digest == small.content_digest == fast.content_digest
    assert read.digest == small.digest != fast.digest
    assert sterna.recode(read, fast_name()).digest == fast.digest
    assert sterna.compress(base, tuned, density=density, scope=scope, coding="small").digest == small.digest
    for one, other in zip(fast.ternaries, read.ternaries, strict=True):
        np.testing.assert_array_equal(one.levels(), other.levels())


def fast_name() -> str:
    return next(sterna.compress(*models(), density=0.5).ternaries).coding.name


def test_threads_do_not_change_a_byte() -> None:
    base, tuned = models()
    digests, threads = set(), torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            digests.add(sterna.compress(base, tuned, density=0.2, coding="small").digest)
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_a_small_expert_attaches_and_comes_off() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
    fast = sterna.compress(base, tuned, density=0.3)
    small = from_bytes(b"".join(file_pieces(sterna.recode(fast, "small"))))
    with sterna.attached(model, fast):
        wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with sterna.attached(model, small):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_bit_masks_and_similarity_read_small_experts() -> None:
    fast = sterna.compress(*models(), density=0.3)
    small = from_bytes(b"".join(file_pieces(sterna.recode(fast, "small"))))
    assert torch.equal(fast.bitmasks().words, small.bitmasks().words)
    assert fast.bitmasks().cosine(small.bitmasks()) == pytest.approx(1)


def test_an_unknown_coding_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no coding named 'tiny'; known: .*small"):
        sterna.recode(sterna.compress(*models()), "tiny")


HEAD = bytes([1, 1])  # a non-zero, as a matrix


@pytest.mark.parametrize(
    ("stream", "shape", "match"),
    [
        (b"", (4, 4), "count"),
        (b"\x80", (4, 4), "count"),
        (b"\x80" * 9 + b"\x01", (4, 4), "count"),
        (b"\x11\x00\x00", (4, 4), "count"),
        (b"\x00\x00", (4, 4), "count"),
        (b"\x01", (4, 4), "count"),
        (b"\x80\x80\x80\x01\x00", (1 << 30, 4), "count"),
        (b"\x01\x02\x00", (4, 4), "mode 2"),
        (b"\x01\x01\x00", (16,), "mode 1"),
        (b"\x01\x01\x00", (1, 16), "mode 1"),
        (b"\x01\x01\xff\xff\xff\xff\xff\xff", (4, 4), "does not decode"),
        (b"\x01\x00" + b"\x00" * 30 + b"\x01", (4, 4), "does not decode"),
    ],
)
def test_a_broken_stream_is_refused(stream: bytes, shape: tuple[int, ...], match: str) -> None:
    data = np.frombuffer(stream + bytes(PADDING), np.uint8)
    with pytest.raises(InvalidFile, match=match):
        SMALL.unpack(data, 0, len(stream), shape)
    if match != "does not decode":
        with pytest.raises(InvalidFile, match=match):  # already when the file is loaded
            SMALL.count(data, 0, len(stream), shape)


def test_bytes_justify_entries_and_non_zeros() -> None:
    """A tensor of few and of many non-zeros: the writer pads its streams until its own limits hold, and a reader refuses less."""
    base = {"w": torch.zeros(4000, 4000)}
    tuned = {"w": torch.zeros(4000, 4000)}
    tuned["w"][17, 5] = 1.0
    small = sterna.compress(base, tuned, density=1.0, alpha=1.0, coding="small", force=True)
    stream = next(small.ternaries).stream
    assert len(stream) == math.ceil(16_000_000 / ENTRIES_A_BYTE)
    file = b"".join(file_pieces(small))
    assert from_bytes(file).content_digest == small.content_digest
    whole = np.ones((1 << 12, 1 << 10), np.int8)
    packed = SMALL.pack(codes_of(whole), whole.shape)
    assert len(packed) >= whole.size / NONZEROS_A_BYTE
    np.testing.assert_array_equal(unpacked(packed, whole.shape), codes_of(whole))


def test_every_cut_and_change_of_a_stream_is_safe() -> None:
    levels = low_rank((40, 30), 0.2, 7)
    stream = bytearray(SMALL.pack(codes_of(levels), levels.shape))
    random = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(stream[: random.integers(0, len(stream) + 1)]) if random.random() < 0.3 else bytearray(stream)
        for _ in range(int(random.integers(1, 4))):
            if damaged:
                damaged[random.integers(0, len(damaged))] = random.integers(0, 256)
        try:
            codes = unpacked(bytes(damaged), levels.shape)
        except InvalidFile:
            continue
        assert codes.size <= levels.size
        assert (np.diff(codes >> 1) > 0).all()
        assert codes.size == 0 or 0 <= codes[0] >> 1 <= codes[-1] >> 1 < levels.size


def test_it_is_registered() -> None:
    assert by_name("small") is SMALL
    assert SMALL.number == 3
