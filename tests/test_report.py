"""The report without a browser: its numbers as text, axes, tables and sentences; hostile names; and what is measured against independent counts."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
import reports
import sterna
import trainable
from sterna import commands
from sterna.errors import CannotWrite, InvalidArgument
from sterna.reporting import amounts, page, scales, texts
from sterna.reporting.report import Candidate, Metric, frontier
from sterna.reporting.sizes import layers_of, lora_bytes, memory_of
from sterna.reporting.tables import tables
from sterna.reporting.timing import same_bits, swaps_among, with_threads
from sterna.reporting.verdict import figures, verdict
from sterna.scoring.intervals import Estimate

STERNA = str(Path(sys.executable).with_name("sterna"))
REPORTING = Path(page.__file__).parent


# Numbers as text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9.996, "10.0"), (99.96, "100"), (0.012345, "0.0123"), (1234.5, "1,234"), (-0.5, "\u22120.500"), (999.6, "1,000"), (2e-4, "0.000200")],
)
def test_digits(value: float, text: str) -> None:
    assert amounts.digits(value) == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (amounts.size(999), "999 B"),
        (amounts.size(999_999), "1.00 MB"),
        (amounts.size(45_441_832), "45.4 MB"),
        (amounts.duration(0.0999996), "100 ms"),
        (amounts.duration(59.9999), "1.00 min"),
        (amounts.duration(5e-6), "5.00 \u00b5s"),
        (amounts.duration(200_000), "2.31 d"),
        (amounts.speed(56e3), "56 kbit/s"),
        (amounts.speed(1e9), "1 Gbit/s"),
        (amounts.milliseconds(1234), "1.23 s"),
        (amounts.signed(-0.04), "0.0"),
        (amounts.signed(0.06), "+0.1"),
        (amounts.difference(Estimate(-0.4, -1.5, 0.7), Metric("accuracy", "accuracy")), "\u22120.4 [\u22121.5, +0.7]"),
        (amounts.times(9.96), "10\u00d7"),
    ],
)
def test_amounts(text: str, wanted: str) -> None:
    assert text.replace("\u00a0", " ") == wanted


@given(st.floats(1e-9, 1e12))
def test_digits_are_three_and_right(value: float) -> None:
    text = amounts.digits(value)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.0051)


# Axes and the frontier


@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=8), st.booleans())
def test_axes_hold_every_value_and_few_ticks(values: list[float], log: bool) -> None:
    scale = scales.logarithmic(values) if log else scales.linear(values)
    assert all(scale.inset <= scale.percent(value) <= 100 - scale.inset for value in values)
    ticks = scale.ticks()
    assert 0 < len(ticks) <= 6
    assert ticks == sorted(ticks)
    assert all(scale.low * (1 - 1e-9) - 1e-9 <= tick <= scale.high * (1 + 1e-9) + 1e-9 for tick in ticks) or len(ticks) == 1


def test_axes_say_where_they_are() -> None:
    """Every number below the first chart of scores stands where the chart's own points say that it does."""
    report = reports.report("news")
    task = report.tasks[0]
    lifted = tuple(replace(one, score=Estimate(one.score.value + 18, one.score.low + 18, one.score.high + 18)) for one in task.candidates)
    text = page.page(replace(report, tasks=(replace(task, candidates=lifted),)))
    section = re.search(r'<section id="scores".*?</section>', text, re.DOTALL)
    assert section
    ticks = [(float(at), float(said)) for at, said in re.findall(r'<text x="([\d.]+)%" y="15"[^>]*>([\d.]+)</text>', section[0])]
    points = [float(at) for at in re.findall(r'<svg x="([\d.]+)%" y="50%" overflow="visible"><path', section[0])]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    assert {value for _, value in ticks} >= {90.0, 95.0, 100.0}
    values = [v0 + (at - x0) * (v1 - v0) / (x1 - x0) for at in points]
    assert values == pytest.approx([89.0, 98.0, 97.7], abs=0.01)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=20), st.booleans())
