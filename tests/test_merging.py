"""Merging beside the papers' formulas on dense vectors, beside PEFT's and mergekit's own functions, and what must hold whatever the method is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dense_merging as dense
import sterna
from coded import expert_of, random_levels, ternary_of
from dense_merging import Vector
from sterna.errors import InvalidArgument, WrongBase
from sterna.expert.changes import Add, Change, Masked, MaskRule, Set
from sterna.expert.expert import Expert
from sterna.expert.facts import BaseFacts, MaskFacts
from sterna.expert.file import file_pieces, from_bytes
from sterna.expert.heads import with_head
from sterna.expert.palette import Palette
from sterna.fingerprint import fingerprint
from sterna.merging import emitting, registry
from sterna.merging.merge import merge
from sterna.merging.replay import replay
from sterna.merging.schedule import setting
from sterna.numbers.kinds import packed, width_of
from sterna.training.errors import InvalidConfig

SHAPES = {"embed.weight": (31, 7), "layers.0.attn.weight": (6, 50), "layers.1.mlp.weight": (9, 40), "norm.bias": (13,)}
SCOPES = ("equal", "global", "tensor", "dense")
"""Ternary experts of one scale, each of its own, each tensor of its own; and palettes in which every entry has its own magnitude."""


def dense_change(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Palette:
    """A tensor without zeros and without ties."""
    values = random.standard_normal(shape).astype(np.float32)
    magnitudes, numbers = np.unique(np.abs(values), return_inverse=True)
    assert magnitudes.size == values.size
    indices = packed(numbers.reshape(-1).astype(np.uint16), width_of(magnitudes.size))
    return Palette(name, ternary_of(np.sign(values).astype(np.int8), 1.0), torch.from_numpy(magnitudes), torch.from_numpy(indices))


def parents(scope: str, count: int = 3, density: float = 0.3) -> list[Expert]:
    made = []
    for number in range(count):
        random = np.random.default_rng(number)
        changes: list[Change] = []
        for position, (name, shape) in enumerate(SHAPES.items()):
            if scope == "dense":
                changes.append(dense_change(name, shape, random))
                continue
            scale = {"equal": 0.25, "global": 0.1 + 0.07 * number, "tensor": 0.1 + 0.05 * number + 0.11 * position}[scope]
            levels = random_levels(shape, density, seed=100 * number + position)
            changes.append(Add(name, ternary_of(levels, float(np.float32(scale)))))
        made.append(expert_of(changes, scope="tensor", scale=0.0, metadata={"task": f"task{number}"}))
    return made


def vector(expert: Expert) -> Vector:
    """The task vector in float64."""
    return {name: tensor.numpy().astype(np.float64) for name, tensor in expert.task_vector().items()}


def close(ours: Expert, theirs: Vector, rtol: float = 1e-6) -> None:
    got = vector(ours)
    assert got.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert np.allclose(got[name], wanted, rtol=rtol, atol=1e-7), name


WEIGHTS = ([1.0, 1.0, 1.0], [1.0, 0.5, 0.25], [0.3, -0.4, 1.7])
Reference = Callable[[list[Vector], list[float]], Vector]
PAPERS: dict[str, tuple[Reference, dict[str, Any]]] = {
    "linear": (dense.linear, {}),
    "task_arithmetic": (lambda v, w: dense.task_arithmetic(v, w, 0.3), {"parameters": {"lambda": 0.3}}),
    "ties": (lambda v, w: dense.ties(v, w, 0.2, 0.7), {"density": 0.2, "parameters": {"lambda": 0.7}}),
    "consensus": (lambda v, w: dense.consensus(v, w, 0.5), {"parameters": {"mask_lambda": 0.5}}),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", sorted(PAPERS))
def test_methods_are_their_papers_formulas(method: str, scope: str) -> None:
    reference, options = PAPERS[method]
    experts = parents(scope)
    for weights in WEIGHTS:
        close(merge(experts, method, weights=weights, **options), reference([vector(e) for e in experts], weights))


@pytest.mark.parametrize("scope", SCOPES)
def test_methods_that_measure_angles_are_their_papers_formulas(scope: str) -> None:
    experts = parents(scope)
    vectors = [vector(expert) for expert in experts]
    close(merge(experts, "model_stock"), dense.model_stock(vectors, [1.0] * 3), rtol=1e-5)
    close(merge(experts[:2], "slerp", parameters={"t": 0.3}), dense.slerp(vectors[:2], [1.0] * 2, 0.3))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_what_its_seed_says_and_rescales(method: str, scope: str) -> None:
    experts = parents(scope)
    vectors = [{n: v * dense.drop_mask(5, f"task{i}", n, v.shape, 0.6) / 0.6 for n, v in vector(expert).items()} for i, expert in enumerate(experts)]
    reference = dense.task_arithmetic if method == "dare_linear" else dense.ties
    for weights in WEIGHTS:
        close(merge(experts, method, weights=weights, density=0.6, seed=5), reference(vectors, weights))


def test_breadcrumbs_on_distinct_magnitudes() -> None:
    experts = parents("dense")
    wanted = dense.breadcrumbs([vector(e) for e in experts], WEIGHTS[1], 0.4, 0.1)
    for semantics in ("paper", "mergekit"):
        close(merge(experts, "breadcrumbs", weights=WEIGHTS[1], density=0.4, gamma=0.1, semantics=semantics), wanted)


# The packages themselves


def peft_merged(method: str, experts: list[Expert], weights: list[float], **options: Any) -> Vector:
    merging = pytest.importorskip("peft.utils.merge_utils")
    vectors = [expert.task_vector() for expert in experts]
    function = getattr(merging, "task_arithmetic" if method == "linear" else method)
    return {name: function([v[name] for v in vectors], torch.tensor(weights), **options).numpy() for name in vectors[0]}


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("scope", SCOPES)
def test_semantics_of_peft(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = parents(scope)
    density = 0.2 if scope == "dense" else 1.0
    for weights in WEIGHTS:
        for method in ("linear", "task_arithmetic"):
            close(merge(experts, method, weights=weights, semantics="peft"), peft_merged(method, experts, weights), 1e-5)
        for election in ("total", "frequency"):
            ours = merge(experts, "ties", weights=weights, density=density, semantics="peft", parameters={"election": election})
            close(ours, peft_merged("ties", experts, weights, density=density, majority_sign_method=election), 1e-5)
        for method in ("dare_linear", "dare_ties"):
            drawn = (dense.drop_mask(0, f"task{i}", n, s, 0.7) for n, s in SHAPES.items() for i in range(3))
            monkeypatch.setattr(torch, "bernoulli", lambda like, drawn=drawn: torch.from_numpy(next(drawn)).to(like.dtype))
            theirs = peft_merged(method, experts, weights, density=0.7)
            monkeypatch.undo()
            close(merge(experts, method, weights=weights, density=0.7, semantics="peft"), theirs, 1e-5)


@pytest.mark.skipif(not dense.MERGEKIT.exists(), reason="mergekit is not in an environment of its own: make mergekit, or STERNA_MERGEKIT_PYTHON")
@pytest.mark.parametrize("scope", SCOPES)
def test_semantics_of_mergekit(scope: str) -> None:
    experts = parents(scope)
    vectors = [{n: v.astype(np.float32) for n, v in vector(expert).items()} for expert in experts]
    weights = [1.0, 0.5, 0.25]
    asked: list[tuple[str, dict[str, Any]]] = [
        ("linear", {}),
        ("task_arithmetic", {"lambda": 0.3}),
        ("ties", {"density": 0.2 if scope == "dense" else 1.0}),
        ("ties", {"density": 1.0, "normalize": False}),
        ("model_stock", {}),
    ]
    if scope == "dense":
        asked.append(("breadcrumbs", {"density": 0.4, "gamma": 0.1}))
    masks = [{n: dense.drop_mask(0, f"task{i}", n, s, 0.7).astype(np.float32) for n, s in SHAPES.items()} for i in range(3)]
    dares: list[tuple[str, dict[str, Any]]] = [("dare_linear", {"density": 0.7}), ("dare_ties", {"density": 0.7})]
    theirs = iter(dense.with_mergekit([*asked, *dares], vectors, weights, masks))
    for method, parameters in asked:
        given = {key: value for key, value in parameters.items() if key not in ("density", "gamma")}
        shares = {key: value for key, value in parameters.items() if key in ("density", "gamma")}
        own = None if method == "model_stock" else weights
        ours = merge(experts, method, weights=own, semantics="mergekit", parameters=given, **shares)
        close(ours, next(theirs), 2e-5)
    for method, _ in dares:
        close(merge(experts, method, weights=weights, density=0.7, semantics="mergekit"), next(theirs), 2e-5)


def test_dare_keeps_the_share_and_the_mean() -> None:
    levels = random_levels((512, 1024), 0.5, seed=1)
    expert = expert_of([Add("w", ternary_of(levels, 0.5))], scale=0.5)
    for seed in range(3):
        kept = merge([expert], "dare_linear", density=0.3, seed=seed)
        values = vector(kept)["w"]
        count = np.count_nonzero(levels)
        assert abs(np.count_nonzero(values) - 0.3 * count) < 4 * np.sqrt(0.21 * count)
        assert np.allclose(np.unique(np.abs(values)), [0, 0.5 / 0.3])
        assert (np.sign(values)[values != 0] == levels[values != 0]).all()


# Trimming what ties


def test_trimming_ternary_experts_under_each_semantics() -> None:
    """All non-zeros of a ternary expert tie: the paper's threshold keeps them all, the packages an exact number, of lowest flat index here."""
    experts = parents("global", 2, density=0.5)
    told: list[str] = []
    whole = merge(experts, "ties", density=0.1, warn=told.append)
    assert vector(whole).keys() == SHAPES.keys()
    close(whole, dense.ties([vector(e) for e in experts], [1.0, 1.0]))
    assert len(told) == 2
    assert "keeps all of its non-zeros at density 0.1" in told[0]
    for semantics in ("peft", "mergekit"):
        one = merge(experts[:1], "ties", density=0.1, semantics=semantics)
        for name, values in vector(one).items():
            before, kept = vector(experts[0])[name].reshape(-1), int(0.1 * values.size)
            places = np.flatnonzero(before)[:kept]
            assert np.flatnonzero(values.reshape(-1)).tolist() == places.tolist()


