"""Intervals, metrics and the bench: against libraries, slow references and simulations."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import rouge_score.rouge_scorer
import sacrebleu
import scipy.stats
import sklearn.metrics
import torch
import transformers

import models
import sterna
import trainable
from sterna.errors import InvalidArgument, InvalidFile, NotFound, SternaError, WrongModel
from sterna.expert.heads import tasks
from sterna.scoring import intervals
from sterna.scoring.bench import Bench, open_bench
from sterna.scoring.intervals import Sums, difference, interval, mean_of
from sterna.scoring.labels import columns_in_order, numbered
from sterna.scoring.metrics import BY_TASK, BadMetric, measured, metric_of
from sterna.training.data import Examples
from sterna.training.evaluation import Evaluation, Outputs
from sterna.training.tokens import Lengths

# Intervals


def test_mcnemar_is_the_binomial_sum() -> None:
    random = np.random.default_rng(0)
    for share in (0.01, 0.1, 0.4):
        right = random.random(80) < 0.7
        other = np.where(random.random(80) < share, ~right, right)
        b, c = int((right & ~other).sum()), int((~right & other).sum())
        tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
        assert intervals.mcnemar(right, other) == pytest.approx(min(1.0, 2 * tail))
    assert intervals.mcnemar(right, right) == 1.0


@pytest.mark.parametrize("kinds", [3, 400], ids=["few kinds of rows", "all rows differ"])
def test_the_paired_bootstrap_is_that_of_scipy(kinds: int) -> None:
    random = np.random.default_rng(1)
    ours, theirs = random.integers(0, kinds, 400) / kinds, random.integers(0, kinds, 400) / kinds
    ours = np.where(random.random(400) < 0.6, theirs, ours)
    value = float((ours - theirs).mean())
    found = difference(value, mean_of(ours), mean_of(theirs))
    wanted = scipy.stats.bootstrap((ours - theirs,), np.mean, n_resamples=10_000, method="percentile", random_state=0)
    assert found.value == value
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=0.15 * wanted.standard_error)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=0.15 * wanted.standard_error)
    assert found.error == pytest.approx(wanted.standard_error, rel=0.05)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(2)
    held = called_noise = 0
    for _ in range(250):
        ours = random.random(300) < 0.8
        theirs = np.where(random.random(300) < 0.3, random.random(300) < 0.8, ours)  # equally good
        found = intervals.right_or_wrong(ours, theirs)
        held += found.low <= 0 <= found.high
        called_noise += found.noise
    assert 0.92 <= held / 250 <= 0.985
    assert called_noise >= held


def test_equal_rows_differ_by_nothing_and_tell_of_no_size() -> None:
    right = np.array([True, False, True, True])
    for found in (intervals.right_or_wrong(right, right), difference(0.0, mean_of(right), mean_of(right))):
        assert (found.value, found.low, found.high, found.p, found.noise) == (0, 0, 0, 1, True)
        assert found.rows_for(0.01) is None


def test_half_a_point_needs_more_than_ten_thousand_rows() -> None:
    random = np.random.default_rng(3)
    right = random.random(2000) < 0.75
    other = np.where(random.random(2000) < 0.08, ~right, right)
    found = intervals.right_or_wrong(right, other)
    rows = found.rows_for(0.005)
    assert rows is not None
    assert rows > 10_000
    many = np.tile(right, rows // 2000), np.tile(other, rows // 2000)
    wide = intervals.right_or_wrong(*many)
    assert (wide.high - wide.low) / 2 == pytest.approx(0.005, rel=0.1)


def test_only_the_same_rows_are_paired() -> None:
    with pytest.raises(ValueError, match="same rows"):
        difference(0.0, mean_of(np.ones(3)), mean_of(np.ones(4)))


def test_resamples_without_a_score_are_left_out() -> None:
    evidence = Sums(np.array([0, 1, 1, 1]), np.array([[1.0, 0.0], [0.0, 1.0]]), lambda sums: np.where(sums[:, 0] > 0, sums[:, 0], np.nan))
    found = interval(1.0, evidence)
    assert 1 <= found.low <= found.high <= 4


# Metrics: each value is a library's, and of any resample too


def outputs_for(task: str, rows: int = 60, seed: int = 0) -> tuple[Outputs, Examples]:
    """What a model might give: right answers more often than not."""
    random = np.random.default_rng(seed)
    texts = tuple("w" for _ in range(rows))
    if task == "classification":
        labels = random.integers(0, 4, rows)
        logits = random.normal(size=(rows, 5)) + 2 * np.eye(5)[labels]  # a class that never occurs
        return Outputs(logits=logits.astype(np.float32)), Examples(texts, None, tuple(labels.tolist()))
    if task == "regression":
        wanted = random.normal(size=rows).round(1)
        predicted = wanted + random.normal(size=rows)
        return Outputs(logits=predicted[:, None].astype(np.float32)), Examples(texts, None, tuple(wanted.tolist()))
    tokens = random.integers(1, 20, rows)
    nats = random.gamma(2.0, 1.0, rows) * tokens
    words = [" ".join(random.choice(["the", "cat", "sat", "on", "a", "mat", "Mat."], random.integers(2, 9))) for _ in range(rows)]
    said = [word if random.random() < 0.3 else " ".join(reversed(word.split()[:-1] or word.split())) for word in words]
    return Outputs(nats=nats, tokens=tokens, texts=tuple(said)), Examples(texts, None, tuple(words))


def part(found: Outputs, examples: Examples, places: np.ndarray) -> tuple[Outputs, Examples]:
    taken = {name: value[places] for name in ("logits", "nats", "tokens") if (value := getattr(found, name)) is not None}
    return Outputs(**taken, texts=tuple(found.texts[i] for i in places) if found.texts else None), examples.taken(places.tolist())


def prepared(task: Any, examples: Examples) -> Evaluation:
    return Evaluation(task, examples, [{"input_ids": [0]}] * len(examples), None, Lengths(8))


def by_library(name: str, found: Outputs, examples: Examples) -> float:
    wanted: Any = examples.answers
    if found.logits is not None and found.logits.shape[1] > 1:
        labels, logits = np.array(wanted), torch.tensor(found.logits)
        predicted = found.logits.argmax(1)
        return {
            "accuracy": lambda: sklearn.metrics.accuracy_score(labels, predicted),
            "macro_f1": lambda: sklearn.metrics.f1_score(labels, predicted, average="macro"),
            "matthews": lambda: sklearn.metrics.matthews_corrcoef(labels, predicted),
            "loss": lambda: float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))),
        }[name]()
    if found.logits is not None:
        x = found.logits[:, 0]
        return {
            "spearman": lambda: scipy.stats.spearmanr(x, wanted).statistic,
            "pearson": lambda: scipy.stats.pearsonr(x, wanted).statistic,
            "mse": lambda: sklearn.metrics.mean_squared_error(wanted, x),
        }[name]()
    if name in ("perplexity", "loss"):
        loss = found.nats.sum() / found.tokens.sum()
        return math.exp(loss) if name == "perplexity" else loss
    texts = list(found.texts or ())
    if name.startswith("rouge"):
        scorer = rouge_score.rouge_scorer.RougeScorer([name])
        return np.mean([scorer.score(target, text)[name].fmeasure for text, target in zip(texts, wanted, strict=True)])
    return {
        "exact_match": lambda: np.mean([a == b for a, b in zip(texts, wanted, strict=True)]),
        "token_f1": lambda: np.mean([squad_f1(a, b) for a, b in zip(texts, wanted, strict=True)]),
        "bleu": lambda: sacrebleu.corpus_bleu(texts, [list(wanted)]).score / 100,
        "chrf": lambda: sacrebleu.corpus_chrf(texts, [list(wanted)]).score / 100,
    }[name]()


def squad_f1(text: str, target: str) -> float:
    """Word by word, as SQuAD's script does, for words without punctuation but a final stop."""
    ours, theirs = ([w for w in side.lower().replace(".", "").split() if w not in ("a", "an", "the")] for side in (text, target))
    left = list(theirs)
    shared = 0
    for word in ours:
        if word in left:
            left.remove(word)
            shared += 1
    if not ours or not theirs:
        return float(ours == theirs)
    if not shared:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in BY_TASK.items() for name in names])
