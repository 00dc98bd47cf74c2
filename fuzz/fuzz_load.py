"""Coverage-guided fuzzing of the expert file's reader, for as long as you like (Linux; needs `pip install atheris`, which Sterna does not).

    mkdir -p .fuzz
    python fuzz/fuzz_load.py .fuzz tests/hostile/corpus -max_len=8192 -max_total_time=3600

New inputs go to .fuzz, from where the next run goes on. An input that breaks the reader is written to the current folder, as crash-*, oom-* or
timeout-*; `python fuzz/fuzz_load.py crash-...` runs it again. Most mutated files are signed anew, so that they come past the checksum; what is
accepted is also decoded, saved and read back. The kernels are not instrumented, but one that reads beyond a file's padding ends the process.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from random import Random

import atheris

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


with atheris.instrument_imports(include=["sterna.expert", "json"]):
    from hostile.craft import SPECIMENS, signed_again
    from hostile.guard import Guarded
    from hostile.mutate import Seed, mutated
    from sterna.errors import SternaError
    from sterna.expert.file import file_pieces, from_bytes

ROOM = Guarded()


def read(data: bytes) -> None:
    """One file through load, decode, dense tensors, saving and loading again."""
    try:
        expert = ROOM.expert(data)
        expert.check()
    except SternaError as error:
        if "\n" in str(error):
            raise AssertionError("an error of more than one line") from error
        return
    again = b"".join(bytes(piece) for piece in file_pieces(expert))
    assert from_bytes(again).content_digest == expert.content_digest
    with contextlib.suppress(SternaError):
        expert.task_vector(max_bytes=1 << 22)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own mutation, mostly signed again; one time in four one of ours, which know the format."""
    random = Random(seed)
    if random.random() < 0.25:
        with contextlib.suppress(Exception):  # too broken to be taken apart
            return mutated([Seed.of(data)], random)[:max_size]
    changed = bytes(atheris.Mutate(data, max_size))
    return signed_again(changed) if random.random() < 0.8 and len(changed) > 48 else changed


def main() -> None:
    for make in SPECIMENS.values():  # kernels are compiled before anything is timed
        ROOM.expert(make().file()).check()
    atheris.Setup(sys.argv, read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