def test_trimming_goes_by_magnitude_over_the_whole_vector() -> None:
    """Scales by tensor differ, so the paper's threshold drops whole tensors of the smallest scales, all ties at the threshold kept."""
    expert = parents("tensor", 1, density=0.5)[0]
    kept = vector(merge([expert], "ties", density=0.05))
    scales = {change.name: change.levels.scale for change in expert.changes if isinstance(change, Add)}
    largest = sorted(scales, key=lambda name: -scales[name])
    assert np.count_nonzero(kept[largest[0]])
    assert not np.count_nonzero(kept[largest[-1]])
    for name in kept:
        assert np.count_nonzero(kept[name]) in (0, next(c.levels.count for c in expert.changes if isinstance(c, Add) and c.name == name))


def test_outliers_of_ternary_experts() -> None:
    """Breadcrumbs drops a magnitude as an outlier only where all of its non-zeros are inside the share."""
    expert = parents("global", 1)[0]
    close(merge([expert], "breadcrumbs", density=1.0, gamma=0.01), vector(expert))
    assert not any(values.any() for values in vector(merge([expert], "breadcrumbs", density=0.2, gamma=0.6)).values())


# What holds for every method


METHODS: dict[str, dict[str, Any]] = {
    name: {"density": 0.5} if name.startswith("dare") else {} for name in registry.known() if name not in ("slerp", "emr")
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_parents_order_does_not_matter(method: str, scope: str) -> None:
    experts = parents(scope)
    weights = None if method == "model_stock" else [1.0, 0.5, 0.25]
    vectors = []
    for order in itertools.permutations(range(3)):
        own = None if weights is None else [weights[i] for i in order]
        vectors.append(vector(merge([experts[i] for i in order], method, weights=own, **METHODS[method])))
    for other in vectors[1:]:
        for name, values in vectors[0].items():
            assert np.allclose(values, other[name], rtol=1e-6, atol=0) if method == "model_stock" else np.array_equal(values, other[name])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("semantics", registry.SEMANTICS)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_one_parent_is_itself(method: str, semantics: str, scope: str) -> None:
    expert = parents(scope, 1)[0]
    merged = merge([expert], method, semantics=semantics)
    assert {n: v.tolist() for n, v in vector(merged).items()} == {n: v.tolist() for n, v in vector(expert).items()}
    assert [type(change) for change in merged.changes] == [type(change) for change in expert.changes]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "consensus"])
