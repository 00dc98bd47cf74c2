"""Mutations of expert files. Most keep the header true to the sizes and sign the file again, so that they get past the outer checks."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from hostile.craft import compact, framed, header_of, signed_again, varint

EDGES = (0, 1, 2, 3, 7, 8, 12, 20, 21, 41, 42, 63, 64, 65, 127, 128, 129, 254, 255, 256, 1 << 14, 1 << 20, (1 << 20) + 1, 1 << 24)
HUGE = (
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 34,
    1 << 35,
    1 << 40,
    1 << 48,
    (1 << 48) + 1,
    1 << 53,
    1 << 55,
    (1 << 56) - 1,
    1 << 56,
    1 << 63,
    (1 << 64) - 1,
)
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 0.5, 1e-300, 1e300, 1 << 53, 10**30, "", "a", "lora", "tensor", "global", "../x", "\x1b", "\ud7ff",
    [], [1], ["a", "b"], {}, {"a": {}}, {"auto_map": 1}, [[[[[[[[[[]]]]]]]]]],
)  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A sound file and where its parts lie in it."""

    file: bytes
    metadata: str
    tensors: list[tuple[str, str, list[int], bytes]]

    @classmethod
    def of(cls, file: bytes) -> Seed:
        origin = 8 + struct.unpack("<Q", file[:8])[0]
        header = json.loads(file[8:origin])
        metadata = header.pop("__metadata__")["sterna"]
        places = {name: [origin + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
        del header["sterna.sha256"]
        return cls(file, metadata, [(name, e["dtype"], e["shape"], file[slice(*places[name])]) for name, e in header.items()])

    def replaced(self, **parts: bytes) -> bytes:
        """The file with other bytes for its table or its streams, in a true header, signed."""
        tensors = [(name, dtype, shape, data) for name, dtype, shape, data in self.tensors if not name.startswith("sterna.")]
        for name, dtype, _, data in self.tensors[len(tensors) :]:
            new = parts.get(name.removeprefix("sterna."), data)
            tensors.append((name, dtype, [len(new)], new))
        return framed(compact(header_of(self.metadata, tensors)), b"".join(data for _, _, _, data in tensors))

    def part(self, name: str) -> bytes:
        return next(data for own, _, _, data in self.tensors if own == f"sterna.{name}")


def flip(data: bytes, random: Random) -> bytes:
    """Bits flipped, bytes set."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        if changed:
            at = random.randrange(len(changed))
            changed[at] = (
                changed[at] ^ 1 << random.randrange(8) if random.random() < 0.6 else random.choice((0, 1, 127, 128, 255, random.randrange(256)))
            )
    return bytes(changed)


def splice(data: bytes, random: Random) -> bytes:
    """A piece cut out, doubled, moved, overwritten, or noise put in."""
    start, stop = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    if random.random() < 0.7:
        stop = min(stop, start + random.randrange(1, 9))
    at = random.randrange(len(data) + 1)
    piece = data[start:stop]
    match random.randrange(5):
        case 0:
            return data[:start] + data[stop:]
        case 1:
            return data[:at] + piece + data[at:]
        case 2:
            return data[:at] + piece + data[at + len(piece) :]
        case 3:
            return data[:start]
    return data[:at] + random.randbytes(random.randrange(1, 9)) + data[at:]


def renumber(data: bytes, random: Random) -> bytes:
    """A varint somewhere replaced by another number."""
    if not data:
        return varint(random.choice(EDGES))
    at = stop = random.randrange(len(data))
    while stop < len(data) - 1 and data[stop] >= 128:
        stop += 1
    old = sum((byte & 127) << 7 * i for i, byte in enumerate(data[at : stop + 1]))
    new = random.choice((old + 1, max(old - 1, 0), 2 * old, random.choice(EDGES), random.choice(EDGES), random.choice(HUGE)))
    return data[:at] + varint(new) + data[stop + 1 :]


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (flip, flip, splice, renumber, renumber)


def anywhere(seed: Seed, random: Random) -> bytes:
    """The whole file, header and checksum too; signed again half of the time."""
    changed = random.choice(BYTES)(seed.file, random)
    return signed_again(changed) if random.random() < 0.5 and len(changed) > 32 else changed


def header_number(seed: Seed, random: Random) -> bytes:
    """A number of the header (a size, an offset, a digit of the facts) replaced, the header's own length made to fit."""
    origin = 8 + struct.unpack("<Q", seed.file[:8])[0]
    header = seed.file[8:origin].rstrip()
    number = random.choice(list(re.finditer(rb"-?\d+(?:\.\d+)?", header)))
    value = float(number[0])
    new: Any = random.choice((int(value) + 1, int(value) - 1, -1, 0, 0.5, "1e400", random.choice(EDGES), random.choice(HUGE), 10**30))
    return framed(header[: number.start()] + str(new).encode() + header[number.end() :], seed.file[origin:-32])


def some_fact(seed: Seed, random: Random) -> bytes:
    """A field of the facts given junk, taken away or added."""
    facts = json.loads(seed.metadata)
    within = facts["base"] if random.random() < 0.3 else facts
    keys = [*within, "config", "tokens", "adapter", "prefixes", "dropped", "excluded", "architecture", "revision", "mask", "tuning", "new"]
    key = random.choice(keys)
    if random.random() < 0.2:
        within.pop(key, None)
    else:
        within[key] = random.choice(JUNK)
    tensors = seed.tensors
    return framed(compact(header_of(compact(facts), tensors)), b"".join(data for _, _, _, data in tensors))


def table(seed: Seed, random: Random) -> bytes:
    return seed.replaced(table=random.choice(BYTES)(seed.part("table"), random))


def streams(seed: Seed, random: Random) -> bytes:
    return seed.replaced(streams=random.choice(BYTES)(seed.part("streams"), random))


def streams_of_the_same_length(seed: Seed, random: Random) -> bytes:
    """What the table says of the streams stays true: only their own index and planes can be wrong."""
    old = seed.part("streams")
    new = random.choice((flip, flip, splice))(old, random)
    return seed.replaced(streams=(new + random.randbytes(len(old)))[: len(old)])


def table_and_streams(seed: Seed, random: Random) -> bytes:
    return seed.replaced(table=flip(seed.part("table"), random), streams=flip(seed.part("streams"), random))


MUTATIONS: tuple[Callable[[Seed, Random], bytes], ...] = (
    anywhere, header_number, some_fact, table, table, table, streams, streams_of_the_same_length, streams_of_the_same_length, table_and_streams,
)  # fmt: skip


def mutated(seeds: list[Seed], random: Random) -> bytes:
    """A file with one mutation, sometimes two."""
    file = random.choice(MUTATIONS)(seed := random.choice(seeds), random)
    if random.random() < 0.1:
        file = signed_again(flip(file[:-32], random) + bytes(32)) if len(file) > 32 else seed.file
    return file
