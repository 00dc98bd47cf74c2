"""The exact k-th magnitude, the sums and the number of kept entries, each against the shortest other way to find them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from sterna import codings
from sterna.codings import CHUNK
from sterna.compeft import ternarize
from sterna.errors import InvalidArgument
from sterna.expert.changes import Ternary
from sterna.numbers import moments, selection
from sterna.numbers.selection import kept_entries
from sterna.progress import silent
from sterna.taskvector import Piece

F32 = NDArray[np.float32]
TINY = float(np.float32(1e-45))  # the smallest denormal
HUGE = float(np.finfo(np.float32).max)


def expected(values: F32, wanted: int) -> NDArray[np.int64]:
    """Flat indices of the largest magnitudes, ascending: sorted by magnitude and then by index, zeros left out."""
    order = sorted(range(values.size), key=lambda i: (-abs(float(values[i])), i))
    return np.array(sorted(i for i in order[:wanted] if values[i] != 0), np.int64)


def selected(values: F32, wanted: int, cuts: tuple[int, ...] = ()) -> tuple[NDArray[np.int64], NDArray[np.bool_], selection.Threshold]:
    """(indices, negative, threshold) as the kernels find them, with the values given in parts that end at `cuts`."""
    parts = np.split(values, cuts)
    upper = np.zeros(selection.UPPER_BINS, np.int64)
    for part in parts:
        selection.count_upper(part, upper)
    upper_bin, above = selection.locate_upper(upper, wanted)
    lower = np.zeros(selection.LOWER_BINS, np.int64)
    for part in parts:
        selection.count_lower(part, upper_bin, lower)
    threshold = selection.locate(upper_bin, above, lower, wanted)
    ties, found, at = threshold.ties, [], 0
    for part in parts:
        codes = np.empty(part.size, np.uint32)
        here = min(selection.count_equal(part, threshold.bits), ties)
        kept = selection.emit(part, threshold.bits, here, codes)
        ties -= here
        found.append(codes[:kept].astype(np.int64) + 2 * at)
        at += part.size
    codes = np.concatenate(found)
    return codes >> 1, (codes & 1).astype(bool), threshold


def check(values: F32, wanted: int, cuts: tuple[int, ...] = ()) -> None:
    indices, negative, threshold = selected(values, wanted, cuts)
    np.testing.assert_array_equal(indices, expected(values, wanted))
    np.testing.assert_array_equal(negative, values[indices] < 0)
    assert threshold.count == indices.size == min(wanted, np.count_nonzero(values))


def random(seed: int, size: int = 400) -> F32:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


ADVERSARIAL: dict[str, F32] = {
    "normal": random(0),
    "ties at every magnitude": np.round(random(1) * 3).astype(np.float32),
    "two values": np.where(random(2) > 0, np.float32(1), np.float32(-2)).astype(np.float32),
    "all equal": np.full(100, -0.125, np.float32),
    "all equal but for the sign": np.where(random(3, 100) > 0, np.float32(0.5), np.float32(-0.5)).astype(np.float32),
    "zeros of both signs": np.array([0.0, -0.0] * 50, np.float32),
    "mostly zeros": np.where(random(4) > 1.5, random(5), np.float32(0)).astype(np.float32),
    "denormals": (random(6) * 20).astype(np.int32).astype(np.float32) * np.float32(TINY),
    "denormals among zeros": np.array([0, TINY, -TINY, 2 * TINY, 0, -0.0, 3 * TINY] * 10, np.float32),
    "the edge of the denormals": np.array([1.17549435e-38, 1.1754942e-38, -1.17549435e-38, 1.1754942e-38] * 9, np.float32),
    "huge": np.array([HUGE, -HUGE, HUGE / 2, 1e38, -1e38, HUGE] * 10, np.float32),
    "every exponent": (np.float32(2) ** np.arange(-149, 128, dtype=np.float32)).astype(np.float32),
    "neighbours in one bin": np.nextafter(np.full(64, 1, np.float32), np.float32(2)) + np.arange(64, dtype=np.float32) * np.float32(2**-23),
    "neighbours across bins": (np.arange(0x3F800000 - 40, 0x3F800000 + 40, dtype=np.uint32)).view(np.float32),
    "one entry": np.array([-3.0], np.float32),
    "one zero": np.array([0.0], np.float32),
    "none": np.empty(0, np.float32),
}


@pytest.mark.parametrize("values", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_the_largest_magnitudes_are_those_of_a_sort(values: F32) -> None:
    for wanted in sorted({0, 1, 2, values.size // 3, values.size // 2, max(values.size - 1, 0), values.size}):
        check(values, min(wanted, values.size))


@pytest.mark.parametrize("cuts", [(1,), (7, 8), (50,), (0, 99), (33, 33, 66)])
@pytest.mark.parametrize("name", ["all equal", "ties at every magnitude", "denormals among zeros", "huge", "normal"])
def test_cutting_the_vector_into_parts_changes_nothing(name: str, cuts: tuple[int, ...]) -> None:
    values = ADVERSARIAL[name]
    cuts = tuple(min(cut, values.size) for cut in cuts)
    for wanted in (1, values.size // 4, values.size // 2, values.size):
        check(values, wanted, cuts)


@given(hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)), st.data())
def test_any_finite_vector(values: F32, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(0, values.size))
    cut = data.draw(st.integers(0, values.size))
    check(values, wanted, (cut,))


@given(st.lists(st.sampled_from([0.0, -0.0, TINY, -TINY, 1.0, -1.0, HUGE]), max_size=40), st.data())
def test_few_values_with_many_ties(values: list[float], data: st.DataObject) -> None:
    check(np.array(values, np.float32), data.draw(st.integers(0, len(values))))


def test_ties_are_cut_by_lowest_index() -> None:
    values = np.array([1, -2, 1, -1, 2, 1, -1], np.float32)
    indices, negative, _ = selected(values, 4)
    assert indices.tolist() == [0, 1, 2, 4]
    assert negative.tolist() == [False, True, False, False]


def test_zeros_are_never_kept() -> None:
    values = np.array([0, 3, -0.0, 0, -1], np.float32)
    for wanted in (2, 3, 5):
        indices, _, threshold = selected(values, wanted)
        assert indices.tolist() == [1, 4]
        assert threshold.count == 2


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_seen_in_the_first_count(bad: float) -> None:
    upper = np.zeros(selection.UPPER_BINS, np.int64)
    selection.count_upper(np.array([1, HUGE, TINY], np.float32), upper)
    assert not selection.has_nonfinite(upper)
    selection.count_upper(np.array([bad], np.float32), upper)
    assert selection.has_nonfinite(upper)


# Sums


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 1000, 100_003])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
def test_sums_agree_with_exact_ones(size: int, scale: float) -> None:
    values = (random(size, size) * np.float32(scale)).astype(np.float32)
    total, squares = moments.sums(values)
    exact = [float(v) for v in values]
    assert total == pytest.approx(math.fsum(exact), rel=1e-13, abs=1e-13 * scale * size)
    assert squares == pytest.approx(math.fsum(v * v for v in exact), rel=1e-13)


@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0, -1000.0])
def test_the_deviation_is_the_unbiased_one(mean: float) -> None:
    values = (random(11, 20_001) + np.float32(mean)).astype(np.float32)
    found = moments.standard_deviation(values.size, *moments.sums(values))
    assert np.float32(found) == np.float32(statistics.stdev([float(v) for v in values]))


def test_the_deviation_of_too_little_is_zero() -> None:
    assert moments.standard_deviation(0, 0.0, 0.0) == moments.standard_deviation(1, 5.0, 25.0) == 0.0
    assert moments.standard_deviation(3, 3.0, 3.0) == 0.0


# The whole procedure on a flat vector, in pieces, in chunks and in threads


def ternarized(values: list[F32], density: float, alpha: float = 1.0, per_tensor: bool = False) -> tuple[list[Ternary], float]:
    pieces = [Piece(f"piece {i}", v.shape, lambda start, stop, out, v=v: np.copyto(out, v[start:stop])) for i, v in enumerate(values)]
    return ternarize(pieces, density=density, alpha=alpha, per_tensor=per_tensor, coding=codings.by_name("fast"), progress=silent)


def levels_by_sort(values: F32, density: float) -> NDArray[np.int8]:
    """Ten-line reference: stable sort by magnitude."""
    wanted = math.floor(Decimal(str(density)) * values.size)
    kept = np.argsort(-np.abs(values), kind="stable")[:wanted]
    levels = np.zeros(values.size, np.int8)
    levels[kept] = np.sign(values[kept])
    return levels


LONG: dict[str, Callable[[], F32]] = {
    "normal": lambda: random(21, 2 * CHUNK + 77_777),
    "ties over several chunks": lambda: np.round(random(22, 2 * CHUNK + 5) * 2).astype(np.float32),
    "one magnitude": lambda: np.where(random(23, 2 * CHUNK + 1) > 0, np.float32(1e-3), np.float32(-1e-3)),
    "sparse": lambda: np.where(random(24, CHUNK + 9) > 3, random(25, CHUNK + 9), np.float32(0)),
}


@pytest.mark.parametrize("density", [0.001, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("make", LONG.values(), ids=LONG.keys())
def test_chunks_and_threads_change_nothing(make: Callable[[], F32], density: float, threads: int) -> None:
    values = make()
    pieces = np.split(values, [0, 1, values.size - 100])
    ternaries, norm = ternarized(pieces, density, alpha=3.0)
    found = np.concatenate([t.levels().reshape(-1) for t in ternaries])
    np.testing.assert_array_equal(found, levels_by_sort(values, density))
    wide = values.astype(np.float64)
    assert {t.scale for t in ternaries} == {float(np.float32(3.0 * wide.std(ddof=1)))}
    assert norm == pytest.approx(float(np.linalg.norm(wide)), rel=1e-12)


def test_the_same_bits_for_any_number_of_threads() -> None:
    import torch

    values = random(31, 3 * CHUNK + 12_345)
    seen = set()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        (ternary,), norm = ternarized([values], 0.1, alpha=0.7)
        seen.add((ternary.scale, norm, ternary.stream.tobytes()))
    torch.set_num_threads(1)
    assert len(seen) == 1


def test_by_tensor_each_is_a_vector_of_its_own() -> None:
    values = [random(41, 1000), random(42, 50) * np.float32(1e-3), np.zeros(7, np.float32), random(43, 3)]
    ternaries, _ = ternarized(values, 0.2, alpha=2.0, per_tensor=True)
    for ternary, own in zip(ternaries, values, strict=True):
        np.testing.assert_array_equal(ternary.levels(), levels_by_sort(own, 0.2))
        assert ternary.scale == float(np.float32(2.0 * own.astype(np.float64).std(ddof=1)))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused_by_its_tensor(bad: float) -> None:
    values = [random(51, 10), random(52, 10)]
    values[1][4] = bad
    with pytest.raises(InvalidArgument, match="piece 1"):
        ternarized(values, 0.5)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_scale_beyond_float32_is_refused(per_tensor: bool) -> None:
    values = [np.array([HUGE, -HUGE, HUGE, -HUGE], np.float32)]
    with pytest.raises(InvalidArgument, match="scale"):
        ternarized(values, 0.5, alpha=10.0, per_tensor=per_tensor)


# How many are kept


@pytest.mark.parametrize(
    ("density", "entries", "kept"),
    [(0.29, 100, 29), (0.1, 10, 1), (0.07, 100, 7), (0.57, 100, 57), (1.0, 7, 7), (1e-3, 999, 0), (1e-3, 1000, 1), (0.3, 10, 3), (0.999, 1000, 999)],
)
def test_the_density_is_the_decimal_that_is_written(density: float, entries: int, kept: int) -> None:
    assert kept_entries(density, entries) == kept


@given(st.decimals(min_value="0.0001", max_value=1, places=4), st.integers(0, 10**13))
def test_kept_entries_are_an_exact_product(density: Decimal, entries: int) -> None:
    assert kept_entries(float(density), entries) == int(density * entries)


@given(st.floats(min_value=5e-324, max_value=1.0), st.integers(0, 10**13))
def test_kept_entries_of_any_float(density: float, entries: int) -> None:
    numerator, denominator = Decimal(repr(density)).as_integer_ratio()
    assert kept_entries(density, entries) == numerator * entries // denominator
