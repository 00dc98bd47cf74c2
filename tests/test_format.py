"""The expert file: docs/format.md, the library and a reader made from that page agree; bytes are stable, few, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

import plain_reader
import sterna
from coded import SCALE, expert_of, opened, random_levels, stream_of, ternary_of
from hostile.craft import ADD, SPECIMENS, Levels, Row, facts, plain, stream
from sterna.errors import CannotWrite, InvalidArgument
from sterna.expert import file as file_module
from sterna.expert.changes import Add, Change, Factors, Folded, Lossless, LowRank, Masked, MaskRule, Multiply, Order, Set, Ternary
from sterna.expert.expert import Expert, exact_bytes
from sterna.expert.facts import MaskFacts
from sterna.expert.file import CODES, file_pieces, from_bytes
from sterna.expert.palette import Palette
from sterna.expert.table import write_table
from sterna.fingerprint import fingerprint

ROOT = Path(__file__).parents[1]


def bytes_of(expert: Expert) -> bytes:
    return b"".join(bytes(piece) for piece in file_pieces(expert))


def plainly(change: Change) -> tuple[Any, ...]:
    """A change as the plain reader tells of it."""
    coded = [(ternary.levels(), ternary.scale) for ternary in change.ternaries]
    match change:
        case Add():
            return "add", *coded
        case Factors():
            ranks = bytes(exact_bytes(change.ranks)) if change.ranks is not None else None
            return "factors", change.key, *coded, change.scaling, change.transposed, change.embedding, ranks
        case LowRank():
            exact = [bytes(exact_bytes(values)) for _, values in change.exact]
            return "lowrank", change.key, change.transposed, change.embedding, *exact
        case Multiply():
            return "multiply", change.key, change.axis, change.bias, *(coded or [bytes(exact_bytes(values)) for _, values in change.exact])
        case Masked(rule=rule):
            exact = [bytes(exact_bytes(values)) for _, values in change.exact]
            return "masked", rule.order, rule.seed, list(rule.names), *coded, *exact
        case Folded():
            exact = [bytes(exact_bytes(values)) for _, values in change.exact]
            return "folded", change.activation, change.transposed, change.scale, *exact
        case Lossless():
            dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[change.dtype]
            return "lossless", dtype, list(change.shape), change.stream.tobytes(), change.digest
        case Palette():
            members = np.zeros(change.levels.shape, np.int64)
            held = change.levels.levels() != 0
            members[held] = change.members.numpy()[change.numbers(0, change.levels.count)] if change.members is not None else 0
            scales = change.scales.numpy() if change.scales is not None else np.empty(0, np.float32)
            return "palette", *coded, change.dense().numpy(), members, scales
    assert isinstance(change, Set)
    scales = bytes(exact_bytes(change.scales)) if change.scales is not None else None
    return "set", change.role, change.first_row, change.task, scales, bytes(exact_bytes(change.value))


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, bytes) and isinstance(theirs, np.ndarray):  # an exact tensor
        return ours == theirs.tobytes()
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


def agree(file: bytes) -> Expert:
    """The library's reading of a file, once the plain reader's is the same."""
    expert = from_bytes(file)
    read, shorts, changes = plain_reader.read(file)
    listed = [(name, change) for name, several in changes.items() for change in several]
    assert [change.name for change in expert.changes] == [name for name, _ in listed]
    for ours, (name, theirs) in zip(expert.changes, listed, strict=True):
        assert same(plainly(ours), theirs), name
        if isinstance(ours, Set):
            assert tuple(ours.value.shape) == theirs[-1].shape
    assert tuple(shorts) == expert.fingerprint.names
    assert b"".join(shorts.values()) == expert.fingerprint.shorts.tobytes()
    assert read["base"]["fingerprint"] == expert.fingerprint.hex
    assert bytes_of(expert) == file or read["writer"] != "test"
    return expert


# The coding


PLACES = ("uniform", "clustered", "one spot", "last")


def placed(place: str, entries: int, density: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Ascending positions, a share `density` of the entries but for `last`."""
    count = round(entries * density)
    match place:
        case "uniform":
            return np.sort(rng.choice(entries, count, replace=False))
        case "clustered":  # rows of very different density, as in a real fine-tune
            weights = rng.random(1 + entries // 997) ** 8
            chance = np.repeat(weights, 997)[:entries]
            return np.flatnonzero(rng.random(entries) < np.minimum(chance * density / max(weights.mean(), 1e-9), 1))
        case "one spot":
            start = int(rng.integers(entries - count + 1))
            return np.arange(start, start + count)
    return np.arange(max(entries - 1, 0), entries)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.05, 0.0584, 0.1, 0.38, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("entries", [0, 1, 7, 4096, 70_000, (1 << 20) + 17])
def test_streams_decode_to_what_was_coded(entries: int, density: float) -> None:
    rng = np.random.default_rng(entries + round(1e4 * density))
    for place in PLACES if density < 1 else ("uniform",):
        positions = placed(place, entries, density, rng)
        negative = rng.random(positions.size) < 0.5
        raw = stream_of(positions, negative, entries)
        wanted = np.zeros(entries, np.int8)
        wanted[positions] = np.where(negative, -1, 1)
        ternary = opened(raw, (entries,))
        assert np.array_equal(ternary.levels(), wanted)
        assert np.array_equal(ternary.codes(), positions << 1 | negative)
        assert np.array_equal(plain_reader.stream_levels(raw, entries), wanted)


NAMED = {1: "rice", 2: "fast"}


@pytest.mark.parametrize("coding", [1, 2])
def test_every_parameter_is_read_alike(coding: int) -> None:
    """Also those that the writer never chooses."""
    levels = {5: 1, 6: -1, 700: 1, 4000: -1, 65_000: 1, 65_001: -1, 99_999: 1}
    more = levels | dict.fromkeys(range(70_000, 70_009), -1)  # more than a group of eight
    for listed, parameter in ((listed, parameter) for listed in (levels, more) for parameter in range(42)):
        raw = stream(100_000, dict(sorted(listed.items())), parameter=parameter, log2=17, coding=coding)
        read = opened(raw, (100_000,), coding=NAMED[coding])
        assert dict(enumerate(read.codes())) == {i: 2 * p + (listed[p] < 0) for i, p in enumerate(sorted(listed))}
        assert np.array_equal(plain_reader.stream_levels(raw, 100_000, coding), read.levels())


@pytest.mark.parametrize("coding", [1, 2])
@pytest.mark.parametrize("log2", range(21))
def test_every_block_size_is_read_alike(log2: int, coding: int) -> None:
    levels = {p: 1 if p % 7 else -1 for p in range(0, 3000, 5)} | dict.fromkeys(range(1024, 1200), 1)
    raw = stream(3000, levels, parameter=3, log2=log2, coding=coding)
    read = opened(raw, (3000,), coding=NAMED[coding])
    assert np.array_equal(plain_reader.stream_levels(raw, 3000, coding), read.levels())
    assert np.flatnonzero(read.levels()).tolist() == sorted(levels)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.4, 1.0])
