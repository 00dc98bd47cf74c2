"""PEFT's methods by name: their configs made from a person's fields by PEFT's own classes, and whether what they learn is a weight delta."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sterna.errors import InvalidArgument, SternaError, Unsupported
from sterna.needs import needed, quiet
from sterna.sources.adapter import read_adapter
from sterna.sources.names import near
from sterna.training.config import OWN_METHODS
from sterna.training.errors import Faults
from sterna.training.models import first_line
from sterna.training.tasks import TaskName

TASK_TYPES: dict[TaskName, str] = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
OURS = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version")
"""Fields of PEFT's configs that the rest of our config decides."""


def method_names() -> list[str]:
    """Every method that `method.name` may be: ours, and PEFT's in small letters."""
    return [*OWN_METHODS, *(str(kind.value).lower() for kind in needed("peft", "sterna[train]").PeftType)]


def peft_kind(name: str) -> str | None:
    """PEFT's own name (LORA, PREFIX_TUNING, ...) for one in any case, with spaces or hyphens, with or without `tuning`; None if there is none."""
    wanted = re.sub(r"[ -]", "_", name.strip().upper().replace("(IA)3", "IA3"))
    known = {str(kind.value) for kind in needed("peft", "sterna[train]").PeftType}
    return next((kind for kind in (wanted, f"{wanted}_TUNING") if kind in known), None)


def peft_config(name: str, fields: Mapping[str, Any], task: TaskName, settings: Any, steps: int, faults: Faults) -> Any:
    """PEFT's config of the method. `settings` is the model's configuration, `steps` the length of the training, which AdaLoRA asks for.

    What is wrong is told to `faults` and the result is then None.
    """
    kind = peft_kind(name)
    if kind is None:
        known = method_names()
        alike = sorted(near(name.lower(), known, most=5), key=lambda other: sorted(other) != sorted(name.lower()))[:3]  # swapped letters first
        meant = f"did you mean {' or '.join(alike)}?" if alike else f"expected one of {', '.join(known)}"
        faults.add("method.name", f"{name!r} is no method; {meant}")
        return None
    maker = needed("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = [field.name for field in dataclasses.fields(maker) if field.init and field.name not in OURS]
    before = len(faults.found)
    for field in fields:
        if field in OURS:
            faults.add(f"method.{field}", "set by the other fields of this config; leave it out")
        elif field not in known:
            alike = near(field, known)
            there = f"near: {', '.join(alike)}" if alike else f"it has {', '.join(known)}"
            faults.add(f"method.{field}", f"{maker.__name__} has no such field; {there}")
    if len(faults.found) > before:
        return None
    usual: dict[str, Any] = {}
    if kind in ("LORA", "ADALORA") and getattr(settings, "model_type", None) not in _usual_targets():
        usual["target_modules"] = "all-linear"
    if kind == "ADALORA":
        usual["total_step"] = steps
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
        usual["num_virtual_tokens"] = 20
    try:
        with quiet():
            return maker(task_type=TASK_TYPES[task], **{**usual, **fields})
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
        faults.add("method", f"PEFT refuses the config: {first_line(error)}")
        return None


def _usual_targets() -> Mapping[str, Any]:
    table: Mapping[str, Any] = needed("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return table


def with_peft(model: Any, config: Any) -> Any:
    """The model with PEFT's modules in it. Raises InvalidArgument with what PEFT says."""
    try:
        with quiet():
            return needed("peft").get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError, RuntimeError) as error:
        raise InvalidArgument(f"method: PEFT cannot put {config.peft_type.value.lower()} on this model: {first_line(error)}") from error


def refuse_broken(model: Any, batch: Mapping[str, Any], name: str) -> None:
    """Run one batch without gradients: some methods do not go with some models, or with a newer transformers, and only the forward tells.

    Raises InvalidArgument.
    """
    import torch

    try:
        with quiet(), torch.no_grad():
            model.eval()(**batch)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError, RuntimeError) as error:
        versions = " and ".join(f"{package} {needed(package).__version__}" for package in ("peft", "transformers"))
        raise InvalidArgument(f"method: {name} does not run on this model with {versions}: {first_line(error)}") from error


def merges(model: Any, config: Any) -> bool:
    """Whether the adapter can be merged into the weights: it is then a change of weights, and ends as an expert."""
    kind = needed("peft.tuners.tuners_utils").BaseTunerLayer
    layers = [module for module in model.modules() if isinstance(module, kind)]
    return not config.is_prompt_learning and bool(layers) and all(type(layer).merge is not kind.merge for layer in layers)


def merged(model: Any) -> Any:
    """The base with the adapter merged into its weights. Raises Unsupported with what PEFT says."""
    try:
        with quiet():
            return model.merge_and_unload()
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise Unsupported(f"method: PEFT cannot merge this adapter into the weights ({first_line(error)}); its folder is kept") from error


def no_expert(model: Any, config: Any) -> str | None:
    """Why the adapter becomes no expert, or None: found by saving it as it is now, and reading it as `compress` will."""
    if config.peft_type.value not in ("LORA", "IA3"):
        return f"{config.peft_type.value.lower()} is neither LoRA nor (IA)3"
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            model.save_pretrained(folder)
            read_adapter(Path(folder))
    except Unsupported as error:
        return str(error)
    except SternaError:  # values as yet untrained may be odd; the real file is judged when it is there
        return None
    return None
