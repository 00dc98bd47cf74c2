"""How large is an expert, against what information theory asks?

Question: How many bytes do streams and table take under the fast coding, against the i.i.d. entropy of a ternary vector with as many non-zeros?
    Exact tensors do not count.
Goal: On uniform positions at most 1.015 times the entropy at densities .005 to .10, 1.035 up to .50; on a real full fine-tune below 0.85 at .05
    and .1.
Predicted: On uniform positions 1.007 to 1.014 from .01 to .1, at worst 1.033 near .38, where Golomb's code has no good divisor; missed at .005, where
    the table's 2.1 KB are 1.5 % of the 143 KB that the entropy asks for. On the real fine-tune .76 at .05 and .80 at .1: its non-zeros cluster.
Peer: Plain layouts of the same levels: int32 positions with a sign bit, two bit masks, a dense 16-bit delta.
"""

from __future__ import annotations

import torch

import harness
import inputs
import sterna
from sterna.summary import ternary_entropy

UNIFORM = (0.001, 0.005, 0.01, 0.0149, 0.02, 0.0296, 0.05, 0.0584, 0.08, 0.1, 0.1133, 0.15, 0.2, 0.25, 0.3, 0.38, 0.45, 0.5)
REAL = (0.05, 0.1, 0.2)
COLUMNS = ("density", "coded, KB", "entropy, KB", "coded / entropy", "streams alone", "table, bytes", "positions, KB", "masks, KB", "16-bit, KB")


def measure(base: inputs.State, tuned: inputs.State, density: float, force: bool = False) -> tuple[list[object], float]:
    """A row of the table, and coded bytes over the entropy's."""
    sizes = sterna.inspect(sterna.compress(base, tuned, density=density, force=force))
    coded = sizes.bytes_streams + sizes.bytes_table
    entropy = sizes.parameters * ternary_entropy(sizes.nonzeros / sizes.parameters) / 8
    plain = (sizes.nonzeros * 33 / 8, sizes.parameters / 4, sizes.parameters * 2)
    kilobytes = [round(size / 1e3, 1) for size in (coded, entropy)]
    row = [f"{density:g}", *kilobytes, f"{coded / entropy:.4f}", f"{sizes.bytes_streams / entropy:.4f}", sizes.bytes_table]
    return [*row, *(round(size / 1e3) for size in plain)], coded / entropy


def main() -> None:
    options = harness.options(__doc__)
    report = harness.Report(__file__, __doc__ or "", options.quick)
    base = inputs.in_memory(inputs.base_folder(options))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    normal = inputs.normal_tuned(zeros, scale=1.0)
    uniform = {density: measure(zeros, normal, density, force=True) for density in (UNIFORM[::4] if options.quick else UNIFORM)}
    tuned = inputs.in_memory(inputs.tuned_folder(options))
    real = {density: measure(base, tuned, density) for density in REAL}

    low = {density: ratio for density, (_, ratio) in uniform.items() if 0.005 <= density <= 0.1}
    high = {density: ratio for density, (_, ratio) in uniform.items() if density > 0.1}
    for limit, ratios, where in ((1.015, low, ".005 to .10"), (1.035, high, "up to .50")):
        worst = max(ratios, key=lambda density: ratios[density])
        report.goal(f"coded / entropy, uniform positions {where}, the worst (density {worst:g})", round(ratios[worst], 4), at_most=limit)
    for density in (0.05, 0.1):
        report.goal(f"coded / entropy, real full fine-tune, density {density:g}", round(real[density][1], 4), at_most=0.85)
    report.table(f"Uniform positions, {_entries(base):,} entries in the encoder's shapes", COLUMNS, [row for row, _ in uniform.values()])
    report.table("Real full fine-tune of the encoder (20 newsgroups)", COLUMNS, [row for row, _ in real.values()])
    report.write()


def _entries(base: inputs.State) -> int:
    return sum(tensor.numel() for tensor in base.values() if tensor.is_floating_point())


if __name__ == "__main__":
    main()
