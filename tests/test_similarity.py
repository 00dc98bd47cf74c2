"""How alike experts are: matrices beside numpy on dense task vectors, and `sterna similarity` as a person or a script meets it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
import sterna
from coded import expert_of, random_levels, ternary_of
from sterna import charts, similarities
from sterna.charts import heat_map
from sterna.errors import CannotWrite, InvalidArgument, NotFound, WrongBase
from sterna.expert.changes import Add, Change, Factors, Masked, MaskRule, Set
from sterna.needs import MissingDependency
from sterna.similarities import Similarity

STERNA = str(Path(sys.executable).with_name("sterna"))


def command(*words: str | Path, cwd: Path, code: str = "", columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", code] if code else [STERNA]
    return subprocess.run([*program, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def family(count: int, seed: int = 0) -> list[sterna.Expert]:
    """Experts that have something in common, over two tensors of unequal scale."""
    common = np.random.default_rng(seed).normal(size=(40, 50))
    experts = []
    for k in range(count):
        own = common + (1 + k) * np.random.default_rng(seed + 1 + k).normal(size=common.shape)
        levels = np.where(np.abs(own) > np.quantile(np.abs(own), 0.8), np.sign(own), 0).astype(np.int8)
        changes: list[Change] = [Add("a", ternary_of(levels, 0.5)), Add("b", ternary_of(random_levels((77,), 0.3, k), 0.0625))]
        experts.append(expert_of([*changes, Set("head", torch.ones(3), "head")], names=("a", "b"), scope="tensor", scale=0.0))
    return experts


def check(found: Similarity, experts: list[sterna.Expert]) -> None:
    """The matrices beside the same of dense float64 vectors."""
    dense = [np.concatenate([t.double().numpy().ravel() for _, t in sorted(e.task_vector().items())]) for e in experts]
    for i, x in enumerate(dense):
        assert found.nonzeros[i] == np.count_nonzero(x)
        assert found.norms[i] == pytest.approx(np.linalg.norm(x), rel=1e-12)
        for j, y in enumerate(dense):
            both, either = ((x != 0) & (y != 0)).sum(), ((x != 0) | (y != 0)).sum()
            assert found.shared[i, j] == both
            assert found.cosine[i, j] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)
            assert found.overlap[i, j] == pytest.approx(both / either)
            assert found.conflicts[i, j] == pytest.approx((x * y < 0).sum() / both if both else math.nan, nan_ok=True)
    for matrix in (found.cosine, found.shared, found.overlap):
        assert np.array_equal(matrix, matrix.T)
        assert matrix.shape == (len(experts), len(experts))
    assert (found.cosine.diagonal() == 1).all()
    assert (found.overlap.diagonal() == 1).all()
    assert (found.conflicts.diagonal() == 0).all()


@pytest.mark.parametrize("room", [1, 1 << 10, 1 << 28], ids=lambda room: f"{room} bytes")
def test_every_pair_as_dense_vectors_have_it(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In however many parts: tensor by tensor, or all at once."""
    monkeypatch.setattr(similarities, "_BYTES", room)
    experts = family(4)
    check(sterna.similarity(experts), experts)


def test_compressed_models() -> None:
    base = models.made("bert")
    experts = [sterna.compress(base, models.tuned(base, seed), density=0.3) for seed in (1, 2, 3)]
    check(sterna.similarity(experts), experts)


def test_lora_by_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = [
        expert_of([
            Factors(name, name, ternary_of(random_levels((rank, 20), 0.4, rank)), ternary_of(random_levels((9, rank), 0.4, 50 + rank)), 0.5)
            for name in ("x", "y")
        ])
        for rank in (2, 3, 5)
    ]  # fmt: skip
    check(sterna.similarity(experts), experts)


def test_an_expert_that_changes_nothing_has_no_cosine() -> None:
    nothing, something = (expert_of([Add("a", ternary_of(levels))]) for levels in (np.zeros(9, np.int8), np.ones(9, np.int8)))
    found = sterna.similarity([nothing, something])
    assert np.isnan(found.cosine[0]).all()
    assert found.cosine[1, 1] == 1
    assert found.overlap[0, 1] == 0
    assert np.isnan(found.conflicts[0, 1])
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["cosine"] == [[None, None], [None, 1.0]]
    none = sterna.similarity([nothing, nothing])
    assert np.isnan(none.overlap).all()


