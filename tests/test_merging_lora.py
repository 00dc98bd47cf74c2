"""LoRA experts merge as products: beside sums of dense products, PEFT's own combinations of the same adapters, and a dense SVD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import dense_merging as dense
import models
import sterna
from coded import expert_of, random_levels, ternary_of
from dense_merging import Vector
from sterna.errors import InvalidArgument
from sterna.expert.changes import Add, Change, Factors, LowRank, Set
from sterna.expert.expert import Expert
from sterna.expert.file import file_pieces
from sterna.merging.merge import merge
from sterna.merging.replay import replay
from sterna.training.errors import InvalidConfig
from test_format import agree
from test_merging import PAPERS, close, peft_merged, vector

KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool, bool]] = {
    "embed.weight": ((3, 31), (7, 3), True, True),
    "layers.0.conv.weight": ((3, 4, 3, 3), (6, 3, 1, 1), False, False),
    "layers.1.conv1d.weight": ((3, 20), (9, 3), True, False),
    "layers.1.linear.weight": ((3, 20), (9, 3), False, False),
}
"""A's and B's shapes, whether the product is transposed, and whether PEFT stores an embedding's."""
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["embed", "conv", "conv1d", "linear"]}


def lora(number: int, left_out: str = "") -> Expert:
    changes: list[Change] = []
    for position, (name, (a, b, transposed, embedding)) in enumerate(KINDS.items()):
        scale = float(np.float32(0.1 + 0.05 * number))
        A, B = (ternary_of(random_levels(shape, 0.4, seed=100 * number + 10 * position + i), scale) for i, shape in enumerate((a, b)))
        if name != left_out:
            changes.append(Factors(name, f"model.{name[:-7]}", A, B, 2.0, transposed, embedding))
    return expert_of(changes, tuple(KINDS), scope="tensor", scale=0.0, source="lora", adapter=CONFIG, metadata={"task": f"task{number}"})


@pytest.fixture(scope="module")
def parents() -> list[Expert]:
    return [lora(0), lora(1, left_out="layers.1.linear.weight"), lora(2)]


def filled(vectors: list[Vector]) -> list[Vector]:
    """Zeros where a parent does not change a tensor."""
    shapes = {name: values.shape for vector in vectors for name, values in vector.items()}
    return [{name: vector.get(name, np.zeros(shape)) for name, shape in sorted(shapes.items())} for vector in vectors]


WEIGHTS = [1.0, -0.5, 0.3]
LINEAR: dict[str, tuple[Callable[[list[Vector], list[float]], Vector], dict[str, Any], int]] = {
    "linear": (dense.linear, {"weights": WEIGHTS}, 3),
    "task_arithmetic": (lambda v, w: dense.task_arithmetic(v, w, 0.7), {"weights": WEIGHTS, "parameters": {"lambda": 0.7}}, 3),
    "model_stock": (dense.model_stock, {}, 3),
    "slerp": (lambda v, w: dense.slerp(v, w, 0.3), {"parameters": {"t": 0.3}}, 2),
}


@pytest.mark.parametrize("method", sorted(LINEAR))
def test_stacked_factors_are_the_sum_of_products(method: str, parents: list[Expert]) -> None:
    reference, options, count = LINEAR[method]
    chosen = [lora(0), lora(1), lora(2)][:count] if method in ("model_stock", "slerp") else parents  # a dense cosine with nothing is none
    weights = options.get("weights", [1.0] * count)
    made = merge(chosen, method, **options)
    close(made, reference(filled([vector(e) for e in chosen]), weights))
    assert all(isinstance(change, Factors) and change.ranks is not None for change in made.changes)
    ranks = {change.name: change.A.shape[0] for change in made.changes if isinstance(change, Factors)}
    assert ranks == {name: 3 * sum(any(c.name == name for c in e.changes) for e in chosen) for name in KINDS}
    agree(b"".join(map(bytes, file_pieces(made))))


def test_merged_products_merge_again(parents: list[Expert]) -> None:
    both = merge(parents[:2], "task_arithmetic", weights=WEIGHTS[:2], metadata={"task": "both"})
    cut = merge(parents[:2], "task_arithmetic", weights=WEIGHTS[:2], parameters={"lora": "svd", "rank": 6}, metadata={"task": "cut"})
    wanted = dense.task_arithmetic(filled([vector(e) for e in parents]), WEIGHTS)
    for first in (both, cut):  # rank 6 is all that two products of rank 3 have
        again = merge([first, parents[2]], "task_arithmetic", weights=[1, WEIGHTS[2]])
        close(again, wanted, 1e-5)
        agree(b"".join(map(bytes, file_pieces(again))))
    assert all(isinstance(change, LowRank) for change in again.changes)


