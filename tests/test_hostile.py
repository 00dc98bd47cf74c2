"""Files from strangers: each is refused with one line that says what is wrong, at once, and with no more memory than its size justifies."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import plain_reader
import sterna
from hostile import generate
from hostile.craft import (
    ADD,
    CHUNK,
    FACTORS,
    MULTIPLY,
    SET,
    SPECIMENS,
    Draft,
    Levels,
    Row,
    facts,
    framed,
    plain,
    shape_table,
    stream,
    text,
    varint,
)
from sterna.errors import InvalidArgument, InvalidFile, NotFound, SternaError, Unsupported, WrongBase
from sterna.expert.changes import Add, Factors, Multiply, Set
from sterna.expert.container import HEADER_LIMIT
from sterna.expert.expert import DENSE_FREE, Expert
from sterna.expert.file import file_pieces, from_bytes

PHRASES: dict[str, str] = json.loads((generate.CORPUS / "cases.json").read_text())
SECOND = 5.0
"""CPU seconds, of a slow machine that is shared: what takes part of one on a quiet core. Work out of proportion to these files takes minutes."""


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Kernels are compiled before anything is timed."""
    for make in SPECIMENS.values():
        from_bytes(make().file()).check()
    from_bytes(plain().file()).task_vector()
    for mode in (0, 1):
        raw = varint(2) + bytes([mode]) + bytes(8)
        with contextlib.suppress(InvalidFile):
            from_bytes(plain().but(shapes=[(6, 5)], rows=[Row(ADD, 1, levels=[Levels(0, raw, coding=3)])]).file()).check()


def measured(work: Callable[[], object]) -> tuple[SternaError | None, float, int]:
    """(the error that it raised, CPU seconds, peak bytes of Python and numpy)."""
    refused = None
    tracemalloc.start()
    began = time.process_time()
    try:
        work()
    except SternaError as error:
        refused = error
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return refused, seconds, peak


def used(path: Path) -> None:
    """What a reader of a file from a stranger does with it."""
    expert = sterna.load(path)
    expert.check()
    expert.task_vector()


# The corpus


@pytest.mark.parametrize("name", sorted(PHRASES))
def test_a_hostile_file_is_refused_with_one_clear_line(name: str) -> None:
    path = generate.CORPUS / f"{name}.safetensors"
    error, seconds, peak = measured(lambda: used(path))
    assert error is not None, "it was not refused"
    message = str(error)
    assert PHRASES[name] in message
    assert "\n" not in message
    assert message.isprintable()
    assert len(message.replace(str(path), "")) < 400
    assert seconds < SECOND
    assert peak < 200_000 + 20 * path.stat().st_size


def test_the_corpus_is_what_its_generator_writes() -> None:
    made = {name: (phrase, file) for name, phrase, file in generate.cases()}
    there = {path.stem: path.read_bytes() for path in generate.CORPUS.glob("*.safetensors")}
    assert {name: phrase for name, (phrase, _) in made.items()} == PHRASES
    assert {name: file for name, (_, file) in made.items()} == there
    assert sum(path.stat().st_size for path in generate.CORPUS.iterdir()) < 400_000


@pytest.mark.parametrize("name", sorted(SPECIMENS))
def test_the_files_that_the_corpus_breaks_are_sound(name: str) -> None:
    file = SPECIMENS[name]().file()
    expert = from_bytes(file)
    expert.check()
    _, _, changes = plain_reader.read(file)
    assert [change.name for change in expert.changes] == [key for key, listed in changes.items() for _ in listed]
    again = b"".join(bytes(piece) for piece in file_pieces(expert))
    assert from_bytes(again).content_digest == expert.content_digest


# Cut short, at every byte


@pytest.mark.parametrize("name", ["kinds", "scaled", "trained", "masked"])
def test_a_file_cut_at_any_byte_is_refused(name: str) -> None:
    file = SPECIMENS[name]().file()
    for length in range(len(file)):
        with pytest.raises(InvalidFile):
            from_bytes(file[:length])


@pytest.mark.parametrize("name", ["kinds", "scaled", "plain", "trained", "masked"])
def test_a_signed_file_with_a_table_cut_at_any_byte_is_refused(name: str) -> None:
    whole = SPECIMENS[name]()
    for length in range(len(whole.table)):

        class Cut(Draft):
            table = whole.table[:length]

        with pytest.raises(InvalidFile, match="table"):
            from_bytes(Cut(whole.facts, whole.names, whole.shapes, whole.rows, whole.exact).file())