def test_weights_scale(method: str) -> None:
    experts = parents("tensor")
    one, two = (vector(merge(experts, method, weights=[c * w for w in (1.0, 0.5, 0.25)])) for c in (1, 2))
    for name in one:
        assert np.array_equal(2 * one[name], two[name])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_kinds_and_columns_give_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = parents("tensor")
    for semantics in registry.by_name(method).semantics:
        by_kind = merge(experts, method, semantics=semantics, **METHODS[method])
        monkeypatch.setattr(emitting, "KINDS", 0)
        by_column = merge(experts, method, semantics=semantics, **METHODS[method])
        monkeypatch.undo()
        for name, values in vector(by_kind).items():
            assert np.allclose(values, vector(by_column)[name], rtol=1e-6, atol=0)
        if method not in ("model_stock",) and semantics != "mergekit":
            assert by_kind.content_digest == by_column.content_digest


def test_threads_and_chunks_do_not_matter() -> None:
    size = (1 << 20) * 2 + 77
    experts = [expert_of([Add("w", ternary_of(random_levels((size,), 0.05, seed=i), float(np.float32(0.1 + i))))], scale=0.1 + i) for i in range(3)]
    before = torch.get_num_threads()
    digests = set()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for method in ("ties", "dare_linear"):
                merged = merge(experts, method, density=0.5, tasks=["a", "b", "c"], semantics="paper")
                digests.add((method, merged.content_digest))
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 2
    close(merge(experts, "ties"), {"w": _quick_ties([vector(e)["w"] for e in experts])})


def _quick_ties(vectors: list[np.ndarray]) -> np.ndarray:
    x = np.stack(vectors)
    agree = (np.sign(x) == np.sign(x.sum(0))) & (x != 0)
    mean: np.ndarray = np.where(agree, x, 0).sum(0) / np.maximum(agree.sum(0), 1)
    return mean