def test_streams_of_the_first_coding_decode_to_what_was_coded(density: float) -> None:
    rng = np.random.default_rng(0)
    for place in PLACES if density < 1 else ("uniform",):
        positions = placed(place, 30_000, density, rng)
        levels = {int(p): int(rng.choice([-1, 1])) for p in positions}
        for parameter in (0, 3, 8):
            raw = stream(30_000, levels, parameter=parameter, log2=13, coding=1)
            assert opened(raw, (30_000,), coding="rice").codes().tolist() == [2 * p + (s < 0) for p, s in levels.items()]
            assert np.flatnonzero(plain_reader.stream_levels(raw, 30_000, 1)).tolist() == list(levels)


def waves(*shape: int, step: int) -> torch.Tensor:
    """Values that every machine and version makes alike."""
    return (torch.arange(math.prod(shape)) * step % 1009 - 504).reshape(shape).float() / 4096


@pytest.mark.parametrize(("scope", "density"), [("global", 0.05), ("tensor", 0.4)])
def test_files_that_earlier_versions_wrote_are_read(scope: Any, density: float) -> None:
    """tests/written: files of the first coding, by the version that wrote it."""
    base = {"layer.bias": waves(70, step=7), "layer.weight": waves(70, 130, step=11), "out.weight": waves(6, 70, step=13)}
    tuned = {name: tensor + waves(*tensor.shape, step=389 + i) ** 3 for i, (name, tensor) in enumerate(base.items())}
    read = agree((ROOT / "tests" / "written" / f"rice-{scope}.safetensors").read_bytes())
    assert {ternary.coding.name for ternary in read.ternaries} == {"rice"}
    assert read.content_digest == sterna.compress(base, tuned, density=density, scope=scope).content_digest
    assert read.adds.ternaries[0].coding.name == "fast"  # as it is attached


def test_the_first_coding_is_no_longer_written() -> None:
    with pytest.raises(InvalidArgument, match="no longer written"):
        stream_of(np.arange(3), np.zeros(3, bool), 10, "rice")


def entropy(count: int, entries: int) -> float:
    """Bits of an i.i.d. ternary vector with that many non-zeros of either sign."""
    k = count / entries
    return entries * (-(1 - k) * math.log2(1 - k) - k * math.log2(k / 2))