@pytest.mark.parametrize("name", ["kinds", "plain", "edges", "masked", "first_coding"])
def test_a_signed_file_with_a_stream_cut_at_any_byte_is_refused(name: str) -> None:
    whole = SPECIMENS[name]()
    for row in whole.rows:
        for levels in row.levels:
            sound = levels.stream
            for length in range(len(sound)):
                levels.stream = sound[:length]
                with pytest.raises(InvalidFile, match="stream"):
                    from_bytes(whole.file()).check()
            levels.stream = sound


# Things that are no files


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is a folder"):
        sterna.load(tmp_path)
    with pytest.raises(NotFound, match="does not exist"):
        sterna.load(tmp_path / "missing.safetensors")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotFound, match="cannot be read: Not a directory"):
        sterna.load(tmp_path / "file" / "expert.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(NotFound, match="is a pipe or device"):
        sterna.load(tmp_path / "pipe.safetensors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "expert.safetensors").write_bytes(plain().file())
    (tmp_path / "expert.safetensors").chmod(0)
    with pytest.raises(NotFound, match="cannot be read: Permission denied"):
        sterna.load(tmp_path / "expert.safetensors")


# Large claims and large files


def sparse(path: Path, head: bytes, size: int) -> Path:
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def test_a_header_of_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = sparse(tmp_path / "h.safetensors", struct.pack("<Q", 100 << 20) + b"{", (100 << 20) + 100)
    error, seconds, peak = measured(lambda: sterna.load(path))
    assert "states a header of 104857600 bytes; an expert's has at most 4194304" in str(error)
    assert seconds < 0.1
    assert peak < 100_000


def test_a_large_checkpoint_is_refused_after_its_header(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [1 << 33], "data_offsets": [0, 1 << 35]}}).encode()
    path = sparse(tmp_path / "w.safetensors", struct.pack("<Q", len(header)) + header, 8 + len(header) + (1 << 35))
    began = time.process_time()
    with pytest.raises(InvalidFile, match="not an expert"):
        sterna.load(path)
    assert time.process_time() - began < 0.2