def test_merged_experts_are_merged_again() -> None:
    experts = parents("global", 4)
    halves = [merge(experts[:2], "task_arithmetic", metadata={"task": "x"}), merge(experts[2:], "task_arithmetic", metadata={"task": "y"})]
    assert any(isinstance(change, Palette) for change in halves[0].changes)
    close(merge(halves, "task_arithmetic"), dense.task_arithmetic([vector(e) for e in experts], [1.0] * 4))


def test_many_parents() -> None:
    experts = parents("equal", 12)
    close(merge(experts, "ties"), dense.ties([vector(e) for e in experts], [1.0] * 12))


def test_parents_that_change_other_tensors() -> None:
    one = expert_of([Add("a", ternary_of(random_levels((5, 6), 0.5, 1)))], ("a", "b"))
    two = expert_of([Add("b", ternary_of(random_levels((7,), 0.5, 2)))], ("a", "b"))
    for method in ("task_arithmetic", "linear", "ties", "model_stock"):
        merged = vector(merge([one, two], method))
        factor = {"linear": 0.5, "model_stock": 0.0}.get(method, 1.0)
        assert np.allclose(merged["a"], factor * vector(one)["a"])
        assert np.allclose(merged["b"], factor * vector(two)["b"])


def test_a_result_is_made_ternary_again() -> None:
    experts = parents("global")
    merged = merge(experts, "task_arithmetic", recompress={"density": 0.1, "alpha": 3.0})
    assert all(isinstance(change, Add) for change in merged.changes)
    values = vector(merge(experts, "task_arithmetic"))
    names = sorted(values)
    flat = np.concatenate([values[name].reshape(-1) for name in names])
    kept = np.argsort(-np.abs(flat), kind="stable")[: int(0.1 * flat.size)]
    wanted = np.zeros(flat.size)
    wanted[kept] = np.sign(flat[kept]) * 3.0 * flat.std(ddof=1)
    assert np.allclose(np.concatenate([vector(merged)[name].reshape(-1) for name in names]), wanted, rtol=1e-6)
    assert merged.facts.merge["recompress"] == {"density": 0.1, "alpha": 3.0}
    assert merged.bitmasks().nonzeros() == kept.size
    with pytest.raises(InvalidConfig, match="recompress: density is 2"):
        merge(experts, "ties", recompress={"density": 2})
    with pytest.raises(InvalidConfig, match=r"recompress\.densty: there is no such field"):
        merge(experts, "ties", recompress={"densty": 0.2})


def test_the_result_is_a_small_file_that_reads_back(tmp_path: Path) -> None:
    experts = parents("global")
    merged = merge(experts, "ties", weights=[1, 1, 0.5])
    merged.save(tmp_path / "m.safetensors")
    read = sterna.load(tmp_path / "m.safetensors")
    assert read.content_digest == merged.content_digest
    assert read.facts.merge["models"][2]["parameters"] == {"weight": 0.5, "density": 1.0}
    assert [model["content_digest"] for model in read.facts.merge["models"]] == [expert.content_digest for expert in experts]
    assert sterna.recode(read, "small").content_digest == merged.content_digest
    with pytest.raises(InvalidArgument, match="several magnitudes"):
        read.bitmasks()


# New values: PaFi and HiWi's biases


BASE = {"a.weight": (6, 10), "b.bias": (9,), "c.weight": (8, 5)}


