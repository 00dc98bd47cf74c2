"""The report in headless Chromium: both languages, phone to wide screen, light, dark, print; every chart there, no text cut or overlapping."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import browser
import reports
from sterna.reporting import amounts, charts
from sterna.reporting.page import write_page

CHARTS = ("scores", "storage", "transfer", "steps", "latency", "memory", "frontier", "layers", "robust")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one task, and one of three whose names are long or hostile."""
    folder = tmp_path_factory.mktemp("pages")
    found = {"one": reports.report("news"), "three": reports.report("news", reports.HOSTILE, reports.LONG)}
    for name, report in found.items():
        write_page(report, folder / f"{name}.html", "ja" if name == "three" else "en")
    return {name: folder / f"{name}.html" for name in found}


@pytest.mark.parametrize(
    ("name", "width", "flags", "how"),
    [
        ("one", 320, (), {}),
        ("one", 1280, (browser.DARK,), {}),
        ("three", 390, (browser.DARK,), {"unfold": True}),
        ("three", 700, (), {}),
        ("three", 900, (), {}),
        ("three", 1600, (), {"unfold": True}),
        ("three", 680, (), {"printed": True}),
    ],
)
def test_no_text_is_cut_or_overlaps_and_every_chart_is_there(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int, flags: tuple[str, ...], how: dict[str, bool]
) -> None:
    found = browser.probed(pages[name], tmp_path / "profile", *flags, width=width, **how)
    for language, kind in (("en", "Report"), ("ja", "報告書")):
        seen = found[language]
        assert seen["overlapping"] == []
        assert seen["cut"] == []
        assert seen["faint"] == []
        assert seen["lang"] == (seen["lang"] if how.get("printed") else language)
        assert seen["shown"] > 100
        assert seen["other"] == 0
        assert kind in seen["title"]
    for section in CHARTS:
        assert found["charts"][section] > 2, section
    assert found["marks"] > 40
    assert found["mute"] == found["unreachable"] == 0
    assert found["resources"] == []
    assert (found["paper"] < 0.1) == (browser.DARK in flags)


def test_what_its_reader_changes_follows_the_formula(pages: dict[str, Path], tmp_path: Path) -> None:
    report = reports.report("news")
    found = browser.probed(pages["one"], tmp_path / "profile")
    sizes = [500_000, 178_996, 45_441_832, 90_875_664]
    assert found["times"] == [amounts.duration(charts.seconds(size, 10e6, 0.1)) for size in sizes]
    assert found["slow"] == [[size, amounts.duration(charts.seconds(size, 56e3, 0.5))] for size in sizes]
    assert report.memory is not None
    assert found["fit"] == [f"{report.memory.experts(4 * 10**9):,}", f"{report.memory.copies(4 * 10**9):,}"]


def test_the_page_as_it_is_written_runs_its_own_script_and_no_other(pages: dict[str, Path], tmp_path: Path) -> None:
    dom = browser.run(pages["three"], tmp_path / "profile")
    assert 'id="all" download="report.json" href="data:application/json' in dom
    assert "<title>圧縮エキスパートの報告書</title>" in dom
    assert "<img" not in dom


def test_it_prints(pages: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "report.pdf"
    command = [browser.chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, f"--print-to-pdf={target}", pages["three"].as_uri()], capture_output=True, timeout=120, check=False)
    assert target.read_bytes().startswith(b"%PDF")
    assert target.stat().st_size > 50_000