def padded(begin: str, item: str, end: str, size: int) -> str:
    """JSON of about `size` bytes, most of it `item` again and again."""
    return begin + (item + ",") * ((size - len(begin) - len(end)) // (len(item) + 1) - 1) + item + end


@pytest.mark.parametrize("item", ["[]", "{}", '{"a":1}', "[[]]", "999", '"ab"', "0.1"])
def test_json_takes_memory_in_proportion(item: str) -> None:
    for file in (
        framed(padded('{"a":[', item, "]}", HEADER_LIMIT // 8), b""),
        plain().but(facts=padded('{"format":1,"metadata":{"a":[', item, "]}}", 1 << 18)).file(),
    ):
        error, seconds, peak = measured(lambda file=file: from_bytes(file))  # type: ignore[misc]
        assert isinstance(error, InvalidFile)
        assert peak < 40 * len(file)
        assert seconds < 2 * SECOND


def test_facts_have_a_limit() -> None:
    with pytest.raises(InvalidFile, match="at most 1048576 are allowed"):
        from_bytes(plain().but(facts=facts(metadata={"a": "a" * (1 << 20)})).file())
    expert = from_bytes(plain().file())
    with pytest.raises(InvalidArgument, match="at most 1048576 fit"):
        Expert(*with_facts(expert, metadata={"a": "a" * (1 << 20)})).save("never.safetensors")
    with pytest.raises(InvalidArgument, match="half a surrogate pair"):
        Expert(*with_facts(expert, metadata={"a": "\ud800"})).save("never.safetensors")
    assert not Path("never.safetensors").exists()


def with_facts(expert: Expert, **changes: object) -> tuple[object, ...]:
    from dataclasses import replace

    return replace(expert.facts, **changes), expert.fingerprint, expert.changes


def counted_names(count: int, depth: int) -> bytes:
    """A table of names of `depth` shared parts of 16 characters and two parts that count."""
    shared = [text(f"{i:016d}") for i in range(depth)]
    digits = [text(f"{i:03x}") for i in range(512)]
    out = [varint(depth + 512), *shared, *digits, varint(count), varint(0, depth + 2, *range(depth), depth, depth)]
    out += [varint(depth + 1, 1, depth + i % 512) if i % 512 else varint(depth, 2, depth + i // 512, depth) for i in range(1, count)]
    return b"".join(out)


@pytest.mark.parametrize(("count", "depth"), [(1 << 16, 0), (1 << 16, 10), (1 << 14, 56), (70_000, 58)])
def test_names_take_memory_and_time_in_proportion(count: int, depth: int) -> None:
    file = plain().but(names=counted_names(count, depth), shorts=bytes(9 * count), rows=[]).file()
    error, seconds, peak = measured(lambda: from_bytes(file))
    assert peak < 4_000_000 + 100 * len(file)
    assert peak < 200_000_000
    assert seconds < 10 * SECOND  # of tens of thousands of names, traced
    assert ("longer than 67108864 characters together" in str(error)) == (count == 70_000)


@pytest.mark.parametrize(
    ("raw", "shape"), [(b"", (0,)), (bytes([12, 1, 0, 1, 0]), (1,)), (bytes([20, 0]), (CHUNK,)), (bytes([12]) + bytes(256), (CHUNK,))]
)
def test_rows_take_memory_and_time_in_proportion(raw: bytes, shape: tuple[int, ...]) -> None:
    count = 1 << 12
    rows = b"".join(varint(ADD, i + 1, 2, 0, len(raw)) for i in range(count))
    draft = plain().but(names=counted_names(count, 0), shorts=bytes(9 * count), shapes=[shape], rows=[], row_count=count, table_tail=rows)
    file = draft.but(streams_tail=raw * count).file()
    error, seconds, peak = measured(lambda: from_bytes(file))
    assert error is None
    assert seconds < 2 * SECOND
    assert peak < 4_000_000 + 80 * len(file)


@pytest.mark.parametrize("index", [bytes(1 << 20), bytes([1, 0, 1]) * (1 << 20) + bytes(1 << 20)], ids=["no non-zero", "a non-zero each"])
def test_blocks_of_one_entry_are_read_in_time_and_memory_that_follow_the_file(index: bytes) -> None:
    def read(chunks: int) -> float:
        file = plain().but(shapes=[(chunks * CHUNK,)], rows=[Row(ADD, 1, levels=[Levels(0, (b"\0" + index) * chunks)])]).file()
        error, seconds, peak = measured(lambda: from_bytes(file).check())
        assert error is None
        assert seconds < SECOND
        assert peak < 80_000_000 + 16 * len(file)
        return seconds

    assert min(read(8) for _ in range(3)) < 12 * min(read(2) for _ in range(3))


def test_a_dense_tensor_is_made_only_within_a_limit_that_is_not_the_files_own() -> None:
    empty = bytes([20, 0])
    claims = facts(base=facts()["base"] | {"parameters": 1 << 50})
    expert = from_bytes(plain().but(facts=claims, shapes=[(1 << 26,)], rows=[Row(ADD, 1, levels=[Levels(0, empty * 64)])]).file())
    assert expert.task_vector()["a.0.w"].numel() * 4 == DENSE_FREE
    with pytest.raises(InvalidArgument, match="more than the 1,000 allowed"):
        expert.task_vector(max_bytes=1000)
    with pytest.raises(SternaError):
        expert.task_vector({"a.0.w": torch.zeros(10), "a.1.b": torch.zeros(3), "b": torch.zeros(3)})
    expert = from_bytes(plain().but(facts=claims, shapes=[((1 << 26) + 1,)], rows=[Row(ADD, 1, levels=[Levels(0, empty * 65)])]).file())
    with pytest.raises(InvalidArgument, match="give its base, or max_bytes"):
        expert.task_vector()


def test_check_takes_no_memory_for_codes_of_a_dense_stream() -> None:
    entries = 1 << 24
    chunk = bytes([20]) + varint(CHUNK) + bytes([0]) + varint(CHUNK // 8) + bytes(CHUNK // 8)
    file = plain().but(shapes=[(entries,)], rows=[Row(ADD, 1, levels=[Levels(0, chunk * 16)])]).file()
    error, _, peak = measured(from_bytes(file).check)
    assert error is None
    assert peak < 64_000_000  # all codes at once would be 128 MB


# Another base, given to task_vector


def test_changes_that_do_not_fit_the_base_are_refused_by_name() -> None:
    factors = Row(
        FACTORS, 1, fields=varint(0) + text("m") + struct.pack("<d", 1.0), levels=[Levels(0, stream(14, {0: 1})), Levels(1, stream(10, {0: 1}))]
    )
    multiply = Row(MULTIPLY, 1, fields=varint(1, 1) + text("m") + text("n"), levels=[Levels(0, stream(6, {0: 1}))])
    whole = Row(SET, 1, fields=varint(1, 0))
    for row, shapes, good, wrong in (
        (Row(ADD, 1, levels=[Levels(0, stream(6, {0: 1}))]), [(2, 3)], (2, 3), (3, 2)),
        (factors, [(2, 7), (5, 2)], (5, 7), (7, 5)),
        (multiply, [(6,)], (4, 6), (6, 4)),
        (whole, [], (3,), (1,)),
    ):
        exact = [("m", "F32", [3], bytes(12))] if row is whole else []
        expert = from_bytes(plain().but(names=["m", "n"], shapes=shapes, rows=[row], exact=exact).file())
        base = {"m": torch.ones(good), "n": torch.ones(6)}
        assert expert.task_vector(base)["m"].shape == good
        with pytest.raises((WrongBase, sterna.errors.PairingError), match="m"):
            expert.task_vector({"m": torch.ones(wrong), "n": torch.ones(6), "filler": torch.ones(100)})
        if row is multiply:
            with pytest.raises(WrongBase, match="scales n by 6 numbers along axis 0"):
                expert.task_vector({"m": torch.ones(good), "n": torch.ones(5)})


# What no reader takes is not written


@pytest.mark.parametrize("name", ["a\nb", "../x", "/x", "a\\b", "", "a" * 1025, ".".join("a" * 65)])
def test_names_that_no_reader_takes_are_not_written(name: str, tmp_path: Path) -> None:
    expert = from_bytes(plain().file())
    change = Set(name, torch.zeros(3), "head")
    with pytest.raises(InvalidArgument, match="an expert cannot hold"):
        Expert(expert.facts, expert.fingerprint, (change,)).save(tmp_path / "e.safetensors")
    assert not list(tmp_path.iterdir())


def test_changes_that_no_reader_takes_are_not_written(tmp_path: Path) -> None:
    expert = from_bytes(plain().file())
    first, second = expert.changes
    assert isinstance(first, Add)
    assert isinstance(second, Add)
    listed: list[tuple[type[SternaError], str, tuple[object, ...]]] = [
        (InvalidArgument, "not in order of their names", (second, first)),
        (InvalidArgument, "not in order of their names", (first, first)),
        (InvalidArgument, "biases are changed twice", (Multiply("a", "a", first.levels, 0, "b"), Set("b", torch.zeros(1), "head"))),
        (InvalidArgument, "cannot be named 'sterna.table'", (Set("sterna.table", torch.zeros(3), "head"),)),
        (InvalidArgument, "more than 8 dimensions", (Set("head", torch.zeros([1] * 9), "head"),)),
        (Unsupported, "float8_e5m2", (Set("head", torch.zeros(3, dtype=torch.float8_e5m2), "head"),)),
        (InvalidArgument, "scope 'tensor' lets them differ", (Add("a", first.levels), Add("b", _with_scale(second, 9.0)))),
    ]
    for kind, phrase, changes in listed:
        with pytest.raises(kind, match=phrase):
            Expert(expert.facts, expert.fingerprint, changes).save(tmp_path / "e.safetensors")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def _with_scale(change: Add, scale: float) -> sterna.expert.changes.Ternary:
    from dataclasses import replace

    return replace(change.levels, scale=scale)


def test_a_header_beyond_its_limit_is_not_written(tmp_path: Path) -> None:
    expert = from_bytes(plain().file())
    heads = tuple(Set(f"{'h' * 900}{i:04d}", torch.zeros(1), "head") for i in range(5000))
    with pytest.raises(InvalidArgument, match="the expert's header takes"):
        Expert(expert.facts, expert.fingerprint, heads).save(tmp_path / "e.safetensors")
    assert not list(tmp_path.iterdir())


# Kernels that are not bounds-checked, with checks


CHECKED = """
import sys
sys.path[:0] = sys.argv[1:]
from hostile import generate
from hostile.craft import SPECIMENS
from hostile.guard import Guarded
from sterna.errors import SternaError
room = Guarded()
for name, _, file in (*generate.cases(), *((name, "", make().file()) for name, make in SPECIMENS.items())):
    try:
        room.expert(file).check()
    except SternaError:
        assert name not in SPECIMENS, name
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards memory with mprotect")
@pytest.mark.parametrize("checks", ["0", "1"], ids=["as shipped", "numba's own checks"])
def test_no_kernel_leaves_its_arrays(checks: str, tmp_path: Path) -> None:
    """The corpus again: every load that leaves the file's bytes and their padding ends the process, every store and lookup is checked by numba."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": checks, "OMP_NUM_THREADS": "1"}
    if checks == "1":
        environment["NUMBA_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", CHECKED, str(Path(__file__).parent)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_factor_product_of_small_factors_is_not_made() -> None:
    wide = bytes([20, 0]) * 16
    row = Row(FACTORS, 1, fields=varint(0) + text("m") + struct.pack("<d", 1.0), levels=[Levels(0, wide), Levels(1, wide)])
    file = plain().but(shapes=shape_table([(1, 1 << 24), (1 << 24, 1)]), rows=[row]).file()
    expert = from_bytes(file)
    assert isinstance(expert.changes[0], Factors)
    with pytest.raises(InvalidArgument, match=f"takes {4 << 48:,} bytes"):
        expert.task_vector()
    assert np.prod(expert.changes[0].A.shape) == 1 << 24