@pytest.mark.parametrize(
    ("density", "bound"),
    [(k, 1.015) for k in (0.01, 0.0149, 0.02, 0.0296, 0.05, 0.0584, 0.08, 0.1)] + [(k, 1.035) for k in (0.12, 0.15, 0.2, 0.25, 0.3, 0.38, 0.45, 0.5)],
)
def test_uniform_positions_take_little_more_than_their_entropy(density: float, bound: float) -> None:
    ternary = ternary_of(random_levels((4096, 1024), density, seed=7))
    expert = expert_of([Add("weight", ternary)])
    bits = 8 * (len(ternary.stream) + len(write_table(expert.fingerprint, expert.changes, scaled=False)))
    assert bits <= bound * entropy(ternary.count, ternary.size)


# The file


class Small(nn.Module):
    """Something of everything: its body is the base, its head the expert's own."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 6, 3)
        self.batch = nn.BatchNorm1d(6)
        self.dense = nn.Linear(6, 5)
        self.classifier = nn.Linear(5, classes)


def pair(dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State dicts of a base without a head and of its fine-tune, buffers changed."""
    torch.manual_seed(seed)
    state = Small().to(dtype).state_dict()
    tuned = {
        name: tensor + 0.02 * torch.randn(tensor.shape).to(dtype) if tensor.is_floating_point() else tensor + 5 for name, tensor in state.items()
    }
    return {name: tensor for name, tensor in state.items() if "classifier" not in name}, tuned


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("density", [0.001, 0.05, 0.38, 1.0])
def test_files_of_models_are_read_alike(density: float, dtype: torch.dtype, scope: Any, tmp_path: Path) -> None:
    base, tuned = pair(dtype)
    expert = sterna.compress(base, tuned, density=density, scope=scope)
    expert.save(tmp_path / "expert.safetensors")
    raw = (tmp_path / "expert.safetensors").read_bytes()
    read = agree(raw)
    kinds = {(type(change), change.role if isinstance(change, Set) else None) for change in read.changes}
    assert kinds == {(Add, None), (Set, "head"), (Set, "buffer")}
    assert (read.digest, read.content_digest) == (hashlib.sha256(raw).hexdigest(), expert.content_digest)
    assert expert.digest == read.digest
    for ours, theirs in zip(expert.changes, read.changes, strict=True):
        assert same(plainly(ours), plainly(theirs))
    assert read.facts == expert.facts
    assert read.fingerprint == expert.fingerprint
    assert bytes_of(read) == raw


def of_every_kind() -> Expert:
    """Every kind of change, every role, every dtype, and shapes from none to three axes."""
    torch.manual_seed(0)
    changes: list[Change] = [
        Add("a.weight", ternary_of(random_levels((40, 50), 0.3))),
        Add("b.weight", ternary_of(random_levels((), 1.0))),
        Add("c.weight", ternary_of(random_levels((0, 3), 1.0))),
        Add("d.weight", ternary_of(np.zeros((7, 3, 2), np.int8))),
        Set("d.weight", torch.randn(2, 3, 2).bfloat16(), "rows", first_row=7),
        Factors("e.weight", "m.e", ternary_of(random_levels((4, 30), 0.1)), ternary_of(random_levels((20, 4), 0.2)), 2.0),
        Factors(
            "f.weight", "m.f", ternary_of(random_levels((2, 9), 0.5)), ternary_of(random_levels((8, 2), 0.5)), 0.125, transposed=True, embedding=True
        ),
        Factors("g.weight", "m.g", ternary_of(random_levels((2, 3, 3, 3), 0.5)), ternary_of(random_levels((8, 2, 1, 1), 0.5)), -1e-3),
        Multiply("h.weight", "m.h", ternary_of(random_levels((1, 30), 0.5)), axis=1),
        Multiply("i.weight", "m.i", ternary_of(random_levels((30, 1), 0.5)), axis=0, bias="i.bias"),
        Set("j.weight", torch.randn(3, 2), "untied"),
        Set("k.weight", torch.randn(3, 2), "saved"),
    ]
    for i, dtype in enumerate(CODES):
        bits = torch.arange(24, dtype=torch.uint8) % 2
        changes.append(Set(f"l.{i:02d}", bits.view(dtype) if dtype != torch.uint8 else bits, "buffer"))
        changes.append(Set(f"m.{i:02d}", torch.zeros((0, 5), dtype=dtype), "head"))
        changes.append(Set(f"n.{i:02d}", torch.zeros((), dtype=dtype), "head"))
    changes.sort(key=lambda change: change.name)
    known = tuple(change.name for change in changes if change.name < "l" and change.name != "k.weight")
    return expert_of(changes, (*known, "i.bias", "untouched.weight"), metadata={"task": "ünïcode ✓", "nested": {"list": [1, 2.5, None, True]}})


