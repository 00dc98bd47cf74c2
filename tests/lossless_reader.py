"""A slow reader of lossless streams in plain Python, written from docs/format.md and sharing no code with the library."""

from __future__ import annotations

import math
from collections import defaultdict

from small_reader import RANK, Decisions, clamp, learn, logistic, probability, splitmix

BAND, WIDEST = 1 << 22, 1 << 18


def soon(pair: list[int], error: int, information: int) -> None:
    """A pair of an offset and what it has seen."""
    pair[0] = clamp(pair[0] + (error * (65536 // min(1 + (pair[1] >> 16), 50)) >> 12), 2816 * 4096)
    pair[1] += information


def nudge(offsets: list[int], place: int, error: int) -> None:
    offsets[place] = clamp(offsets[place] + (error * 21 >> 6), 2816 * 4096)


def varint(stream: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value, shift, at = value | (stream[at] & 127) << shift, shift + 7, at + 1
        if stream[at - 1] < 128:
            return value, at


def read(stream: bytes, shape: tuple[int, ...], base: list[int], width: int) -> list[int]:
    """The tuned tensor's bit patterns in C order, from the base's; both of `width` bits."""
    entries = math.prod(shape)
    cols = entries // shape[0] if len(shape) > 1 and entries else 0
    matrix = bool(cols) and shape[0] > 1 and 1 < cols <= WIDEST
    step = max(BAND // cols, 1) * cols if matrix else BAND
    words, at = list(base), 0
    for start in range(0, entries, step):
        stop = min(start + step, entries)
        n, at = varint(stream, at)
        if n:
            raw, at = varint(stream, at)
            length, at = varint(stream, at)
            plane, code, at = stream[at : at + raw], stream[at + raw : at + raw + length], at + raw + length
            words[start:stop] = band(Decisions(code), plane, words[start:stop], n, cols if matrix else stop - start, matrix, width)
    assert at == len(stream), "bytes are left over"
    return words


def band(decide: Decisions, plane: bytes, words: list[int], n: int, cols: int, matrix: bool, width: int) -> list[int]:
    bits = "".join(f"{byte:08b}"[::-1] for byte in plane)
    used = 0
    V = [[(splitmix(RANK * (j % 64) + a + 1) >> 54) - 512 for a in range(RANK)] for j in range(cols if matrix else 0)]
    c, m = [[0, 0] for _ in range(cols if matrix else 1)], [0] * cols
    sizes, longer, empty, trust, context, left = [0] * 32, [0] * 32, [0] * 4, 65536, 0, n
    classes: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    lengths: dict[tuple[int, int, int], list[int]] = defaultdict(lambda: [0, 0])
    leading: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    means: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    share = n * 65536 // len(words)
    usual = max([t for t in range(-2816, 2817) if logistic(t) <= share], default=-2816) * 4096
    dense = matrix and 4 * n >= len(words)
    sign_bit, full = 1 << (width - 1), (1 << width) - 1

    def product(u: list[int], j: int) -> int:
        return clamp(sum(x * y for x, y in zip(u, V[j], strict=True)) >> 16, 2047)

    def pulled(u: list[int], v: list[int], weight: int) -> list[int]:
        return [clamp(x + ((weight * y + 32768) >> 16), 8191) for x, y in zip(u, v, strict=True)]

    for i in range(len(words) // cols):
        if not left:
            break
        p = probability(empty[context])
        bit = decide(p)
        empty[context] = learn(empty[context], 65536 * bit - p, 0)
        context = (2 * context + bit) % 4
        if not bit:
            continue
        u, r, seen, row = [0] * RANK, usual, 0, []

        def taught(error: int, information: int, k: int) -> None:
            nonlocal r, seen
            r, seen = learn(r, error, seen), seen + information
            c[k] = [learn(c[k][0], error, c[k][1]), min(c[k][1] + information, 50 * 65536)]

        for j in range(cols):
            if not left:
                break
            old, k = words[i * cols + j], j if matrix else 0
            kind = old % sign_bit >> (width - 9)
            z = product(u, k) if dense else 0
            size = min(abs(z) >> 6, 31)
            p = probability(r + c[k][0] + classes[kind][0] + sizes[size])
            bit = decide(p)
            error, information = 65536 * bit - p, p * (65536 - p) >> 16
            taught(error, information, k)
            soon(classes[kind], error, information)
            if dense:
                nudge(sizes, size, error)
            if not bit:
                continue
            z = product(u, k) if matrix else 0
            size = min(abs(z) >> 6, 31)
            p = logistic(clamp(trust * z >> 16, 2816))
            plus = decide(p)
            if matrix:
                trust += (65536 * plus - p) * z >> 17
                u = pulled(u, V[j], (1310720 // (50 + len(row))) * (65536 * plus - logistic(z)) >> 16)
                row.append((j, plus))
            b = means[kind][0] + 32768 >> 16
            phase = 0 if b else 1
            while not (phase == 1 and b == width - 1) and not (phase == 2 and b == 0):
                scale = r - usual + c[k][0] + longer[size]
                p = probability(lengths[phase, kind, b][0] + (-scale if phase == 2 else scale))
                bit = decide(p)
                error, information = 65536 * bit - p, p * (65536 - p) >> 16
                soon(lengths[phase, kind, b], error, information)
                error = -error if phase == 2 else error
                nudge(longer, size, error)
                taught(error, information, k)
                if phase == 0:
                    phase, b = (1, b) if bit else (2, b - 1)
                elif bit:
                    b += 1 if phase == 1 else -1
                else:
                    break
            mean = means[kind]
            mean[0] += ((b << 16) - mean[0]) * (65536 // (mean[1] + 1)) >> 16
            mean[1] = min(mean[1] + 1, 49)
            value = 1
            for _ in range(min(b, 2)):
                pair = leading[b, value]
                p = probability(pair[0])
                bit = decide(p)
                soon(pair, 65536 * bit - p, p * (65536 - p) >> 16)
                value = 2 * value + bit
            rest = max(b - 2, 0)
            value, used = value << rest | int(bits[used : used + rest][::-1] or "0", 2), used + rest
            ordered = full - old if old & sign_bit else old + sign_bit
            ordered += value if plus else -value
            assert 0 <= ordered <= full, "an entry left the range"
            words[i * cols + j] = full - ordered if ordered < sign_bit else ordered - sign_bit
            left -= 1
        usual += (r - usual) * 13 >> 8
        for j, plus in row:
            V[j] = pulled(V[j], u, (2621440 // (100 + m[j])) * (65536 * plus - logistic(product(u, j))) >> 16)
            m[j] += 1
    assert left == 0
    assert len(plane) == (used + 7) // 8
    assert "1" not in bits[used:]
    assert decide.at <= len(decide.data) + 4
    assert not any(decide.data[decide.at :])
    return words