def test_the_frontier_is_what_nothing_beats(points: list[tuple[int, int]], higher: bool) -> None:
    candidates = [Candidate("expert", "", size, Estimate(score, score, score)) for size, score in points]
    best = frontier(candidates, higher)
    sign = 1 if higher else -1
    for size, score in points:
        beaten = any(other <= size and sign * reached >= sign * score and (other, reached) != (size, score) for other, reached in points)
        assert ((size, score) in [(one.bytes, one.score.value) for one in best]) == (not beaten)
    assert len({one.bytes for one in best}) == len(best)


# Texts


def test_every_text_is_in_both_languages_with_the_same_fields() -> None:
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    same_in_both = {"way.lora", "column.milliseconds"}
    for key, text in texts.TEXTS.items():
        assert text.en, key
        assert text.ja, key
        assert fields(text.en) == fields(text.ja), key
        japanese = any("\u3040" <= letter <= "\u30ff" or "\u4e00" <= letter <= "\u9fff" for letter in text.ja)
        assert japanese or key in same_in_both, key
        assert not re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", text.en), key


def test_every_text_is_used() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in REPORTING.iterdir() if path.suffix in (".py", ".html") and path.name != "texts.py")
    columns = {f"column.{column}" for table in tables(reports.report()).values() for column in table.columns}
    made = ("kind.", "way.", "gate.", "table.", "step.", "verdict.", "side.", "memory.", "scores.to.")  # keys that are put together
    sections = ("scores", "gates", "storage", "transfer", "steps", "latency", "memory", "frontier", "layers", "robust", "side")
    titles = {f"{name}.title" for name in sections}
    unused = [key for key in texts.TEXTS if f'"{key}"' not in sources and key not in columns | titles and not key.startswith(made)]
    assert unused == []
    assert columns <= set(texts.TEXTS)


def test_a_missing_text_is_an_error() -> None:
    with pytest.raises(KeyError):
        texts.t("no.such.key")


# The page


class Structure(html.parser.HTMLParser):
    """Which tags a page opens, and whether all are closed in order."""

    VOID = ("meta", "input", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def structure(text: str) -> Structure:
    found = Structure()
    found.feed(text)
    assert found.open == []
    return found


@pytest.mark.parametrize("language", ["en", "ja"])
def test_hostile_names_stay_text(language: str) -> None:
    plain = structure(page.page(reports.report("news", "mail", "calls")))
    hostile = page.page(reports.report("news", reports.HOSTILE, reports.LONG), language)
    found = structure(hostile)
    assert sorted(found.tags) == sorted(plain.tags)  # not one tag more
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", hostile)
    assert f'<html lang="{language}">' in hostile


def test_the_page_needs_nothing_else() -> None:
    text = page.page(reports.report("news", "mail"))
    assert "default-src 'none'" in text
    links = [value for name, value in structure(text).attributes if name in ("src", "href", "action", "srcset") and value]
    assert all(value.startswith(("#", "data:")) for value in links)
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_holds_every_number_as_json() -> None:
    report = reports.report("news", reports.HOSTILE)
    text = page.page(report)
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.DOTALL)
    assert found
    assert json.loads(found[1]) == json.loads(json.dumps(page.cleaned(report).to_dict()))


def test_a_report_of_little_is_a_page_too() -> None:
    full = reports.report("news")
    task = replace(full.tasks[0], candidates=full.tasks[0].candidates[:1], kept=(), layers=(), trail=())
    bare = replace(full, tasks=(task,), steps=None, latency=None, memory=None, dtypes=(), threads=(), gates=(), machine={}, inputs=(), seconds=None)
    text = page.page(bare)
    structure(text)
    assert "No step of compression passed its gates for news." in text
    assert figures(bare) == []


def test_another_language_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'de'; expected one of en, ja"):
        page.page(reports.report(), "de")


def test_a_page_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite):
        page.write_page(reports.report(), tmp_path / "absent" / "report.html")


# Sentences