def test_every_kind_of_change_is_read_alike() -> None:
    expert = of_every_kind()
    assert same(plainly(expert.changes[0]), plainly(agree(bytes_of(expert)).changes[0]))
    own = [replace_scale(change, 0.1 + i) for i, change in enumerate(expert.changes)]
    scaled = replace(expert, facts=replace(expert.facts, scope="tensor", scale=0.0), changes=tuple(own))
    read = agree(bytes_of(scaled))
    assert [t.scale for t in read.ternaries] == [float(np.float32(t.scale)) for t in scaled.ternaries]


NAMES = tuple(sorted(f"layer.{i}.{name}" for i in range(5) for name in ("bias", "weight")))


def trained(ternary: bool = False, order: Order = "random", dtype: torch.dtype = torch.float32) -> Expert:
    """What PaFi and HiWi leave: masked values, tuned biases, folded weights, heads in 8 and 16 bit."""
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rule = MaskRule(order, 70, NAMES[2:7], seed=(1 << 53) - 1 if order == "random" else 0)
    changes: list[Change] = [
        Masked(rule, ternary_of(random_levels((70,), 0.6)) if ternary else some(70)),
        Set("layer.0.bias", some(4), "tuned"),
        Folded("layer.0.weight", some(6, 2), some(2, 6), "gelu", -0.5),
        Folded("layer.4.weight", some(4, 3), some(3, 4), "relu", 1.0, transposed=True),
        Set("score.bias", some(3).half(), "head"),
        Set("score.weight", torch.arange(-6, 6).reshape(3, 4).to(torch.int8), "head", scales=torch.tensor([0.5, 0.0, 2.0])),
    ]
    how: dict[str, Any] = {} if ternary else {"method": "exact", "density": None, "alpha": None, "scale": 0.0}
    mask = MaskFacts(order, 0.005, rule.seed)
    return expert_of(sorted(changes, key=lambda change: change.name), NAMES, source="pafi", mask=mask, tuning={"method": "pafi"}, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["smallest", "largest", "random"])
@pytest.mark.parametrize("ternary", [False, True])
def test_what_training_leaves_is_read_alike(ternary: bool, order: Order, dtype: torch.dtype) -> None:
    expert = trained(ternary, order, dtype)
    read = agree(bytes_of(expert))
    assert (read.facts, read.content_digest) == (expert.facts, expert.content_digest)
    assert all(same(plainly(ours), plainly(theirs)) for ours, theirs in zip(expert.changes, read.changes, strict=True))
    score = next(change for change in read.changes if change.name == "score.weight")
    assert isinstance(score, Set)
    assert torch.equal(score.tensor, torch.arange(-6, 6).reshape(3, 4) * torch.tensor([[0.5], [0.0], [2.0]]))


def test_what_contradicts_itself_is_not_written() -> None:
    expert = trained()
    masked = next(change for change in expert.changes if isinstance(change, Masked))
    folded = next(change for change in expert.changes if isinstance(change, Folded))
    head = next(change for change in expert.changes if isinstance(change, Set) and change.scales is not None)

    def with_change(old: Change, *new: Change) -> Expert:
        changes = [change for change in expert.changes if change is not old]
        return replace(expert, changes=tuple(sorted([*changes, *new], key=lambda change: change.name)))

    def with_values(values: torch.Tensor | Ternary) -> Expert:
        return with_change(masked, Masked(masked.rule, values))

    assert isinstance(masked.values, torch.Tensor)
    refused = {
        "mask is .* in the facts": replace(expert, facts=replace(expert.facts, mask=None)),
        "in the table": with_change(masked),
        "method is 'exact', but it has levels": with_change(folded, Add(folded.name, replace(ternary_of(random_levels((3,), 1.0)), scale=0.0))),
        "expected 70 .1 or more. in float32": with_values(masked.values.double()),
        "has torch.float32 values of shape": with_values(masked.values[:-1]),
        "does not name": with_change(masked, Masked(replace(masked.rule, names=("layer.1.bias", "z")), masked.values)),
        "mask lies over a tensor": with_change(folded, Set("layer.2.bias", torch.zeros(2), "tuned")),
        "masks are more than one": with_change(folded, Masked(replace(masked.rule, names=(folded.name,)), masked.values)),
        r"expected \[n, r\] and \[r, n\]": with_change(folded, replace(folded, U=folded.U.T.contiguous())),
        "has the scale inf": with_change(folded, replace(folded, scale=math.inf)),
        "expected an int8 head": with_change(head, replace(head, role="buffer")),
        "3 finite float32 numbers": with_change(head, replace(head, scales=torch.tensor([1.0, -1.0, 1.0]))),
        "the same name": with_change(head, head, Set("score.weight.scales", torch.zeros(2), "head")),
        "cannot be named": with_change(head, Set("sterna.values", torch.zeros(2), "head")),
        "tunes 'z'": with_change(head, Set("z", torch.zeros(2), "tuned")),
    }
    for names in ((), ("b", "a"), ("a", "a")):
        with pytest.raises(InvalidArgument, match="sorted and distinct"):
            MaskRule("smallest", 1, names)
    for phrase, other in refused.items():
        with pytest.raises(InvalidArgument, match=phrase):
            bytes_of(other)