def tuned_parents(values: str, count: int = 3) -> tuple[dict[str, torch.Tensor], list[Expert], list[Vector]]:
    """A base, experts with a mask over two of its tensors and a bias tuned as a whole, and their differences by slot, in float64."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in BASE.items()}
    rule = MaskRule("smallest", 31, ("a.weight", "c.weight"))
    mark = fingerprint(base)
    flat = torch.cat([base[name].reshape(-1) for name in rule.names])
    entries = torch.from_numpy(np.sort(np.argsort(flat.abs().numpy(), kind="stable")[:31]))
    experts, vectors = [], []
    for number in range(count):
        bias = base["b.bias"] + 0.1 * torch.randn(9, generator=generator)
        changes: list[Change]
        if values == "ternary":
            levels = random_levels((31,), 0.6, seed=number)
            changes = [Masked(rule, ternary_of(levels, 0.25))]
            vectors.append({"a.weight": 0.25 * levels})
            told: dict[str, Any] = {"method": "compeft", "density": 0.5, "alpha": 1.0, "scale": 0.25}
        else:
            new = torch.randn(31, generator=generator)
            changes = [Masked(rule, new), Set("b.bias", bias, "tuned")]
            vectors.append({"a.weight": (new.double() - flat[entries].double()).numpy(), "b.bias": (bias.double() - base["b.bias"].double()).numpy()})
            told = {"method": "exact", "density": None, "alpha": None, "scale": 0.0}
        facts = {"source": "pafi", "mask": MaskFacts("smallest"), "base": BaseFacts("base", mark.hex, 109), "metadata": {"task": f"task{number}"}}
        experts.append(replace(expert_of(changes, tuple(BASE), **told, **facts), fingerprint=mark))
    return base, experts, vectors


def slots(expert: Expert, base: dict[str, torch.Tensor]) -> Vector:
    """The differences by slot of an expert of new values."""
    rows = {}
    for change in expert.changes:
        if isinstance(change, Masked):
            dense_vectors = expert.task_vector(base)
            flat = torch.cat([base[name].reshape(-1) for name in change.rule.names])
            entries = np.sort(np.argsort(flat.abs().numpy(), kind="stable")[: change.rule.count])
            rows[change.name] = torch.cat([dense_vectors[name].reshape(-1) for name in change.rule.names]).double().numpy()[entries]
        elif isinstance(change, Set):
            rows[change.name] = (change.value.double() - base[change.name].double()).numpy()
    return rows


@pytest.mark.parametrize("values", ["exact", "ternary"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_experts_of_one_mask_are_merged_as_vectors(method: str, values: str) -> None:
    base, experts, vectors = tuned_parents(values)
    weights = [1.0, 1.0, 1.0] if method == "model_stock" else [1.0, 0.5, 0.25]
    options: dict[str, Any] = {"density": 0.6} if method in ("ties", "dare_linear", "dare_ties") else {}
    options |= {"density": 0.5, "gamma": 0.1} if method == "breadcrumbs" and values == "exact" else {}
    if method.startswith("dare"):
        masked = [{n: v * dense.drop_mask(0, f"task{i}", n, v.shape, 0.6) / 0.6 for n, v in w.items()} for i, w in enumerate(vectors)]
        wanted = (dense.task_arithmetic if method == "dare_linear" else dense.ties)(masked, weights)
    elif method == "breadcrumbs":
        wanted = dense.breadcrumbs(vectors, weights, 0.5, 0.1) if options else dense.task_arithmetic(vectors, weights)
    elif method == "ties":
        wanted = dense.ties(vectors, weights, 0.6)
    else:
        wanted = getattr(dense, method)(vectors, weights)
    merged = merge(experts, method, weights=weights, base=base, **options)
    got = slots(merged, base)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert np.allclose(got[name], wanted[name], atol=1e-6), name
    merged = from_bytes(b"".join(bytes(piece) for piece in file_pieces(merged)))
    assert (merged.facts.source, merged.facts.method) == ("pafi", "merge")
    if values == "exact":
        model = torch.nn.Module()
        for name in BASE:
            part = torch.nn.Module()
            part.register_parameter(name.rpartition(".")[2], torch.nn.Parameter(base[name].clone()))
            model.add_module(name.partition(".")[0], part)
        with sterna.attached(model, merged):
            live = model.state_dict()
            assert torch.allclose(live["b.bias"], base["b.bias"] + torch.from_numpy(wanted["b.bias"]).float(), atol=1e-6)
        assert all(torch.equal(model.state_dict()[name], base[name]) for name in base)


def test_new_values_need_their_base_and_one_mask() -> None:
    base, experts, _ = tuned_parents("exact")
    with pytest.raises(InvalidArgument, match="whose differences need the base"):
        merge(experts, "linear")
    with pytest.raises(WrongBase):
        merge(experts, "linear", base={name: tensor + 1 for name, tensor in base.items()})
    other = replace(experts[1], changes=(Masked(MaskRule("smallest", 30, ("a.weight", "c.weight")), torch.zeros(30)),))
    with pytest.raises(InvalidConfig, match="masks differ: smallest, 31 and smallest, 30"):
        merge([experts[0], other], "linear", base=base)
    levels = replace(experts[1], changes=(Add("c.weight", ternary_of(random_levels((8, 5), 0.5))),))
    with pytest.raises(InvalidConfig, match=r"c\.weight is changed by levels or as a whole in task1"):
        merge([experts[0], levels], "linear", base=base)
    with pytest.raises(InvalidConfig, match="recompress: the parents hold new values"):
        merge(experts, "linear", base=base, recompress=True)


# On live models


class Classifier(torch.nn.Module):
    def __init__(self, classes: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(40, 30).to(dtype)
        self.classifier = torch.nn.Linear(30, classes).to(dtype)


def classifiers() -> tuple[dict[str, torch.Tensor], list[Expert]]:
    base = {name: tensor for name, tensor in Classifier(2).state_dict().items() if name.startswith("body")}
    experts = []
    for number, task in enumerate(("bbc", "toxic")):
        torch.manual_seed(number + 1)
        tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
        tuned |= {"classifier.weight": torch.randn(2 + 3 * number, 30), "classifier.bias": torch.randn(2 + 3 * number)}
        experts.append(sterna.compress(base, tuned, density=0.2, metadata={"task": task}))
    return base, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_merged_experts_attach_with_a_head_and_come_off_to_the_bit(dtype: torch.dtype) -> None:
    _, experts = classifiers()
    merged = merge(experts, "task_arithmetic", weights=[0.7, 0.4])
    assert sorted(merged.facts.heads) == ["bbc", "toxic"]
    model = Classifier(2, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidArgument, match="choose one of bbc, toxic"):
        sterna.attach(model, merged)
    with pytest.raises(InvalidArgument, match="no head for 'sports'"):
        sterna.attach(model, merged, head="sports")
    for task, classes in (("bbc", 2), ("toxic", 5)):
        added = merged.task_vector()
        with sterna.attached(model, merged, head=task, allow_narrower=True) as patch:
            assert model.classifier.weight.shape == (classes, 30)
            wanted = (before["body.weight"].float() + added["body.weight"]).to(dtype)
            assert torch.equal(model.body.weight, wanted)
            patch.swap(merged, head="bbc", allow_narrower=True)
            assert model.classifier.weight.shape == (2, 30)
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    own = next(c for c in experts[1].changes if isinstance(c, Set) and c.name == "classifier.weight")
    chosen = next(c for c in with_head(merged, "toxic").changes if isinstance(c, Set) and c.name == "classifier.weight")
    assert torch.equal(own.value, chosen.value)


def test_merged_experts_attach_to_tensors_of_any_layout() -> None:
    _, experts = classifiers()
    merged = with_head(merge(experts, "ties"), "bbc")
    model = Classifier(2)
    model.body.weight = torch.nn.Parameter(model.body.weight.detach().T.contiguous().T)
    before = model.body.weight.detach().clone()
    patch = sterna.attach(model, merged)
    assert torch.equal(model.body.weight, before + merged.task_vector()["body.weight"])
    patch.detach()
    assert torch.equal(model.body.weight, before)


def test_merged_experts_are_applied_with_a_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, experts = classifiers()
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    merged = merge(experts, "ties")
    with pytest.raises(InvalidArgument, match="choose one of"):
        sterna.apply(tmp_path / "base", merged, tmp_path / "out")
    sterna.apply(tmp_path / "base", merged, tmp_path / "out", head="toxic")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["classifier.weight"].shape == (5, 30)
    assert torch.equal(written["body.weight"], base["body.weight"] + merged.task_vector()["body.weight"])


# Recipes


def saved(folder: Path, experts: list[Expert]) -> list[Path]:
    paths = []
    for number, expert in enumerate(experts):
        paths.append(folder / f"e{number}.safetensors")
        expert.save(paths[-1])
    return paths


def test_a_recipe_is_what_its_arguments_are_and_is_replayed(tmp_path: Path) -> None:
    experts = parents("global")
    saved(tmp_path, experts)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("""