def test_a_metric_is_the_library_s_on_all_rows_and_on_any_resample(task: Any, name: str) -> None:
    found, examples = outputs_for(task)
    metric = metric_of(name, task)
    got = measured(metric, prepared(task, examples), found, [str(i) for i in range(5)])
    assert got.value == pytest.approx(by_library(name, found, examples), rel=1e-6)
    places = np.random.default_rng(4).integers(0, len(examples), (3, len(examples)))
    resampled = got.evidence.of(places)
    for draw, chosen in zip(resampled, places, strict=True):
        assert draw == pytest.approx(by_library(name, *part(found, examples, chosen)), rel=1e-5)
    assert got.evidence.of(np.arange(len(examples))[None])[0] == pytest.approx(got.value, rel=1e-6)


def test_metrics_without_a_value_are_zero_and_not_nan() -> None:
    examples = Examples(("w",) * 4, None, (0, 0, 1, 1))
    found = Outputs(logits=np.tile(np.array([[1.0, 0.0]], np.float32), (4, 1)))
    for name in ("matthews", "macro_f1"):
        got = measured(metric_of(name, "classification"), prepared("classification", examples), found, ["a", "b"])
        assert math.isfinite(got.value)
        assert np.isfinite(got.evidence.of(np.zeros((2, 4), np.int64))).all()
    got = measured(
        metric_of("spearman", "regression"), prepared("regression", Examples(("w",) * 3, None, (1.0, 2.0, 3.0))), Outputs(logits=np.ones((3, 1))), []
    )
    assert got.value == 0
    assert not got.evidence.of(np.zeros((2, 3), np.int64)).any()


