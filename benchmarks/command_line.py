"""How long until the command line answers?

Question: How long does `sterna --help` take, and the commands that import torch?
Goal: `sterna --help` in under 0.3 seconds.
Predicted: 0.15 s for --help, of which the interpreter takes 0.02; 2 s for `sterna inspect`, nearly all of it importing torch and numba.
Peer: `python -c pass`, and `python -c "import torch"`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import inputs
import sterna
from harness import Side, mean, milliseconds


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    command = str(Path(sys.executable).with_name("sterna"))
    with tempfile.TemporaryDirectory() as temporary:
        file = str(Path(temporary) / "expert.safetensors")
        sterna.compress(inputs.base_folder(options), inputs.tuned_folder(options)).save(file)
        words = {
            "sterna --help": [command, "--help"],
            "sterna inspect": [command, "inspect", file],
            "python, nothing": [sys.executable, "-c", "pass"],
            "python, import torch": [sys.executable, "-c", "import torch"],
        }
        sides = {name: Side(lambda line=line: subprocess.run(line, stdout=subprocess.DEVNULL, check=True)) for name, line in words.items()}
        times = harness.in_turn(sides, 5 if options.quick else 15)
    report.goal("sterna --help", mean(times["sterna --help"]), at_most=0.3, unit="s")
    report.table("Until a command has answered", ("command", "ms"), [[name, milliseconds(taken)] for name, taken in times.items()])
    report.write()


if __name__ == "__main__":
    main()