merge_method: dare_ties
models:
  - e0.safetensors
  - {model: e1.safetensors, parameters: {weight: 0.5}}
  - {model: e2.safetensors, task: third, parameters: {density: 0.25}}
parameters: {density: 0.5, lambda: 0.8}
seed: 7
""")
    merged = merge(recipe)
    assert [model["task"] for model in merged.facts.merge["models"]] == ["task0", "task1", "third"]
    record = merged.facts.merge
    held = [{"model": expert, "task": told["task"], "parameters": told["parameters"]} for expert, told in zip(experts, record["models"], strict=True)]
    same = merge({**record, "models": held})
    assert same.content_digest == merged.content_digest
    merged.save(tmp_path / "merged.safetensors")
    assert replay(tmp_path / "merged.safetensors").content_digest == merged.content_digest
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "merged.safetensors").rename(moved / "merged.safetensors")
    with pytest.raises(InvalidConfig, match=r"models\[0\]: e0.safetensors is missing"):
        replay(moved / "merged.safetensors")
    assert replay(moved / "merged.safetensors", [tmp_path]).content_digest == merged.content_digest
    experts[2].save(tmp_path / "e0.safetensors")
    with pytest.raises(InvalidConfig, match="another expert"):
        replay(moved / "merged.safetensors", [tmp_path])
    with pytest.raises(InvalidArgument, match="not merged"):
        replay(tmp_path / "e1.safetensors")


def test_recipes_of_recipes(tmp_path: Path) -> None:
    experts = parents("tensor")
    saved(tmp_path, experts)
    (tmp_path / "inner.yaml").write_text("merge_method: task_arithmetic\nmodels: [e1.safetensors, e2.safetensors]\n")
    (tmp_path / "outer.yaml").write_text("merge_method: task_arithmetic\nmodels: [e0.safetensors, {model: inner.yaml, task: inner}]\n")
    merged = merge(tmp_path / "outer.yaml")
    close(merged, dense.task_arithmetic([vector(e) for e in experts], [1.0] * 3))
    merged.save(tmp_path / "merged.safetensors")
    assert replay(tmp_path / "merged.safetensors").content_digest == merged.content_digest


def test_filters_and_gradients(tmp_path: Path) -> None:
    experts = parents("global")
    vectors = [vector(e) for e in experts]
    weight = [{"filter": "attn", "value": 0.25}, {"value": [0.0, 2.0]}]
    merged = vector(merge({"merge_method": "task_arithmetic", "models": [{"model": experts[0], "parameters": {"weight": weight}}, experts[1]]}))
    for name, factor in {"embed.weight": 0.0, "layers.0.attn.weight": 0.25, "layers.1.mlp.weight": 2.0, "norm.bias": 2.0}.items():
        assert np.allclose(merged[name], factor * vectors[0][name] + vectors[1][name], rtol=1e-6, atol=1e-9)
    assert [round(setting([0, 1, 0]).at(f"layers.{i}.w", 5), 6) for i in range(5)] == [0, 0.5, 1, 0.5, 0]


def test_every_fault_of_a_recipe_is_told_at_once(tmp_path: Path) -> None:
    saved(tmp_path, parents("global"))
    (tmp_path / "bad.yaml").write_text("""