def relative(made: Vector, wanted: Vector) -> float:
    lost = sum(((made[name] - values) ** 2).sum() for name, values in wanted.items())
    return float(np.sqrt(lost / sum((values**2).sum() for values in wanted.values())))


def test_a_truncated_svd_is_the_nearest_of_its_rank_and_tells_its_error(parents: list[Expert]) -> None:
    wanted = dense.linear(filled([vector(e) for e in parents]), WEIGHTS)
    for rank in (1, 2, 4, 100):
        made = merge(parents, "linear", weights=WEIGHTS, parameters={"lora": "svd", "rank": rank})
        for name, values in wanted.items():
            U, S, V = np.linalg.svd(values.reshape(values.shape[0], -1), full_matrices=False)
            near = (U[:, :rank] * S[:rank]) @ V[:rank]
            assert np.allclose(vector(made)[name].reshape(near.shape), near, atol=1e-6), (name, rank)
        told = made.facts.merge["loss"]
        assert told["relative"] == pytest.approx(relative(vector(made), wanted), abs=2e-6, rel=1e-3)
        alone = {name: relative({name: vector(made)[name]}, {name: values}) for name, values in wanted.items()}
        assert told["largest"]["relative"] == pytest.approx(max(alone.values()), abs=2e-6, rel=1e-3)
    default = merge(parents, "linear", weights=WEIGHTS, parameters={"lora": "svd"})
    assert {change.A.shape[0] for change in default.changes if isinstance(change, LowRank)} == {3}, "the parents' own rank"


def ternary(values: np.ndarray, density: float, alpha: float) -> np.ndarray:
    """ComPEFT in four dense lines."""
    kept = np.argsort(-np.abs(values), kind="stable")[: int(density * values.size)]
    out = np.zeros(values.size)
    out[kept] = np.sign(values[kept]) * alpha * values.std(ddof=1)
    return out


def test_full_weights_are_comp_eft_of_the_sum(parents: list[Expert]) -> None:
    wanted = dense.linear(filled([vector(e) for e in parents]), WEIGHTS)
    made = merge(parents, "linear", weights=WEIGHTS, parameters={"lora": "sparse"}, recompress={"density": 0.3, "alpha": 1.5})
    flat = np.concatenate([values.reshape(-1) for values in wanted.values()]).astype(np.float32).astype(np.float64)
    got = np.concatenate([values.reshape(-1) for values in vector(made).values()])
    assert np.allclose(got, ternary(flat, 0.3, 1.5), rtol=1e-5)
    assert all(isinstance(change, Add) for change in made.changes)
    assert (made.facts.source, dict(made.facts.adapter)) == ("full", {})
    assert made.facts.merge["loss"]["relative"] == pytest.approx(relative(vector(made), wanted), rel=1e-3)


@pytest.mark.parametrize("parameters", [{}, {"lora": "svd"}])
def test_factors_are_made_ternary_again(parameters: dict[str, Any], parents: list[Expert]) -> None:
    wanted = dense.linear(filled([vector(e) for e in parents]), WEIGHTS)
    made = merge(parents, "linear", weights=WEIGHTS, parameters=parameters, recompress={"density": 0.5, "alpha": 1.2})
    assert all(isinstance(change, Factors) and change.ranks is None for change in made.changes)
    assert made.facts.merge["loss"]["relative"] == pytest.approx(relative(vector(made), wanted), rel=1e-3)
    made.bitmasks()
    agree(b"".join(map(bytes, file_pieces(made))))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}),
        ("task_arithmetic", {"lora": "svd", "rank": 2}),
        ("task_arithmetic", {"lora": "sparse"}),
        ("ties", {"rank": 2}),
        ("ties", {"lora": "sparse"}),
    ],
)
def test_neither_order_nor_threads_nor_a_replay_change_a_bit(method: str, parameters: dict[str, Any], parents: list[Expert], tmp_path: Path) -> None:
    made = merge(parents, method, weights=WEIGHTS, parameters=parameters)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert merge(parents[::-1], method, weights=WEIGHTS[::-1], parameters=parameters).content_digest == made.content_digest
    finally:
        torch.set_num_threads(threads)
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for parent, path in zip(parents, paths, strict=True):
        parent.save(path)
    merge(paths, method, weights=WEIGHTS, parameters=parameters).save(tmp_path / "merged.safetensors")
    assert replay(tmp_path / "merged.safetensors").content_digest == made.content_digest


