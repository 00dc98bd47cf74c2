"""The coding of bits: against a slow reader written from the specification, over shapes, densities and bit patterns; sizes; limits."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import lossless_reader
from sterna.codings import PADDING, lossless
from sterna.codings.lossless import CHANGES_A_BYTE, ENTRIES_A_BYTE, Words
from sterna.errors import InvalidFile

FORMAT = Path(__file__).parents[1] / "docs" / "format.md"
SHAPES = [(0,), (), (1,), (7,), (0, 4), (4, 0), (1, 9), (9, 1), (2, 2), (5, 3), (3, 5), (40, 70), (70, 40), (6, 4, 3), (3, 4, 3, 3)]
EDGES = {
    np.uint16: [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FFF, 0xFFFF, 0x7FC0, 0x3F80, 0xBF80, 0x007F, 0x7C00],
    np.uint32: [0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x3F800000, 0xBF800000, 0x007FFFFF],
}


def stream_of(base: Words, tuned: Words) -> bytes:
    flat, new = base.ravel(), tuned.ravel()
    return b"".join(lossless.encode(flat[start:stop], new[start:stop], base.shape) for start, stop in lossless.extents(base.shape))


def decoded(stream: bytes, base: Words) -> Words:
    words, data = base.flatten(), np.frombuffer(stream + bytes(PADDING), np.uint8)
    for band in lossless.bands(data, 0, len(stream), base.shape):
        lossless.decode(data, band, words[band.start : band.stop], base.shape)
    return words.reshape(base.shape)


def slow(stream: bytes, base: Words) -> list[int]:
    return lossless_reader.read(stream, base.shape, base.ravel().tolist(), 8 * base.itemsize)


def floats(shape: tuple[int, ...], density: float, dtype: Any, seed: int, size: float = 1e-3) -> tuple[Words, Words]:
    """A base of normal values and the same with a low-rank update on some entries, as the patterns of bfloat16 or float32."""
    random = np.random.default_rng(seed)
    base = random.normal(0, 0.05, shape).astype(np.float32)
    rows = shape[0] if shape else 1
    update = random.normal(0, size, (rows, *[1] * max(len(shape) - 1, 0))) * random.normal(0, 1, shape[1:]) if shape else random.normal(0, size)
    tuned = np.where(random.random(shape) < density, base + update, base).astype(np.float32)
    shift = 16 if dtype is np.uint16 else 0
    return (base.view(np.uint32) >> shift).astype(dtype).reshape(shape), (tuned.view(np.uint32) >> shift).astype(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_the_slow_reader_reads_every_stream(shape: tuple[int, ...], density: float, dtype: Any) -> None:
    base, tuned = floats(shape, density, dtype, math.prod(shape))
    stream = stream_of(base, tuned)
    assert slow(stream, base) == tuned.ravel().tolist()
    np.testing.assert_array_equal(decoded(stream, base), tuned)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_patterns_come_back(data: st.DataObject) -> None:
    """NaN of any payload, infinities, zeros of both signs and subnormals among them, with jumps from one end of the range to the other."""
    dtype = data.draw(st.sampled_from([np.uint16, np.uint32]))
    shape = data.draw(st.sampled_from([(), (5,), (3, 4), (9, 7), (2, 3, 4), (1, 6), (30, 20)]))
    patterns = st.one_of(st.sampled_from(EDGES[dtype]), st.integers(0, np.iinfo(dtype).max))
    base = data.draw(arrays(dtype, shape, elements=patterns, fill=patterns))
    tuned = np.where(data.draw(arrays(bool, shape)), data.draw(arrays(dtype, shape, elements=patterns, fill=patterns)), base)
    stream = stream_of(base, tuned)
    np.testing.assert_array_equal(decoded(stream, base), tuned)
    assert slow(stream, base) == tuned.ravel().tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_bands_decode_alone(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setattr(lossless, "BAND", 256)
    monkeypatch.setattr(lossless_reader, "BAND", 256)
    for shape in ((40, 30), (1000,), (3, 700)):
        base, tuned = floats(shape, 0.3, dtype, 3)
        assert len(list(lossless.extents(shape))) > 2
        stream = stream_of(base, tuned)
        assert slow(stream, base) == tuned.ravel().tolist()
        np.testing.assert_array_equal(decoded(stream, base), tuned)


def test_a_matrix_too_wide_is_read_as_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "WIDEST", 16)
    monkeypatch.setattr(lossless_reader, "WIDEST", 16)
    base, tuned = floats((20, 17), 0.5, np.uint16, 1)
    assert slow(stream_of(base, tuned), base) == tuned.ravel().tolist()


def test_the_vectors_of_the_specification() -> None:
    section = FORMAT.read_text(encoding="utf-8").split("## The bits: lossless coding 1")[1].split("## What a reader checks")[0]
    vectors = re.findall(r"^\| (\d+) x (\d+) \| (BF16|F32) \| (\d+) \| `([0-9a-f ]+)` \|$", section, re.MULTILINE)
    assert len(vectors) >= 4
    for rows, cols, dtype, modulus, stream in vectors:
        i, j = np.indices((int(rows), int(cols)))
        remainder = (i * j + i) % int(modulus)
        base = 0x3C00 + (37 * i + 11 * j) % 512 if dtype == "BF16" else 0x3C000000 + (70001 * i + 1234567 * j) % (1 << 25)
        words: Words = base.astype(np.uint16 if dtype == "BF16" else np.uint32)
        tuned = (base + np.select([remainder == 1, remainder == 2, remainder == 3], [1, -3, 40 * (j + 1)])).astype(words.dtype)
        assert stream_of(words, tuned) == bytes.fromhex(stream)
        assert slow(bytes.fromhex(stream), words) == tuned.ravel().tolist()


def test_equal_tensors_take_a_byte_a_band() -> None:
    base = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    assert stream_of(base, base) == b"\0"


@pytest.mark.parametrize(("density", "size", "share"), [(0.05, 1e-3, 0.95), (1.0, 1e-3, 0.75), (1.0, 2e-4, 0.75)])
def test_smaller_than_the_entropy_of_the_differences(density: float, size: float, share: float) -> None:
    """Structure pays: the update has rank one, and how far a bfloat16 moves depends on its exponent. (Of .05, the positions are random.)"""
    base, tuned = floats((600, 400), density, np.uint16, 0, size)

    def ordered(words: Words) -> np.ndarray:
        wide = words.astype(np.int64)
        return np.where(wide & 0x8000, 0xFFFF - wide, wide + 0x8000)

    _, counts = np.unique(ordered(tuned) - ordered(base), return_counts=True)
    shares = counts / base.size
    assert len(stream_of(base, tuned)) < share * base.size * -(shares * np.log2(shares)).sum() / 8


def test_bytes_justify_what_they_decode_to() -> None:
    """Where the model finds everything certain, zeros fill the code up."""
    base = np.full((1024, 1024), 0x3F80, np.uint16)
    few, all_of_them = base.copy(), base + np.uint16(1)
    few[:, 0] += np.uint16(1)
    for tuned in (few, all_of_them):
        stream = stream_of(base, tuned)
        assert len(stream) >= max(base.size // ENTRIES_A_BYTE, np.count_nonzero(base != tuned) // CHANGES_A_BYTE)
        np.testing.assert_array_equal(decoded(stream, base), tuned)
        assert len(stream) < base.size // 100
    one = base.copy()
    one[17, 5] = 0
    assert len(stream_of(base, one)) < 12


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
def test_damage_is_refused_or_decodes_to_something(place: int, byte: int, cut: bool) -> None:
    base, tuned = floats((20, 30), 0.3, np.uint32, 5)
    stream = bytearray(stream_of(base, tuned))
    if cut:
        del stream[place % len(stream) :]
    else:
        stream[place % len(stream)] = byte
    with contextlib.suppress(InvalidFile):
        assert decoded(bytes(stream), base).shape == base.shape


@pytest.mark.parametrize(
    "stream",
    [b"", b"\x80", b"\x05", b"\x01\x00", b"\x01\x00\x05\x00", b"\x01\x00\x00", b"\x7f\x00\x01\x00", b"\x00\x00", b"\xff" * 9, b"\x01\x01\x00\x00"],
    ids=bytes.hex,
)
def test_counts_that_do_not_fit_are_refused(stream: bytes) -> None:
    with pytest.raises(InvalidFile):
        decoded(stream, np.zeros((4, 5), np.uint16))
