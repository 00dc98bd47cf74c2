"""What a tuning learned, as an expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from sterna import __version__
from sterna.codings import default_coding
from sterna.compeft import check_options, ternarize
from sterna.compression import base_facts
from sterna.errors import InvalidArgument
from sterna.expert.changes import Add, Change, Masked, Set, Ternary
from sterna.expert.expert import Expert
from sterna.expert.facts import Facts, MaskFacts
from sterna.precision import HeadPrecision, check_head, stored
from sterna.progress import silent
from sterna.sources.config import changed_config
from sterna.sources.finetune import difference
from sterna.taskvector import Piece
from sterna.tuning.hiwi import HiWi, WeightTap
from sterna.tuning.pafi import DENSITY as MASK_DENSITY
from sterna.tuning.pafi import PaFi
from sterna.tuning.parts import Adapter, Entries, Part, Whole

if TYPE_CHECKING:
    from sterna.tuning.tuning import Tuning

Values = Literal["exact", "fp32", "fp16", "bf16", "ternary"]
DENSITY, ALPHA = 0.3, 2.0
"""Of the ternary step where none is given: trained entries move more evenly than a full fine-tune's, so more of them are kept, at a smaller scale."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def expert_of(
    tuning: Tuning, *, values: Values, density: float | None, alpha: float | None, head: HeadPrecision, metadata: Mapping[str, Any]
) -> Expert:
    """The expert of a tuning whose values are written. Raises InvalidArgument."""
    if values not in ("exact", "ternary", *DTYPES):
        raise InvalidArgument(f"values is {values!r}; expected exact, fp32, fp16, bf16 or ternary")
    if values != "ternary" and (density, alpha) != (None, None):
        raise InvalidArgument(f"density and alpha are those of the ternary step; values is {values!r}")
    check_head(head)
    ground, parts = tuning.ground, tuning.parts
    scale, entries = 0.0, 0
    if values == "ternary":
        density, alpha = DENSITY if density is None else density, ALPHA if alpha is None else alpha
        changes, scale, entries = _ternary(tuning, parts, density, alpha)
    else:
        changes = _exact(tuning, parts, DTYPES.get(values))
    changes += [stored(Set(part.name, part.parameter.detach().cpu().clone(), "head"), head) for part in tuning.heads]
    changes += [Set(name, tensor.cpu(), "buffer") for name, tensor in tuning.changed_buffers().items()]
    changes.sort(key=lambda change: change.name)
    facts = Facts(
        method="compeft" if values == "ternary" else "exact",
        source="pafi" if isinstance(tuning.method, PaFi) else "hiwi",
        density=density,
        alpha=alpha,
        scope="global",
        scale=scale,
        base=base_facts(ground.base, ground.fingerprint),
        writer=f"sterna {__version__}",
        parameters=entries or sum(_stored(change) for change in changes if not isinstance(change, Set) or change.role == "tuned"),
        architecture=ground.live.architecture,
        prefixes=ground.pairing.prefixes,
        dropped=ground.pairing.dropped,
        config=changed_config(ground.base.config, ground.live.config, bool(tuning.heads)),
        mask=_mask_facts(tuning.method),
        tuning=_options(tuning.method),
        metadata=dict(metadata),
    )
    return Expert(facts, ground.fingerprint, tuple(changes))


def _exact(tuning: Tuning, parts: Sequence[Part], dtype: torch.dtype | None) -> list[Change]:
    if tuning.rule is not None:
        values = [part.values.detach().cpu().to(dtype or part.base.dtype) for part in parts if isinstance(part, Entries)]
        return [Masked(tuning.rule, torch.cat(values))]
    return [_exact_change(part, dtype) for part in parts]


def _exact_change(part: Part, dtype: torch.dtype | None) -> Change:
    if isinstance(part, Adapter) and isinstance(part.tap, WeightTap):
        return part.tap.change(part.name, dtype)
    return Set(part.name, _new(part).to(dtype or part.slots[0].tensor.dtype), "tuned")


def _new(part: Part) -> torch.Tensor:
    """The tuned tensor, in the stored dtype, on the CPU."""
    stored = part.slots[0].tensor.detach()
    return (part.tap.folded(stored) if isinstance(part, Adapter) else stored).cpu().clone()


def _ternary(tuning: Tuning, parts: Sequence[Part], density: float, alpha: float) -> tuple[list[Change], float, int]:
    """ComPEFT over what the trained entries moved by: with a mask over its entries as one tensor, else over each tuned tensor."""
    check_options(density, alpha)
    if tuning.rule is not None:
        pairs = [(part.base, part.values.detach()) for part in parts if isinstance(part, Entries)]
        old, new = (torch.cat([pair[side].float().cpu() for pair in pairs]) for side in (0, 1))
        pieces = [difference("values", tuple(new.shape), old, new)]
    else:
        pieces = [_moved(part) for part in parts]
    levels, _ = ternarize(pieces, density=density, alpha=alpha, per_tensor=False, coding=default_coding(), progress=silent)
    changes: list[Change] = [_change(tuning, piece.name, ternary) for piece, ternary in zip(pieces, levels, strict=True)]
    return changes, levels[0].scale, sum(piece.size for piece in pieces)


def _moved(part: Part) -> Piece:
    new, old = _new(part), part.base if isinstance(part, Whole) else part.slots[0].tensor
    return difference(part.name, tuple(new.shape), old, new)


def _change(tuning: Tuning, name: str, levels: Ternary) -> Change:
    return Masked(tuning.rule, levels) if tuning.rule is not None else Add(name, levels)


def _stored(change: Change) -> int:
    return sum(tensor.numel() for _, tensor in change.exact)


def _mask_facts(method: PaFi | HiWi) -> MaskFacts | None:
    if isinstance(method, HiWi):
        return None
    density = MASK_DENSITY if method.density is None and method.count is None else method.density
    return MaskFacts(method.order, density, method.seed if method.order == "random" else 0)


def _options(method: PaFi | HiWi) -> dict[str, Any]:
    """The method's options that are not its defaults, as plain JSON; what the mask's facts and the rows say already is left out."""
    said = {"density", "count", "order", "seed", "gradient"} if isinstance(method, PaFi) else set()
    given = {field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.name not in said}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if value not in (None, (), [])}
