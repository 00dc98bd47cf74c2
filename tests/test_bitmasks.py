"""Experts as two bit masks: every operation beside the same on dense arrays, on the CPU's loops and through torch."""

from __future__ import annotations

import dataclasses
import gc
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import sterna
from coded import SCALE, expert_of, opened, random_levels, stream_of, ternary_of
from models import made, same_state, state_of, tuned
from sterna import addition, bitmasks, comparison
from sterna.addition import sums
from sterna.bitmasks import Bitmasks, Masks
from sterna.codings import CHUNK
from sterna.errors import InvalidArgument, InvalidFile, WrongBase
from sterna.expert.changes import Add, Change, Factors, Joined, Masked, MaskRule, Multiply, Set
from sterna.live import device, update
from sterna.live.device import AddMasks
from sterna.live.update import ScatteredAdd, SparseAdd
from sterna.numbers import torch_bits

Levels = NDArray[np.int8]

SHAPES = [(), (1,), (63,), (64,), (65,), (0,), (3, 0), (7, 9), (33, 71), (2, 3, 5, 7), (130_000,)]
DENSITIES = [0.0, 0.01, 0.2, 0.7, 1.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["loops", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The operations by the CPU's compiled loops, and by torch as on an accelerator."""
    if request.param == "torch":
        monkeypatch.setattr(comparison, "compiled", lambda words: False)
        monkeypatch.setattr(addition, "compiled", lambda words: False)
    return str(request.param)


def experts_of(*tensors: dict[str, Levels], scales: Sequence[float] = (SCALE, 0.125, 3.0)) -> list[sterna.Expert]:
    """Full experts for one base, each with a scale of its own in every tensor."""
    names = tuple(sorted({name for levels in tensors for name in levels}))
    return [
        expert_of([Add(name, ternary_of(levels[name], scales[(k + n) % len(scales)])) for n, name in enumerate(names) if name in levels], names)
        for k, levels in enumerate(tensors)
    ]


def dense(expert: sterna.Expert) -> NDArray[np.float64]:
    return np.concatenate([np.empty(0), *(tensor.double().numpy().ravel() for _, tensor in sorted(expert.task_vector().items()))])


def check_pair(first: sterna.Expert, second: sterna.Expert, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    """Every operation on two experts beside numpy on their dense vectors x and y."""
    a, b = first.bitmasks(), second.bitmasks()
    assert a.dot(b) == b.dot(a) == pytest.approx(x @ y, rel=1e-12, abs=1e-12)
    assert a.norm() == pytest.approx(np.linalg.norm(x), rel=1e-12)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    assert a.cosine(b) == pytest.approx(x @ y / norms if norms else math.nan, rel=1e-9, abs=1e-12, nan_ok=True)
    both, differ = (x != 0) & (y != 0), x * y < 0
    found = a.overlap(b)
    assert (found.shared, found.either, found.conflicting) == (both.sum(), ((x != 0) | (y != 0)).sum(), differ.sum())
    assert found == b.overlap(a)
    assert a.nonzeros() == np.count_nonzero(x)
    wanted = differ.sum() / both.sum() if both.any() else math.nan
    assert [a.conflicts(b), found.conflicts] == pytest.approx([wanted, wanted], nan_ok=True)
    assert found.jaccard == pytest.approx(both.sum() / found.either if found.either else math.nan, nan_ok=True)


# The masks themselves


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_masks_hold_the_levels(shape: tuple[int, ...], density: float) -> None:
    levels = random_levels(shape, density, 1)
    masks = Masks.of(ternary_of(levels))
    assert (masks.shape, masks.scale, masks.size) == (shape, SCALE, levels.size)
    assert masks.words.dtype == torch.int64
    assert masks.words.shape == (2, -(-levels.size // 64))
    assert masks.levels().dtype == torch.int8
    assert np.array_equal(masks.levels().numpy(), levels)
    for words, sign in ((masks.positive, 1), (masks.negative, -1)):
        bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")
        assert np.array_equal(np.flatnonzero(bits), np.flatnonzero(levels.ravel() == sign))  # and no bit past the end


def test_masks_of_a_tensor_of_many_chunks() -> None:
    entries = 2 * CHUNK + 12_345
    positions = np.array([0, 63, 64, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, entries - 1])
    negative = np.arange(8) % 3 == 0
    masks = Masks.of(opened(stream_of(positions, negative, entries), (entries,)))
    flat = masks.levels().numpy()
    assert np.array_equal(np.flatnonzero(flat), positions)
    assert np.array_equal(flat[positions] < 0, negative)


def test_an_expert_has_the_masks_of_its_ternary_changes() -> None:
    A, B, vector, levels = (random_levels(shape, 0.4, k) for k, shape in enumerate([(3, 20), (15, 3), (9, 1), (7, 11)]))
    changes: list[Change] = [
        Add("add", ternary_of(levels)),
        Factors("lora", "lora", ternary_of(A), ternary_of(B), 2.0),
        Multiply("vector", "vector", ternary_of(vector), 0),
        Set("head", torch.ones(3), "head"),
        Set("saved", torch.ones(3), "saved"),
        Set("statistics", torch.ones(3), "buffer"),
    ]
    masks = expert_of(changes).bitmasks()
    wanted = {"add": levels, "lora.lora_A": A, "lora.lora_B": B, "vector": vector}
    assert list(masks.tensors) == list(wanted)
    for key, value in wanted.items():
        assert np.array_equal(masks.tensors[key].levels().numpy(), value)
        assert masks.tensors[key].words.data_ptr() in range(masks.words.data_ptr(), masks.words.data_ptr() + masks.words.nbytes)
    assert masks.words.shape == (2, sum(-(-value.size // 64) for value in wanted.values()))
    assert list(expert_of(changes).bitmasks(["lora", "head"]).tensors) == ["lora.lora_A", "lora.lora_B"]
    assert expert_of(changes).bitmasks([]).words.shape == (2, 0)
    assert torch.equal(masks.to("cpu").words, masks.words)


def test_a_compressed_model_in_memory_and_from_its_file(tmp_path: Any) -> None:
    model = made("bert")
    expert = sterna.compress(model, tuned(model), density=0.2)
    expert.save(tmp_path / "expert.safetensors")
    loaded = sterna.load(tmp_path / "expert.safetensors")
    for change, masks in zip(expert.changes, expert.bitmasks().tensors.values(), strict=False):
        if isinstance(change, Add):
            assert np.array_equal(masks.levels().numpy(), change.levels.levels())
    assert torch.equal(expert.bitmasks().words, loaded.bitmasks().words)
    assert expert.bitmasks().cosine(loaded.bitmasks()) == 1.0
    assert isinstance(expert.bitmasks(), sterna.Bitmasks)


# Two experts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_tensors_as_dense_ones_do(shape: tuple[int, ...], way: str) -> None:
    for k, density in enumerate(DENSITIES):
        for m, other in enumerate(DENSITIES):
            first, second = experts_of({"a": random_levels(shape, density, k)}, {"a": random_levels(shape, other, 10 + m)})
            check_pair(first, second, dense(first), dense(second))


def test_scales_of_tensors_count(way: str) -> None:
    shapes = {"a": (40, 50), "b": (129,), "c": (1,), "d": (8, 8, 3)}
    tensors = [{name: random_levels(shape, 0.3, 9 * k + n) for n, (name, shape) in enumerate(shapes.items())} for k in range(2)]
    first, second = experts_of(*tensors)
    check_pair(first, second, dense(first), dense(second))


def test_experts_of_different_tensors(way: str) -> None:
    """One changes what the other leaves alone: nothing is shared there, and everything still counts for norms."""
    a, b, c = (random_levels((30, 41), 0.3, k) for k in range(3))
    zeros = np.zeros_like(a)
    first, second = experts_of({"a": a, "b": b}, {"b": c, "d": a})
    whole, other = experts_of({"a": a, "b": b, "d": zeros}, {"a": zeros, "b": c, "d": a})
    check_pair(first, second, dense(whole), np.concatenate([np.zeros(a.size), dense(second)]))
    assert first.bitmasks().dot(second.bitmasks()) == pytest.approx(float(np.sum(b.astype(int) * c)) * 0.125**2)
    assert other.bitmasks().nonzeros() == second.bitmasks().nonzeros()
    apart, alone = experts_of({"a": a}, {"b": b})
    check_pair(apart, alone, np.concatenate([dense(apart), np.zeros(a.size)]), np.concatenate([np.zeros(a.size), dense(alone)]))


def lora(rank: int, seed: int, scaling: float = 0.5, transposed: bool = False, A: tuple[int, ...] = (20,)) -> Change:
    factors = random_levels((rank, *A), 0.3, seed), random_levels((33, rank), 0.3, seed + 100)
    return Factors("layer", "layer", ternary_of(factors[0], 0.25), ternary_of(factors[1], 0.0625), scaling, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inner", [(20,), (4, 3, 3)], ids=str)
def test_lora_is_compared_by_its_products(inner: tuple[int, ...], transposed: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_ENTRIES", 100)  # a few rows at a time
    add = Add("more", ternary_of(random_levels((70,), 0.5, 5)))
    for ranks in ((4, 4), (2, 7), (1, 3)):
        first, second = (
            expert_of([lora(rank, k, scaling=scaling, transposed=transposed, A=inner), add], source="lora")
            for k, (rank, scaling) in enumerate(zip(ranks, (0.5, -2.0), strict=True))
        )
        x, y = dense(first), dense(second)
        assert x.any()
        assert y.any()
        check_pair(first, second, x, y)


def test_ia3_vectors_are_compared_as_they_are(way: str) -> None:
    vectors = [random_levels((130, 1), 0.4, k) for k in range(2)]
    first, second = (expert_of([Multiply("layer", "layer", ternary_of(v), 0, "bias")], names=("layer", "bias")) for v in vectors)
    check_pair(first, second, SCALE * vectors[0].ravel().astype(float), SCALE * vectors[1].ravel().astype(float))


def test_masked_experts_are_compared_over_the_mask(way: str) -> None:
    values = [random_levels((500,), 0.4, k) for k in range(2)]
    rule = MaskRule("smallest", 500, ("a", "b"))
    first, second = (expert_of([Masked(rule, ternary_of(v))], names=("a", "b"), source="pafi") for v in values)
    check_pair(first, second, SCALE * values[0].astype(float), SCALE * values[1].astype(float))
    assert list(first.bitmasks().tensors) == ["a"]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_properties_of_an_inner_product(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 200))
    vectors = [data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=size, max_size=size)) for _ in range(3)]
    scales = [data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.0])) for _ in range(2)]
    x, y, z = (np.array(v, np.int8) for v in vectors)
    one, two = (expert_of([Add("a", ternary_of(v, s))]).bitmasks() for v, s in zip((x, y), scales, strict=True))
    assert one.dot(two) == two.dot(one)
    assert one.dot(one) == pytest.approx(one.norm() ** 2, rel=1e-15)
    assert abs(one.dot(two)) <= one.norm() * two.norm() * (1 + 1e-15)
    # Linear: what the sums of two vectors give with a third is the sum of what each gives.
    parts = [expert_of([Add("a", ternary_of(v, 1.0))]).bitmasks() for v in (x, y, z)]
    added = np.concatenate([np.empty(0), *(block.numpy() for _, block in sums(parts[:2], "a"))])
    assert float(added @ z) == parts[0].dot(parts[2]) + parts[1].dot(parts[2])
    # Three times the scale, three times the product.
    tripled = expert_of([Add("a", ternary_of(x, 3 * scales[0]))]).bitmasks()
    assert tripled.dot(two) == 3 * one.dot(two)
    negated = expert_of([Add("a", ternary_of(-x, scales[0]))]).bitmasks()
    assert negated.dot(two) == -one.dot(two)
    if x.any():
        assert one.cosine(one) == 1.0
        assert one.cosine(negated) == -1.0
        assert one.conflicts(negated) == 1.0
    assert one.overlap(negated).jaccard == (1.0 if x.any() else pytest.approx(math.nan, nan_ok=True))


# Many experts


@pytest.mark.parametrize("count", [1, 2, 3, 8, 127, 128, 200])
def test_votes_of_many_experts(count: int, way: str) -> None:
    levels = [random_levels((7, 1000), 0.5, k) for k in range(count)]
    masks = [expert.bitmasks() for expert in experts_of(*({"a": one} for one in levels))]
    (start, block), *more = sums(masks, "a")
    assert (start, more) == (0, [])
    assert block.dtype == (torch.int8 if count < 128 else torch.int16)
    assert np.array_equal(block.numpy(), sum(one.ravel().astype(int) for one in levels))


def test_votes_that_all_agree(way: str) -> None:
    for count, sign in ((127, 1), (127, -1), (300, -1)):
        masks = [expert_of([Add("a", ternary_of(np.full(100, sign, np.int8)))]).bitmasks()] * count
        ((_, block),) = sums(masks, "a")
        assert (block == sign * count).all()


def test_addition_goes_block_by_block(threads: int, way: str) -> None:
    size = 3 * CHUNK + 777
    levels = [random_levels((size,), 0.1, k) for k in range(3)]
    masks = [expert.bitmasks() for expert in experts_of(*({"a": one} for one in levels))]
    blocks = list(sums(masks, "a"))
    assert [(start, len(block)) for start, block in blocks] == [(0, CHUNK), (CHUNK, CHUNK), (2 * CHUNK, CHUNK), (3 * CHUNK, 777)]
    assert np.array_equal(torch.cat([block for _, block in blocks]).numpy(), levels[0] + levels[1] + levels[2])


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, -0.4], [0.5, 0.5, 0.25, 0.0]], ids=str)
@pytest.mark.parametrize("scales", [(SCALE,), (0.1, 0.02, 0.3)], ids=str)
def test_weighted_sums(weights: list[float], scales: tuple[float, ...], way: str) -> None:
    levels = [random_levels((101, 33), 0.4, k) for k in range(4)]
    made = experts_of(*({"a": one} for one in levels), scales=[float(np.float32(scale)) for scale in scales])
    ((_, block),) = sums([expert.bitmasks() for expert in made], "a", weights)
    assert block.dtype == torch.float32
    wanted = sum(weight * dense(expert) for weight, expert in zip(weights, made, strict=True))
    assert np.allclose(block.numpy(), wanted, rtol=1e-6, atol=1e-7)
    order = [2, 0, 3, 1]
    ((_, other),) = sums([made[k].bitmasks() for k in order], "a", [weights[k] for k in order])
    assert torch.equal(block, other)  # in whatever order the experts come


def test_an_expert_without_the_tensor_adds_nothing(way: str) -> None:
    a, b = random_levels((99,), 0.5, 1), random_levels((99,), 0.5, 2)
    masks = [expert.bitmasks() for expert in experts_of({"a": a, "b": b}, {"b": b}, {"a": b})]
    ((_, block),) = sums(masks, "a")
    assert np.array_equal(block.numpy(), a + b)
    ((_, block),) = sums(masks, "a", [2.0, 5.0, 1.0])
    assert np.allclose(block.numpy(), 2 * SCALE * a + 3.0 * b)
    assert list(sums([expert_of([Add("a", ternary_of(np.empty((0, 3), np.int8)))]).bitmasks()], "a")) == []


def test_factors_add_by_key(way: str) -> None:
    changes = [lora(3, k) for k in range(2)]
    masks = [expert_of([change], source="lora").bitmasks() for change in changes]
    ((_, block),) = sums(masks, "layer.lora_A")
    assert np.array_equal(block.numpy(), sum(change.ternaries[0].levels().ravel() for change in changes))


# What cannot be


def exact(kind: str) -> Change:
    if kind == "masked":
        return Masked(MaskRule("smallest", 3, ("a",)), torch.ones(3))
    return Set("a", torch.ones(3), "tuned")


@pytest.mark.parametrize("kind", ["masked", "tuned"])
def test_exact_experts_have_no_masks(kind: str) -> None:
    with pytest.raises(InvalidArgument, match=r"holds exact values for a, .*compress it over its base first"):
        expert_of([exact(kind)]).bitmasks()


def test_experts_for_different_bases_are_refused_and_both_named() -> None:
    first = expert_of([Add("a", ternary_of(random_levels((9,), 0.5)))])
    base = dataclasses.replace(first.facts.base, name="other", fingerprint="f" * 64)
    second = dataclasses.replace(first, facts=dataclasses.replace(first.facts, base=base))
    pattern = rf"base, fingerprint {first.facts.base.fingerprint[:12]}, and other, {'f' * 12}"
    operations: list[Callable[[Bitmasks, Bitmasks], object]] = [Bitmasks.dot, Bitmasks.cosine, Bitmasks.overlap, Bitmasks.conflicts]
    for operation in (*operations, lambda a, b: sums([a, b], "a")):
        with pytest.raises(WrongBase, match=pattern):
            operation(first.bitmasks(), second.bitmasks())


OTHERS: dict[str, Callable[[], Change]] = {
    "added levels of shape (33, 20)": lambda: Add("layer", ternary_of(random_levels((33, 20), 0.5))),
    "added levels of shape (20, 33)": lambda: Add("layer", ternary_of(random_levels((20, 33), 0.5))),
    "a LoRA product of shape (33, 20)": lambda: lora(2, 0),
    "an (IA)3 vector of shape (33, 1)": lambda: Multiply("layer", "layer", ternary_of(random_levels((33, 1), 0.5)), 0),
    "masked entries, in number 7": lambda: Masked(MaskRule("smallest", 7, ("early", "layer")), ternary_of(random_levels((7,), 0.5))),
}


@pytest.mark.parametrize("second", OTHERS)
@pytest.mark.parametrize("first", OTHERS)
def test_changes_without_common_positions_are_refused(first: str, second: str) -> None:
    if first == second:
        return
    a, b = (expert_of([OTHERS[name]()], names=("early", "layer")).bitmasks() for name in (first, second))
    with pytest.raises(InvalidArgument, match=re.escape(f"layer is changed in ways that cannot be compared: by {first} and by {second}")):
        a.dot(b)
    assert a.dot(a) > 0


def test_other_axes_transposes_and_masks_are_other_positions() -> None:
    vector = ternary_of(random_levels((9, 1), 0.5))
    values = ternary_of(random_levels((7,), 0.5))
    pairs: list[tuple[Change, Change]] = [
        (Multiply("layer", "k", vector, 0), Multiply("layer", "k", vector, 1)),
        (lora(2, 0, A=(33,)), lora(2, 0, A=(33,), transposed=True)),
        (Masked(MaskRule("smallest", 7, ("layer",)), values), Masked(MaskRule("largest", 7, ("layer",)), values)),
    ]
    for one, two in pairs:
        with pytest.raises(InvalidArgument, match="layer is changed in ways that cannot be compared"):
            expert_of([one]).bitmasks().overlap(expert_of([two]).bitmasks())


def test_what_sums_refuse() -> None:
    small, large = (expert_of([Add("a", ternary_of(random_levels(shape, 0.5)))]).bitmasks() for shape in ((9,), (10,)))
    cases: list[tuple[tuple[Any, ...], str]] = [
        (([small], "b"), "b is to be added over 1 experts, but none has it"),
        (([], "b"), "none has it"),
        (([small, large], "a"), r"it has the shapes \[\(9,\), \(10,\)\]"),
        (([small, small], "a", [1.0]), r"weights are \[1.0\] for 2 experts; expected a finite number each"),
        (([small], "a", [math.nan]), "expected a finite number each"),
    ]
    for words, pattern in cases:
        with pytest.raises(InvalidArgument, match=pattern):
            sums(*words)  # when it is called, not when its first block is asked for


def test_a_damaged_stream_is_told() -> None:
    levels = random_levels((5000,), 0.2)
    positions = np.flatnonzero(levels)
    stream = bytearray(stream_of(positions, levels[positions] < 0, levels.size))
    stream[len(stream) // 2 :] = b"\xff" * (len(stream) - len(stream) // 2)
    with pytest.raises(InvalidFile):
        Masks.of(opened(bytes(stream), levels.shape))


def test_a_small_file_cannot_ask_for_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmasks, "DENSE_FREE", 1 << 20)
    expert = expert_of([Add("a", ternary_of(np.zeros(1 << 24, np.int8)))])
    with pytest.raises(InvalidArgument, match=r"the bit masks take 4,194,304 bytes, more than the [\d,]+ that the coded ones justify"):
        expert.bitmasks()


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=20))
def test_torch_counts_bits(words: list[int]) -> None:
    assert torch_bits.population(torch.tensor(words)).tolist() == [(word & (1 << 64) - 1).bit_count() for word in words]


