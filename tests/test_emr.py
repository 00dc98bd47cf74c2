"""EMR-Merging: one vector for all tasks, from which each is had by its mask and scale; beside the paper's formulas on dense vectors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import models
import sterna
from coded import expert_of, random_levels, ternary_of
from dense_merging import Vector
from sterna.commands import app
from sterna.errors import InvalidArgument
from sterna.expert.changes import Add, Factors, Masked, MaskRule, Set
from sterna.expert.expert import Expert
from sterna.expert.facts import MaskFacts
from sterna.expert.file import file_pieces
from sterna.expert.heads import with_head
from sterna.expert.palette import Palette
from sterna.merging import emitting
from sterna.merging.merge import merge
from sterna.merging.replay import replay
from sterna.training.errors import InvalidConfig
from test_format import agree
from test_merging import SCOPES, close, parents, vector


def recovered(vectors: list[Vector]) -> list[Vector]:
    """Each task's vector by the formulas of arXiv 2405.17461, with no sign where a sum is 0."""
    unified, tasks = {}, []
    for name in vectors[0]:
        x = np.stack([v[name] for v in vectors])
        sign = np.sign(np.where(np.abs(x.sum(0)) < 1e-9, 0, x.sum(0)))
        unified[name] = sign * np.where(np.sign(x) == sign, np.abs(x), 0).max(0)
    for v in vectors:
        masked = {name: np.where(v[name] * unified[name] > 0, unified[name], 0) for name in v}
        scale = sum(np.abs(v[name]).sum() for name in v) / sum(np.abs(masked[name]).sum() for name in v)
        tasks.append({name: scale * values for name, values in masked.items()})
    return tasks


