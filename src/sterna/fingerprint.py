"""Which base: a digest of its values that is the same in every lossless dtype, and tells a narrower load from another model.

Of every floating-point tensor of the base, SHA-256 of its shape and of its values widened to float32; the same of the base rounded to bfloat16 and
to float16. The fingerprint is SHA-256 over the first of these in the order of the sorted names; three bytes of each digest are kept to name culprits.
"""

from __future__ import annotations

import hashlib
import struct
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from sterna.errors import InvalidArgument, WrongBase

SHORT = 3
"""Bytes kept of each digest."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
"""The columns of a fingerprint: the base itself, and the base rounded to the two narrower dtypes."""
HASHED_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

S = TypeVar("S")
T = TypeVar("T")

_SLICE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """`names` sorted; `digest` 32 bytes over all; `shorts` uint8[len(names), 3, SHORT], a column for each of PRECISIONS."""

    names: tuple[str, ...]
    digest: bytes
    shorts: NDArray[np.uint8]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return self.names == other.names and self.digest == other.digest and np.array_equal(self.shorts, other.shorts)

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def hex(self) -> str:
        return self.digest.hex()


def tensor_digest(tensor: torch.Tensor, rounded_to: torch.dtype = torch.float32) -> bytes:
    """SHA-256 of the tensor's shape and of its values, rounded to `rounded_to` and widened to float32; 32 bytes.

    float64 values that float32 cannot hold are hashed as float64, and so equal no float32 tensor.
    """
    sha = hashlib.sha256(struct.pack(f"<B{tensor.dim()}Q", tensor.dim(), *tensor.shape))
    flat = tensor.detach().reshape(-1)
    narrow = torch.empty(min(_SLICE, flat.numel()), dtype=rounded_to, device="cpu") if rounded_to != torch.float32 else None
    wide = torch.empty(min(_SLICE, flat.numel()), dtype=torch.float32, device="cpu")
    for start in range(0, flat.numel(), _SLICE):
        part = flat[start : start + _SLICE]
        if part.dtype == torch.float64 and rounded_to == torch.float32 and not torch.equal(part.float().double(), part):
            sha.update(memoryview(part.cpu().contiguous().numpy()).cast("B"))
            continue
        if narrow is not None:
            part = narrow[: part.numel()].copy_(part)
        if part.dtype != torch.float32 or part.device.type != "cpu":
            part = wide[: part.numel()].copy_(part)
        sha.update(memoryview(part.contiguous().numpy()).cast("B"))
    return sha.digest()


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> Fingerprint:
    """Fingerprint of a base given as its floating-point tensors by name. Tensors are hashed in parallel by torch's number of threads."""
    names = tuple(sorted(tensors))
    for name in names:
        if tensors[name].dtype not in HASHED_DTYPES:
            raise InvalidArgument(f"cannot fingerprint {name} of dtype {tensors[name].dtype}; expected one of float32, bfloat16, float16")
    columns = [(name, _column(tensors[name], precision)) for name in names for precision in PRECISIONS]
    distinct = list(dict.fromkeys(columns))
    digests = dict(zip(distinct, _in_threads(lambda column: tensor_digest(tensors[column[0]], column[1]), distinct), strict=True))
    shorts = np.frombuffer(b"".join(digests[column][:SHORT] for column in columns), np.uint8).reshape(len(names), 3, SHORT)
    return Fingerprint(names, combine(digests[column] for column in columns[0::3]), shorts)


def _column(tensor: torch.Tensor, precision: torch.dtype) -> torch.dtype:
    """The precision to round to: rounding to the tensor's own dtype is no rounding."""
    return torch.float32 if tensor.dtype == precision else precision


def combine(digests: Iterable[bytes]) -> bytes:
    """The digest over all tensors from theirs, in the order of the sorted names."""
    return hashlib.sha256(b"".join(digests)).digest()


def _in_threads(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    if torch.get_num_threads() == 1 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, items))


