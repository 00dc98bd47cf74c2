"""Products of two thin matrices, some entries at a time, in an order that is stated: equal to the bit on every machine, by any number of threads."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, boundscheck=False)
def product_entries(B, A, start, out):
    """out[i] = entry start + i of B @ A in C order. B float64[m, r], A float64[r, n], out float32; nothing is made but one row.

    An entry is the sum over k = 0, 1, ... of B[i, k] * A[k, j], in float64 in this order, rounded once to float32.
    """
    columns = A.shape[1]
    row = np.empty(columns, np.float64)
    done = 0
    while done < out.size:
        i, first = divmod(start + done, columns)
        last = min(columns, first + out.size - done)
        row[first:last] = 0.0
        for k in range(A.shape[0]):
            left = B[i, k]
            if left != 0.0:
                for j in range(first, last):
                    row[j] += left * A[k, j]
        for j in range(first, last):
            out[done + j - first] = np.float32(row[j])
        done += last - first