def test_facts_of_a_mask_and_of_exact_values_have_limits() -> None:
    good = trained().facts
    assert good.mask is not None
    for fields, phrase in (
        ({"density": 0.5}, "density is 0.5"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"scale": 1.0}, "scale is 1.0"),
        ({"method": "compeft"}, "density is None"),
        ({"mask": replace(good.mask, rule=2)}, "mask.rule is 2; expected 1"),
        ({"mask": replace(good.mask, seed=1 << 53)}, "mask.seed is"),
        ({"mask": replace(good.mask, density=0.0)}, "mask.density is 0.0"),
        ({"tuning": {"a": {"auto_map": "x"}}}, "tuning is"),
        ({"tuning": {"a": math.nan}}, "tuning is"),
    ):
        with pytest.raises(InvalidArgument, match=phrase):
            replace(good, **fields)


def replace_scale(change: Change, scale: float) -> Change:
    def other(ternary: Ternary) -> Ternary:
        return replace(ternary, scale=float(np.float32(scale)))

    match change:
        case Add():
            return replace(change, levels=other(change.levels))
        case Factors():
            return replace(change, A=other(change.A), B=other(change.B))
        case Multiply():
            return replace(change, vector=other(change.vector))
    return change


@pytest.mark.parametrize("name", sorted(SPECIMENS))
def test_files_of_another_writer_are_read_alike(name: str) -> None:
    agree(SPECIMENS[name]().file())


def test_exact_tensors_that_are_not_aligned_are_read_alike() -> None:
    exact = [("x", "U8", [3], b"abc"), ("y", "F32", [2], struct.pack("<2f", 1.5, -2.5)), ("z", "F64", [1], struct.pack("<d", 0.1))]
    rows = [Row(3, 0, name, b"\0\0") for name, _, _, _ in exact]
    expert = agree(plain().but(rows=rows, exact=exact).file())
    assert [change.value.tolist() for change in expert.changes if isinstance(change, Set)] == [[97, 98, 99], [1.5, -2.5], [0.1]]


def test_any_safetensors_reader_opens_the_file(tmp_path: Path) -> None:
    expert = of_every_kind()
    expert.save(tmp_path / "expert.safetensors")
    raw = (tmp_path / "expert.safetensors").read_bytes()
    with safe_open(tmp_path / "expert.safetensors", "pt") as opened_file:
        assert list(opened_file.metadata()) == ["sterna"]
        assert json.loads(opened_file.metadata()["sterna"])["format"] == 1
        kept = {change.name: change.value for change in expert.changes if isinstance(change, Set)}
        assert set(opened_file.keys()) == {*kept, "sterna.table", "sterna.streams", "sterna.sha256"}
        for name, value in kept.items():
            read = opened_file.get_tensor(name)
            assert (read.dtype, read.shape) == (value.dtype, value.shape)
            assert bytes(exact_bytes(read)) == bytes(exact_bytes(value))
        assert opened_file.get_tensor("sterna.sha256").numpy().tobytes() == hashlib.sha256(raw[:-32]).digest()


def test_an_expert_without_changes_is_a_file_too() -> None:
    agree(bytes_of(expert_of([], names=("a", "b"))))


def test_header_and_table_of_an_encoder_take_less_than_4_kb() -> None:
    layer = [f"attention.{part}" for part in ("output.LayerNorm", "output.dense", "self.key", "self.query", "self.value")]
    layer += ["intermediate.dense", "output.LayerNorm", "output.dense"]
    modules = [f"encoder.layer.{i}.{part}" for i in range(6) for part in layer]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")] + ["pooler.dense.weight", "pooler.dense.bias"]
    names += [f"embeddings.{part}" for part in ("LayerNorm.bias", "LayerNorm.weight", "position_embeddings.weight", "word_embeddings.weight")]
    assert len(names) > 100
    shapes = {"dense.weight": (384, 384), "intermediate.dense.weight": (1536, 384), "word_embeddings.weight": (3000, 384)}
    changes: list[Change] = []
    for i, name in enumerate(sorted(names)):
        shape = next((s for end, s in reversed(shapes.items()) if name.endswith(end)), (384, 384) if "self" in name and "weight" in name else (384,))
        changes.append(Add(name, ternary_of(random_levels(shape, 0.1, seed=i))))
    changes += [Set("classifier.bias", torch.zeros(20), "head"), Set("classifier.weight", torch.zeros(20, 384), "head")]
    labels = {str(i): f"group.number-{i:02d}.of.20" for i in range(20)}
    config = {"id2label": labels, "problem_type": "single_label_classification"}
    expert = expert_of(
        sorted(changes, key=lambda change: change.name),
        tuple(names),
        config=config,
        architecture="BertForSequenceClassification",
        prefixes=("", "bert."),
    )
    raw = bytes_of(expert)
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8:header])["sterna.table"]["shape"][0]
    assert header + table <= 4096
    agree(raw)