# A person's own metric


def cost(predicted: list[str], wanted: list[str]) -> list[float]:
    """What wrong answers cost, row by row."""
    return [0.0 if said == is_so else 5.0 if is_so == "1" else 1.0 for said, is_so in zip(predicted, wanted, strict=True)]


cost.higher_is_better = False  # type: ignore[attr-defined]
cost.title = "cost in euro"  # type: ignore[attr-defined]


def own(function: Callable[..., Any], task: Any = "classification") -> Any:
    found, examples = outputs_for(task)
    return measured(metric_of(function, task), prepared(task, examples), found, [str(i) for i in range(5)])


def test_an_own_metric_of_rows_is_resampled_as_their_mean() -> None:
    metric = metric_of(cost, "classification")
    assert (metric.title, metric.higher_is_better, metric.points) == ("cost in euro", False, False)
    got = own(cost)
    found, examples = outputs_for("classification")
    by_hand = np.array(cost([str(i) for i in found.logits.argmax(1)], [str(i) for i in examples.answers or ()]))
    assert got.value == by_hand.mean()
    places = np.random.default_rng(0).integers(0, 60, (2, 60))
    assert np.allclose(got.evidence.of(places), by_hand[places].mean(1))


@pytest.mark.parametrize("task", ["classification", "regression", "seq2seq", "causal-lm"])
def test_an_own_metric_of_all_rows_is_called_for_every_resample(task: Any) -> None:
    def share(predicted: Any, wanted: Any) -> float:
        kind = np.ndarray if task == "regression" else list
        assert isinstance(predicted, kind)
        assert isinstance(wanted, kind)
        return float(np.mean([a == b for a, b in zip(predicted, wanted, strict=True)])) ** 2

    got = own(share, task)
    found, examples = outputs_for(task)
    places = np.random.default_rng(0).integers(0, 60, (2, 60))
    one, two = (own_on(share, task, *part(found, examples, chosen)) for chosen in places)
    assert np.allclose(got.evidence.of(places), [one, two])


def own_on(function: Callable[..., Any], task: Any, found: Outputs, examples: Examples) -> float:
    return float(measured(metric_of(function, task), prepared(task, examples), found, [str(i) for i in range(5)]).value)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda p, w: math.nan, "gives nan on 60 rows"),
        (lambda p, w: 1 / 0, "raises ZeroDivisionError on 60 rows"),
        (lambda p: 1.0, "raises TypeError"),
        (lambda p, w: [1.0, 2.0], r"an array of shape \(2,\) on 60 rows"),
        (lambda p, w: "good", "raises ValueError"),
        (lambda p, w: [math.inf] + [0.0] * 59, "1 values that are not finite"),
    ],
)
def test_a_bad_own_metric_is_told_with_what_it_gave(function: Any, said: str) -> None:
    with pytest.raises(BadMetric, match=said):
        own(function)


