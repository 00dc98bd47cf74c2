"""The index of a stream's blocks, which block codings share: how each chunk is cut, and for each block its non-zeros, its parameter and its bytes."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sterna.codings import CHUNK, U8, Blocks
from sterna.errors import InvalidFile


def block_log2(nonzeros: int, entries: int) -> int:
    """The smallest block of a chunk that holds about two thousand non-zeros: its entry in the index then costs less than a percent of it."""
    wanted = 2048 * entries / max(nonzeros, 1)
    return min(max(math.ceil(math.log2(max(wanted, 1))), 12), 20)


@njit(nogil=True, cache=True, boundscheck=False)
def put_varint(out, at, value):
    """LEB128: 7 bits a byte, low first, the top bit set on all but the last."""
    while value >= 128:
        out[at] = np.uint8((value & 127) | 128)
        value >>= 7
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@njit(nogil=True, cache=True, boundscheck=False)
def _get_varint(data, at, stop):
    """(value, next at); next at is -1 for a varint that runs past `stop` or past 35 bits."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= stop:
            return 0, -1
        byte = int(data[at])
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 0, -1


@njit(nogil=True, cache=True, boundscheck=False)
def _read(data, at, stop, entries, columns):
    """Walk the records of a stream and fill the int64 columns (start, size, count, offset, length, parameter) as far as there are any.

    Returns the number of blocks that hold non-zeros, -1 for an index that breaks a rule of the format.
    """
    rows = 0
    for chunk in range(0, entries, CHUNK):
        if at >= stop:
            return -1
        log2 = int(data[at])
        at += 1
        if log2 > 20:
            return -1
        chunk_end = min(chunk + CHUNK, entries)
        first = rows
        payload = 0
        for start in range(chunk, chunk_end, 1 << log2):
            size = min(1 << log2, chunk_end - start)
            count, at = _get_varint(data, at, stop)
            if at < 0 or count > size:
                return -1
            if count == 0:
                continue
            if at >= stop:
                return -1
            parameter = int(data[at])
            length, at = _get_varint(data, at + 1, stop)
            if at < 0 or length > stop:
                return -1
            if rows < columns.shape[1]:
                columns[0, rows] = start
                columns[1, rows] = size
                columns[2, rows] = count
                columns[3, rows] = payload
                columns[4, rows] = length
                columns[5, rows] = parameter
            rows += 1
            payload += length
        for row in range(first, min(rows, columns.shape[1])):
            columns[3, row] += at
        at += payload
        if at > stop:
            return -1
    return rows if at == stop else -1


def malformed() -> InvalidFile:
    return InvalidFile("a stream's block index is not well-formed or does not fill the stream")


def read(data: U8, start: int, stop: int, entries: int) -> Blocks:
    """The blocks of the stream data[start:stop]; a coding checks their parameters and lengths itself. Raises InvalidFile."""
    rows = _read(data, start, stop, entries, np.empty((6, 0), np.int64))
    if rows < 0:
        raise malformed()
    columns = np.empty((6, rows), np.int64)
    _read(data, start, stop, entries, columns)
    return Blocks(*columns)
