"""An expert to and from its file. `docs/format.md` is the specification."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sterna.codings import ENTRIES_A_BYTE, PADDING, U8
from sterna.errors import InvalidArgument, InvalidFile, Unsupported
from sterna.expert.changes import VALUES, Change, Lossless, Masked, Set, streams
from sterna.expert.container import CHECKSUM, ITEM_BYTES, Container, Part, parse, pieces, read
from sterna.expert.expert import Expert, exact_bytes
from sterna.expert.facts import Facts, from_json, to_json
from sterna.expert.palette import Palette
from sterna.expert.table import MAX_DIMENSIONS, read_table, write_table
from sterna.writing import whole_file

TABLE = "sterna.table"
STREAMS = "sterna.streams"
_OURS = (TABLE, STREAMS, VALUES, CHECKSUM, "__metadata__")

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in _DTYPES.items()}


def save(expert: Expert, path: str | os.PathLike[str]) -> None:
    """Write the file whole or not at all. Raises CannotWrite."""
    with whole_file(path) as file:
        for piece in file_pieces(expert):
            file.write(piece)


def file_pieces(expert: Expert) -> Iterator[bytes | memoryview]:
    """The file's bytes: exact tensors (widest dtype first, so that each is aligned), table, streams, checksum.

    Raises Unsupported or InvalidArgument for what the format cannot hold, before the first piece.
    """
    for change in expert.changes:
        refuse_unwritable(change)
    told = [ternary for change in expert.changes if not isinstance(change, Palette) for ternary in change.ternaries]
    if expert.facts.scope == "global" and any(np.float32(ternary.scale) != np.float32(expert.facts.scale) for ternary in told):
        raise InvalidArgument(f"an expert of scope 'global' has the scale {expert.facts.scale} in every tensor; scope 'tensor' lets them differ")
    table = write_table(expert.fingerprint, expert.changes, expert.facts.scope == "tensor")
    if fault := _contradiction(expert.facts, expert.changes):
        raise InvalidArgument(f"the expert's {fault}")
    coded = [stream for change in expert.changes for stream in streams(change)]
    exact = sorted((part for change in expert.changes for part in change.exact), key=lambda part: (-part[1].element_size(), part[0]))
    if len({name for name, _ in exact}) < len(exact):
        raise InvalidArgument("two exact tensors of the expert have the same name in its file")
    parts: list[Part] = [(name, CODES[t.dtype], tuple(t.shape), lambda t=t: iter([exact_bytes(t)])) for name, t in exact]  # type: ignore[misc]
    parts.append((TABLE, "U8", (len(table),), lambda: iter([table])))
    parts.append((STREAMS, "U8", (sum(s.size for s in coded),), lambda: (memoryview(s) for s in coded)))
    return pieces(to_json(expert.facts), parts)


def refuse_unwritable(change: Change) -> None:
    """Raise Unsupported or InvalidArgument for an exact tensor that a file cannot hold."""
    for name, tensor in change.exact:
        if tensor.dtype not in CODES:
            raise Unsupported(f"{name} is {tensor.dtype}, which an expert cannot keep exactly; expected a plain float, integer or bool")
        if (name in _OURS and not isinstance(change, Masked)) or tensor.dim() > MAX_DIMENSIONS:
            raise InvalidArgument(f"an exact tensor cannot be named {name!r}, or have more than {MAX_DIMENSIONS} dimensions")


def _contradiction(facts: Facts, changes: Sequence[Change]) -> str | None:
    """Where the facts and the changes do not agree, or None."""
    rules = [change.rule for change in changes if isinstance(change, Masked)]
    if facts.method == "exact" and any(change.ternaries for change in changes):
        return "method is 'exact', but it has levels"
    if any(not isinstance(change, Lossless | Set) if facts.method == "lossless" else isinstance(change, Lossless) for change in changes):
        return f"method is {facts.method!r}, which some of its changes do not go with"
    if lost := {change.task for change in changes if isinstance(change, Set) and change.task} - set(facts.heads):
        return f"table has heads of the task {min(lost)!r}, which its facts do not know"
    if fault := _tasks_fault(facts, changes):
        return fault
    told = [(facts.mask.order, facts.mask.seed)] if facts.mask is not None else []
    if told != [(rule.order, rule.seed) for rule in rules]:
        return f"mask is {told or 'none'} in the facts, {[(rule.order, rule.seed) for rule in rules] or 'none'} in the table"
    return None


def _tasks_fault(facts: Facts, changes: Sequence[Change]) -> str | None:
    """Where palettes' masks of tasks do not go with the tasks of the facts, or with each other, or None."""
    masked = {change.tasks for change in changes if isinstance(change, Palette)} | {0 for c in changes if not isinstance(c, Palette | Set)}
    if masked <= {0}:
        return None
    if len(masked) > 1:
        return "changes have masks of tasks in some tensors, and none (or of other tasks) in others"
    return None if masked == {len(facts.heads)} else f"palettes have masks of {masked.pop()} tasks, its facts tell of {len(facts.heads)}"


