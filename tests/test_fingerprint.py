"""Which base: digests against hashlib over plain bytes, the same in every lossless dtype, and hashed once a live tensor."""

from __future__ import annotations

import gc
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sterna
from models import made, tuned
from sterna import fingerprint as module
from sterna.errors import InvalidArgument, WrongBase
from sterna.fingerprint import SHORT, Fingerprint, LiveDigests, combine, compare, fingerprint, require_base, tensor_digest

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def plain_digest(tensor: torch.Tensor) -> bytes:
    """The specification: SHA-256 of the shape and of the values widened to float32."""
    shape = struct.pack(f"<B{tensor.dim()}Q", tensor.dim(), *tensor.shape)
    return hashlib.sha256(shape + tensor.detach().float().numpy().tobytes()).digest()


def some(seed: int = 0, dtype: torch.dtype = F32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (30, 8), "layer.0.weight": (8, 8), "layer.0.bias": (8,), "layer.1.weight": (4, 2, 3, 3), "one": (), "none": (0, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def seen(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[bytes, torch.dtype]]:
    return {name: (tensor_digest(t), t.dtype) for name, t in tensors.items()}


def altered(tensors: Mapping[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """One entry of each named tensor moved by one spacing."""
    changed = {name: t.clone() for name, t in tensors.items()}
    for name in names:
        flat = changed[name].view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0, dtype=flat.dtype))
    return changed


# Digests


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_digest_is_that_of_the_specification(dtype: torch.dtype) -> None:
    for tensor in some(1, dtype).values():
        assert tensor_digest(tensor) == plain_digest(tensor)
        for narrow in (BF16, F16):
            assert tensor_digest(tensor, narrow) == plain_digest(tensor.to(narrow))


def test_a_long_tensor_is_hashed_in_slices_all_the_same() -> None:
    tensor = torch.randn(3, (1 << 20) + 7, generator=torch.Generator().manual_seed(0))
    assert tensor_digest(tensor) == plain_digest(tensor)
    assert tensor_digest(tensor.T.contiguous().T) == plain_digest(tensor)
    assert tensor_digest(tensor, BF16) == plain_digest(tensor.to(BF16))


@pytest.mark.parametrize("narrow", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("wide", [F32, F64], ids=str)
def test_a_lossless_wider_load_has_the_same_digest(narrow: torch.dtype, wide: torch.dtype) -> None:
    for tensor in some(2, narrow).values():
        assert tensor_digest(tensor.to(wide)) == tensor_digest(tensor)


def test_half_precision_values_that_bfloat16_holds_are_the_same_base() -> None:
    tensor = torch.tensor([0.5, -3.0, 0.0, 96.0])
    assert tensor_digest(tensor.to(F16)) == tensor_digest(tensor.to(BF16)) == tensor_digest(tensor)


def test_doubles_that_float32_cannot_hold_equal_nothing_narrower() -> None:
    tensor = torch.randn(100, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert tensor_digest(tensor) != tensor_digest(tensor.float())
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())


def test_shape_sign_of_zero_and_every_bit_count() -> None:
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    digests = [tensor_digest(t) for t in (tensor, tensor.reshape(4, 6), tensor.reshape(24), tensor[None], torch.nextafter(tensor, tensor + 1))]
    assert len(set(digests)) == len(digests)
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))
    assert tensor_digest(torch.tensor([1e-45])) != tensor_digest(torch.tensor([0.0]))


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.data())
def test_any_changed_value_changes_the_digest(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    other = tensor.clone()
    at = data.draw(st.integers(0, len(values) - 1))
    other[at] = data.draw(st.floats(width=32))
    same_bits = other.view(torch.int32)[at] == tensor.view(torch.int32)[at]
    assert (tensor_digest(other) == tensor_digest(tensor)) == bool(same_bits)


# The fingerprint of a base


def test_a_fingerprint_is_made_of_the_digests_by_sorted_name(threads: int) -> None:
    tensors = some(3)
    mark = fingerprint(tensors)
    names = sorted(tensors)
    assert mark.names == tuple(names)
    assert mark.digest == hashlib.sha256(b"".join(plain_digest(tensors[n]) for n in names)).digest()
    assert mark.hex == mark.digest.hex()
    for name, row in zip(names, mark.shorts, strict=True):
        for column, dtype in zip(row, (F32, BF16, F16), strict=True):
            assert column.tobytes() == plain_digest(tensors[name].to(dtype))[:SHORT]


def test_order_and_prefix_do_not_matter() -> None:
    tensors = some(4)
    mark = fingerprint(tensors)
    assert fingerprint(dict(reversed(tensors.items()))) == mark
    prefixed = fingerprint({"model." + name: t for name, t in tensors.items()})
    assert prefixed.digest == mark.digest
    assert np.array_equal(prefixed.shorts, mark.shorts)
    assert prefixed != mark


def test_a_wider_base_of_narrow_values_has_the_same_digest() -> None:
    narrow = some(5, BF16)
    assert fingerprint({n: t.float() for n, t in narrow.items()}).digest == fingerprint(narrow).digest


def test_integers_are_no_part_of_a_fingerprint() -> None:
    with pytest.raises(InvalidArgument, match="int64"):
        fingerprint({"counter": torch.tensor(3)})


# Comparing


@pytest.mark.parametrize("base_dtype", [F32, F16, BF16], ids=str)
def test_the_same_values_are_the_same_base(base_dtype: torch.dtype) -> None:
    tensors = some(6, base_dtype)
    mark = fingerprint(tensors)
    for dtype in (base_dtype, F32, F64):
        result = compare(mark, seen({n: t.to(dtype) for n, t in tensors.items()}))
        assert result.same
        assert not result.absent


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_narrower_load_is_told_from_another_model(dtype: torch.dtype) -> None:
    tensors = some(7)
    mark = fingerprint(tensors)
    narrow = {n: t.to(dtype) for n, t in tensors.items()}
    result = compare(mark, seen(narrow))
    assert set(result.narrower) == set(tensors) - {"none"}
    assert result.different == ()
    assert not result.same
    wrong = {**narrow, "layer.0.bias": narrow["layer.0.bias"] + 1}
    assert compare(mark, seen(wrong)).different == ("layer.0.bias",)


def test_each_narrow_dtype_has_its_own_column() -> None:
    tensors = some(8)
    mixed = {n: t.to(dtype) for (n, t), dtype in zip(tensors.items(), [F32, F16, BF16, F16, BF16, F32], strict=True)}
    result = compare(fingerprint(tensors), seen(mixed))
    assert set(result.narrower) == {"layer.0.weight", "layer.0.bias", "layer.1.weight", "one"}
    assert result.different == ()
    crossed = compare(fingerprint(tensors), {n: (tensor_digest(t.to(F16)), BF16) for n, t in tensors.items()})
    assert set(crossed.different) == set(tensors) - {"none"}


@pytest.mark.parametrize("names", [("one",), ("embed.weight", "layer.1.weight")])
def test_culprits_are_named_in_order(names: tuple[str, ...]) -> None:
    tensors = some(9)
    result = compare(fingerprint(tensors), seen(altered(tensors, *names)))
    assert result.different == names
    assert result.narrower == result.absent == ()


def test_a_part_of_the_base_is_compared_and_the_rest_is_absent() -> None:
    tensors = some(10)
    mark = fingerprint(tensors)
    part = {n: t for n, t in tensors.items() if not n.startswith("layer.1")}
    assert compare(mark, seen(part)).same
    assert compare(mark, seen(part)).absent == ("layer.1.weight",)
    assert compare(mark, seen(altered(part, "one"))).different == ("one",)
    assert compare(mark, {}).absent == mark.names


def test_where_short_digests_collide_the_whole_still_differs() -> None:
    tensors = some(11)
    mark = fingerprint(tensors)
    other = replace(mark, digest=bytes(32))
    assert compare(other, seen(tensors)).different == mark.names


def test_two_swapped_tensors_are_both_named() -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(3), "c": torch.full((3,), 2.0)}
    assert compare(fingerprint(tensors), seen({**tensors, "a": tensors["b"], "b": tensors["a"]})).different == ("a", "b")