def changed(**fields: Any) -> Any:
    """A report of one task whose chosen expert has these fields."""
    report = reports.report("news")
    task = report.tasks[0]
    candidates = tuple(replace(one, **fields) if one.chosen else one for one in task.candidates)
    return replace(report, tasks=(replace(task, candidates=candidates),))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "a difference within noise (\u22120.3"),
        ({"to_tuned": Estimate(-4, -5, -3)}, "measurably worse (\u22124.0"),
        ({"to_tuned": Estimate(4, 3, 5)}, "measurably better (+4.0"),
        ({"to_tuned": None}, "of the base alone (+8.7"),
        ({"to_tuned": None, "to_base": None}, "accuracy is 79.7; a swap"),
        ({"chosen": False}, "No step of compression passed its gates for news."),
    ],
)
def test_the_verdict_says_what_the_intervals_say(fields: dict[str, Any], says: str) -> None:
    (said,) = verdict(changed(**fields))
    assert says in said.en
    assert said.ja


def test_the_verdict_of_several_names_the_worst_by_its_own_metric() -> None:
    (said,) = verdict(reports.report("news", "mail", "language"))
    assert said.en.startswith("For 3 tasks, experts of 1.50")
    assert "1 of 3 score measurably below their tuned models (largest loss +0.300" in said.en  # a perplexity that rose
    report = reports.report("news", "mail", "language")
    (same,) = verdict(replace(report, tasks=report.tasks[:2]))
    assert "each scores as its tuned model within noise (largest loss \u22120.3" in same.en


# Tables


def test_csv_reads_back_and_no_cell_is_a_formula() -> None:
    report = reports.report('=HYPERLINK("http://x")', "a,\"b\"\nc")
    for table in tables(report).values():
        rows = list(csv.reader(io.StringIO(table.csv())))
        assert rows[0] == list(table.columns)
        assert len(rows) == len(table.rows) + 1
        for read, cells in zip(rows[1:], table.rows, strict=True):
            for text, cell in zip(read, cells, strict=True):
                assert not text.startswith(("=", "@", "+"))
                if isinstance(cell, float):
                    assert float(text) == cell
    assert [row[0] for row in csv.reader(io.StringIO(tables(report)["storage"].csv()))][1] == "'=HYPERLINK(\"http://x\")"


