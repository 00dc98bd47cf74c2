"""Compiled loops of the sampled gradient."""

from __future__ import annotations

from numba import njit


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract"})
def add_sampled_dots(left, right, rows, columns, out):
    """out[k] += left[rows[k]] . right[columns[k]] for every k; left float32[m, tokens], right float32[n, tokens], both C-contiguous."""
    tokens = left.shape[1]
    for k in range(out.size):
        a, b = left[rows[k]], right[columns[k]]
        total = out.dtype.type(0)
        for t in range(tokens):
            total += a[t] * b[t]
        out[k] += total