def test_metrics_by_import_path_are_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_figures.py").write_text("limit = 3\ndef profit(predicted, wanted):\n    return 7\n", encoding="utf-8")
    (tmp_path / "my_broken.py").write_text("import nowhere_to_be_found\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    metric = metric_of("my_figures:profit", "classification")
    assert (metric.name, metric.title, metric.higher_is_better) == ("my_figures:profit", "profit", True)
    assert own(metric.function).value == 7  # type: ignore[arg-type]
    for path, said in {
        "my_figures:loss": "has no 'loss'",
        "my_figures:limit": "an? int; expected a function",
        "my_broken:any": "cannot be imported: ModuleNotFoundError",
        "no_such_module:f": "cannot be imported",
        "accurracy": "did you mean 'accuracy'",
        "rougeL": "classification has accuracy, macro_f1",
    }.items():
        with pytest.raises(InvalidArgument, match=said):
            metric_of(path, "classification")
    for path in ("my_figures:profit", "exact_match"):
        assert metric_of(path, "causal-lm").name == path
        with pytest.raises(InvalidArgument, match="expected rows with a target"):
            metric_of(path, "causal-lm", answered=False)
    assert metric_of(None, "causal-lm", answered=False).name == "perplexity"


# Labels


@pytest.mark.parametrize(
    ("labels", "classes", "numbers", "names"),
    [
        (["pos", "neg"], ["neg", "pos"], (1, 0), ("neg", "pos")),
        (["POS", "neg"], ["Neg", "Pos"], (1, 0), ("neg", "POS")),
        (["b", "a"], ["a", "b", "c"], (1, 0), ("a", "b", "c")),
        (["1", "0", "1"], ["LABEL_0", "LABEL_1", "LABEL_2"], (1, 0, 1), ("0", "1", "LABEL_2")),
        (["1", "0"], ["negative", "positive"], (1, 0), ("0", "1")),
        (["10", "2"], ["2", "10"], (1, 0), ("2", "10")),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], (1, 0), ("LABEL_0", "LABEL_1")),
    ],
)
def test_labels_are_numbered_by_name_then_by_number(labels: list[str], classes: list[str], numbers: tuple[int, ...], names: tuple[str, ...]) -> None:
    def warn(message: str) -> None:
        raise AssertionError(message)

    assert numbered(labels, classes, "data", warn) == (numbers, names)


def test_labels_of_a_head_without_names_go_by_their_order_with_a_warning() -> None:
    said: list[str] = []
    assert numbered(["ham", "spam", "ham"], ["LABEL_0", "LABEL_1"], "mail.csv", said.append) == ((0, 1, 0), ("ham", "spam"))
    assert "'ham', 'spam'" in said[0]
    assert numbered(["10", "2"], ["LABEL_0", "LABEL_1"], "ratings.csv", said.append) == ((1, 0), ("2", "10"))
    assert len(said) == 2


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["ham", "spam"], ["neg", "pos"]),  # other names: their order would be a guess
        (["ham", "spam"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["neg", "pos", "neutral"], ["neg", "pos"]),
        (["1", "2", "3"], ["neg", "neutral", "pos"]),
    ],
)
def test_labels_that_do_not_fit_are_told_with_both_sides(labels: list[str], classes: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="do not fit") as error:
        numbered(labels, classes, "data.csv", lambda message: None)
    for name in (*labels, *classes):
        assert repr(name) in str(error.value)


def test_outputs_are_put_in_the_order_of_the_rows_classes() -> None:
    assert columns_in_order(("b", "a"), ("a", "b"), 2, "x") == [1, 0]
    assert columns_in_order(("a", "b"), ("a", "b"), 2, "x") is None
    assert columns_in_order(None, ("a", "b"), 2, "x") is None
    assert columns_in_order(("LABEL_0", "LABEL_1"), ("a", "b"), 2, "x") is None
    for names, outputs in ((("a", "c"), 2), (("a", "b", "c"), 3)):
        with pytest.raises(InvalidArgument, match="another task"):
            columns_in_order(names, ("a", "b"), outputs, "x")