@pytest.mark.parametrize("way", ["kinds", "columns"])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_task_is_recovered_as_the_paper_has_it(scope: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = parents(scope)[::-1]  # bits go by the tasks' names, not by the parents' order
    if way == "columns":
        monkeypatch.setattr(emitting, "KINDS", 0)
    merged = merge(experts, "emr")
    read = agree(b"".join(map(bytes, file_pieces(merged))))
    assert read.content_digest == merged.content_digest
    for number, wanted in enumerate(recovered([vector(expert) for expert in experts[::-1]])):
        close(with_head(read, f"task{number}"), wanted)
        close(with_head(merged, f"task{number}"), wanted)


def test_one_parent_is_itself() -> None:
    expert = parents("tensor", 1)[0]
    close(with_head(merge([expert], "emr")), vector(expert))


def test_parents_that_agree_nowhere_or_change_nothing() -> None:
    levels = random_levels((8, 9), 0.4, seed=1)
    ours, theirs = (expert_of([Add("w", ternary_of(sign * levels, 0.25))], metadata={"task": task}) for sign, task in ((1, "a"), (-1, "b")))
    merged = merge([ours, theirs], "emr")
    agree(b"".join(map(bytes, file_pieces(merged))))
    assert not any(values.any() for task in "ab" for values in vector(with_head(merged, task)).values())


def test_a_tensor_that_no_parent_changes_is_joined_with_one_under_a_mask() -> None:
    untouched = np.zeros((8, 9), np.int8)
    changes = [[Add("same", ternary_of(untouched, 0.25)), Add("w", ternary_of(random_levels((8, 9), 0.4, seed=seed), 0.25))] for seed in (1, 2)]
    merged = merge([expert_of(each, metadata={"task": task}) for each, task in zip(changes, "ab", strict=True)], "emr")
    one = with_head(merged, "a")
    assert {change.name: type(change) for change in one.changes} == {"same": Add, "w": Add}
    assert not vector(one)["same"].any()
    assert one.adds.count == np.count_nonzero(vector(one)["w"]) > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_order_and_replay_do_not_change_a_bit(threads: int, tmp_path: Path) -> None:
    experts = parents("global")
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for expert, path in zip(experts, paths, strict=True):
        expert.save(path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        merge(paths, "emr").save(tmp_path / "merged.safetensors")
        digests = {merge(order, "emr").content_digest for order in (experts, experts[::-1])}
        digests |= {replay(tmp_path / "merged.safetensors").content_digest, sterna.load(tmp_path / "merged.safetensors").content_digest}
        digests.add(sterna.recode(tmp_path / "merged.safetensors", "small").content_digest)
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


class Tasks:
    """A base, two classifiers tuned from it with heads of 3 and 5 classes, and their merged expert."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.base = folder / "base"
        models.bert_encoder().save_pretrained(self.base)
        self.experts = []
        for number, classes in enumerate((3, 5)):
            torch.manual_seed(number + 1)
            tuned = models.bert_classifier(classes)
            tuned.bert.load_state_dict(
                {n: t + 0.02 * torch.randn_like(t) for n, t in models.transformers.BertModel.from_pretrained(self.base).state_dict().items()}
            )
            tuned.save_pretrained(folder / f"tuned{number}")
            self.experts.append(sterna.compress(self.base, folder / f"tuned{number}", density=0.3, metadata={"task": f"task{number}"}))
        self.merged = folder / "merged.safetensors"
        merge(self.experts, "emr").save(self.merged)

    def live(self, classes: int) -> Any:
        torch.manual_seed(7)
        kind = models.transformers.BertForSequenceClassification
        return kind.from_pretrained(self.base, num_labels=classes).eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return Tasks(tmp_path_factory.mktemp("tasks"))


def test_a_task_is_attached_with_its_mask_its_scale_and_its_head(tasks: Tasks, tmp_path: Path) -> None:
    wanted = recovered([vector(expert) for expert in tasks.experts])
    for number, classes in enumerate((3, 5)):
        live = tasks.live(2)
        before = copy.deepcopy(live.state_dict())
        with sterna.attached(live, tasks.merged, head=f"task{number}"):
            on = live.state_dict()
            for name, values in wanted[number].items():
                assert np.allclose(on[f"bert.{name}"] - before[f"bert.{name}"], values, atol=1e-6), name
            assert on["classifier.weight"].shape[0] == classes
            folder = sterna.apply(tasks.base, tasks.merged, tmp_path / f"applied{number}", head=f"task{number}")
            applied = models.transformers.BertForSequenceClassification.from_pretrained(folder).state_dict()
            assert all(torch.equal(applied[name], tensor) for name, tensor in on.items())
        assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in before.items())
    live = tasks.live(3)
    patch = sterna.attach(live, tasks.merged, head="task0")
    patch.swap(tasks.merged, head="task1")
    patch.detach()
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in tasks.live(3).state_dict().items())


def test_no_task_and_another_task_are_told(tasks: Tasks) -> None:
    with pytest.raises(InvalidArgument, match="heads of 2 tasks; choose one of task0, task1"):
        sterna.attach(tasks.live(3), tasks.merged)
    with pytest.raises(InvalidArgument, match="no head for 'task2'; choose one of task0, task1"):
        sterna.attach(tasks.live(3), tasks.merged, head="task2")
    with pytest.raises(InvalidArgument, match=r"has values for each of 2 tasks; choose one"):
        sterna.load(tasks.merged).task_vector()


def test_what_a_file_says_of_itself(tasks: Tasks) -> None:
    told = json.loads(CliRunner().invoke(app, ["inspect", str(tasks.merged), "--json"]).stdout)
    assert any("masks of 2 tasks" in tensor["change"] for tensor in told["tensors"])
    apart = sum(expert.file_bytes or len(b"".join(map(bytes, file_pieces(expert)))) for expert in tasks.experts)
    assert tasks.merged.stat().st_size < apart


def test_what_emr_does_not_take() -> None:
    experts = parents("global")
    with pytest.raises(InvalidArgument, match="emr takes no weights"):
        merge(experts, "emr", weights=[1, 2, 1])
    with pytest.raises(InvalidConfig, match="is lost where the result is made ternary"):
        merge(experts, "emr", recompress=True)
    with pytest.raises(InvalidConfig, match="has a mask for each of its tasks"):
        merge([merge(experts[:2], "emr"), experts[2]], "ties")
    names = ("a", "b")
    lora = expert_of([Factors("a", "a", ternary_of(random_levels((2, 5), 0.5)), ternary_of(random_levels((4, 2), 0.5)), 1.0)], names, source="lora")
    with pytest.raises(InvalidConfig, match="has LoRA: use lora: sparse first"):
        merge([lora], "emr")
    masked = expert_of(
        [Masked(MaskRule("smallest", 3, names), torch.ones(3))],
        names,
        method="exact",
        density=None,
        alpha=None,
        scale=0.0,
        source="pafi",
        mask=MaskFacts("smallest"),
    )
    with pytest.raises(InvalidConfig, match="has new values under a mask"):
        merge([masked], "emr")
    heads = [
        expert_of([Add("a", ternary_of(random_levels((9,), 0.5, s))), Set("score", torch.ones(2), "head")], metadata={"task": f"t{s}"})
        for s in range(4)
    ]
    with pytest.raises(InvalidConfig, match="has the heads of 2"):
        merge([merge(heads[:2], "ties", metadata={"task": "x"}), heads[2]], "emr")


def test_many_tasks() -> None:
    experts: list[Expert] = [expert_of([Add("w", ternary_of(random_levels((400,), 0.1, s), 0.25))], metadata={"task": f"t{s:02}"}) for s in range(33)]
    merged = merge(experts[:32], "emr")
    agree(b"".join(map(bytes, file_pieces(merged))))
    assert isinstance(merged.changes[0], Palette)
    for number, wanted in enumerate(recovered([vector(expert) for expert in experts[:32]])):
        close(with_head(merged, f"t{number:02}"), wanted)
    with pytest.raises(InvalidConfig, match="33 parents; emr keeps masks of at most 32 tasks"):
        merge(experts, "emr")