class LiveDigests:
    """Digests of live tensors, remembered by the tensor, its data pointer, version and layout, so that a swap does not hash again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], tuple[object, ...], bytes]] = {}  # by id: a tensor's == compares values

    def of(self, tensors: list[torch.Tensor]) -> list[bytes]:
        """32-byte digests of the tensors as they are now."""
        found = [self._lookup(tensor) for tensor in tensors]
        missing = [tensor for tensor, digest in zip(tensors, found, strict=True) if digest is None]
        for tensor, digest in zip(missing, _in_threads(tensor_digest, missing), strict=True):
            self.remember(tensor, digest)
        hashed = {id(tensor): self._known[id(tensor)][2] for tensor in missing}
        return [digest if digest is not None else hashed[id(tensor)] for tensor, digest in zip(tensors, found, strict=True)]

    def remember(self, tensor: torch.Tensor, digest: bytes) -> None:
        """Note that `tensor`, as it is now, has that digest."""
        key = id(tensor)
        known = self._known.get(key)
        reference = known[0] if known is not None and known[0]() is tensor else weakref.ref(tensor, lambda gone: self._forget(key, gone))
        self._known[key] = (reference, _state(tensor), digest)

    def forget(self, tensor: torch.Tensor) -> None:
        """Hash that tensor anew when it is asked for next."""
        self._known.pop(id(tensor), None)

    def _forget(self, key: int, gone: weakref.ref[torch.Tensor]) -> None:
        known = self._known.get(key)
        if known is not None and known[0] is gone:
            del self._known[key]

    def _lookup(self, tensor: torch.Tensor) -> bytes | None:
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != _state(tensor):
            return None
        return known[2]


def _state(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()


@dataclass(frozen=True, slots=True)
class Comparison:
    """How tensors compare to a fingerprint, by name: other values; the base rounded to their narrower dtype; not there to compare."""

    different: tuple[str, ...]
    narrower: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.different and not self.narrower


def compare(base: Fingerprint, digests: Mapping[str, tuple[bytes, torch.dtype]]) -> Comparison:
    """Hold tensors, given as (digest, dtype) by the base's names, against a base's fingerprint.

    The whole digest decides where every tensor is there; the short ones name culprits, and decide for a part of the base or a narrower load.
    """
    if len(digests) == len(base.names) and combine(digests[name][0] for name in base.names) == base.digest:
        return Comparison((), (), ())
    different: list[str] = []
    narrower: list[str] = []
    for name, row in zip(base.names, base.shorts, strict=True):
        if name not in digests:
            continue
        digest, dtype = digests[name]
        shorts = [column.tobytes() for column in row]
        if digest[:SHORT] == shorts[0]:
            continue
        narrow = dtype in PRECISIONS[1:] and digest[:SHORT] == shorts[PRECISIONS.index(dtype)]
        (narrower if narrow else different).append(name)
    if not different and not narrower and len(digests) == len(base.names):
        different = list(base.names)  # the short digests collide, the whole does not
    return Comparison(tuple(different), tuple(narrower), tuple(name for name in base.names if name not in digests))


def require_base(
    base: Fingerprint,
    label: str,
    digests: Mapping[str, tuple[bytes, torch.dtype]],
    allow_narrower: bool = False,
    masked: bool = False,
    lossless: Mapping[str, torch.dtype] | None = None,
) -> Comparison:
    """Raise WrongBase, naming the first culprits, unless the tensors are the base called `label`, or a narrower load that is allowed.

    No narrower load is where a mask is to be made of the base (`masked`), or tensors are to become others to the bit (`lossless`: their dtypes by
    name): but a tensor that was rounded to its very dtype is what it is made of, whatever is allowed.
    """
    result = compare(base, digests)
    if lossless is not None:
        result = replace(result, narrower=tuple(name for name in result.narrower if lossless.get(name) != digests[name][1]))
    if result.different:
        first = ", ".join(result.different[:4])
        raise WrongBase(f"this is not the expert's base {label!r}: {len(result.different)} of {len(digests)} tensors differ, the first: {first}")
    if result.narrower and (masked or lossless is not None or not allow_narrower):
        dtype = str(digests[result.narrower[0]][1]).removeprefix("torch.")
        if masked:
            raise WrongBase(
                f"this is the expert's base {label!r} in {dtype}, narrower than the one it was made on ({len(result.narrower)} tensors, the first: "
                f"{result.narrower[0]}): the expert's mask is made of the base's magnitudes, and rounding puts them in another order. "
                "Load the base in its own dtype or a wider one"
            )
        if lossless is not None:
            raise WrongBase(
                f"this is the expert's base {label!r} in {dtype}, narrower than the one it was made on ({len(result.narrower)} tensors, the first: "
                f"{result.narrower[0]}): a lossless expert adds to the base's very bits. Load the base in its own dtype or a wider one"
            )
        raise WrongBase(
            f"this is the expert's base {label!r} in {dtype}, narrower than the one it was made on ({len(result.narrower)} tensors, the first: "
            f"{result.narrower[0]}): its weights are rounded already, and updates below half a spacing vanish. "
            "allow_narrower=True (--allow-narrower) accepts that"
        )
    return result
