"""Tensor names: what wrappers add to them, and how the names of two models of one family correspond."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sterna.errors import PairingError

_LEADING = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+")
_INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module)\.")
_SAVED = re.compile(r"(?<![^.])modules_to_save\.[^.]+\.")
_LEGACY = re.compile(r"(?<=[Nn]orm\.)(gamma|beta)$")

BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Last parts of the names of persistent buffers, for checkpoints that come without their module."""
NONPERSISTENT = frozenset({"position_ids", "inv_freq", "original_inv_freq", "masked_bias", "token_type_ids", "cos_cached", "sin_cached"})
"""Last parts of the names of buffers that model classes rebuild by themselves; some versions store them and others do not."""
HEADS = frozenset({"classifier", "classification_head", "score", "qa_outputs", "logits_proj", "sequence_summary", "multi_choice", "out_proj_head"})
"""What transformers' classes call their classification, score and QA heads."""
_EMBEDDING = re.compile(r"(?:^|[._])(?:embed(?:ding)?s?|wte|wpe|shared|lm_head|tok_embeddings)(?:[._]|$)|embed", re.IGNORECASE)


def plain(name: str) -> str:
    """The name without what DataParallel, torch.compile, FSDP, activation checkpointing and PEFT put into it, and with today's norm names."""
    name = _LEADING.sub("", name)
    name = _SAVED.sub("", _INNER.sub("", name))
    return _LEGACY.sub(lambda m: "weight" if m[1] == "gamma" else "bias", name)


def last(name: str) -> str:
    return name.rpartition(".")[2]


def is_head(name: str, prefix: str) -> bool:
    """Whether the first module of `name`, after the class's base prefix, is one that classes call their task head."""
    return name.removeprefix(prefix).partition(".")[0] in HEADS


def is_embedding(name: str) -> bool:
    """Whether `name` is that of an embedding or of the output layer that mirrors one: tables that gain rows with the vocabulary."""
    return _EMBEDDING.search(name.rpartition(".")[0]) is not None


def near(wanted: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Known names that look like `wanted`, best first."""
    from difflib import get_close_matches

    return get_close_matches(wanted, list(known), n=most, cutoff=0.4)


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names for a message, with how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


@dataclass(frozen=True, slots=True)
class Alignment:
    """`to_other` maps base names to the other model's own names; the prefixes are the class prefixes on either side ('' or 'bert.')."""

    base_prefix: str
    other_prefix: str
    to_other: dict[str, str]

    def other_of(self, base_name: str) -> str:
        """The plain name that the other model gives to the base's tensor, whether or not it has it."""
        return swap_prefix(plain(base_name), self.base_prefix, self.other_prefix)


def swap_prefix(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def align(base: Mapping[str, tuple[int, ...] | None], other: Mapping[str, tuple[int, ...] | None]) -> Alignment:
    """Find the class prefixes under which most names and shapes of `other` are those of `base` (None: any shape).

    Raises PairingError where no name and shape agree.
    """
    base_plain = {plain(name): name for name in base}
    other_plain = {plain(name): name for name in other}
    best: tuple[int, int, Alignment] | None = None
    for base_prefix in _prefixes(base_plain):
        for other_prefix in _prefixes(other_plain):
            if base_prefix and base_prefix == other_prefix:
                continue  # the same as two empty prefixes
            matched: dict[str, str] = {}
            taken: set[str] = set()
            agreeing = 0
            for short, name in base_plain.items():
                found = other_plain.get(swap_prefix(short, base_prefix, other_prefix))
                if found is not None and found not in taken:  # "a." for "b." may make two names one
                    matched[name] = found
                    taken.add(found)
                    agreeing += None in (base[name], other[found]) or base[name] == other[found]
            score = (agreeing, -len(base_prefix) - len(other_prefix))
            if best is None or score > best[:2]:
                best = (*score, Alignment(base_prefix, other_prefix, matched))
    if best is None or best[0] == 0:
        raise PairingError(f"no tensor of the two models agrees in name and shape: one has {some(sorted(base))}; the other has {some(sorted(other))}")
    return best[2]


def _prefixes(names: Iterable[str]) -> list[str]:
    """'' and the leading parts, up to two deep, that at least half of the names share."""
    listed = list(names)
    counts: dict[str, int] = {}
    for name in listed:
        parts = name.split(".")
        for depth in (1, 2):
            if len(parts) > depth:
                prefix = ".".join(parts[:depth]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
    return ["", *(prefix for prefix, count in counts.items() if 2 * count >= len(listed))]
