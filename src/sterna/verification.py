"""Is the file whole, and is this the right base?"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sterna.errors import WrongBase
from sterna.expert.changes import Lossless, Masked, Set, touched
from sterna.expert.expert import Expert, refuse_shape
from sterna.fingerprint import HASHED_DTYPES, require_base, tensor_digest
from sterna.lossless import rebuilt
from sterna.progress import Progress, silent
from sterna.sources.checkpoint import Checkpoint, Source, open_checkpoint
from sterna.sources.names import align, some


@dataclass(frozen=True, slots=True)
class Verification:
    """A file that is whole; with a base, that it is the right one. `narrower` are base tensors in a narrower dtype, `absent` those it lacks."""

    digest: str
    base: str | None
    narrower: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


def verify(
    expert: Expert | str | os.PathLike[str], base: Source | None = None, *, allow_narrower: bool = False, progress: Progress = silent
) -> Verification:
    """Check the file's structure, checksum and every stream, and the base's fingerprint where one is given (lossless streams decode with it alone).

    Raises NotFound, InvalidFile or WrongBase.
    """
    if not isinstance(expert, Expert):
        from sterna.expert.file import load

        expert = load(expert)
    expert.check()
    if base is None:
        return Verification(expert.digest, None)
    opened = open_checkpoint(base)
    own, narrower, absent = require_checkpoint(expert, opened, allow_narrower, progress)
    made = [(change, opened.read(own[change.name])) for change in expert.changes if isinstance(change, Lossless)]
    for (change, tensor), _ in zip(made, rebuilt(made), strict=True):  # each is held against its digest
        refuse_shape(change, {change.name: tensor})
    return Verification(expert.digest, opened.label, narrower, absent)


def require_checkpoint(
    expert: Expert, base: Checkpoint, allow_narrower: bool, progress: Progress = silent
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """The checkpoint's own names by the expert's base names, once its values are those of the expert's base; and which are narrower, and absent.

    Raises WrongBase, also where a tensor that the expert changes is absent.
    """
    own = align(dict.fromkeys(expert.fingerprint.names), base.shapes_by_any_name).to_other
    own = {name: base.aliases.get(found, found) for name, found in own.items()}
    own = {name: found for name, found in own.items() if base.tensors[found].dtype in HASHED_DTYPES}
    digests = {}
    for number, (name, found) in enumerate(own.items()):
        tensor = base.read(found)
        digests[name] = (tensor_digest(tensor), tensor.dtype)
        progress("verify base", number + 1, len(own), "tensors")
    masked = any(isinstance(change, Masked) for change in expert.changes)
    result = require_base(expert.fingerprint, expert.facts.base.name, digests, allow_narrower, masked, expert.lossless)
    known = set(expert.fingerprint.names)
    kept = {change.name for change in expert.changes if isinstance(change, Set) and change.role != "tuned"}
    lost = [name for change in expert.changes for name in touched(change) if name in known and name not in own and name not in kept]
    if lost:
        raise WrongBase(f"this base has no {some(lost)}, which the expert changes")
    return own, result.narrower, result.absent
