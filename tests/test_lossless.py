"""Lossless experts: what attaches, and what is applied, is the tuned checkpoint to the bit; and off again, the base."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import lossless_reader
import models
import plain_reader
import sterna
from sterna.codings import lossless
from sterna.errors import InvalidArgument, InvalidFile, Unsupported, WrongBase
from sterna.expert.changes import Lossless, Set
from sterna.expert.expert import Expert
from sterna.expert.file import file_pieces, from_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
State = dict[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the bit, names, dtypes and shapes included."""
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(bits(first[name]), bits(second[name])) for name in first
    )


def again(expert: Expert) -> Expert:
    """As its file gives it back."""
    return from_bytes(b"".join(bytes(piece) for piece in file_pieces(expert)))


def states(dtype: torch.dtype = torch.bfloat16) -> tuple[State, State]:
    """A base of several shapes and a tuned copy with NaN, infinities, a zero of the other sign, equal tensors, and untouched rows."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (30, 20), "b.weight": (50, 8), "b.bias": (50,), "c.weight": (3, 2, 2), "d": ()}
    base = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    base["c.weight"].zero_()
    base["d"].fill_(1)
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["a.weight"] += (0.01 * torch.randn(30, 1) * torch.randn(20)).to(dtype)
    tuned["b.weight"][7] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e30, 3.0]).to(dtype)
    tuned["c.weight"][1] = -0.0
    bits(tuned["b.weight"])[8, 0] = -1  # a NaN with a payload
    return base, tuned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", models.MODELS)
def test_attached_it_is_the_tuned_model_and_detached_the_base(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = models.made(name, dtype)
    tuned = models.tuned(base)
    before, wanted = models.state_of(base), models.state_of(tuned)
    expert = again(sterna.compress(base, tuned, lossless=True))
    assert expert.facts.method == "lossless"
    assert expert.content_digest == sterna.compress(base, tuned, lossless=True).content_digest
    sterna.verify(expert, base)
    written = load_file(sterna.apply(base, expert, tmp_path / "out") / "model.safetensors")
    if isinstance(base, transformers.PreTrainedModel):  # whose files may have other names
        read = type(base).from_pretrained(tmp_path / "out", dtype=dtype)  # which keeps some of T5 in float32, whatever it is asked
        assert same(read.to(dtype).state_dict(), wanted)
    else:
        assert same(written, {key: wanted[key] for key in written})
    patch = sterna.attach(base, expert)
    assert same(base.state_dict(), wanted)
    assert patch.swallowed == 0
    patch.detach()
    assert same(base.state_dict(), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_no_arithmetic_keeps(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = states(dtype)
    expert = again(sterna.compress(base, tuned, lossless=True))
    assert {change.name for change in expert.changes} == {"a.weight", "b.weight", "c.weight"}  # equal tensors take nothing
    assert same(load_file(sterna.apply(base, expert, tmp_path / "out") / "model.safetensors"), tuned)


@pytest.mark.parametrize("tuned_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
def test_dtypes_of_the_tuned_model_come_back(base_dtype: torch.dtype, tuned_dtype: torch.dtype, tmp_path: Path) -> None:
    base, _ = states(base_dtype)
    _, tuned = states(tuned_dtype)
    base["b.bias"][0] = float("nan")
    expert = again(sterna.compress(base, tuned, lossless=True))
    assert same(load_file(sterna.apply(base, expert, tmp_path / "out") / "model.safetensors"), tuned)


class Small(nn.Module):
    def __init__(self, state: State) -> None:
        super().__init__()
        self.a = nn.Linear(20, 30, bias=False)
        self.b = nn.Linear(8, 50)
        self.c = nn.Module()
        self.c.weight = nn.Parameter(torch.zeros(3, 2, 2))
        self.d = nn.Parameter(torch.ones(()))
        self.to(state["d"].dtype).load_state_dict(state)


def test_a_live_model_wider_than_the_tuned_one() -> None:
    """The base in float32 becomes the tuned bfloat16 values, whatever its own low bits were."""
    wide, _ = states(torch.float32)
    _, tuned = states(torch.bfloat16)
    tuned["b.weight"][7, 0] = 1.0  # NaN is no value to compare
    tuned["b.weight"][8, 0] = 1.0
    expert = sterna.compress(wide, tuned, lossless=True)
    model = Small(wide)
    with sterna.attached(model, expert):
        assert all(torch.equal(tensor, tuned[name].float()) for name, tensor in model.state_dict().items())
    assert same(model.state_dict(), wide)
    rounded = {name: tensor.bfloat16() for name, tensor in wide.items()}
    narrow = Small(rounded)
    with sterna.attached(narrow, expert):  # what the tuned dtype makes of the base is what it is a patch of
        assert same(narrow.state_dict(), tuned)
    assert same(narrow.state_dict(), rounded)
    half = Small({name: tensor.half() for name, tensor in wide.items()})
    for allowed in (False, True):
        with pytest.raises(WrongBase, match="to the bit"):
            sterna.attach(half, expert, allow_narrower=allowed)


def test_a_narrower_base_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    base, tuned = states(torch.float32)
    expert = sterna.compress(base, tuned, lossless=True)
    narrow = {name: tensor.bfloat16() for name, tensor in base.items()}
    for allowed in (False, True):
        with pytest.raises(WrongBase, match="to the bit"):
            sterna.attach(Small(narrow), expert, allow_narrower=allowed)
        with pytest.raises(WrongBase, match="very bits"):
            sterna.apply(narrow, expert, tmp_path / "out", allow_narrower=allowed)
    other = {name: tensor + 1 for name, tensor in base.items()}
    with pytest.raises(WrongBase, match="differ"):
        sterna.attach(Small(other), expert)
    exact = {name: tensor.bfloat16() for name, tensor in states(torch.float16)[0].items()}
    of_half = sterna.compress(exact, {name: tensor.float() + 1e-3 for name, tensor in exact.items()}, lossless=True)
    with pytest.raises(WrongBase, match="cannot hold"):
        sterna.attach(Small(exact), of_half)


def test_a_model_that_is_not_contiguous_and_swaps() -> None:
    base, tuned = states()
    first, second = sterna.compress(base, tuned, lossless=True), sterna.compress(base, {**tuned, "d": tuned["d"] + 1}, lossless=True)
    model = Small(base)
    model.a.weight.data = model.a.weight.data.t().contiguous().t()
    patch = sterna.attach(model, first)
    assert torch.equal(bits(model.a.weight), bits(tuned["a.weight"]))
    assert patch.undo_bytes > 0
    patch.swap(second)
    assert float(model.d.detach()) == 2
    patch.swap(sterna.compress(base, {name: tensor * 2 for name, tensor in base.items()}, density=0.5, force=True))
    patch.detach()
    assert same(model.state_dict(), base)


def test_heads_rows_and_dropped_tensors_are_as_compress_has_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = models.bert_classifier(labels=5)
    tuned = models.tuned(classifier)
    grown = copy.deepcopy(tuned.bert.embeddings.word_embeddings.weight.detach())
    tuned.resize_token_embeddings(43)
    classifier.bert.save_pretrained(tmp_path / "base")
    tuned.bfloat16().save_pretrained(tmp_path / "tuned")
    expert = sterna.compress(tmp_path / "base", tmp_path / "tuned", lossless=True)
    roles = {change.name: change.role for change in expert.changes if isinstance(change, Set)}
    assert roles["classifier.weight"] == "head"
    assert roles["embeddings.word_embeddings.weight"] == "rows"
    assert grown.shape[0] == 40
    written = load_file(sterna.apply(tmp_path / "base", expert, tmp_path / "out") / "model.safetensors")
    assert same(written, load_file(tmp_path / "tuned" / "model.safetensors"))


def test_float64_and_buffers_that_differ_in_a_sign() -> None:
    base: State = {"w": torch.ones(4, 4), "wide": torch.ones(3, dtype=torch.float64), "n.running_mean": torch.zeros(2)}
    tuned = {"w": base["w"] + 1, "wide": base["wide"] + 1e-12, "n.running_mean": -base["n.running_mean"]}
    expert = sterna.compress(base, tuned, lossless=True)
    assert {change.name for change in expert.changes} == set(base)
    assert len(sterna.compress(base, {**base, "w": tuned["w"]}, lossless=True).changes) == 1
    with pytest.raises(Unsupported):
        sterna.compress(base, tuned)


@pytest.mark.parametrize("option", [{"density": 0.1}, {"alpha": 4.0}, {"scope": "global"}, {"coding": "small"}, {"head": "fp16"}], ids=str)
def test_options_that_do_not_go_with_it_are_refused(option: dict[str, Any]) -> None:
    base, tuned = states()
    with pytest.raises(InvalidArgument, match=next(iter(option))):
        sterna.compress(base, tuned, lossless=True, **option)


def test_adapters_and_experts_are_refused(tmp_path: Path) -> None:
    base, tuned = states()
    expert = sterna.compress(base, tuned, lossless=True)
    expert.save(tmp_path / "expert.safetensors")
    for source in (expert, tmp_path / "expert.safetensors"):
        with pytest.raises(InvalidArgument, match="expected a full checkpoint"):
            sterna.compress(base, source, lossless=True)
    with pytest.raises(InvalidArgument, match="without lossless"):
        expert.bitmasks()


def test_the_task_vector_is_the_difference() -> None:
    base, tuned = states(torch.float32)
    tuned["b.weight"][7:9] = 0.25
    expert = sterna.compress(base, tuned, lossless=True)
    for name, tensor in expert.task_vector(base).items():
        assert torch.equal(tensor, tuned[name] - base[name])
    with pytest.raises(InvalidArgument, match="give task_vector the base"):
        expert.task_vector()
    with pytest.raises(WrongBase):
        expert.task_vector({name: tensor + 1 for name, tensor in base.items()})


def test_the_content_digest_is_of_what_it_decodes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = states()
    expert = sterna.compress(base, tuned, lossless=True)
    monkeypatch.setattr(lossless, "CHANGES_A_BYTE", 1)  # which pads
    padded = sterna.compress(base, tuned, lossless=True)
    assert padded.content_digest == expert.content_digest
    assert padded.digest != expert.digest
    tuned["d"] += 1
    assert sterna.compress(base, tuned, lossless=True).content_digest != expert.content_digest


def test_threads_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "BAND", 64)
    base, tuned = states()
    digests = set()
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            expert = sterna.compress(base, tuned, lossless=True)
            sterna.verify(expert, base)
        finally:
            torch.set_num_threads(threads)
        digests.add(expert.digest)
    assert len(digests) == 1


def test_sizes_count_what_changed() -> None:
    base, tuned = states()
    summary = sterna.inspect(sterna.compress(base, tuned, lossless=True))
    changed = sum(int((bits(base[name]) != bits(tuned[name])).sum()) for name in base)
    assert (summary.nonzeros, summary.parameters) == (changed, sum(tensor.numel() for tensor in base.values()))
    assert summary.bits_per_change == 8 * summary.bytes_streams / changed
    assert summary.entropy_bits_per_parameter == 0
    nothing = sterna.inspect(sterna.compress(base, base, lossless=True))
    assert (nothing.nonzeros, nothing.bytes_streams, nothing.bits_per_change, nothing.tensors) == (0, 0, None, ())


def test_damage_that_the_checksum_does_not_see_is_found_by_the_tensors_digest(tmp_path: Path) -> None:
    base, tuned = states()
    expert = sterna.compress(base, tuned, lossless=True)
    change = expert.changes[0]
    assert isinstance(change, Lossless)
    lying = replace(expert, changes=(replace(change, digest=bytes(16)), *expert.changes[1:]), file_digest=None)
    lying.check()
    model = Small(base)
    for work in (
        lambda: sterna.verify(lying, base),
        lambda: sterna.attach(model, lying),
        lambda: sterna.apply(base, lying, tmp_path / "out"),
        lambda: lying.task_vector(base),
    ):
        with pytest.raises(InvalidFile, match=r"a\.weight does not become"):
            work()
    assert same(model.state_dict(), base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plain_readers_read_the_file(dtype: torch.dtype) -> None:
    base, tuned = states(dtype)
    facts, _, changes = plain_reader.read(b"".join(bytes(piece) for piece in file_pieces(sterna.compress(base, tuned, lossless=True))))
    assert facts["method"] == "lossless"
    assert set(changes) == {"a.weight", "b.weight", "c.weight"}
    width = 8 * base["d"].element_size()
    for name, ((kind, code, shape, stream, digest),) in changes.items():
        assert (kind, code, shape) == ("lossless", {4: "F32"}.get(width // 8, {torch.float16: "F16"}.get(dtype, "BF16")), list(base[name].shape))
        words = [word % (1 << width) for word in bits(base[name]).flatten().tolist()]
        read = lossless_reader.read(stream, shape, words, width)
        assert read == [word % (1 << width) for word in bits(tuned[name]).flatten().tolist()]
        assert plain_reader.hashlib.sha256(b"".join(word.to_bytes(width // 8, "little") for word in read)).digest()[:16] == digest


def test_the_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = models.bert_classifier(labels=4)
    classifier.bert.save_pretrained(tmp_path / "base")
    models.tuned(classifier).save_pretrained(tmp_path / "tuned")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("sterna")), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = run("compress", "base", "tuned", "-o", "x.safetensors", "--lossless")
    assert done.returncode == 0, done.stderr
    assert "entries changed" in done.stdout
    shown = run("inspect", "x.safetensors").stdout
    assert "every bit of a full fine-tune" in shown
    assert "bits a change" in shown
    assert json.loads(run("inspect", "x.safetensors", "--json").stdout)["facts"]["method"] == "lossless"
    assert "the right base" in run("verify", "x.safetensors", "--base", "base").stdout
    assert run("apply", "base", "x.safetensors", "-o", "out").returncode == 0
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors"))
    refused = run("compress", "base", "tuned", "-o", "y.safetensors", "--lossless", "--density", "0.1")
    assert refused.returncode == 2
    assert "density is 0.1" in refused.stderr