# The bench


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, tuned models and experts of each task, and rows."""
    folder = tmp_path_factory.mktemp("scoring")
    for kind in ("bert", "llama", "t5"):
        trainable.save_base(kind, folder / kind)
    trainable.save_csv(folder / "rows.csv", 50)
    tuned_classifier(folder, "tuned", ["a", "b"], 1)
    tuned_classifier(folder, "turned", ["b", "a"], 1)
    tuned_classifier(folder, "three", ["a", "b", "c"], 2)
    for name in ("tuned", "turned", "three"):
        sterna.compress(folder / "bert", folder / name, density=0.5).save(folder / f"{name}.safetensors")
    for kind, loader in (("llama", transformers.AutoModelForCausalLM), ("t5", transformers.AutoModelForSeq2SeqLM)):
        models.tuned(loader.from_pretrained(folder / kind), size=0.1).save_pretrained(folder / f"{kind}-tuned")
        trainable.tokenizer("t5" if kind == "t5" else "llama").save_pretrained(folder / f"{kind}-tuned")
        sterna.compress(folder / kind, folder / f"{kind}-tuned", density=0.5).save(folder / f"{kind}.safetensors")
    return folder


def tuned_classifier(folder: Path, name: str, labels: list[str], seed: int) -> None:
    """A fine-tune of the encoder for these labels. Of one seed the heads have the same rows for the same labels."""
    names = dict(enumerate(labels))
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "bert", id2label=names, label2id={label: i for i, label in names.items()}, num_labels=len(labels)
    )
    model = models.tuned(model, seed=seed, size=0.1)
    with torch.no_grad():
        rows = 3 * torch.randn(26, model.classifier.weight.shape[1], generator=torch.Generator().manual_seed(seed))
        model.classifier.weight.copy_(torch.stack([rows[ord(label) - ord("a")] for label in labels]))
        model.classifier.bias.zero_()
    model.save_pretrained(folder / name)
    trainable.tokenizer("bert").save_pretrained(folder / name)


def bench_of(place: Path, like: Any = "tuned.safetensors", **options: Any) -> Bench:
    likes = [place / one for one in ([like] if isinstance(like, str) else like)]
    return open_bench(place / "bert", place / "rows.csv", like=likes, device="cpu", **options)


def logits_of(folder: Path, texts: tuple[str, ...]) -> np.ndarray:
    """Row by row through transformers alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return np.concatenate([model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in texts])


def test_a_bench_scores_a_tuned_folder_as_transformers_runs_it(place: Path) -> None:
    bench = bench_of(place)
    outcome = bench.run(place / "tuned")
    wanted = logits_of(place / "tuned", bench.evaluation.examples.texts).argmax(1) == np.array(bench.evaluation.examples.answers)
    assert outcome.right is not None
    assert np.array_equal(outcome.right, wanted)
    assert outcome.value == pytest.approx(100 * wanted.mean())
    assert 0.1 < wanted.mean() < 1.0


def test_a_bench_scores_an_expert_as_its_checkpoint_and_leaves_the_base_as_it_was(place: Path, tmp_path: Path) -> None:
    bench = bench_of(place)
    before = models.state_of(bench.model)
    outcome = bench.run(place / "tuned.safetensors")
    assert models.same_state(bench.model, before)
    sterna.apply(place / "bert", place / "tuned.safetensors", tmp_path / "whole")
    trainable.tokenizer("bert").save_pretrained(tmp_path / "whole")
    assert np.array_equal(outcome.right, bench.run(tmp_path / "whole").right)
    assert bench.run(sterna.load(place / "tuned.safetensors")).value == outcome.value
    with sterna.attached(bench.model, place / "tuned.safetensors"):
        assert bench.run_live().value == outcome.value


def test_classes_in_another_order_are_scored_by_name(place: Path) -> None:
    """The two tuned models differ in the order of their outputs only."""
    for like in ("tuned.safetensors", "turned.safetensors", "turned"):
        bench = bench_of(place, like)
        one, two = bench.run(place / "tuned"), bench.run(place / "turned")
        assert one.value == two.value
        assert bench.run(place / "tuned.safetensors").rows == 50
    assert bench_of(place).head == ("a", "b")
    assert bench_of(place, "turned").head == ("b", "a")


def test_an_expert_of_another_task_is_refused_with_both_sides(place: Path) -> None:
    with pytest.raises(InvalidArgument, match="'a', 'b', 'c'"):
        bench_of(place).run(place / "three")
    with pytest.raises(InvalidArgument, match="3 classes"):
        bench_of(place).run(place / "three.safetensors")
    with pytest.raises(WrongModel):
        bench_of(place).run(place / "llama.safetensors")


def test_labels_that_a_head_has_and_the_rows_lack_are_no_fault(place: Path) -> None:
    bench = bench_of(place, "three")
    assert bench.classes == ("a", "b", "c")
    assert bench.run(place / "three").rows == 50