# On live tensors of a device, which the CPU stands for


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a layout with gaps, its axes the other way round."""
    room = torch.zeros([2 * size for size in reversed(tensor.shape)], dtype=tensor.dtype)
    view = room[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


@pytest.mark.parametrize("loose", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (64, 3), (33, 71), (4, 5, 6, 7)], ids=str)
def test_masks_add_what_the_loops_add(shape: tuple[int, ...], dtype: torch.dtype, loose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_PART", 128)
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 3, shape, generator=generator)).to(dtype)
    for density, scale in ((0.0, 1.0), (0.3, 1e-3), (1.0, 40.0)):
        ternary = ternary_of(random_levels(shape, density, 3), float(np.float32(scale)))
        wanted, live = base.clone(), spread(base) if loose else base.clone()
        loops, masks = SparseAdd([wanted], Joined.of([ternary])), AddMasks(live, ternary)
        loops.apply()
        masks.apply()
        assert torch.equal(live, wanted)
        assert (masks.updates, masks.undo_bytes, masks.swallowed) == (loops.updates, loops.undo_bytes, loops.swallowed)
        masks.revert()
        assert torch.equal(torch.empty_like(base).copy_(live).view(torch.uint8), base.view(torch.uint8))
        masks.revert()  # nothing is left to undo
        assert torch.equal(live, base)


def test_special_values_come_back_to_the_bit() -> None:
    base = torch.tensor([math.nan, -0.0, 0.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38] * 9)
    bits = base.view(torch.int32).clone()
    bits[0] = 0x7FC12345  # a NaN with a payload
    base = bits.view(torch.float32).clone()
    step = AddMasks(base, ternary_of(np.ones(72, np.int8)))
    step.apply()
    step.revert()
    assert torch.equal(base.view(torch.int32), bits)


def test_a_failure_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_PART", 64)
    base = torch.randn(10, 64)
    live = base.clone()
    step = AddMasks(live, ternary_of(random_levels((10, 64), 0.5)))
    part, parts = device._part, iter(range(10))

    def failing(masks: Masks, start: int) -> Any:
        if next(parts) == 5:
            raise RuntimeError("out of memory")
        return part(masks, start)

    monkeypatch.setattr(device, "_part", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        step.apply()
    assert not torch.equal(live, base)
    monkeypatch.setattr(device, "_part", part)
    step.revert()
    assert torch.equal(live, base)


class OnDevice:
    """Steps as a plan gets them for a model on an accelerator."""

    def __call__(self, tensors: Sequence[torch.Tensor], adds: Joined) -> list[Any]:
        return [AddMasks(tensor, ternary) for tensor, ternary in zip(tensors, adds.ternaries, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", ["bert", "convolutions", "gpt2"])
def test_attach_swap_and_detach_from_masks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name, dtype)
    experts = [sterna.compress(model, tuned(model, seed, size=1e-2), density=0.3) for seed in (1, 2)]
    before = state_of(model)
    wanted = []
    for expert in experts:
        with sterna.attached(model, expert) as patch:
            wanted.append((state_of(model), patch.swallowed, patch.undo_bytes))
    monkeypatch.setattr("sterna.live.patch.sparse_adds", OnDevice())
    for parameter in model.parameters():  # some with gaps
        if parameter.dim() == 2 and parameter.shape[0] % 3:
            parameter.data = spread(parameter.data)
    patch = sterna.attach(model, experts[0])
    for k in (0, 1, 0):
        patch.swap(experts[k])
        assert AddMasks in {type(step) for step in patch._now().steps}
        assert same_state(model, wanted[k][0])
        assert [patch.swallowed, patch.undo_bytes] == list(wanted[k][1:])
    patch.detach()
    assert same_state(model, before)


def test_masks_are_moved_to_a_device_once_and_go_with_the_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("bert")
    expert = sterna.compress(model, tuned(model), density=0.3)
    count = sum(isinstance(change, Add) for change in expert.changes)
    monkeypatch.setattr("sterna.live.patch.sparse_adds", OnDevice())
    packed: list[int] = []
    pack = bitmasks._packed
    monkeypatch.setattr(bitmasks, "_packed", lambda ternaries: packed.append(1) or pack(ternaries))
    gc.collect()
    held = len(device._held)
    for _ in range(3):
        sterna.attach(model, expert).detach()
    assert len(packed) == count
    assert len(device._held) == held + count
    del expert
    gc.collect()
    assert len(device._held) == held


def test_only_tensors_elsewhere_are_added_from_masks() -> None:
    ternaries = [ternary_of(random_levels((6, 8), 0.5, k)) for k in range(3)]
    data = np.concatenate([t.data for t in ternaries])
    starts = np.cumsum([0, *(t.data.size for t in ternaries)])
    joined = Joined.of([type(t).open(t.shape, t.scale, t.coding, data, int(at), int(at) + t.stop) for t, at in zip(ternaries, starts, strict=False)])
    tensors = [torch.zeros(6, 8), torch.zeros(8, 6).T, torch.zeros(6, 8, device="meta")]
    kinds = [type(step) for step in update.sparse_adds(tensors, joined)]
    assert sorted(kind.__name__ for kind in kinds) == ["AddMasks", "ScatteredAdd", "SparseAdd"]
    assert ScatteredAdd in kinds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_an_accelerator() -> None:
    model = nn.Linear(300, 200)
    expert = sterna.compress(model, tuned(model, size=1e-2), density=0.3)
    other = sterna.compress(model, tuned(model, 2, size=1e-2), density=0.3)
    with sterna.attached(model, expert):
        wanted = state_of(model)
    before = state_of(model)
    live = model.to("cuda")
    with sterna.attached(live, expert) as patch:
        assert {type(step) for step in patch._now().steps} == {AddMasks}
        assert all(torch.equal(tensor.cpu(), wanted[name]) for name, tensor in live.state_dict().items())
    assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in live.state_dict().items())
    a, b = expert.bitmasks(), other.bitmasks()
    c, d = a.to("cuda"), b.to("cuda")
    assert (a.dot(b), a.norm(), a.overlap(b)) == (c.dot(d), c.norm(), c.overlap(d))
    for weights in (None, [0.5, 2.0]):
        for (_, x), (_, y) in zip(sums([a, b], "weight", weights), sums([c, d], "weight", weights), strict=True):
            assert torch.equal(x, y.cpu())
    with pytest.raises(InvalidArgument, match="one expert's masks are on cpu, the other's on cuda"):
        a.dot(d)