# The same bytes


PRINT_DIGEST = "import sys; sys.path[:0] = sys.argv[1:]; import test_format as t, torch; print(t.sterna.compress(*t.pair(torch.float32)).digest)"


def test_the_same_content_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    base, tuned = pair(torch.float32)
    expert = sterna.compress(base, tuned)
    for name in ("a", "b"):
        expert.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sterna.compress(dict(reversed(base.items())), dict(reversed(tuned.items()))).digest == expert.digest
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", PRINT_DIGEST, here], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expert.digest


def variants(expert: Expert) -> Iterator[tuple[str, Expert]]:
    """Experts that differ from `expert` (of_every_kind) in one thing that counts."""
    first = expert.changes[0]
    assert isinstance(first, Add)
    flipped, moved = first.levels.levels(), first.levels.levels()
    at = tuple(np.argwhere(flipped)[0])
    flipped[at] *= -1
    moved[at] = 0

    def other(position: int, change: Change) -> Expert:
        return replace(expert, changes=(*expert.changes[:position], change, *expert.changes[position + 1 :]))

    yield "a sign", other(0, Add(first.name, ternary_of(flipped)))
    yield "a level", other(0, Add(first.name, ternary_of(moved)))
    yield "a shape", other(0, Add(first.name, ternary_of(first.levels.levels().reshape(50, 40))))
    yield "a name", other(0, Add("a.weighs", first.levels))
    yield "a kind", other(0, Multiply(first.name, "a", first.levels, 0))
    yield "a scale", replace(expert, facts=replace(expert.facts, scale=0.5), changes=tuple(replace_scale(c, 0.5) for c in expert.changes))
    yield "a change less", replace(expert, changes=expert.changes[:-1])
    yield "the source", replace(expert, facts=replace(expert.facts, source="lora"))
    base = fingerprint({"other": torch.zeros(2)})
    yield "the base", replace(expert, fingerprint=base, facts=replace(expert.facts, base=replace(expert.facts.base, fingerprint=base.hex)))
    for position, change in enumerate(expert.changes):
        match change:
            case Factors(scaling=2.0):
                yield "a factor on the product", other(position, replace(change, scaling=2.5))
                yield "a transposition", other(position, replace(change, transposed=True))
            case Multiply(bias="i.bias"):
                yield "an axis", other(position, replace(change, axis=1))
                yield "a bias", other(position, replace(change, bias=None))
            case Set(role="rows"):
                yield "a first row", other(position, replace(change, first_row=8))
            case Set(role="saved"):
                yield "a role", other(position, replace(change, role="head"))
                yield "a value", other(position, replace(change, value=change.value + 1))
                yield "an exact shape", other(position, replace(change, value=change.value.T.contiguous()))
                yield "a dtype", other(position, replace(change, value=change.value.view(torch.int32)))


def trained_variants(expert: Expert) -> Iterator[tuple[str, Expert]]:
    """Experts that differ from `trained()` in one thing that counts."""
    for position, change in enumerate(expert.changes):

        def other(new: Change, position: int = position) -> Expert:
            return replace(expert, changes=(*expert.changes[:position], new, *expert.changes[position + 1 :]))

        match change:
            case Masked(rule=rule, values=torch.Tensor() as values):
                yield "a masked value", other(replace(change, values=values * 2))
                yield "a masked dtype", other(replace(change, values=values.half()))
                yield "an order", other(replace(change, rule=replace(rule, order="largest")))
                yield "a seed", other(replace(change, rule=replace(rule, seed=1)))
                yield "a mask's tensors", other(replace(change, rule=replace(rule, names=rule.names[:-1])))
                yield "a form", other(replace(change, values=ternary_of(random_levels((70,), 0.6))))
            case Folded(transposed=True):
                yield "an activation", other(replace(change, activation="identity"))
                yield "a fold's scale", other(replace(change, scale=2.0))
                yield "a fold's axis", other(replace(change, transposed=False))
                yield "D", other(replace(change, D=change.D + 1))
                yield "U", other(replace(change, U=change.U + 1))
            case Set(scales=torch.Tensor() as scales):
                yield "a scale of a row", other(replace(change, scales=scales * 2))
                yield "no scales", other(replace(change, scales=None))
                yield "a level of the head", other(replace(change, value=-change.value))