def test_the_base_wears_the_head_of_what_it_is_held_against(place: Path) -> None:
    bench = bench_of(place)
    assert bench.head_from == "lent"
    tuned = sterna.load(place / "tuned.safetensors")
    head = {change.name: change.value for change in tuned.changes if getattr(change, "role", "") == "head"}
    assert torch.equal(bench.model.classifier.weight, head["classifier.weight"])
    assert open_bench(place / "bert", place / "rows.csv").head_from == "new"
    own = open_bench(place / "tuned", place / "rows.csv")
    assert own.head_from == "own"
    assert own.run().value == bench.run(place / "tuned").value


def test_rows_and_splits_are_the_rows_of_the_whole(place: Path) -> None:
    bench = bench_of(place)
    right = bench.run(place / "tuned").right
    assert right is not None
    few = bench.rows([4, 0, 9]).run(place / "tuned").right
    assert np.array_equal(few, right[[4, 0, 9]])
    first, second = bench.split(0.4)
    assert (len(first), len(second)) == (20, 30)
    texts = [*first.evaluation.examples.texts, *second.evaluation.examples.texts]
    assert sorted(texts) == sorted(bench.evaluation.examples.texts)
    assert sum(first.evaluation.examples.answers or ()) == 10  # each label in proportion
    assert bench.split(0.4)[0].evaluation.examples == first.evaluation.examples
    with pytest.raises(InvalidArgument, match="cannot be split"):
        bench.rows([0]).split()
    with pytest.raises(InvalidArgument, match="no row"):
        bench.rows([])
    assert len(bench_of(place, rows=20)) == 20


def test_outcomes_of_other_rows_or_metrics_are_not_held_against_each_other(place: Path) -> None:
    bench = bench_of(place)
    outcome = bench.run()
    with pytest.raises(InvalidArgument, match="expected outcomes of one bench"):
        outcome.against(bench.rows([0, 1]).run())
    with pytest.raises(InvalidArgument, match="macro_f1"):
        outcome.against(bench.run(metric=metric_of("macro_f1", "classification")))


