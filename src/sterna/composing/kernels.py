"""Compiled loops of a pool: what many experts have at each position, told once for each combination that occurs, and weighed trial by trial.

A tensor is cut into blocks of BLOCK positions. What one expert has at a position is a *class*: which expert, which of its magnitudes, which sign. The
positions of a block that any expert changes are its *union*; those of them with the same classes have one *kind*. A weighting then needs one sum for
each kind, and one look-up, addition and store for each position of the union.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from sterna.live.kernels import BF16, FLOAT, bf16_to_float, float_to_bf16, float_to_fp16, fp16_to_float
from sterna.numbers.machine import pointer

BLOCK = 1 << 16
"""Positions of a block: their numbers, and those of their kinds, fit 16 bits, and their sums a core's second cache."""

_U = np.uint64
_GOLDEN = _U(0x9E3779B97F4A7C15)


@njit(nogil=True, cache=True, boundscheck=False)
def union_of_block(codes, classes, size, positions, kinds, runs, members):
    """The union of one block. `codes` (uint32) are what all experts have in it, expert after expert: position << 1 | negative; `classes` (int32) the
    class of each but for the sign, which adds one.

    Writes the union's positions (uint16, ascending), the kind of each (uint16), and, class after class, in how many kinds it is, `runs` (int32[2, :]:
    class, how many), and in which, `members` (uint16). Returns (positions, kinds, runs, members) that were written.

    Kinds are found as nodes of a tree: a node is its parent's classes and one more.
    """
    most = codes.size + 1
    parent, last = np.empty(most, np.uint32), np.empty(most, np.int32)
    node = np.zeros(size, np.uint32)
    slots = _U(1024)
    while slots < _U(2 * most):
        slots *= _U(2)
    mask = slots - _U(1)
    table = np.zeros(slots, np.uint32)
    nodes = 1
    for i in range(codes.size):
        position = codes[i] >> np.uint32(1)
        wanted = classes[i] + np.int32(codes[i] & np.uint32(1))
        before = node[position]
        at = ((_U(before) << _U(32) | _U(wanted)) * _GOLDEN) >> _U(32) & mask
        while table[at] and not (parent[table[at]] == before and last[table[at]] == wanted):
            at = (at + _U(1)) & mask
        if not table[at]:
            table[at] = nodes
            parent[nodes], last[nodes] = before, wanted
            nodes += 1
        node[position] = table[at]
    number = np.full(nodes, -1, np.int32)
    found = count = 0
    for position in range(size):
        here = node[position]
        if here:
            if number[here] < 0:
                number[here] = found
                found += 1
            positions[count], kinds[count] = position, number[here]
            count += 1
    return count, found, *_runs(parent, last, number, nodes, runs, members)


@njit(nogil=True, cache=True, boundscheck=False)
def _runs(parent, last, number, nodes, runs, members):
    """In which kinds each class is; see `union_of_block`. Returns (runs, members) that were written."""
    top = 0
    for i in range(1, nodes):
        top = max(top, last[i])
    begins = np.zeros(top + 2, np.int64)
    for i in range(1, nodes):
        if number[i] >= 0:
            here = np.uint32(i)
            while here:
                begins[last[here] + 1] += 1
                here = parent[here]
    count = 0
    for each in range(top + 1):
        if begins[each + 1]:
            runs[0, count], runs[1, count] = each, begins[each + 1]
            count += 1
        begins[each + 1] += begins[each]
    written = begins[top + 1]
    for i in range(1, nodes):
        if number[i] >= 0:
            here = np.uint32(i)
            while here:
                members[begins[last[here]]] = number[i]
                begins[last[here]] += 1
                here = parent[here]
    return count, written


@njit(nogil=True, cache=True, boundscheck=False)
def weigh(first, last, address, union, kind_count, run, run_class, member, values, positions, kinds, members, base, kind):
    """live word = base word + the sum of the values of its classes, for the unions of blocks first..last-1.

    `address` is where each block begins in live memory, of words of base.dtype; union, run (by block) and member (by run) say where each begins in
    `positions`, `kinds` and `base`, in `run_class` and in `members`. `values` (float64) are the classes' under the weighting. A sum is made in
    float64, in the order of its values, and rounded to float32; the addition is made in float32 and rounded to the live dtype: as merging and
    attaching do.
    """
    most = longest = 0
    for k in range(first, last):
        most = max(most, kind_count[k])
        longest = max(longest, run[k + 1] - run[k])
    sums, rounded = np.empty(most, np.float64), np.empty(most, np.float32)
    for k in range(first, last):
        begin, end = run[k], run[k + 1]
        found = kind_count[k]
        sums[:found] = 0.0
        of_runs = values[run_class[begin:end]]
        for r in np.argsort(of_runs):
            value = of_runs[r]
            if value != 0.0:
                for m in range(member[begin + r], member[begin + r + 1]):
                    sums[members[m]] += value
        for j in range(found):
            rounded[j] = np.float32(sums[j])
        live = carray(pointer(address[k]), BLOCK, base.dtype)
        if kind == FLOAT:
            for i in range(_U(union[k]), _U(union[k + 1])):
                step = rounded[kinds[i]]
                old = base[i]
                live[positions[i]] = old if step == np.float32(0) else base.dtype.type(np.float32(old) + step)
        else:
            for i in range(_U(union[k]), _U(union[k + 1])):
                step = rounded[kinds[i]]
                old = base[i]
                if step == np.float32(0):
                    live[positions[i]] = old
                elif kind == BF16:
                    live[positions[i]] = base.dtype.type(float_to_bf16(bf16_to_float(np.uint16(old)) + step))
                else:
                    live[positions[i]] = base.dtype.type(float_to_fp16(fp16_to_float(np.uint16(old)) + step))


@njit(nogil=True, cache=True, boundscheck=False)
def save(first, last, address, union, positions, base):
    """base[i] = live word, for the unions of blocks first..last-1."""
    for k in range(first, last):
        live = carray(pointer(address[k]), BLOCK, base.dtype)
        for i in range(_U(union[k]), _U(union[k + 1])):
            base[i] = live[positions[i]]


@njit(nogil=True, cache=True, boundscheck=False)
def put_back(first, last, address, union, positions, base):
    """live word = base[i], for the unions of blocks first..last-1."""
    for k in range(first, last):
        live = carray(pointer(address[k]), BLOCK, base.dtype)
        for i in range(_U(union[k]), _U(union[k + 1])):
            live[positions[i]] = base[i]


@njit(nogil=True, cache=True, boundscheck=False)
def ordered_sums(rows, weights):
    """For each row of float64[k, n], the sum of its values times float64[n], in the order of the products."""
    sums = np.zeros(rows.shape[0], np.float64)
    products = np.empty(weights.size, np.float64)
    for i in range(rows.shape[0]):
        count = 0
        for j in range(weights.size):
            value = rows[i, j] * weights[j]
            if value != 0.0:
                at = count
                while at and products[at - 1] > value:
                    products[at] = products[at - 1]
                    at -= 1
                products[at] = value
                count += 1
        for j in range(count):
            sums[i] += products[j]
    return sums