# Methods that look at single entries of the products


def numbers(number: int) -> Expert:
    """Factors that are numbers, so that no two entries of a product tie."""
    random = np.random.default_rng(number)
    changes: list[Change] = []
    for name, (a, b, transposed, embedding) in KINDS.items():
        A, B = (torch.from_numpy(random.standard_normal(shape).astype(np.float32)) for shape in (a, b))
        changes.append(LowRank(name, f"model.{name[:-7]}", A, B, transposed, embedding))
    return expert_of(changes, tuple(KINDS), scope="tensor", scale=0.0, source="lora", adapter=CONFIG, metadata={"task": f"task{number}"})


def near(made: Expert, wanted: Vector) -> None:
    """Equal but for what float32 factors round."""
    got = vector(made)
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.allclose(got[name], values, rtol=0, atol=2e-6 * np.abs(values).max()), name


FULL = {"rank": 50}
"""A rank that no tensor exceeds."""


@pytest.mark.parametrize("make", [lora, numbers])
@pytest.mark.parametrize("method", ["ties", "consensus"])
def test_entries_of_products_by_the_papers_formulas(method: str, make: Callable[[int], Expert]) -> None:
    experts = [make(number) for number in range(3)]
    reference, options = PAPERS[method]
    made = merge(experts, method, weights=WEIGHTS, **options | {"parameters": options.get("parameters", {}) | FULL})
    near(made, reference([vector(e) for e in experts], WEIGHTS))
    assert made.facts.merge["loss"]["relative"] < 1e-6


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_masks_of_products(method: str) -> None:
    experts = [lora(number) for number in range(3)]
    vectors = [{n: v * dense.drop_mask(5, f"task{i}", n, v.shape, 0.6) / 0.6 for n, v in vector(expert).items()} for i, expert in enumerate(experts)]
    reference = dense.task_arithmetic if method == "dare_linear" else dense.ties
    near(merge(experts, method, weights=WEIGHTS, density=0.6, seed=5, parameters=FULL), reference(vectors, WEIGHTS))


def test_outliers_of_products() -> None:
    experts = [numbers(number) for number in range(3)]
    wanted = dense.breadcrumbs([vector(e) for e in experts], WEIGHTS, 0.4, 0.1)
    for semantics in ("paper", "mergekit"):
        made = merge(experts, "breadcrumbs", weights=WEIGHTS, density=0.4, gamma=0.1, semantics=semantics, parameters=FULL)
        near(made, wanted)


@pytest.mark.filterwarnings("ignore:The density")
def test_semantics_of_peft_on_products() -> None:
    experts = [numbers(number) for number in range(3)]
    ours = merge(experts, "ties", weights=WEIGHTS, density=0.2, semantics="peft", parameters=FULL)
    near(ours, peft_merged("ties", experts, WEIGHTS, density=0.2))


@pytest.mark.skipif(not dense.MERGEKIT.exists(), reason="mergekit is not in an environment of its own: make mergekit, or STERNA_MERGEKIT_PYTHON")
def test_semantics_of_mergekit_on_products() -> None:
    experts = [numbers(number) for number in range(3)]
    vectors = [{n: v.astype(np.float32) for n, v in vector(expert).items()} for expert in experts]
    masks = [{n: dense.drop_mask(0, f"task{i}", n, v.shape, 0.7).astype(np.float32) for n, v in vectors[0].items()} for i in range(3)]
    asked: list[tuple[str, dict[str, Any]]] = [("ties", {"density": 0.2}), ("dare_ties", {"density": 0.7})]
    for (method, shares), theirs in zip(asked, dense.with_mergekit(asked, vectors, [1.0, 0.5, 0.25], masks), strict=True):
        near(merge(experts, method, weights=[1.0, 0.5, 0.25], semantics="mergekit", parameters=FULL, **shares), theirs)