def test_the_content_digest_follows_what_training_left() -> None:
    expert = trained()
    digests = {"itself": expert.content_digest} | {name: other.content_digest for name, other in trained_variants(expert)}
    assert len(set(digests.values())) == len(digests) == 15


def test_the_content_digest_follows_the_content() -> None:
    expert = of_every_kind()
    digests = {"itself": expert.content_digest}
    for name, other in variants(expert):
        digests[name] = other.content_digest
    assert len(set(digests.values())) == len(digests) == 19


def test_the_content_digest_follows_nothing_else() -> None:
    expert = of_every_kind()
    facts_now = expert.facts
    for changed in (
        replace(facts_now, metadata={}),
        replace(facts_now, writer="another writer 9"),
        replace(facts_now, base=replace(facts_now.base, name="org/name", revision="abc")),
        replace(facts_now, density=0.5, alpha=1.0),
    ):
        other = replace(expert, facts=changed)
        assert other.content_digest == expert.content_digest
        assert other.digest != expert.digest


def test_coding_anew_keeps_the_content_digest() -> None:
    levels = {5: 1, 6: -1, 700: 1, 4999: -1}
    digests = set()
    for parameter, log2 in ((2, 12), (3, 12), (16, 20), (20, 5)):
        draft = plain().but(facts=facts(), rows=[Row(ADD, 1, levels=[Levels(0, stream(5000, levels, parameter, log2))])])
        digests.add(from_bytes(draft.file()).content_digest)
    digests.add(from_bytes(bytes_of(from_bytes(draft.file()))).content_digest)
    assert len(digests) == 1


def specified_content_digest(raw: bytes) -> str:
    """docs/format.md, The digests, over what the plain reader reads."""
    read, _, changes = plain_reader.read(raw)
    origin = 8 + struct.unpack("<Q", raw[:8])[0]
    dtypes = {name: entry["dtype"] for name, entry in json.loads(raw[8:origin]).items() if name != "__metadata__"}
    spelled = {"F": "float", "B": "bfloat", "I": "int", "U": "uint"}
    out = bytearray()

    def string(*texts: str) -> None:
        for text in texts:
            out.extend(struct.pack("<Q", len(text.encode())) + text.encode())

    def shape(of: NDArray[Any]) -> None:
        out.extend(struct.pack(f"<B{of.ndim}Q", of.ndim, *of.shape))

    def spelling(name: str) -> str:
        code = dtypes[name]
        return "bool" if code == "BOOL" else spelled[code[0]] + code.lstrip("FBIU")

    def exact(name: str, of: NDArray[Any]) -> None:
        string(spelling(name))
        shape(of)
        out.extend(of.tobytes())

    string("sterna content 1", read["method"], read["source"], read["base"]["fingerprint"])
    for name, several in changes.items():
        for change in several:
            string(change[0], name)
            match change:
                case "factors", _, _, _, scaling, transposed, embedding, ranks:
                    out += struct.pack("<dBB", scaling, transposed, embedding)
                    if ranks is not None:
                        exact(f"{name}.ranks", ranks)
                case "lowrank", _, transposed, embedding, A, B:
                    out += struct.pack("<BB", transposed, embedding)
                    exact(f"{name}.A", A)
                    exact(f"{name}.B", B)
                case "multiply", _, axis, bias, vector:
                    out.append(axis)
                    string(bias or "")
                    if not isinstance(vector, tuple):
                        exact(f"{name}.vector", vector)
                case "set", role, first_row, task, scales, value:
                    string(f"head:{task}" if task else role, spelling(f"{task}:{name}" if task else name))
                    shape(value)
                    out += struct.pack("<QB", first_row, scales is not None) + value.tobytes()
                    out += scales.tobytes() if scales is not None else b""
                case "masked", order, seed, eligible, values:
                    string(order)
                    ternary = isinstance(values, tuple)
                    out += struct.pack("<3QB", seed, (values[0] if ternary else values).size, len(eligible), ternary)
                    string(*eligible)
                    if not ternary:
                        exact("sterna.values", values)
                case "folded", activation, transposed, scale, D, U:
                    string(activation)
                    out += struct.pack("<dB", scale, transposed)
                    exact(f"{name}.D", D)
                    exact(f"{name}.U", U)
            for levels, scale in (item for item in change if isinstance(item, tuple)):
                shape(levels)
                positions = np.flatnonzero(levels)
                out += struct.pack("<fQ", scale, positions.size)
                out += (2 * positions.astype("<i8") + (levels.reshape(-1)[positions] < 0)).astype("<i8").tobytes()
            if change[0] == "palette":
                held = change[2] != 0
                out += np.abs(change[2][held]).astype("<f4").tobytes()
                if change[4].size:
                    out += change[3][held].astype("<i8").tobytes()
                    string("float32")
                    shape(change[4])
                    out += change[4].tobytes()
    return hashlib.sha256(out).hexdigest()