# What is measured


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tuned model, two experts of it, and labelled rows."""
    folder = tmp_path_factory.mktemp("place")
    base = trainable.save_base("bert", folder / "base")
    body: Any = models.bert_classifier(labels=2)
    body.bert.load_state_dict(type(body.bert).from_pretrained(base).state_dict())
    tuned: Any = models.tuned(body)
    tuned.config.id2label, tuned.config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    tuned.save_pretrained(folder / "tuned")
    trainable.tokenizer("bert").save_pretrained(folder / "tuned")
    for density in (0.3, 0.1):
        sterna.compress(base, folder / "tuned", density=density, alpha=2.0).save(folder / f"at{density}.safetensors")
    trainable.save_csv(folder / "test.csv", 60, seed=3)
    return folder


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([STERNA, *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False)


COLUMNS = ("--text-column", "text", "--label-column", "label")


def test_the_command_reports_the_scores_that_evaluate_gives(place: Path, tmp_path: Path) -> None:
    experts = ("at0.3.safetensors", "at0.1.safetensors")
    words = ("--base", "base", "--data", "test.csv", "--tuned", "tuned", *COLUMNS, "--repeats", 3, "-o", tmp_path / "r.html", "--json")
    done = run("report", *experts, *words, cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (task,) = found["tasks"]
    assert [one["chosen"] for one in task["candidates"] if one["kind"] == "expert"] == [True, False]
    files = [place / expert for expert in experts]
    scored = sterna.evaluate(place / "base", files, data=place / "test.csv", tuned=place / "tuned", text="text", label="label")
    entries = scored.tasks[0].entries
    mine = [one for one in task["candidates"] if one["kind"] != "control"]
    assert [one["score"]["value"] for one in mine] == [entry.outcomes["accuracy"].value for entry in entries]
    assert [one["bytes"] for one in mine[1:]] == [
        sum(file.stat().st_size for file in (place / "tuned").glob("*.safetensors")),
        *((place / expert).stat().st_size for expert in experts),
    ]
    assert {"BitDelta", "DARE", "prune only"} <= {one["label"] for one in task["candidates"] if one["kind"] == "control"}
    assert found["restored"] is True
    assert [run["same_bits"] for run in found["threads"]] == [True, True]
    assert [run["dtype"] for run in found["dtypes"]] == ["fp32", "bf16", "fp16"]
    structure((tmp_path / "r.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("at0.3.safetensors", "--data", "test.csv"), "--base is missing"),
        (("at0.3.safetensors", "--base", "base"), "--data is missing"),
        (("at0.3.safetensors", "--base", "base", "--data", "test.csv", "--lang", "de"), "language is 'de'"),
        (("at0.3.safetensors", "--base", "base", "--data", "test.csv", "-o", "absent/r.html"), "cannot be written"),
        (("absent.safetensors", "--base", "base", "--data", "test.csv"), "absent.safetensors"),
        (("at0.3.safetensors", "--base", "base", "--data", "absent.csv"), "absent.csv"),
        (("tuned",), "is no run folder"),
        (("tuned", "at0.3.safetensors"), "a folder is among 2 paths"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["sterna", "report", *words])
    with pytest.raises(SystemExit) as left:
        commands.main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert says in said
    assert said.count("\n") == 1
    assert not (place / "report.html").exists()


def test_layers_count_what_the_task_vector_holds(place: Path) -> None:
    expert = sterna.load(place / "at0.1.safetensors")
    counted: dict[str, int] = {}
    for name, tensor in expert.task_vector().items():
        if name.startswith("classifier"):
            continue
        number = re.search(r"layer\.(\d+)\.", name)
        counted[number[1] if number else ""] = counted.get(number[1] if number else "", 0) + int(tensor.count_nonzero())
    layers = layers_of(sterna.inspect(expert))
    assert {layer.name: layer.nonzeros for layer in layers} == counted
    assert [layer.name for layer in layers] == ["", "0", "1"]


def test_lora_bytes_are_those_of_peft() -> None:
    import peft

    model: Any = models.bert_classifier()
    expected = lora_bytes(model, 8)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, task_type="SEQ_CLS"))
    assert expected == 2 * sum(value.numel() for name, value in wrapped.named_parameters() if "lora_" in name)


def test_the_first_attach_that_is_timed_finds_the_fingerprint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from sterna import fingerprint
    from sterna.live.patch import forget_base

    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=2)
    expert = sterna.load(place / "at0.3.safetensors")
    hashed: list[torch.Size] = []
    digest = fingerprint.tensor_digest

    def counted(tensor: torch.Tensor, *how: torch.dtype) -> bytes:
        hashed.append(tensor.shape)
        return digest(tensor, *how)

    monkeypatch.setattr(fingerprint, "tensor_digest", counted)
    found = []
    for forget in (False, False, True):
        hashed.clear()
        if forget:
            forget_base(model)
        with sterna.attached(model, expert):
            found.append(len(hashed))
    assert found[1] == 0 < found[0] == found[2]


def test_swaps_threads_and_memory_leave_the_base_as_it_was(place: Path) -> None:
    import transformers

    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    experts = [sterna.load(place / f"at{density}.safetensors") for density in (0.3, 0.1)]
    assert [len(times.samples) for times in swaps_among(model, experts)] == [1, 1]
    assert all(run.same_bits for run in with_threads(model, experts[0], (1, 2), 2))
    memory = memory_of(model, experts)
    assert memory.base == sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert memory.experts(memory.base + memory.undo + 5 * memory.expert) == 5
    assert same_bits(model.state_dict(), before)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = -0.0
    before[next(iter(before))].view(-1)[0] = 0.0
    assert not same_bits(model.state_dict(), before)  # equal values, other bits
