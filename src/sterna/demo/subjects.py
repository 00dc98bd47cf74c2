"""A trained model with its task vector made movable: any vector of the same length can be put in the trained one's place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Subject:
    """A live model whose trained parameters are `origin` + a task vector.

    `tau` is the trained task vector, fp32 [d], over the sorted names of `parameters`. For a full fine-tune the origin is the base;
    for LoRA the parameters are the factors and the origin is zero. The trained head stays in the model throughout.
    """

    model: torch.nn.Module
    parameters: Mapping[str, torch.nn.Parameter]
    origin: Mapping[str, torch.Tensor]
    tau: torch.Tensor

    def put(self, tau: torch.Tensor) -> None:
        """Set every parameter to origin + tau."""
        done = 0
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                part = tau[done : done + parameter.numel()].view(parameter.shape)
                parameter.copy_(self.origin[name] + part.to(parameter.device))
                done += parameter.numel()


def full_subject(tuned: Any, base: Any) -> Subject:
    """From two classifiers of one class: everything below the head (transformers' `base_model`) is the task vector."""
    origin = {name: value.detach().clone() for name, value in base.base_model.named_parameters()}
    tuned_parameters = dict(tuned.base_model.named_parameters())
    return _subject(tuned, tuned_parameters, origin)


def lora_subject(model: torch.nn.Module) -> Subject:
    """From a PEFT model: the factors are the task vector."""
    factors = {name: value for name, value in model.named_parameters() if "lora_" in name}
    return _subject(model, factors, {name: torch.zeros_like(value) for name, value in factors.items()})


def _subject(model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], origin: Mapping[str, torch.Tensor]) -> Subject:
    ordered = {name: parameters[name] for name in sorted(parameters) if parameters[name].is_floating_point()}
    tau = torch.cat([(value.detach() - origin[name]).float().flatten().cpu() for name, value in ordered.items()])
    return Subject(model, ordered, origin, tau)