def _unjustified(changes: Sequence[Change]) -> str | None:
    """Where sequential codings tell of more entries than their bytes justify the time to decode, or None."""
    held = [t for change in changes for t in change.ternaries if t.coding.sequential is True and t.count]
    entries, given = sum(t.size for t in held), sum(t.stop - t.start for t in held)
    return f"{given:,} bytes of sequential streams tell of {entries:,} entries" if entries > ENTRIES_A_BYTE * given else None


def load(path: str | os.PathLike[str]) -> Expert:
    """Read an expert from its file, checking everything that can be checked without decoding it.

    Raises NotFound, or InvalidFile: not an expert, damaged, or with counts and sizes that do not fit.
    """
    container = read(path)
    try:
        return from_container(container)
    except InvalidFile as error:
        raise InvalidFile(f"{os.fspath(path)}: {error}") from error


def from_bytes(data: bytes) -> Expert:
    """An expert from the bytes of its file. Raises InvalidFile."""
    padded = np.zeros(len(data) + PADDING, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return from_container(parse(padded))


def from_container(container: Container) -> Expert:
    """An expert of views into a file's bytes. Raises InvalidFile."""
    facts = from_json(container.metadata)
    unread = set(container.entries) - {TABLE, STREAMS, CHECKSUM}

    def exact(name: str) -> torch.Tensor:
        if name not in unread:
            raise InvalidFile(f"the table tells of an exact tensor {name!r} that the file lacks")
        unread.discard(name)
        return _tensor(container, name)

    table, coded = (container.entries.get(name) for name in (TABLE, STREAMS))
    if table is None or coded is None or any((entry.dtype, len(entry.shape)) != ("U8", 1) for entry in (table, coded)):
        raise InvalidFile(f"the file lacks the U8 tensors {TABLE!r} and {STREAMS!r}")
    scale = float(np.float32(facts.scale)) if facts.scope == "global" else None
    digest = bytes.fromhex(facts.base.fingerprint)
    table_bytes = container.data[table.start : table.stop].tobytes()
    fingerprint, changes = read_table(table_bytes, digest, container.data, coded.start, coded.stop, scale, exact)
    if unread:
        raise InvalidFile(f"the file has tensors that its table does not tell of: {', '.join(repr(name[:80]) for name in sorted(unread)[:4])}")
    if fault := _contradiction(facts, changes) or _unjustified(changes):
        raise InvalidFile(f"the file's {fault}")
    return Expert(facts, fingerprint, changes, container.digest.hex(), container.data.size - PADDING)


def _tensor(container: Container, name: str) -> torch.Tensor:
    entry = container.entries[name]
    dtype = _DTYPES[entry.dtype]
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=dtype)
    raw: U8 = container.data[entry.start : entry.stop]
    if entry.dtype == "BOOL" and raw.max() > 1:
        raise InvalidFile(f"the exact tensor {name!r} holds booleans that are neither 0 nor 1")
    if entry.start % ITEM_BYTES[entry.dtype]:  # other writers may not align
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype).reshape(entry.shape)
