"""Composition: a pool beside the dense formula and beside merging, the search on scores with planted weights, and the command on real rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing

import models
import sterna
import trainable
from sterna.composing import kernels, unions
from sterna.composing.compose import compose
from sterna.composing.heads import fit
from sterna.composing.pool import Pool
from sterna.composing.search import Trial, best, search
from sterna.errors import AlreadyAttached, InvalidArgument, PatchError, SternaError, Unsupported, WrongBase
from sterna.expert.expert import Expert
from sterna.merging.replay import replay
from sterna.scoring.bench import open_bench

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = ([0.7, -0.3, 1.2, 0.0], [1.0, 1.0, 1.0, 1.0], [-1.5, 0.25, 0.0, 1e-3], [0.0] * 4)


def made(kind: str, base: torch.nn.Module, count: int = 4) -> list[Expert]:
    """Experts for a base, each of another seed. ("merged" ones have palettes.)"""
    if kind in ("ternary", "by tensor", "small"):
        scope = "tensor" if kind == "by tensor" else "global"
        found = [sterna.compress(base, models.tuned(base, seed=i, size=2e-2), density=0.3, scope=scope) for i in range(count)]  # type: ignore[arg-type]
        return [sterna.recode(expert, "small") for expert in found] if kind == "small" else found
    if kind == "merged":
        parents = made("ternary", base, 2 * count)
        return [sterna.merge(parents[2 * i : 2 * i + 2], "linear", weights=[1, 0.4 + i], tasks=[f"{i}", f"{i} too"]) for i in range(count)]
    method = sterna.PaFi(density=0.2) if kind.startswith("PaFi") else sterna.HiWi(target="bias", rank=2)
    return [trained(base, method, i, "ternary" in kind) for i in range(count)]


def trained(base: torch.nn.Module, method: sterna.PaFi | sterna.HiWi, seed: int, ternary: bool) -> Expert:
    """What a few noisy steps of tuning leave."""
    model = models.made("bert", next(base.parameters()).dtype)
    tuning = sterna.tune(model, method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    expert = tuning.expert(values="ternary", density=0.3, alpha=2.0) if ternary else tuning.expert()
    tuning.discard()
    return expert


def dense(base: torch.nn.Module, experts: Sequence[Expert], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """base + sum w_i t_i, in float64, for what the experts change."""
    vectors = [expert.task_vector(base) for expert in experts]
    found = {}
    state = base.state_dict()
    for name in {name for vector in vectors for name in vector}:
        found[name] = state[name].double() + sum(w * v[name].double() for w, v in zip(weights, vectors, strict=True) if name in v)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ternary", "by tensor", "small", "merged", "PaFi", "PaFi ternary", "HiWi"])
def test_a_pool_is_the_merged_expert_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    base = models.made("bert", dtype)
    experts, before = made(kind, base), models.state_of(base)
    other = models.made("bert", dtype)
    with Pool(base, experts) as pool:
        for weights in WEIGHTS:
            pool.weigh(weights)
            assert pool.weights == tuple(weights)
            now = models.state_of(base)
            merged = sterna.merge(experts, "task_arithmetic", weights=weights, tasks=list("abcd"), base=other)
            with sterna.attached(other, merged, head=next(iter(merged.facts.heads), None)):
                wanted = models.state_of(other)
            heads = {"classifier.weight", "classifier.bias"}  # a merged expert brings one along
            assert [name for name in now if name not in heads and not torch.equal(now[name], wanted[name])] == []
    assert models.same_state(base, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ternary", "merged", "PaFi", "HiWi"])
def test_a_pool_is_the_dense_formula(kind: str, dtype: torch.dtype) -> None:
    base = models.made("bert", dtype)
    experts = made(kind, base)
    wanted = [dense(base, experts, weights) for weights in WEIGHTS]
    with Pool(base, experts) as pool:
        for weights, expected in zip(WEIGHTS, wanted, strict=True):
            pool.weigh(weights)
            state = base.state_dict()
            for name, value in expected.items():
                near = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
                assert torch.allclose(state[name].double(), value, rtol=near, atol=near / 10), name


def test_threads_and_blocks_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unions, "_THREAD", 100)
    base = torch.nn.Module()
    torch.manual_seed(0)
    base.weight = torch.nn.Parameter(torch.randn(3 * kernels.BLOCK + 77))
    base.bias = torch.nn.Parameter(torch.randn(300))
    experts = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        other = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in base.state_dict().items()}
        experts.append(sterna.compress(base.state_dict(), other, density=0.2, force=True))
    before = models.state_of(base)
    weights = [0.3, -1.1, 0.9, 0.0, 0.45]
    vectors = [expert.task_vector() for expert in experts]
    with Pool(base, experts) as pool:
        pool.weigh([1.0] * 5)
        pool.weigh(weights)
        for name, tensor in base.state_dict().items():
            wanted = before[name].double() + sum(w * vector[name].double() for w, vector in zip(weights, vectors, strict=True))
            assert torch.allclose(tensor.double(), wanted, rtol=1e-6, atol=1e-6)
    assert models.same_state(base, before)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_many_experts_whose_every_position_is_of_its_own_kind() -> None:
    base = {"w": normal(0, 90, 90)}
    experts = [sterna.compress(base, {"w": base["w"] + normal(i + 1, 90, 90)}, density=0.5, force=True) for i in range(70)]
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(base["w"].clone())
    weights = np.random.default_rng(0).uniform(-1.5, 1.5, 70).tolist()
    with Pool(model, experts) as pool:
        pool.weigh(weights)
        wanted = base["w"].double() + sum(w * e.task_vector()["w"].double() for w, e in zip(weights, experts, strict=True))
        assert torch.allclose(model.w.double(), wanted, atol=1e-5)
        assert pool.nonzeros == sum(ternary.count for expert in experts for ternary in expert.ternaries)
        assert pool.bytes > 0
    assert torch.equal(model.w, base["w"])


def test_tensors_that_are_not_contiguous() -> None:
    base = torch.nn.Module()
    base.w = torch.nn.Parameter(torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).T)
    before = base.w.detach().clone()
    state = {"w": before.contiguous()}
    experts = [sterna.compress(state, {"w": state["w"] + normal(i, 50, 40)}, density=0.3, force=True) for i in (1, 2)]
    with Pool(base, experts) as pool:
        pool.weigh([0.5, -2.0])
        wanted = before + 0.5 * experts[0].task_vector()["w"] - 2 * experts[1].task_vector()["w"]
        assert torch.allclose(base.w, wanted, atol=1e-5)
    assert torch.equal(base.w, before)


def adapters(folder: Path, base: torch.nn.Module, count: int = 3) -> list[Expert]:
    """LoRA experts of different ranks."""
    import copy

    import peft

    found = []
    base.save_pretrained(folder / "base")  # type: ignore[operator]
    for number in range(count):
        torch.manual_seed(number)
        wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2 + number, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora" in name:
                    parameter.normal_()
        wrapped.save_pretrained(folder / str(number))
        found.append(sterna.compress(folder / "base", folder / str(number), density=0.5))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_lora(tmp_path: Path, dtype: torch.dtype) -> None:
    base = models.made("llama", dtype)
    experts, before = adapters(tmp_path, base), models.state_of(base)
    weights = [0.5, -1.2, 0.25]
    with Pool(base, experts) as pool:
        pool.weigh([1.0, 1.0, 1.0])
        pool.weigh(weights)
        now = models.state_of(base)
        assert not models.same_state(base, before)
    assert models.same_state(base, before)
    merged = sterna.merge(experts, "task_arithmetic", weights=weights, tasks=list("abc"))
    with sterna.attached(base, merged):
        near = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        assert all(torch.allclose(now[name], tensor, rtol=near, atol=near) for name, tensor in models.state_of(base).items())


# What a pool refuses, and whom it keeps off


def test_a_pool_refuses_what_cannot_be_weighed(tmp_path: Path) -> None:
    base = models.made("bert")
    experts, before = made("ternary", base, 2), models.state_of(base)
    cases: list[tuple[list[Expert], type[SternaError], str]] = [
        ([], InvalidArgument, "no experts"),
        ([experts[0], experts[0]], InvalidArgument, "given 2 times"),
        ([experts[0], made("ternary", models.made("bert", seed=5), 1)[0]], WrongBase, "same base"),
        ([experts[0], made("PaFi", base, 1)[0]], Unsupported, "levels"),
        (made("ternary", models.made("bert", seed=5), 1), WrongBase, "not the expert's base"),
    ]
    other = models.made("bert")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    cases += [([sterna.compress(base, models.tuned(base), lossless=True)], Unsupported, "lossless")]
    cases += [([sterna.merge(experts, "emr", tasks=["a", "b"])], InvalidArgument, "choose one")]
    for given, error, told in cases:
        with pytest.raises(error, match=told):
            Pool(base, given)
        assert models.same_state(base, before)
    with pytest.raises(WrongBase):
        Pool(other, experts)


def test_a_pool_and_an_expert_keep_each_other_off() -> None:
    base = models.made("bert")
    experts, before = made("ternary", base, 2), models.state_of(base)
    with Pool(base, experts) as pool:
        pool.weigh([1.0, 1.0])
        with pytest.raises(AlreadyAttached):
            sterna.attach(base, experts[0])
        with pytest.raises(AlreadyAttached):
            Pool(base, experts)
        for wrong in ([1.0], [1.0, float("nan")], [1.0, 2.0, 3.0]):
            with pytest.raises(InvalidArgument):
                pool.weigh(wrong)
        assert pool.weights == (1.0, 1.0)
    assert models.same_state(base, before)
    with pytest.raises(PatchError):
        pool.weigh([1.0, 1.0])
    pool.close()
    with sterna.attached(base, experts[0]), pytest.raises(AlreadyAttached):
        Pool(base, experts)
    assert models.same_state(base, before)


def test_a_pool_tells_of_others_writes() -> None:
    base = models.made("bert")
    pool = Pool(base, made("ternary", base, 2))
    pool.weigh([1.0, 0.5])
    with torch.no_grad():
        base.bert.encoder.layer[0].output.dense.weight.add_(1)
    with pytest.raises(PatchError, match="changed under"):
        pool.weigh([0.5, 1.0])
    with pytest.raises(PatchError, match="changed under"):
        pool.close()


# The search


def planted(wanted: Sequence[float]) -> Callable[[Sequence[float]], float]:
    return lambda weights: -float(np.sum((np.asarray(weights) - wanted) ** 2))


def test_the_search_finds_planted_weights() -> None:
    wanted = [0.8, 0.0, -0.5, 0.3]
    trials = search(4, planted(wanted), budget=80, l1=0.0)
    assert np.allclose(best(trials).weights, wanted, atol=0.02)
    assert trials[0].weights == (0.0,) * 4
    assert len(trials) <= 80


def test_the_search_keeps_its_bounds_and_its_budget_and_is_the_same_again() -> None:
    seen: list[Trial] = []
    trials = search(3, planted([9.0, -9.0, 0.0]), budget=30, bounds=(-1.0, 1.5), tell=seen.append)
    assert seen == trials
    assert all(-1 <= weight <= 1.5 for trial in trials for weight in trial.weights)
    assert np.allclose(best(trials).weights, [1.5, -1.0, 0.0], atol=0.1)
    assert search(3, planted([9.0, -9.0, 0.0]), budget=30, bounds=(-1.0, 1.5)) == trials
    for budget in (1, 2, 5):
        assert len(search(3, planted([1.0, 0.0, 0.0]), budget=budget)) == budget
    first = {search(8, planted([0.0] * 8), budget=2, seed=seed)[1].weights for seed in range(8)}
    assert len(first) > 1  # the seed draws which weight moves first


def test_the_penalty_is_of_the_mean_magnitude() -> None:
    trials = search(4, lambda weights: 0.0, budget=12, l1=0.2)
    assert all(trial.penalized == pytest.approx(-0.2 * np.mean(np.abs(trial.weights))) for trial in trials)
    assert best(trials).weights == (0.0,) * 4


def test_scores_that_are_no_numbers() -> None:
    trials = search(2, lambda weights: float("nan") if weights[0] > 0.2 else 1 + weights[0], budget=25)
    assert best(trials).weights[0] <= 0.2
    for value in (float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="finite"):
            search(2, lambda weights, value=value: value, budget=5)
    with pytest.raises(InvalidArgument, match="expected a number"):
        search(2, lambda weights: None, budget=5)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 2.5}, "budget"),
        ({"bounds": (1.0, 2.0)}, "bounds"),
        ({"bounds": (0.0, 0.0)}, "bounds"),
        ({"bounds": (float("nan"), 1.0)}, "bounds"),
        ({"l1": -1.0}, "l1"),
        ({"l1": float("inf")}, "l1"),
    ],
)
def test_searches_that_cannot_be_made(options: dict[str, Any], told: str) -> None:
    base = models.made("llama")
    with pytest.raises(InvalidArgument, match=told):
        compose(made("ternary", base, 2), base=base, score=lambda model: 0.0, **options)


def test_an_interruption_keeps_the_best_so_far() -> None:
    calls = 0

    def score(weights: Sequence[float]) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return -abs(weights[0] - 0.5)

    assert len(search(2, score, budget=40)) == 5


# compose


def test_composing_finds_what_was_planted_and_its_record_replays(tmp_path: Path) -> None:
    base = models.made("llama")
    wanted = [0.8, 0.0, -0.5]
    paths = []
    for number, expert in enumerate(made("ternary", base, 3)):
        paths.append(tmp_path / f"{number}.safetensors")
        expert.save(paths[-1])
    before = models.state_of(base)
    with Pool(base, [sterna.load(path) for path in paths]) as pool:
        pool.weigh(wanted)
        target = models.state_of(base)

    def score(model: torch.nn.Module) -> float:
        return -sum(float(((tensor - target[name]) ** 2).sum()) for name, tensor in model.state_dict().items())

    found = compose(paths, base=base, score=score, budget=60, l1=0.0)
    assert models.same_state(base, before)
    assert np.allclose(found.weights, wanted, atol=0.02)
    assert found.parents == ("0", "1", "2")
    with sterna.attached(base, found.expert):
        assert score(base) == found.score  # what was scored is what is saved, to the bit
    found.expert.save(tmp_path / "composed.safetensors")
    assert replay(tmp_path / "composed.safetensors").content_digest == found.expert.content_digest
    again = compose(paths, base=base, score=score, budget=60, l1=0.0)
    assert again.trials == found.trials
    assert again.expert.digest == found.expert.digest


def test_many_experts_sum_to_few_magnitudes() -> None:
    base = torch.nn.Module()
    base.w = torch.nn.Parameter(normal(0, 500, 400))
    state = {"w": base.w.detach().clone()}
    experts = [sterna.compress(state, {"w": state["w"] + (1 + i / 9) * normal(i + 1, 500, 400)}, density=0.5, force=True) for i in range(14)]
    wanted = np.random.default_rng(0).uniform(-1, 1, 14).tolist()
    with pytest.raises(InvalidArgument, match="magnitudes"):
        sterna.merge(experts, "task_arithmetic", weights=wanted, tasks=[f"{i}" for i in range(14)])
    target = state["w"] + sum(w * expert.task_vector()["w"] for w, expert in zip(wanted, experts, strict=True))

    def score(model: torch.nn.Module) -> float:
        return -float((model.w - target).abs().sum())

    found = compose(experts, base=base, score=score, budget=40, l1=0.0)
    assert sum(weight != 0 for weight in found.weights) > 10
    with sterna.attached(base, found.expert):
        assert score(base) == found.score


def test_many_experts_with_scales_by_tensor_are_refused() -> None:
    base = models.made("llama")
    with pytest.raises(Unsupported, match="scope global"):
        compose(made("by tensor", base, 12), base=base, score=lambda model: 0.0)


@pytest.mark.parametrize("kind", ["PaFi", "HiWi", "merged"])
def test_composing_other_kinds(kind: str) -> None:
    base = models.made("bert")
    experts, before = made(kind, base, 2), models.state_of(base)
    found = compose(experts, base=base, score=lambda model: -float(models.answer(model).abs().sum()), budget=8)
    assert models.same_state(base, before)
    assert found.expert.facts.merge["merge_method"] == "task_arithmetic"


def test_a_score_that_fails_leaves_the_base() -> None:
    base = models.made("llama")
    experts, before = made("ternary", base, 2), models.state_of(base)

    def score(model: torch.nn.Module) -> float:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        compose(experts, base=base, score=score)
    assert models.same_state(base, before)


# Heads


def test_leave_one_out_is_what_leaving_one_out_gives() -> None:
    random = np.random.default_rng(0)
    X, y = random.standard_normal((14, 30)), random.standard_normal(14)
    linear = pytest.importorskip("sklearn.linear_model")
    ridges = np.logspace(-4, 2, 13) * np.linalg.svd(X - X.mean(0))[1][0] ** 2
    losses = []
    for ridge in ridges:
        kept = [np.delete(np.arange(14), i) for i in range(14)]
        without = [linear.Ridge(alpha=ridge).fit(X[k], y[k]).predict(X[i : i + 1])[0] for i, k in enumerate(kept)]
        losses.append(np.mean((np.array(without) - y) ** 2))
    found = fit(X, y.tolist(), None)
    assert found.score == pytest.approx(-min(losses) / y.var())
    reference = linear.Ridge(alpha=ridges[int(np.argmin(losses))]).fit(X, y)
    assert np.allclose(found.weight[0], reference.coef_)
    assert np.allclose(found.bias, reference.intercept_)
    through_zero = fit(X, y.tolist(), None, intercept=False)
    assert np.all(through_zero.bias == 0)


def test_a_fitted_classifier_tells_classes_apart() -> None:
    random = np.random.default_rng(1)
    centres = 3 * random.standard_normal((3, 12))
    labels = random.integers(0, 3, 40)
    rows = centres[labels] + random.standard_normal((40, 12))
    found = fit(rows[:20], labels[:20].tolist(), 3)
    assert ((rows[20:] @ found.weight.T + found.bias).argmax(1) == labels[20:]).mean() > 0.9
    noise = fit(random.standard_normal((20, 12)), labels[:20].tolist(), 3)
    assert found.score > -0.5 > noise.score


# The command line


WORDS = ("ball goal match team", "vote law party tax")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer, two experts of classifiers with other labels, few rows and test rows of two subjects."""
    import transformers

    folder = tmp_path_factory.mktemp("compose")
    words = sorted({word for text in WORDS for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    base = models.made("bert")
    base.bert.save_pretrained(folder / "base")  # type: ignore[operator]
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    for seed in (1, 2):
        other = models.tuned(base, seed=seed, size=5e-2)
        other.save_pretrained(folder / f"tuned{seed}")  # type: ignore[operator]
        sterna.compress(folder / "base", folder / f"tuned{seed}", density=0.3).save(folder / f"expert{seed}.safetensors")
    random = np.random.default_rng(0)
    for name, count in (("few", 16), ("test", 30)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for number in range(count):
                subject = number % 2
                table.writerow([" ".join(random.choice(WORDS[subject].split(), 4)), ("sport", "politics")[subject]])
    return folder


def invoke(*arguments: object) -> typer.testing.Result:
    from sterna.commands import app

    return typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(folder: Path, *more: object, data: str = "few.csv") -> list[object]:
    experts = [folder / "expert1.safetensors", folder / "expert2.safetensors"]
    return ["compose", *experts, "--base", folder / "base", "--data", folder / data, "--budget", 6, *more]


def test_the_command_composes_scores_and_writes(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "composed.safetensors"
    found = invoke(*command(workplace, "--test", workplace / "test.csv", "-o", out, "--json"))
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["own"]["score"] >= max(told["base"]["score"], told["single"]["score"])
    assert told["own"]["rows"] == 30
    assert told["own"]["low"] - 1e-9 <= told["own"]["value"] <= told["own"]["high"] + 1e-9
    assert told["over_base"]["low"] <= told["over_base"]["value"] <= told["over_base"]["high"]
    assert set(told["weights"]) == {"expert1", "expert2"}
    expert = sterna.load(out)
    assert expert.facts.config["id2label"] == {"0": "politics", "1": "sport"}
    bench = open_bench(workplace / "base", workplace / "test.csv", like=expert)
    assert bench.run(expert).value == told["own"]["value"]
    again = replay(out, [workplace])
    assert again.content_digest == expert.content_digest
    second = tmp_path / "again.safetensors"
    assert invoke(*command(workplace, "-o", second)).exit_code == 0
    assert second.read_bytes() == out.read_bytes()


def test_the_command_tells_in_words(workplace: Path, tmp_path: Path) -> None:
    found = invoke(*command(workplace, "--test", workplace / "test.csv", "-o", tmp_path / "x.safetensors"))
    assert found.exit_code == 0, found.output
    assert "composed" in found.stdout
    assert "best alone" in found.stdout
    untested = invoke(*command(workplace, "-o", tmp_path / "y.safetensors"))
    assert "no test rows were given" in " ".join(untested.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (lambda f: command(f, "--budget", 0, "-o", f / "x"), "budget"),
        (lambda f: command(f, "-o", f / "x", data="none.csv"), "none.csv"),
        (lambda f: command(f), "--output is missing"),
        (lambda f: ["compose", "--base", f / "base", "--data", f / "few.csv", "-o", f / "x"], "experts are missing"),
        (lambda f: command(f, "--task", "poetry", "-o", f / "x"), "poetry"),
        (lambda f: command(f, "--dtype", "int4", "-o", f / "x"), "int4"),
        (lambda f: command(f, "--label-column", "topic", "-o", f / "x"), "topic"),
        (lambda f: ["compose", f / "expert1.safetensors", *command(f, "-o", f / "x")[1:]], "given 2 times"),
    ],
)
def test_the_command_refuses_and_writes_nothing(workplace: Path, arguments: Callable[[Path], list[object]], told: str) -> None:
    found = invoke(*arguments(workplace))
    assert found.exception is not None
    assert told in str(found.exception)
    assert isinstance(found.exception, SternaError)
    assert not (workplace / "x").exists()


def test_experts_of_a_language_model_are_composed_by_its_answers(tmp_path: Path) -> None:
    import transformers

    base = trainable.save_base("llama", tmp_path / "base")
    for seed in (1, 2):
        models.tuned(transformers.AutoModelForCausalLM.from_pretrained(base), seed=seed, size=0.1).save_pretrained(tmp_path / f"tuned{seed}")
        sterna.compress(base, tmp_path / f"tuned{seed}", density=0.3).save(tmp_path / f"expert{seed}.safetensors")
    trainable.save_jsonl(tmp_path / "few.jsonl", trainable.completions(8))
    trainable.save_jsonl(tmp_path / "test.jsonl", trainable.completions(12, seed=1))
    experts = [tmp_path / f"expert{seed}.safetensors" for seed in (1, 2)]
    words = ["--base", base, "--data", tmp_path / "few.jsonl", "--test", tmp_path / "test.jsonl", "--budget", 4, "--json"]
    for metric in ("loss", "token_f1"):
        out = tmp_path / f"{metric}.safetensors"
        found = invoke("compose", *experts, *words, "--metric", metric, "-o", out)
        assert found.exit_code == 0, found.output
        own = json.loads(found.stdout)["own"]
        value = {part: sterna.evaluate(base, out, data=tmp_path / part, metric=metric).tasks[0].entries[1] for part in ("few.jsonl", "test.jsonl")}
        assert own["value"] == pytest.approx(value["test.jsonl"].outcomes[metric].value, rel=1e-4)
        if metric == "loss":  # which the search saw of the completions alone
            assert own["score"] == pytest.approx(-value["few.jsonl"].outcomes[metric].value, rel=1e-4)
