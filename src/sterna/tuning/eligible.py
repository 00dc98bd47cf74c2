"""Which tensors of a base are trained: those of the transformer blocks, and among them the feed-forward layers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sterna.errors import InvalidArgument, Unsupported
from sterna.live.weights import Slot
from sterna.sources.names import near, some

Side = Literal["input", "output"]

_BLOCK = re.compile(r"(?:^|\.)\d+\.")
"""A number in a dotted name: the tensor belongs to one of many like blocks."""

_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)


def in_blocks(slots: Mapping[str, Slot]) -> list[str]:
    """The base names of floating-point tensors inside numbered blocks, norms and biases too; tables of embeddings there are not."""
    return [name for name, slot in slots.items() if _BLOCK.search(name) and not isinstance(slot.owner, _EMBEDDINGS)]


def chosen(names: Collection[str], usual: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> tuple[str, ...]:
    """Sorted names: those that `include` matches (glob patterns), or the `usual` ones where it is empty; without those that `exclude` matches.

    Raises InvalidArgument for a pattern that matches nothing, with names that look like it, and where nothing is left.
    """
    picked = set(_matching("include", include, names)) if include else set(usual)
    picked -= set(_matching("exclude", exclude, names))
    if not picked:
        raise InvalidArgument(
            "no tensor is left to train: "
            + ("every one is excluded" if include or exclude else f"none lies in numbered blocks; name some by include: {some(sorted(names), 6)}")
        )
    return tuple(sorted(picked))


def _matching(what: str, patterns: Sequence[str], names: Collection[str]) -> list[str]:
    if isinstance(patterns, str):
        raise InvalidArgument(f"{what} is {patterns!r}; expected a list of glob patterns")
    found: list[str] = []
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise InvalidArgument(f"{what} pattern {pattern!r} matches no tensor; near names: {', '.join(_alike(pattern, names))}")
        found += hits
    return found


def _alike(pattern: str, names: Collection[str]) -> list[str]:
    """Names with a part that looks like what the pattern spells out, else the first few."""
    of_part = {part: name for name in sorted(names, reverse=True) for part in name.split(".")}
    spelled = max(pattern.replace("*", ".").split("."), key=len)
    return [of_part[part] for part in near(spelled, of_part)] or sorted(names)[:3]


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A linear layer of a feed-forward block, by the base name of its module; `side` says which end of it is d_model wide, where that is known."""

    module: str
    side: Side | None


_FEED_FORWARD: tuple[tuple[str, Side], ...] = (
    (r"(?<!attention\.)intermediate\.dense", "input"),  # BERT, RoBERTa, ELECTRA, ViT, DeiT, BEiT
    (r"\d+\.output\.dense", "output"),
    (r"ffn", "input"),  # ALBERT
    (r"ffn_output", "output"),
    (r"ffn\.lin1", "input"),  # DistilBERT
    (r"ffn\.lin2", "output"),
    (r"mlp\.(?:c_fc|fc1|fc_in|dense_h_to_4h|up_proj|gate_proj|gate_up_proj)", "input"),  # GPT-2, Phi, GPT-J, GPT-NeoX, LLaMA and its kin, CLIP
    (r"mlp\.(?:c_proj|fc2|fc_out|dense_4h_to_h|down_proj)", "output"),
    (r"(?:DenseReluDense|mlp)\.wi(?:_[01])?", "input"),  # T5
    (r"(?:DenseReluDense|mlp)\.wo", "output"),
    (r"\d+\.fc1", "input"),  # BART, OPT, Whisper, M2M100
    (r"\d+\.fc2", "output"),
)


def feed_forward(names: Collection[str], patterns: Sequence[str] | None) -> list[FeedForward]:
    """The feed-forward layers among the modules that have a weight in `names`, in their order; `patterns` are globs of modules instead.

    Raises Unsupported where none is found, InvalidArgument for a pattern without a match.
    """
    modules = sorted(name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    if patterns is not None:
        modules = sorted(set(_matching("modules", patterns, modules)))
    found = [FeedForward(module, side) for module in modules if (side := _side(module)) or patterns is not None]
    if not found:
        raise Unsupported(
            f"no feed-forward layer was recognised among {some(modules, 6)}; name them by modules=[...] (glob patterns of modules)"
        )
    return found


def _side(module: str) -> Side | None:
    if not _BLOCK.search(module):
        return None
    for pattern, side in _FEED_FORWARD:
        if re.search(rf"(?:^|\.)(?:{pattern})$", module):
            return side
    return None