def test_differences_are_in_points_and_either_way_round(place: Path) -> None:
    bench = bench_of(place)
    one, two = bench.run(place / "tuned"), bench.run()
    found, back = one.against(two), two.against(one)
    assert found.value == pytest.approx(one.value - two.value)
    assert (found.low, found.high) == pytest.approx((-back.high, -back.low), abs=2.0)
    assert found.test == "McNemar"
    assert one.interval().low < one.value < one.interval().high
    loss = metric_of("loss", "classification")
    by_loss = bench.run(place / "tuned", metric=loss).against(bench.run(metric=loss))
    assert by_loss.test == "bootstrap"


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_peft_folder_is_scored_as_peft_runs_it(place: Path, tmp_path: Path, method: str) -> None:
    """LoRA, and a method that no expert can be made of."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=2)
    config: Any = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    if method == "prompt":
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    said: list[str] = []
    bench = open_bench(place / "bert", place / "rows.csv", like=tmp_path / "adapter", warn=said.append, device="cpu")
    found = bench.outputs(tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "bert")
    with torch.no_grad():
        wanted = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in bench.evaluation.examples.texts[:9]]
    assert found.logits is not None
    assert np.allclose(found.logits[:9], wanted, atol=1e-5)
    assert "no names" in said[0]


def test_rows_from_memory_are_those_of_a_file(place: Path) -> None:
    rows = trainable.rows(50)
    bench = open_bench(place / "bert", rows, like=place / "tuned")
    assert bench.evaluation.examples.texts == bench_of(place).evaluation.examples.texts


def test_the_perplexity_of_rows_is_that_of_their_tokens(place: Path) -> None:
    bench = open_bench(place / "llama", place / "rows.csv", like=place / "llama.safetensors", max_length=9)
    assert (bench.task, bench.metric.name) == ("causal-lm", "perplexity")
    outcome = bench.run(place / "llama-tuned")
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama-tuned")
    nats = count = 0.0
    with torch.no_grad():
        for row in bench.evaluation.rows:
            ids = torch.tensor([row["input_ids"]])
            nats += float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    assert outcome.value == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert outcome.rows == len(bench.evaluation.rows) > 20
    assert len(bench.split()[0]) == round(len(bench) / 2)
    assert bench.run(place / "llama.safetensors").against(outcome).test == "bootstrap"


def test_a_sequence_to_sequence_bench_generates_once_for_all_metrics(place: Path) -> None:
    bench = open_bench(place / "t5", place / "rows.csv", like=place / "t5.safetensors", target="summary", target_max_length=4, rows=8)
    assert bench.task == "seq2seq"
    found = bench.outputs(place / "t5.safetensors")
    for name in BY_TASK["seq2seq"]:
        outcome = bench.outcome(found, metric_of(name, "seq2seq"))
        assert math.isfinite(outcome.value)
        assert outcome.interval().low <= outcome.value + 1e-9


def written_by_hand(folder: Path, prompt: str, most: int) -> str:
    """The likeliest token again and again, the whole text anew each time, until the end of text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < most and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_texts_written_in_batches_are_those_written_one_by_one(kind: str, batch: int, place: Path, tmp_path: Path) -> None:
    rows = trainable.completions(12)
    torch.manual_seed(0)
    model: Any = {"llama": models.llama, "gpt2": models.gpt2}[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that a text depends on its prompt, and some end early
    model.save_pretrained(tmp_path / kind)
    trainable.tokenizer("llama").save_pretrained(tmp_path / kind)
    bench = open_bench(tmp_path / kind, rows, metric="exact_match", target_max_length=6, batch=batch, device="cpu")
    found = bench.outputs().texts
    wanted = tuple(written_by_hand(tmp_path / kind, row["prompt"], 6) for row in rows)
    assert found == wanted
    assert len(set(wanted)) > 3


def test_texts_end_with_the_end_of_text_and_hold_neither_prompt_nor_padding(place: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    model.generation_config.eos_token_id = [trainable.tokenizer("llama").convert_tokens_to_ids("w5")]
    bench = open_bench(place / "llama", trainable.completions(6), metric="exact_match", target_max_length=5, device="cpu")
    every = set(" ".join(bench.outputs().texts or ()).split())
    last = trainable.tokenizer("llama").convert_tokens_to_ids(sorted(every)[0])
    model.generation_config.eos_token_id = last
    found = bench.outputs(model).texts or ()
    assert any(text.endswith(sorted(every)[0]) for text in found)
    assert all(sorted(every)[0] not in text.split()[:-1] for text in found)


def test_a_bench_of_completions_writes_texts_where_a_metric_is_of_texts(place: Path) -> None:
    rows = trainable.completions(20)
    bench = open_bench(place / "llama", rows, like=place / "llama.safetensors", target_max_length=3)
    assert (bench.task, bench.metric.name, len(bench)) == ("causal-lm", "perplexity", 20)
    found = bench.outputs()
    assert found.texts is None
    exact = metric_of("exact_match", "causal-lm")
    with pytest.raises(InvalidArgument, match="no texts were written"):
        bench.outcome(found, exact)
    assert bench.run(metric=exact).rows == 20
    found = bench.outputs(place / "llama.safetensors", metrics=[bench.metric, exact])
    for name in BY_TASK["causal-lm"]:
        assert math.isfinite(bench.outcome(found, metric_of(name, "causal-lm")).value)
    first, second = bench.split(0.3, seed=1)
    assert [len(first), len(second), len(first.rows([2, 0]))] == [6, 14, 2]
    assert {*first.evaluation.examples.texts} | {*second.evaluation.examples.texts} == {row["prompt"] for row in rows}
    part = first.outputs(metrics=[exact])
    whole = bench.outputs(metrics=[exact])
    told = dict(zip(bench.evaluation.examples.texts, whole.texts or (), strict=True))
    assert part.texts == tuple(told[text] for text in first.evaluation.examples.texts)
    t5 = open_bench(place / "t5", place / "rows.csv", target="summary", metric="loss")
    assert t5.outputs().texts is None


def test_the_perplexity_of_completions_is_theirs_alone(place: Path) -> None:
    rows = trainable.completions(15)
    bench = open_bench(place / "llama", rows, like=place / "llama.safetensors", batch=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama-tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "llama-tuned")
    nats = count = 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(len(prompt), len(ids)):
            nats -= float(chances[at - 1, ids[at]])
            count += 1
    assert bench.run(place / "llama-tuned").value == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_a_model_without_room_for_what_is_to_be_written_says_so(place: Path, tmp_path: Path) -> None:
    trainable.save_base("gpt2", tmp_path / "gpt2")
    bench = open_bench(tmp_path / "gpt2", trainable.completions(4), metric="exact_match")
    with pytest.raises(InvalidArgument, match="target_max_length is 64, and the model takes 16 tokens"):
        bench.run()
    assert open_bench(tmp_path / "gpt2", trainable.completions(4), metric="exact_match", target_max_length=12).run().rows == 4


def test_an_own_metric_gets_stripped_texts(place: Path) -> None:
    seen: list[Any] = []

    def same(predicted: list[str], wanted: list[str]) -> list[bool]:
        seen.append((predicted, wanted))
        return [p == w for p, w in zip(predicted, wanted, strict=True)]

    rows = [{"q": "w1 w2", "a": "  w3 w4 \n"}, {"q": "w1\n", "a": "w5[EOS]"}]
    open_bench(place / "llama", rows, text="q", target="a", metric=same, target_max_length=3).run()
    ((predicted, wanted),) = seen
    assert wanted == ["w3 w4", "w5"]
    assert all(text == text.strip() and "[" not in text for text in predicted)


def test_a_regression_bench_has_no_classes(place: Path) -> None:
    bench = open_bench(place / "bert", place / "rows.csv", task="regression", label="rating", metric="mse")
    assert bench.classes == ()
    assert bench.run().value > 0


def test_a_merged_expert_is_scored_with_the_head_that_is_named(place: Path) -> None:
    merged = sterna.merge([place / "tuned.safetensors", place / "three.safetensors"], "ties")
    assert tasks(merged) == ("three", "tuned")
    bench = open_bench(place / "bert", place / "rows.csv", like=merged, head="tuned")
    assert bench.run(merged, head="tuned").rows == 50
    with pytest.raises(InvalidArgument, match="three, tuned"):
        open_bench(place / "bert", place / "rows.csv", like=merged)
    with pytest.raises(InvalidArgument, match="3 classes"):
        bench.run(merged, head="three")


@pytest.mark.parametrize(
    ("data", "options", "error", "said"),
    [
        ([{"text": "w1", "label": "a"}, {"text": "w2", "label": "a"}], {}, InvalidFile, "one label only \\('a'\\)"),
        ([{"text": "w1"}], {}, InvalidArgument, "label: no column"),
        ([{"other": "w1", "label": "a"}], {}, InvalidArgument, "text: no column"),
        ([{"text": "", "label": "a"}], {}, InvalidFile, "no row with everything"),
        ([], {}, InvalidArgument, "an empty list"),
        ([1, 2], {}, InvalidArgument, "a list of int"),
        ("empty.csv", {}, InvalidFile, "has no rows"),
        ("nowhere.csv", {}, NotFound, "nowhere.csv"),
        ("rows.csv", {"label": "lable"}, InvalidArgument, "no column 'lable'"),
        ("rows.csv", {"metric": "rougeL"}, InvalidArgument, "metric is 'rougeL'"),
        ("rows.csv", {"task": "causal-lm", "metric": "exact_match"}, InvalidArgument, "expected rows with a target"),
        ("rows.csv", {"task": "causal-lm", "metric": len}, InvalidArgument, "expected rows with a target"),
        ("rows.csv", {"task": "causal-lm", "label": "label"}, InvalidArgument, "'label' is not used: causal-lm has a target"),
        ("rows.csv", {"task": "causal-lm", "target": "text"}, InvalidArgument, "no column goes by a usual name"),
        ("rows.csv", {"task": "causal-lm", "text": "text", "target": "text"}, InvalidArgument, "the column of the text too"),
        ([{"prompt": "w1", "completion": " "}], {"task": "causal-lm"}, InvalidFile, "no row with everything that is needed: 'prompt', 'completion'"),
        ([{"prompt": "w1", "completion": ["w2"]}], {"task": "causal-lm"}, InvalidFile, "row 1: 'completion' holds a list"),
        ([{"text": "w1 \ud800", "label": "a"}], {}, InvalidFile, "row 1: 'text' holds a lone surrogate at character 3"),
        ("rows.csv", {"rows": 0}, InvalidArgument, "rows is 0"),
        ("rows.csv", {"dtype": "int8"}, InvalidArgument, "dtype is 'int8'"),
        ([{"text": "w1", "label": "x"}, {"text": "w2", "label": "y"}], {}, InvalidArgument, "the head has 2 classes \\('a', 'b'\\)"),
    ],
)
def test_bad_rows_are_refused_before_a_model_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, data: Any, options: Any, error: type[SternaError], said: str
) -> None:
    (place / "empty.csv").write_text("text,label\n", encoding="utf-8")
    monkeypatch.setattr("sterna.scoring.bench.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=said):
        open_bench(place / "bert", place / data if isinstance(data, str) else data, like=place / "tuned", **options)