def test_names_are_those_of_files_and_whole_paths_where_two_are_alike(tmp_path: Path) -> None:
    one, two = family(2)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    one.save(tmp_path / "x" / "news.safetensors")
    two.save(tmp_path / "y" / "legal.v2.safetensors")
    two.save(tmp_path / "y" / "news.safetensors")
    assert sterna.similarity([str(tmp_path / "x" / "news.safetensors"), tmp_path / "y" / "legal.v2.safetensors"]).names == ("news", "legal.v2")
    alike = [tmp_path / folder / "news.safetensors" for folder in ("x", "y")]
    assert sterna.similarity([*alike, one]).names == (str(alike[0]), str(alike[1]), "expert 3")


def test_what_cannot_be_compared() -> None:
    one, two = family(2)
    other = expert_of([Add("a", ternary_of(random_levels((40, 50), 0.5)))], names=("a", "b", "z"))
    loras = [Factors("b", "b", ternary_of(random_levels((2, 7), 0.5)), ternary_of(random_levels((11, 2), 0.5)), 1.0)]
    masked = Masked(MaskRule("smallest", 7, ("a", "b")), ternary_of(random_levels((7,), 0.5)))
    exact = Set("a", torch.ones(40, 50), "tuned")
    cases: list[tuple[list[Any], type[Exception], str]] = [
        ([], InvalidArgument, "experts to compare: 0; expected two or more"),
        ([one], InvalidArgument, "experts to compare: 1; expected two or more"),
        ([one, "nowhere.safetensors"], NotFound, "nowhere"),
        (["same.safetensors", "same.safetensors"], InvalidArgument, "same.safetensors is given twice"),
        ([one, two, other], WrongBase, rf"expert 1 is for the base base, fingerprint {one.fingerprint.hex[:12]}, and expert 3 for base, "),
        ([one, expert_of(list(loras), names=("a", "b"))], InvalidArgument, "expert 1 and expert 2: b is changed in ways that cannot be compared"),
        ([one, expert_of([masked], names=("a", "b"))], InvalidArgument, "expert 1 and expert 2: a is changed in ways"),
        ([one, two, expert_of([exact], names=("a", "b"))], InvalidArgument, "expert 3: the expert holds exact values for a"),
    ]
    for experts, error, pattern in cases:
        with pytest.raises(error, match=pattern):
            sterna.similarity(experts)


# Heat maps