def test_a_wrong_base_is_an_error_that_names_it() -> None:
    tensors = some(12)
    mark = fingerprint(tensors)
    with pytest.raises(WrongBase, match=r"'the-base'.*2 of 6 tensors differ.*layer\.0\.weight, one"):
        require_base(mark, "the-base", seen(altered(tensors, "one", "layer.0.weight")), allow_narrower=True)
    narrow = seen({n: t.to(F16) for n, t in tensors.items()})
    with pytest.raises(WrongBase, match=r"'the-base' in float16.*--allow-narrower"):
        require_base(mark, "the-base", narrow, allow_narrower=False)
    assert require_base(mark, "the-base", narrow, allow_narrower=True).narrower
    assert require_base(mark, "the-base", seen(tensors), allow_narrower=False).same


def test_combining_is_order_dependent() -> None:
    assert combine([b"a" * 32, b"b" * 32]) != combine([b"b" * 32, b"a" * 32])


# Live tensors: hashed once


class Counter:
    """Counts the tensors that are hashed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: torch.Tensor, rounded_to: torch.dtype = F32) -> bytes:
        self.calls += 1
        return tensor_digest(tensor, rounded_to)

    def since(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    counter = Counter()
    monkeypatch.setattr(module, "tensor_digest", counter)
    return counter


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda t: t.add_(1),
    "mul_": lambda t: t.mul_(2),
    "copy_": lambda t: t.copy_(torch.ones(4, 4)),
    "zero_": lambda t: t.zero_(),
    "fill_": lambda t: t.fill_(3),
    "one entry": lambda t: t.__setitem__((0, 0), 9.0),
    "a row": lambda t: t[1].add_(1),
    "a view": lambda t: t.view(-1)[3:5].mul_(5),
    "index_put_": lambda t: t.index_put_((torch.tensor([1]),), torch.tensor(7.0)),
    "masked_fill_": lambda t: t.masked_fill_(torch.eye(4).bool(), 8.0),
    "index_add_": lambda t: t.index_add_(0, torch.tensor([0]), torch.ones(1, 4)),
    "scatter_": lambda t: t.scatter_(0, torch.zeros(1, 4, dtype=torch.long), 5.0),
    "clamp_": lambda t: t.clamp_(0.5, 0.6),
    "uniform_": lambda t: t.uniform_(2, 3),
    "transpose_": lambda t: t.transpose_(0, 1),
    "addmm_": lambda t: t.addmm_(torch.ones(4, 4), torch.ones(4, 4)),
    "a detached alias": lambda t: t.detach().add_(1),
    "out=": lambda t: torch.add(torch.ones(4, 4), 2, out=t),
    "other data": lambda t: setattr(t, "data", torch.ones(4, 4)),
    "transposed data": lambda t: setattr(t, "data", t.data.T),
    "another dtype": lambda t: setattr(t, "data", t.data.half().float() + 1),
    "set_": lambda t: t.set_(torch.full((4, 4), 2.0)),
    "foreach": lambda t: torch._foreach_add_([t], 1.0),
    "normal_": lambda t: nn.init.normal_(t),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_tensor_is_hashed_again(change: Callable[[torch.Tensor], object], hashed: Counter) -> None:
    known = LiveDigests()
    tensor = torch.arange(16.0).reshape(4, 4)
    assert known.of([tensor]) == known.of([tensor]) == [plain_digest(tensor)]
    assert hashed.since() == 1
    before = plain_digest(tensor)
    with torch.no_grad():
        change(tensor)
    assert plain_digest(tensor) != before
    assert known.of([tensor]) == known.of([tensor]) == [plain_digest(tensor)]
    assert hashed.since() == 1


def test_what_was_forgotten_is_hashed_again(hashed: Counter) -> None:
    known = LiveDigests()
    one, other = torch.arange(4.0), torch.arange(5.0)
    known.of([one, other])
    known.forget(one)
    known.forget(torch.zeros(2))  # never seen
    assert hashed.since() == 2
    assert known.of([one, other]) == [plain_digest(one), plain_digest(other)]
    assert hashed.since() == 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("foreach", [False, True])
def test_training_is_seen(optimizer: type[torch.optim.Optimizer], foreach: bool, hashed: Counter) -> None:
    known = LiveDigests()
    model = nn.Linear(3, 3)
    tensors = list(model.parameters())
    known.of(tensors)
    model(torch.ones(2, 3)).sum().backward()
    assert known.of(tensors) == [plain_digest(t) for t in tensors]
    assert hashed.since() == 2
    optimizer(tensors, lr=0.1, foreach=foreach).step()
    assert known.of(tensors) == [plain_digest(t) for t in tensors]
    assert hashed.since() == 2


def test_loading_weights_is_seen(hashed: Counter) -> None:
    known = LiveDigests()
    model = nn.Linear(3, 3)
    known.of(list(model.parameters()))
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    assert known.of(list(model.parameters())) == [plain_digest(t) for t in model.parameters()]
    assert hashed.since() == 4


def test_equal_tensors_are_hashed_each_and_one_tensor_given_twice_keeps_its_place() -> None:
    known = LiveDigests()
    one, two, three = torch.ones(3), torch.ones(3), torch.zeros(3)
    assert known.of([one, three, two, one]) == [plain_digest(t) for t in (one, three, two, one)]


def test_what_is_gone_is_forgotten(hashed: Counter) -> None:
    known = LiveDigests()
    for value in range(50):
        tensor = torch.full((3,), float(value))
        assert known.of([tensor]) == [plain_digest(tensor)]
        del tensor
    gc.collect()
    assert not known._known
    assert hashed.since() == 50


def test_a_remembered_digest_is_believed_until_the_tensor_changes(hashed: Counter) -> None:
    known = LiveDigests()
    tensor = torch.ones(3)
    known.remember(tensor, b"x" * 32)
    assert known.of([tensor]) == [b"x" * 32]
    tensor.add_(1)
    assert known.of([tensor]) == [plain_digest(tensor)]
    assert hashed.since() == 1


def test_digests_in_threads_are_the_same(threads: int) -> None:
    tensors = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    assert LiveDigests().of(tensors) == [plain_digest(t) for t in tensors]


def test_a_model_is_hashed_once_however_often_experts_come_and_go(hashed: Counter) -> None:
    base = made("bert")
    experts = [sterna.compress(base, tuned(base, seed)) for seed in (1, 2)]
    hashed.since()
    patch = sterna.attach(base, experts[0])
    assert hashed.since() == len(list(base.parameters()))
    for i in range(5):
        patch.swap(experts[i % 2])
    patch.detach()
    for expert in experts:
        sterna.attach(base, expert).detach()
    assert hashed.since() == 0
    with torch.no_grad():
        base.bert.pooler.dense.weight[0, 0] += 1
    with pytest.raises(WrongBase, match=r"1 of 39 tensors differ, the first: bert\.pooler\.dense\.weight"):
        sterna.attach(base, experts[0])
    assert hashed.since() == 1


def test_fingerprints_compare_by_value() -> None:
    mark = fingerprint(some(13))
    assert mark == fingerprint(some(13))
    assert hash(mark) == hash(fingerprint(some(13)))
    assert mark != fingerprint(some(14))
    assert mark != replace(mark, shorts=np.zeros_like(mark.shorts))
    assert mark != "something else"
    assert isinstance(mark, Fingerprint)