def test_a_dense_result_is_cut_near_its_best_and_tells_its_error() -> None:
    experts = [numbers(number) for number in range(3)]
    wanted = dense.ties([vector(e) for e in experts], [1.0] * 3, 0.3)
    made = merge(experts, "ties", density=0.3, parameters={"rank": 2})
    assert made.facts.merge["loss"]["relative"] == pytest.approx(relative(vector(made), wanted), rel=1e-3)
    best = sum((np.linalg.svd(v.reshape(v.shape[0], -1))[1][2:] ** 2).sum() for v in wanted.values())
    lost = sum(((vector(made)[n] - v) ** 2).sum() for n, v in wanted.items())
    assert best <= lost * (1 + 1e-6) <= 1.02 * best
    again = merge(experts, "ties", density=0.3, parameters={"rank": 2}, recompress={"density": 0.5, "alpha": 1.2})
    assert again.facts.merge["loss"]["relative"] == pytest.approx(relative(vector(again), wanted), rel=1e-3)
    full = merge(experts, "ties", density=0.3, parameters={"lora": "sparse"}, recompress={"density": 0.5, "alpha": 1.2})
    flat = np.concatenate([values.reshape(-1) for values in wanted.values()]).astype(np.float32).astype(np.float64)
    assert np.allclose(np.concatenate([values.reshape(-1) for values in vector(full).values()]), ternary(flat, 0.5, 1.2), rtol=1e-5)


# PEFT itself


