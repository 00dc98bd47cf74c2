"""The mask by rule: the hash against its published outputs, and every order against a sort by numpy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sterna.codings import CHUNK
from sterna.errors import InvalidArgument
from sterna.expert.changes import MaskRule, Order
from sterna.mask import choose, mask_of, tensor_piece
from sterna.numbers.selection import hash_magnitudes

ORDERS: tuple[Order, ...] = ("smallest", "largest", "random")


def hashes(seed: int, count: int) -> NDArray[np.uint64]:
    """SplitMix64's outputs 1 to count from a state, in Python's integers."""
    low, out = (1 << 64) - 1, []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & low
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & low
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & low
        out.append(z ^ z >> 31)
    return np.array(out, np.uint64)


def chosen(rule: MaskRule, tensors: list[torch.Tensor]) -> list[list[int]]:
    """The mask by a stable sort of one flat vector."""
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors]).numpy()
    keys = {"smallest": np.abs(flat), "largest": -np.abs(flat)}.get(rule.order)
    if keys is None:
        keys = hashes(rule.seed, flat.size) >> np.uint64(33)
    kept = np.sort(np.argsort(keys, kind="stable")[: rule.count])
    ends = np.cumsum([0, *(tensor.numel() for tensor in tensors)])
    return [(kept[(kept >= start) & (kept < stop)] - start).tolist() for start, stop in pairwise(ends)]


def test_the_hash_is_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert hashes(1234567, 5).tolist() == published
    for first in (0, 2):
        out = np.empty(3, np.uint32)
        hash_magnitudes(1234567, first, out)
        assert out.tolist() == [value >> 33 for value in published[first : first + 3]]


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ties", [False, True])
def test_a_mask_is_the_first_of_a_stable_sort(order: Order, ties: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(7,), (300, 40), (0, 3), (), (11, 5, 9)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    if ties:
        tensors = [(tensor * 2).round() / 4 for tensor in tensors]  # a few magnitudes, zeros of both signs among them
    names = tuple(f"{i}" for i in range(len(shapes)))
    entries = sum(tensor.numel() for tensor in tensors)
    for count in (1, 2, 59, 700, entries // 2, entries - 1, entries):
        rule = MaskRule(order, count, names, seed=9)
        found = choose(rule, list(map(tensor_piece, names, tensors)))
        assert [positions.tolist() for positions in found] == chosen(rule, tensors), count


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("order", ORDERS)
def test_a_mask_over_many_chunks(order: Order, threads: int) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randint(-50, 50, (CHUNK + 77,), generator=generator) / 64, torch.randn(3, CHUNK // 2, generator=generator)]
    rule = MaskRule(order, 31_000, ("a", "b"), seed=3)
    if order == "random":
        found = choose(rule, list(map(tensor_piece, rule.names, tensors)))
        keys = np.empty(sum(tensor.numel() for tensor in tensors), np.uint32)
        hash_magnitudes(3, 0, keys)
        kept = np.sort(np.argsort(keys, kind="stable")[: rule.count])
        assert np.concatenate([found[0], found[1] + tensors[0].numel()]).tolist() == kept.tolist()
        return
    assert [positions.tolist() for positions in choose(rule, list(map(tensor_piece, rule.names, tensors)))] == chosen(rule, tensors)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_lossless_wider_load_has_the_same_mask(order: Order, narrow: torch.dtype) -> None:
    names = ("a", "b")
    tensors = [torch.randn(200, 30).to(narrow), torch.randn(40).to(narrow)]  # with hundreds of ties
    rule = MaskRule(order, 1500, names)
    masks = [
        [positions.tolist() for positions in choose(rule, list(map(tensor_piece, names, [tensor.to(wide) for tensor in tensors])))]
        for wide in (narrow, torch.float32, torch.float64)
    ]
    assert masks[0] == masks[1] == masks[2] == chosen(rule, tensors)


def test_layout_does_not_matter() -> None:
    tensor = torch.randn(30, 20)
    rule = MaskRule("smallest", 50, ("a",))
    assert choose(rule, [tensor_piece("a", tensor)])[0].tolist() == choose(rule, [tensor_piece("a", tensor.T.contiguous().T)])[0].tolist()


def test_what_cannot_be_chosen_is_refused() -> None:
    piece = tensor_piece("a", torch.tensor([1.0, float("nan"), 2.0]))
    for count in (0, 4):
        with pytest.raises(InvalidArgument, match=f"mask of {count} entries is to be chosen from 3"):
            choose(MaskRule("random", count, ("a",)), [piece])
    for order in ("smallest", "largest"):
        with pytest.raises(InvalidArgument, match="NaN or infinity"):
            choose(MaskRule(order, 1, ("a",)), [piece])
    assert choose(MaskRule("random", 3, ("a",)), [piece])[0].tolist() == [0, 1, 2]


def test_masks_are_remembered_by_base_and_rule() -> None:
    tensor, read = torch.randn(50), []

    def given(name: str) -> torch.Tensor:
        read.append(name)
        return tensor

    rules = [MaskRule("smallest", count, ("remembered",)) for count in (3, 4)]
    first = [mask_of(base, rule, given) for base in (b"one", b"two") for rule in rules]
    assert len(read) == 4
    assert [mask_of(base, rule, given) for base in (b"one", b"two") for rule in rules] == first
    assert len(read) == 4
