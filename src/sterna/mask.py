"""The mask of PaFi (Liao et al., arXiv 2305.16742): the entries of a base that are trained, told by a rule so that no position is stored.

The eligible tensors, in the order of their sorted names, are one flat vector. The rule picks `count` of its entries: those of smallest (or
largest) magnitude in float32, or those of smallest hash of (seed, flat index); ties are cut by lowest flat index. A lossless wider load of the base
gives the same mask, a narrower one may not: the base's fingerprint must have matched before a mask is made again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from sterna.codings import I64
from sterna.errors import InvalidArgument
from sterna.expert.changes import MaskRule
from sterna.numbers import selection
from sterna.streaming import Chunk, Histogram, chunks_of, ordered, scratch
from sterna.taskvector import F32, Piece, float32

_KEPT = 4
"""Masks kept in memory: 8 bytes an entry."""


def tensor_piece(name: str, tensor: torch.Tensor) -> Piece:
    """A base tensor as a piece of the vector that a mask is chosen from."""
    flat = tensor.detach().reshape(-1)
    return Piece(name, tuple(tensor.shape), lambda start, stop, out: np.copyto(out, float32(flat[start:stop])))


def choose(rule: MaskRule, pieces: Sequence[Piece]) -> list[I64]:
    """The chosen flat indices of each piece, ascending, int64. `pieces` are those of `rule.names`, in that order.

    Raises InvalidArgument where there are fewer entries than the rule's count, or where magnitudes are not numbers.
    """
    entries = sum(piece.size for piece in pieces)
    if not 0 < rule.count <= entries:
        raise InvalidArgument(f"a mask of {rule.count:,} entries is to be chosen from {entries:,}; expected at least 1, at most all of them")
    if rule.order == "random":
        pieces = _hashed(rule.seed, pieces)
    lowest = rule.order != "largest"
    return _emit(pieces, _threshold(pieces, rule, lowest), lowest)


def _hashed(seed: int, pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of hashes that order as magnitudes do."""

    def read(first: int, start: int, stop: int, out: F32) -> None:
        selection.hash_magnitudes(seed, first + start, out.view(np.uint32))

    starts = accumulate((piece.size for piece in pieces), initial=0)
    return [Piece(piece.name, piece.shape, partial(read, first)) for piece, first in zip(pieces, starts, strict=False)]


def _threshold(pieces: Sequence[Piece], rule: MaskRule, lowest: bool) -> selection.Threshold:
    chunks = [chunk for piece in pieces for chunk in chunks_of(piece)]
    upper, lower = Histogram(selection.UPPER_BINS), Histogram(selection.LOWER_BINS)
    for _ in ordered(lambda chunk: selection.count_upper(chunk.read(), upper.mine()), chunks):
        pass
    counts = upper.total()
    if rule.order != "random" and selection.has_nonfinite(counts):
        raise InvalidArgument("the base holds NaN or infinity among the tensors that are to be masked; exclude them")
    upper_bin, beyond = (selection.locate_lowest_upper if lowest else selection.locate_upper)(counts, rule.count)
    for _ in ordered(lambda chunk: selection.count_lower(chunk.read(), upper_bin, lower.mine()), chunks):
        pass
    if lowest:
        return selection.locate_lowest(upper_bin, beyond, lower.total(), rule.count)
    found = selection.locate(upper_bin, beyond, lower.total(), rule.count)
    return selection.Threshold(found.bits, rule.count - found.count + found.ties, rule.count)  # zeros count here, where too little else is left


def _emit(pieces: Sequence[Piece], threshold: selection.Threshold, lowest: bool) -> list[I64]:
    left = threshold.ties
    parts: dict[int, list[I64]] = {id(piece): [np.empty(0, np.int64)] for piece in pieces}

    def positions(chunk: Chunk, ties: int) -> tuple[I64, int]:
        values = chunk.read()
        used = min(selection.count_equal(values, threshold.bits), ties) if ties else 0
        room = scratch.codes[: values.size]
        kept = (selection.emit_lowest if lowest else selection.emit)(values, threshold.bits, used, room)
        return (room[:kept].astype(np.int64) >> (0 if lowest else 1)) + chunk.start, used

    for chunk, (found, used) in ordered(partial(positions, ties=left), [chunk for piece in pieces for chunk in chunks_of(piece)]):
        if used > left:  # an earlier chunk, worked on at the same time, took some of them
            found, used = positions(chunk, left)
        left -= used
        parts[id(chunk.piece)].append(found)
    return [np.concatenate(parts[id(piece)]) for piece in pieces]


class _Masks:
    """The last masks that were made, by the base's fingerprint and the rule."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bytes, MaskRule], list[I64]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, base: bytes, rule: MaskRule, make: Callable[[], list[I64]]) -> list[I64]:
        with self._lock:
            if (base, rule) in self._kept:
                self._kept.move_to_end((base, rule))
                return self._kept[base, rule]
        made = make()
        with self._lock:
            self._kept[base, rule] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made


_masks = _Masks()


def mask_of(base: bytes, rule: MaskRule, read: Callable[[str], torch.Tensor]) -> list[I64]:
    """The chosen flat indices (ascending, int64) of each of the rule's tensors; remembered for the last few bases and rules.

    `base` is a digest over the very values that `read` gives, or of the whole base that they were held against; it is what the mask is remembered by.
    Raises InvalidArgument as `choose` does.
    """
    return _masks.get(base, rule, lambda: choose(rule, [tensor_piece(name, read(name)) for name in rule.names]))