merge_method: tise
semantic: peft
seed: -1
models:
  - {model: e0.safetensors, parameters: {weight: heavy}}
  - {model: gone.safetensors, tsk: x}
  - 7
parameters: {density: 0}
""")
    with pytest.raises(InvalidConfig) as caught:
        merge(tmp_path / "bad.yaml")
    told = "\n".join(caught.value.faults)
    for phrase in (
        "merge_method: no merge method is named 'tise'; did you mean ties",
        "semantic: there is no such field; did you mean semantics?",
        "seed: -1 is no integer",
        "models[0].parameters.weight: 'heavy' is no number",
        "gone.safetensors is no file",
        "models[1].tsk: there is no such field; did you mean task?",
        "models[2]: 7 is no parent",
        "models[0].parameters.density: 0 is not above 0",
    ):
        assert phrase in told, (phrase, told)


def test_circles_of_recipes(tmp_path: Path) -> None:
    saved(tmp_path, parents("global", 1))
    (tmp_path / "a.yaml").write_text("merge_method: linear\nmodels: [e0.safetensors, b.yaml]\n")
    (tmp_path / "b.yaml").write_text("merge_method: linear\nmodels: [a.yaml]\n")
    with pytest.raises(InvalidConfig, match=r"circle: a.yaml -> b.yaml -> a.yaml"):
        merge(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").unlink()
    with pytest.raises(InvalidConfig, match=r"models\[1\].model: the config .*b.yaml cannot be read"):
        merge(tmp_path / "a.yaml")


BAD: dict[str, tuple[str, Callable[[list[Expert]], object]]] = {
    "unknown method": ("no merge method is named 'dare'; did you mean dare_ties or dare_linear", lambda e: merge(e, "dare")),
    "density 0": ("density: 0 is not above 0, up to 1", lambda e: merge(e, "ties", density=0)),
    "density 2": ("density: 2 is not above 0, up to 1", lambda e: merge(e, "ties", density=2)),
    "no density": ("density: missing; dare_ties keeps", lambda e: merge(e, "dare_ties")),
    "density unused": ("parameters.density: there is no such field", lambda e: merge(e, "linear", density=0.5)),
    "weights": ("weights are [1, 2] for 3 experts", lambda e: merge(e, "ties", weights=[1, 2])),
    "weights of nan": ("weight: nan is no number", lambda e: merge(e, "ties", weights=[1, 2, float("nan")])),
    "weights of 0": ("add up to 0", lambda e: merge(e, "linear", weights=[1, -1, 0])),
    "weights too large": ("not finite in float32", lambda e: merge(e, "task_arithmetic", weights=[1e300, 1, 1])),
    "weights of a stock": ("model_stock takes no weights", lambda e: merge(e, "model_stock", weights=[1, 2, 3])),
    "tasks": ("2 parents are named x", lambda e: merge(e, "ties", tasks=["x", "x", "y"])),
    "tasks missing": ("tasks are ['x'] for 3 experts", lambda e: merge(e, "ties", tasks=["x"])),
    "repeated": ("have the same content: a parent is given 2 times", lambda e: merge([e[0], e[0]], "ties", tasks=["x", "y"])),
    "three for slerp": ("slerp takes 2 parents; given 3", lambda e: merge(e, "slerp")),
    "one for a stock": ("model_stock takes 2 or more parents; given 1", lambda e: merge(e[:1], "model_stock")),
    "none": ("models: [] is no list of parents", lambda e: merge([], "ties")),
    "semantics": ("semantics: 'mine' is not one of", lambda e: merge(e, "ties", semantics="mine")),  # type: ignore[arg-type]
    "semantics of another": ("consensus follows paper, not peft", lambda e: merge(e, "consensus", semantics="peft")),
    "option": ("parameters.lamda: there is no such field; did you mean lambda?", lambda e: merge(e, "ties", parameters={"lamda": 1})),
    "option's choice": ("'loud' is not one of total, frequency", lambda e: merge(e, "ties", parameters={"election": "loud"})),
    "no method": ("method is missing", lambda e: merge(e)),
    "beside a recipe": ("seed cannot be given beside a recipe", lambda e: merge({}, seed=3)),
    "base": ("base_model: 'gpt' is not the parents' base, base", lambda e: merge({"merge_method": "ties", "models": e, "base_model": "gpt"})),
    "other base": ("only experts for the same base", lambda e: merge([e[0], expert_of(list(e[1].changes), ("other",))], "ties")),
    "other shape": ("has shape (2, 3) in x, (31, 7) in task0", lambda e: merge([e[0], _reshaped()], "ties", tasks=["task0", "x"])),
    "trimmed by filters": ("the paper trims over the whole vector", lambda e: merge(e, "ties", density=[0.1, 0.2])),  # type: ignore[arg-type]
}


def _reshaped() -> Expert:
    return expert_of([Add("embed.weight", ternary_of(random_levels((2, 3), 1.0)))], tuple(SHAPES))


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input(case: str) -> None:
    phrase, attempt = BAD[case]
    with pytest.raises((InvalidConfig, InvalidArgument)) as caught:
        attempt(parents("global"))
    assert phrase in str(caught.value)


def test_exact_experts_are_refused_by_name() -> None:
    base = {"w": torch.randn(4, 5)}
    lossless = sterna.compress(base, {"w": base["w"] + 1}, lossless=True, force=True)
    with pytest.raises(InvalidConfig, match="changes w by lossless, which cannot be merged yet"):
        merge([lossless], "ties")


def test_methods_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> None:
            @registry.merge_method("loudest")
            def loudest(kinds: registry.Kinds, *, volume: float = 1.0) -> registry.F64:
                """The value of largest magnitude."""
                pick = np.abs(kinds.values).argmax(0)
                return volume * kinds.values[pick, np.arange(pick.size)]

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()] if group == "sterna.merge_methods" else [])
    registry._load.cache_clear()
    try:
        experts = parents("global")
        merged = vector(merge(experts, "loudest", parameters={"volume": 2.0}))
        vectors = [vector(e) for e in experts]
        for name, values in merged.items():
            assert np.allclose(np.abs(values), 2 * np.max([np.abs(v[name]) for v in vectors], axis=0))
    finally:
        registry._REGISTERED.pop("loudest", None)
        registry._load.cache_clear()
    with pytest.raises(ValueError, match="is not a bool, int, float"):
        registry.merge_method("odd")(lambda kinds, *, x: kinds.values[0])


# The command line


def run(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from sterna.commands import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line(tmp_path: Path) -> None:
    _, experts = classifiers()
    paths = saved(tmp_path, experts)
    out = tmp_path / "merged.safetensors"
    done = run("merge", *paths, "--method", "ties", "--weights", "1,0.5", "--density", "0.5", "-p", "lambda=0.7", "-o", out)
    assert done.exit_code == 0, done.output
    assert "ties of bbc, toxic" in done.output
    wanted = merge(paths, "ties", weights=[1, 0.5], density=0.5, parameters={"lambda": 0.7})
    assert sterna.load(out).content_digest == wanted.content_digest
    shown = run("inspect", out).output
    for phrase in ("merged by ties", "e0.safetensors", "head bbc", '"lambda": 0.7'):
        assert phrase in shown, shown
    again = tmp_path / "again.safetensors"
    assert run("merge", "--replay", out, "-o", again).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    assert run("merge", *paths, "--method", "ties", "--recompress", "0.1,3", "-o", again).exit_code == 0
    assert sterna.load(again).facts.merge["recompress"] == {"density": 0.1, "alpha": 3.0}
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [e0.safetensors, e1.safetensors]\n")
    assert run("merge", tmp_path / "r.yaml", "-o", again, "--json").exit_code == 0
    there = sorted(tmp_path.iterdir())
    for arguments, phrase in (
        ((*paths, "--method", "tais"), "did you mean ties"),
        ((*paths, "--method", "ties", "--weights", "1,x"), "expected numbers with commas"),
        ((tmp_path / "r.yaml", "--method", "ties"), "--method cannot be given beside a recipe"),
        ((tmp_path / "r.yaml", paths[0]), "expected the recipe alone"),
        ((), "experts are missing"),
    ):
        failed = run("merge", *arguments, "-o", tmp_path / "failed.safetensors")
        assert phrase in str(failed.exception), (phrase, failed.exception)
    assert "--output is missing" in str(run("merge", *paths, "--method", "ties").exception)
    assert sorted(tmp_path.iterdir()) == there