@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_heat_map_for_two_and_for_twenty(count: int, tmp_path: Path) -> None:
    found = sterna.similarity(family(count))
    heat_map(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    heat_map(found, tmp_path / "map.SVG")
    drawn = (tmp_path / "map.SVG").read_bytes()
    words = [text.text for text in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    for name in found.names:
        assert words.count(name) == 4  # a row of the first matrix, a column of each
    for i in range(count):
        for j in range(count):
            for value in (f"{found.cosine[i, j]:z.2f}", f"{100 * found.overlap[i, j]:.0f}", f"{100 * found.conflicts[i, j]:.0f}"):
                assert value in words
    heat_map(found, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.svg", "map.SVG", "map.png"]


def test_a_heat_map_with_gaps_and_long_names(tmp_path: Path) -> None:
    nothing = expert_of([Add("a", ternary_of(np.zeros(9, np.int8)))])
    nothing.save(tmp_path / ("a very long name of an expert, " * 3 + ".safetensors"))
    found = sterna.similarity([*tmp_path.iterdir(), nothing])
    heat_map(found, tmp_path / "map.svg")
    words = "".join(ET.fromstring((tmp_path / "map.svg").read_bytes()).itertext())
    assert "a very long n…" in words
    assert "nan" not in words


def test_where_a_heat_map_cannot_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sterna.similarity(family(2))
    with pytest.raises(InvalidArgument, match=r"map.pdf; expected a file that ends in .png or .svg"):
        heat_map(found, tmp_path / "map.pdf")
    with pytest.raises(CannotWrite, match="is not a folder"):
        heat_map(found, tmp_path / "nowhere" / "map.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"matplotlib is needed here .*pip install 'sterna\[charts\]'"):
        charts.check_chart(tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twenty experts for one base and one for another."""
    folder = tmp_path_factory.mktemp("place")
    for k, expert in enumerate(family(20)):
        expert.save(folder / f"task-{k:02}.safetensors")
    expert_of([Add("a", ternary_of(random_levels((40, 50), 0.5)))], names=("a", "b", "z")).save(folder / "other.safetensors")
    expert_of([Set("a", torch.ones(40, 50), "tuned")], names=("a", "b"), method="exact", source="hiwi", density=None, alpha=None, scale=0.0).save(
        folder / "exact.safetensors"
    )
    return folder


def files(place: Path, count: int) -> list[str]:
    return [f"task-{k:02}.safetensors" for k in range(count)]


def test_the_json_is_what_python_gives(place: Path) -> None:
    done = command("similarity", *files(place, 3), "--json", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    found = sterna.similarity([place / name for name in files(place, 3)])
    assert value == json.loads(json.dumps(found.to_dict()))
    assert list(value) == ["base", "experts", "cosine", "shared", "overlap", "conflicts"]
    assert value["base"] == {"name": "base", "fingerprint": found.fingerprint}
    assert [list(expert) for expert in value["experts"]] == [["name", "nonzeros", "norm"]] * 3
    assert [expert["name"] for expert in value["experts"]] == ["task-00", "task-01", "task-02"]
    for key in ("cosine", "shared", "overlap", "conflicts"):
        assert np.array_equal(np.array(value[key]), getattr(found, key))


@pytest.mark.parametrize(("count", "columns"), [(2, 80), (20, 60), (20, 120)])
def test_the_table_fits_and_has_every_pair(place: Path, count: int, columns: int) -> None:
    found = sterna.similarity([place / name for name in files(place, count)])
    done = command("similarity", *files(place, count), cwd=place, columns=columns)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= columns
    experts, *sections = done.stdout.split("\n\n")
    for name, nonzeros in zip(found.names, found.nonzeros, strict=True):
        assert any(name in line and f"{nonzeros:,}" in line for line in experts.splitlines())
    matrices = (found.cosine, "z.3f"), (100 * found.overlap, ".1f"), (100 * found.conflicts, ".1f")
    for section, (matrix, digits) in zip(sections, matrices, strict=True):
        title, *lines = section.splitlines()
        assert title.startswith(("cosine", "overlap", "sign conflicts"))
        shown: dict[tuple[int, int], str] = {}
        heads: list[int] = []
        for line in lines:
            if line.startswith("    ") and len(line.split()[0]) <= 2 and line[:4].strip() == "":
                heads = [int(word) - 1 for word in line.split()]
                continue
            row, *cells = line.split()
            shown |= {(int(row) - 1, column): cell for column, cell in zip(heads, cells, strict=False)}
        assert shown == {(i, j): format(matrix[i, j], digits) for i in range(count) for j in range(i)}


def test_the_chart_comes_beside_the_result(place: Path, tmp_path: Path) -> None:
    done = command("similarity", *files(place, 3), "--chart", tmp_path / "map.png", "--json", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["experts"][2]["name"] == "task-02"
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


MISTAKES = {
    "one expert": (["task-00.safetensors"], "experts to compare: 1; expected two or more"),
    "another base": (["task-00.safetensors", "other.safetensors"], "task-00 is for the base base, fingerprint"),
    "exact values": (["task-00.safetensors", "exact.safetensors"], "exact: the expert holds exact values for a"),
    "no picture": (["task-00.safetensors", "nothing.safetensors", "--chart", "map.gif"], "expected a file that ends in .png or .svg"),
    "no folder": (["task-00.safetensors", "nothing.safetensors", "--chart", "nowhere/map.png"], "nowhere is not a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake: str, place: Path) -> None:
    words, message = MISTAKES[mistake]
    done = command("similarity", *words, cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sterna: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_chart_without_matplotlib(place: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from sterna.commands import main; main()"
    done = command("similarity", "nothing", "nowhere", "--chart", "map.png", cwd=place, code=code)  # told before anything is read
    assert done.returncode == 2
    assert "pip install 'sterna[charts]'" in done.stderr