class Trained:
    """A base, and three PEFT folders of tuned adapters over it, with the experts made of them and the folders that hold just what these have."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        torch.manual_seed(3)
        models.bert_encoder().save_pretrained(self.base)
        self.experts, self.folders = [], []
        for number, (rank, modules) in enumerate([(4, ["query", "value"]), (2, ["query", "value"]), (3, ["query", "key"])]):
            config = peft.LoraConfig(r=rank, lora_alpha=5, task_type="SEQ_CLS", target_modules=modules)
            model = peft.get_peft_model(self.live(), config)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name or "modules_to_save" in name:
                        parameter.add_(models.noise(parameter, generator, 0.1))
            model.save_pretrained(folder / f"tuned{number}")
            expert = sterna.compress(self.base, folder / f"tuned{number}", density=0.5, metadata={"task": f"task{number}"})
            self.experts.append(expert)
            self.folders.append(sterna.apply(self.base, expert, folder / f"coded{number}"))

    def live(self) -> Any:
        torch.manual_seed(9)
        return transformers.BertForSequenceClassification.from_pretrained(self.base, num_labels=3).eval()

    def combined(self, weights: list[float], kind: str, **options: Any) -> dict[str, torch.Tensor]:
        """What PEFT adds to each weight when it combines the adapters, on the bare encoder: it combines none that have heads."""
        model = None
        for number, folder in enumerate(self.folders):
            config = peft.LoraConfig.from_pretrained(folder)
            config.task_type, config.modules_to_save = "FEATURE_EXTRACTION", None
            tensors = {name.replace(".bert.", "."): t for name, t in load_file(folder / "adapter_model.safetensors").items() if "lora" in name}
            if model is None:
                model = peft.PeftModel(transformers.BertModel.from_pretrained(self.base), config, adapter_name="0")
            else:
                model.add_adapter(str(number), config)
            assert not peft.set_peft_model_state_dict(model, tensors, adapter_name=str(number)).unexpected_keys
        assert model is not None
        model.add_weighted_adapter([str(number) for number in range(3)], weights, "all", combination_type=kind, **options)
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and "all" in getattr(m, "lora_A", {})}
        return {name.removeprefix("base_model.model."): layer.get_delta_weight("all").detach() for name, layer in layers.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize(("kind", "parameters"), [("cat", {}), ("svd", {"lora": "svd", "rank": 3})])
def test_what_peft_combines(kind: str, parameters: dict[str, Any], trained: Trained) -> None:
    theirs = trained.combined(WEIGHTS, kind, **({"svd_rank": 3} if kind == "svd" else {}))
    made = merge(trained.experts, "task_arithmetic", weights=WEIGHTS, parameters=parameters)
    ours = made.task_vector()
    assert {f"{name}.weight" for name in theirs} == set(ours)
    for name, delta in theirs.items():
        assert torch.allclose(ours[f"{name}.weight"], delta, atol=1e-6), name


@pytest.mark.parametrize("parameters", [{}, {"lora": "svd", "rank": 3}, {"lora": "sparse"}])
def test_attach_apply_and_peft_agree(parameters: dict[str, Any], trained: Trained, tmp_path: Path) -> None:
    """The merged expert on a live model, as a checkpoint, and where it is an adapter still, as a PEFT folder that PEFT loads."""
    made = merge(trained.experts, "linear", parameters=parameters)
    live = trained.live()
    before = copy.deepcopy(live.state_dict())
    update = made.task_vector()
    with sterna.attached(live, made, head="task1"):
        on = copy.deepcopy(live.state_dict())
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in before.items())
    for name, delta in update.items():
        assert torch.equal(on[f"bert.{name}"], before[f"bert.{name}"] + delta), name
    head = next(c for c in made.changes if isinstance(c, Set) and c.task == "task1" and c.name.endswith("weight"))
    assert torch.equal(on["classifier.weight"], head.tensor)
    sterna.apply(trained.base, made, tmp_path / "whole", merged=True, head="task1")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    stored = {name.removeprefix("bert."): tensor for name, tensor in whole.items()}
    assert all(torch.equal(stored[name], on[f"bert.{name}"]) for name in update)
    if parameters.get("lora") != "sparse":
        folder = sterna.apply(trained.base, made, tmp_path / "adapter", head="task1")
        loaded = peft.PeftModel.from_pretrained(trained.live(), folder).merge_and_unload().state_dict()
        for name in update:
            assert torch.allclose(loaded[f"bert.{name}"], on[f"bert.{name}"], atol=1e-6), name
        assert torch.equal(loaded["classifier.weight"], on["classifier.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ranks_with_scales_are_added_in_any_dtype(dtype: torch.dtype, trained: Trained) -> None:
    made = merge(trained.experts, "linear", weights=WEIGHTS)
    live = trained.live().to(dtype)
    before = copy.deepcopy(live.state_dict())
    with sterna.attached(live, made, head="task0", allow_narrower=True):
        for name, delta in made.task_vector().items():
            wanted = (before[f"bert.{name}"].float() + delta).to(dtype)
            assert torch.equal(live.state_dict()[f"bert.{name}"], wanted), name
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in before.items())


# Bad input


@pytest.mark.parametrize(
    ("method", "parameters", "told"),
    [
        ("linear", {"lora": "average"}, "'average' is not one of concat, svd, sparse"),
        ("linear", {"rank": 4}, "only lora: svd has a rank"),
        ("linear", {"lora": "svd", "rank": 0}, "0 is no integer of 1 or more"),
        ("ties", {"lora": "concat"}, "ties looks at single values"),
        ("linear", {"lorra": "svd"}, "did you mean lora"),
    ],
)
def test_what_a_recipe_cannot_say(method: str, parameters: dict[str, Any], told: str, parents: list[Expert]) -> None:
    with pytest.raises(InvalidConfig, match=told):
        merge(parents, method, parameters=parameters)


def test_what_does_not_fit_is_refused_by_name(parents: list[Expert]) -> None:
    full = expert_of([Add("layers.1.linear.weight", ternary_of(random_levels((9, 20), 0.4), 0.5))], tuple(KINDS), metadata={"task": "full"})
    with pytest.raises(InvalidConfig, match=r"layers\.1\.linear\.weight is changed by LoRA in task0, and otherwise in full"):
        merge([parents[0], full], "linear")
    with pytest.raises(InvalidConfig, match="no parent is a LoRA expert"):
        merge([full], "linear", parameters={"lora": "svd"})
    wide = expert_of(
        [Factors("layers.1.linear.weight", "x", ternary_of(random_levels((3, 18), 0.4)), ternary_of(random_levels((10, 3), 0.4)), 1.0)],
        tuple(KINDS),
        source="lora",
        metadata={"task": "wide"},
    )
    with pytest.raises(InvalidConfig, match=r"products of shapes \(9, 20\) and \(10, 18\).*in task0 and wide"):
        merge([parents[0], wide], "linear")
    with pytest.raises(InvalidArgument, match=r"several magnitudes in embed\.weight"):
        merge(parents, "linear").bitmasks()
    with pytest.raises(InvalidArgument, match=r"embed\.weight are not finite in float32"):
        merge(parents, "task_arithmetic", weights=[3e38, 3e38, 3e38], parameters={"lambda": 1e3})
