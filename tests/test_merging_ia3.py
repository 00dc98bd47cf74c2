"""(IA)3 experts merge by what their vectors are above 1; the result is an (IA)3 expert again, on live models and as a PEFT folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import dense_merging as dense
import models
import sterna
from coded import expert_of, random_levels, ternary_of
from dense_merging import Vector
from sterna.errors import InvalidArgument
from sterna.expert.changes import Add, Multiply, Set
from sterna.expert.expert import Expert
from sterna.expert.file import file_pieces
from sterna.merging.merge import merge
from sterna.training.errors import InvalidConfig
from test_format import agree

WEIGHTS = [1.0, -0.5, 0.25]


def vectors_of(expert: Expert) -> Vector:
    """What the vectors are above 1, float64."""
    found = {}
    for change in expert.changes:
        if isinstance(change, Multiply):
            exact = isinstance(change.vector, torch.Tensor)
            found[change.name] = change.vector.double().numpy() if exact else change.vector.levels().astype(np.float64) * change.vector.scale
    return found


class Trained:
    """A base and three (IA)3 experts over it, with a head each."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        torch.manual_seed(3)
        models.bert_encoder().save_pretrained(self.base)
        self.experts = []
        for number in range(3):
            config = peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
            model = peft.get_peft_model(self.live(), config)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "ia3_" in name or "modules_to_save" in name:
                        parameter.add_(models.noise(parameter, generator, 0.1))
            model.save_pretrained(folder / f"tuned{number}")
            made = sterna.compress(self.base, folder / f"tuned{number}", density=0.5, metadata={"task": f"task{number}"})
            self.experts.append(made)

    def live(self) -> Any:
        torch.manual_seed(9)
        return transformers.BertForSequenceClassification.from_pretrained(self.base, num_labels=3).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


REFERENCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (lambda v: dense.linear(v, WEIGHTS), {"weights": WEIGHTS}),
    "task_arithmetic": (lambda v: dense.task_arithmetic(v, WEIGHTS, 0.7), {"weights": WEIGHTS, "parameters": {"lambda": 0.7}}),
    "ties": (lambda v: dense.ties(v, WEIGHTS, 0.4), {"weights": WEIGHTS, "density": 0.4}),
    "consensus": (lambda v: dense.consensus(v, WEIGHTS), {"weights": WEIGHTS}),
    "model_stock": (lambda v: dense.model_stock(v, [1.0] * 3), {}),
}


@pytest.mark.parametrize("method", sorted(REFERENCES))
def test_vectors_merge_around_one(method: str, trained: Trained) -> None:
    reference, options = REFERENCES[method]
    made = merge(trained.experts, method, **options)
    got = vectors_of(agree(b"".join(map(bytes, file_pieces(made)))))
    for name, wanted in reference([vectors_of(expert) for expert in trained.experts]).items():
        assert np.allclose(got[name], wanted, atol=1e-7), name
    assert (
        made.content_digest
        == merge(trained.experts[::-1], method, **options | ({"weights": WEIGHTS[::-1]} if "weights" in options else {})).content_digest
    )


def test_attached_applied_and_by_peft(trained: Trained, tmp_path: Path) -> None:
    made = merge(trained.experts, "linear")
    wanted = dense.linear([vectors_of(expert) for expert in trained.experts], [1.0] * 3)
    live = trained.live()
    before = copy.deepcopy(live.state_dict())
    with sterna.attached(live, made, head="task1"):
        on = copy.deepcopy(live.state_dict())
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in before.items())
    for change in made.changes:
        if isinstance(change, Multiply):
            factor = 1 + torch.from_numpy(wanted[change.name]).float().reshape(-1)
            shaped = factor.reshape(-1, 1) if change.axis == 0 else factor.reshape(1, -1)
            assert torch.allclose(on[f"bert.{change.name}"], before[f"bert.{change.name}"] * shaped, atol=1e-6)
            if change.bias:
                assert torch.allclose(on[f"bert.{change.bias}"], before[f"bert.{change.bias}"] * factor, atol=1e-6)
    folder = sterna.apply(trained.base, made, tmp_path / "adapter", head="task1")
    loaded = peft.PeftModel.from_pretrained(trained.live(), folder).merge_and_unload().state_dict()
    assert all(torch.allclose(loaded[name], tensor, atol=1e-6) for name, tensor in on.items())
    head = next(c for c in made.changes if isinstance(c, Set) and c.task == "task1" and c.name.endswith("weight"))
    assert torch.equal(on["classifier.weight"], head.tensor)


def test_merged_ones_merge_again(trained: Trained) -> None:
    both = merge(trained.experts[:2], "task_arithmetic", metadata={"task": "both"})
    again = vectors_of(merge([both, trained.experts[2]], "task_arithmetic"))
    for name, wanted in dense.task_arithmetic([vectors_of(expert) for expert in trained.experts], [1.0] * 3).items():
        assert np.allclose(again[name], wanted, atol=1e-7)


def test_what_does_not_fit_is_told(trained: Trained) -> None:
    made = merge(trained.experts, "linear")
    with pytest.raises(InvalidArgument, match="several magnitudes"):
        made.bitmasks()
    with pytest.raises(InvalidConfig, match="recompress"):
        merge(trained.experts, "linear", recompress=True)

    def one(task: str, axis: int) -> Expert:
        return expert_of([Multiply("w", "w", ternary_of(random_levels((4, 1), 0.9)), axis)], ("b", "w"), source="ia3", metadata={"task": task})

    with pytest.raises(InvalidConfig, match="w: vectors differ in shape, axis or bias"):
        merge([one("x", 0), one("y", 1)], "linear")
    added = expert_of([Add("w", ternary_of(random_levels((4, 4), 0.5)))], ("b", "w"), metadata={"task": "full"})
    with pytest.raises(InvalidConfig, match="w is changed by levels or as a whole in full, as new values in another parent"):
        merge([one("x", 0), added], "linear")