def test_the_content_digest_is_the_specified_one() -> None:
    crafted = [from_bytes(SPECIMENS[name]().file()) for name in ("merged", "adapters", "recovering")]
    for expert in (of_every_kind(), trained(), trained(ternary=True), sterna.compress(*pair(torch.float16), scope="tensor"), *crafted):
        assert expert.content_digest == specified_content_digest(bytes_of(expert))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_fingerprint_is_the_specified_one(dtype: torch.dtype) -> None:
    base = {"b": torch.randn(3, 4).to(dtype), "a": torch.randn(()).to(dtype), "c": torch.randn(0, 2).to(dtype)}
    if dtype == torch.float64:
        base = {name: tensor.float().double() for name, tensor in base.items()}
    whole, shorts = [], b""
    for name in sorted(base):
        tensor = base[name]
        head = struct.pack(f"<B{tensor.dim()}Q", tensor.dim(), *tensor.shape)
        digests = [
            hashlib.sha256(head + tensor.to(kind).float().numpy().tobytes()).digest() for kind in (torch.float32, torch.bfloat16, torch.float16)
        ]
        whole.append(digests[0])
        shorts += b"".join(digest[:3] for digest in digests)
    mark = fingerprint(base)
    assert mark.digest == hashlib.sha256(b"".join(whole)).digest()
    assert mark.shorts.tobytes() == shorts


# The specification's example


def test_the_example_of_the_specification_is_what_the_code_writes(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(script) == 1
    done = subprocess.run([sys.executable, "-c", script[0]], cwd=tmp_path, capture_output=True, text=True, check=True)
    printed = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for name in ("sterna.table", "sterna.streams"):
        block = re.search(rf"`{name}`:\n\n```\n(.*?)```", page, re.DOTALL)
        assert block is not None
        assert " ".join(line[:32].strip() for line in block[1].splitlines()) == printed[name]
    facts_shown = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert facts_shown is not None
    read, _, changes = plain_reader.read((tmp_path / "example.safetensors").read_bytes())
    del read["writer"]
    assert json.loads(facts_shown[1]) == read
    assert np.flatnonzero(changes["layer.weight"][0][1][0]).tolist() == [2, 3, 9, 17, 28, 40]
    agree((tmp_path / "example.safetensors").read_bytes())


# Written whole or not at all


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "expert.safetensors"
    path.write_bytes(b"the old file")
    return path


def test_the_files_mode_follows_the_umask(tmp_path: Path) -> None:
    expert = expert_of([Add("a", ternary_of(random_levels((9,), 0.5)))])
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            expert.save(tmp_path / "expert.safetensors")
        finally:
            os.umask(before)
        assert (tmp_path / "expert.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "No space left on device")], ids=lambda e: type(e).__name__
)
def test_a_failure_in_the_middle_leaves_the_old_file(error: BaseException, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = of_every_kind()

    def failing(_: Expert) -> Iterator[bytes]:
        yield b"half of it"
        raise error

    monkeypatch.setattr(file_module, "file_pieces", failing)
    with pytest.raises(CannotWrite if isinstance(error, OSError) else type(error)):
        expert.save(old)
    assert old.read_bytes() == b"the old file"
    assert list(old.parent.iterdir()) == [old]


LIMITED = """
import resource, sys
sys.path[:0] = sys.argv[2:]
import test_format
expert = test_format.of_every_kind()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    expert.save(sys.argv[1])
except test_format.CannotWrite as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_disk_that_fills_up_leaves_the_old_file(old: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(old), str(Path(__file__).parent)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{old} could not be written: File too large; nothing was left behind\n"
    assert old.read_bytes() == b"the old file"
    assert list(old.parent.iterdir()) == [old]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="is not a folder; create it first"):
        of_every_kind().save(tmp_path / "missing" / "expert.safetensors")


def test_a_file_saved_over_the_one_it_was_loaded_from_is_whole(tmp_path: Path) -> None:
    of_every_kind().save(tmp_path / "expert.safetensors")
    before = (tmp_path / "expert.safetensors").read_bytes()
    sterna.load(tmp_path / "expert.safetensors").save(tmp_path / "expert.safetensors")
    assert (tmp_path / "expert.safetensors").read_bytes() == before
    assert all(t.scale == SCALE for t in sterna.load(tmp_path / "expert.safetensors").ternaries)
