"""A slow reader of coding 3 in plain Python, written from docs/format.md and sharing no code with the library."""

from __future__ import annotations

import math

KNOTS = [round(65536 / (1 + math.exp(-k / 4))) for k in range(45)] + [65535]
RANK = 32


def logistic(t: int) -> int:
    if t < 0:
        return 65536 - logistic(-t)
    return KNOTS[t >> 6] + ((KNOTS[(t >> 6) + 1] - KNOTS[t >> 6]) * (t % 64) >> 6)


def clamp(x: int, most: int) -> int:
    return max(-most, min(x, most))


def probability(logit: int) -> int:
    return logistic(clamp(logit >> 12, 2816))


def learn(offset: int, error: int, seen: int) -> int:
    return clamp(offset + (error * (65536 // min(8 + (seen >> 16), 50)) >> 12), 2816 * 4096)


def splitmix(k: int) -> int:
    wrap = 2**64 - 1
    z = k * 0x9E3779B97F4A7C15 & wrap
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & wrap
    z = (z ^ z >> 27) * 0x94D049BB133111EB & wrap
    return z ^ z >> 31


class Decisions:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.low, self.high, self.word = data, 0, 0, 2**32 - 1, 0
        for _ in range(4):
            self.word = self.word << 8 | self.byte()

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def __call__(self, p: int) -> int:
        assert 1 <= p <= 65535
        middle = self.low + ((self.high - self.low) * p >> 16)
        bit = int(self.word <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 24 == self.high >> 24:
            self.low, self.high = (self.low << 8) % 2**32, (self.high << 8) % 2**32 | 255
            self.word = (self.word << 8) % 2**32 | self.byte()
        return bit


def read(stream: bytes, shape: tuple[int, ...]) -> list[int]:
    """The levels of a tensor in C order."""
    n = at = 0
    while True:
        n |= (stream[at] & 127) << 7 * at
        at += 1
        if stream[at - 1] < 128:
            break
    entries = math.prod(shape)
    levels = [0] * entries
    if n == 0:
        assert at == len(stream)
        return levels
    decide = Decisions(stream[at + 1 :])
    if stream[at] == 0:
        left = n
        for place in range(entries):
            if left and decide(max(1, min(left * 65536 // (entries - place), 65535))):
                levels[place] = 1 if decide(32768) else -1
                left -= 1
    else:
        assert stream[at] == 1
        left = matrix(decide, levels, n, shape[0], entries // shape[0])
    assert left == 0
    assert decide.at <= len(decide.data) + 4
    assert not any(decide.data[decide.at :])
    return levels


def matrix(decide: Decisions, levels: list[int], n: int, first: int, second: int) -> int:
    rows, cols = max(first, second), min(first, second)
    V = [[(splitmix(RANK * (j % 64) + a + 1) >> 54) - 512 for a in range(RANK)] for j in range(cols)]
    c, s, m = [0] * cols, [0] * cols, [0] * cols
    sizes, empty, trust, context, left = [0] * 32, [0] * 4, 65536, 0, n
    share = n * 65536 // (rows * cols)
    usual = max([t for t in range(-2816, 2817) if logistic(t) <= share], default=-2816) * 4096

    def product(u: list[int], j: int) -> int:
        return clamp(sum(x * y for x, y in zip(u, V[j], strict=True)) >> 16, 2047)

    def pulled(u: list[int], v: list[int], weight: int) -> list[int]:
        return [clamp(x + ((weight * y + 32768) >> 16), 8191) for x, y in zip(u, v, strict=True)]

    for i in range(rows):
        if not left:
            break
        p = probability(empty[context])
        b = decide(p)
        empty[context] = learn(empty[context], 65536 * b - p, 0)
        context = (2 * context + b) % 4
        if not b:
            continue
        u, r, seen, row = [0] * RANK, usual, 0, []
        for j in range(cols):
            if not left:
                break
            z = product(u, j)
            k = min(abs(z) >> 6, 31)
            p = probability(r + c[j] + sizes[k])
            b = decide(p)
            error, information = 65536 * b - p, p * (65536 - p) >> 16
            r, seen = learn(r, error, seen), seen + information
            c[j], s[j] = learn(c[j], error, s[j]), min(s[j] + information, 50 * 65536)
            sizes[k] = clamp(sizes[k] + (error * 21 >> 6), 2816 * 4096)
            if b:
                p = logistic(clamp(trust * z >> 16, 2816))
                plus = decide(p)
                trust += (65536 * plus - p) * z >> 17
                u = pulled(u, V[j], (1310720 // (50 + len(row))) * (65536 * plus - logistic(z)) >> 16)
                row.append((j, plus))
                levels[i * cols + j if first >= second else j * rows + i] = 2 * plus - 1
                left -= 1
        usual += (r - usual) * 13 >> 8
        for _ in range(2):
            for j, plus in row:
                u = pulled(u, V[j], (1310720 // (50 + len(row))) * (65536 * plus - logistic(product(u, j))) >> 16)
        for j, plus in row:
            V[j] = pulled(V[j], u, (2621440 // (100 + m[j])) * (65536 * plus - logistic(product(u, j))) >> 16)
            m[j] += 1
    return left
