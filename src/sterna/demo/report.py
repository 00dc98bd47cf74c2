"""What the demo found, as data, as one table on a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sterna.scoring.intervals import Estimate

if TYPE_CHECKING:
    from sterna.reporting.measure import LivePart
    from sterna.reporting.report import DtypeRun

COLUMNS = ("", "density", "scale", "bytes on disk", "to 16 bit", "bits/param", "entropy", "accuracy, %", "to uncompressed")
NARROW = ("", "density\nscale", "bytes\nto 16 bit", "bits\nentropy", "accuracy, %", "to\nuncompressed")
WIDTH = 144
"""Characters that the table takes with intervals beside their values."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to keep the fine-tuning. `alpha` counts in standard deviations of the task vector, `factor` multiplies the task vector itself.

    `bytes` are None for what is not a file; `ratio` is the 16-bit reference's bytes over these; `difference` is paired, on the same test texts.
    """

    method: str
    accuracy: Estimate
    difference: Estimate | None = None
    density: float | None = None
    alpha: float | None = None
    factor: float | None = None
    bytes: int | None = None
    ratio: float | None = None
    bits: float | None = None
    entropy: float | None = None

    def cells(self) -> tuple[str, ...]:
        scale = f"{self.alpha:.3g} std" if self.alpha is not None else f"x {self.factor:g}" if self.factor is not None else ""
        return (
            self.method,
            "" if self.density is None else f"{self.density:g}",
            scale,
            "" if self.bytes is None else f"{self.bytes:,}",
            "" if self.ratio is None else f"{self.ratio:.1f}x",
            "" if self.bits is None else f"{self.bits:.3f}",
            "" if self.entropy is None else f"{self.entropy:.3f}",
            f"{self.accuracy.value:.1%} ({self.accuracy.low:.1%} to {self.accuracy.high:.1%})".replace("%", ""),
            ""
            if self.difference is None
            else f"{100 * self.difference.value:+.1f} ({100 * self.difference.low:+.1f} to {100 * self.difference.high:+.1f})",
        )


def stacked(cells: Sequence[str]) -> tuple[str, ...]:
    """Nine cells as six: density over scale, bytes over ratio, bits over entropy, a value over its interval."""
    method, density, scale, size, ratio, bits, entropy, accuracy, difference = (cell.replace(" (", "\n").removesuffix(")") for cell in cells)
    return method, f"{density}\n{scale}", f"{size}\n{ratio}", f"{bits}\n{entropy}", accuracy, difference


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task: what was trained, on how many rows, and the rows of the table."""

    name: str
    training: str
    classes: int
    train_rows: int
    validation_rows: int
    test_rows: int
    parameters: int
    rows: tuple[Row, ...]

    @property
    def line(self) -> str:
        return (
            f"{self.name}: {self.classes} classes, {self.training} of {self.parameters:,} parameters on {self.train_rows:,} texts; "
            f"{self.validation_rows:,} validation and {self.test_rows:,} test texts."
        )


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Everything that one run found. `files` are the experts that it wrote, `seconds` what each stage took, `page` is the report's HTML file."""

    tasks: tuple[TaskResult, ...]
    live: LivePart
    dtypes: tuple[DtypeRun, ...]
    files: tuple[str, ...]
    seconds: dict[str, float]
    machine: dict[str, str]
    page: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self, narrow: bool = False) -> Table:
        """One table for a terminal; `narrow` puts two values into a cell, one below the other, and so fits 80 characters."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column(min_width=12)
        for column in (NARROW if narrow else COLUMNS)[1:]:
            table.add_column(column, justify="right", no_wrap=True)
        for task in self.tasks:
            table.add_section()
            table.add_row(f"[bold]{escape(task.name)}[/bold]")
            for row in task.rows:
                table.add_row(*(stacked(row.cells()) if narrow else row.cells()))
        return table

    def print(self, console: Console) -> None:
        """The table and the lines below it. Where the output is no terminal, no line is broken."""
        if not console.is_terminal:
            console.width = max(console.width, WIDTH)
        console.print(self.table(narrow=console.width < WIDTH))
        for line in self.lines():
            console.print(line, highlight=False, soft_wrap=not console.is_terminal)

    def markdown(self) -> str:
        """The same table and lines for a README."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
        for task in self.tasks:
            lines.append(f"| **{task.name}** |" + " |" * (len(COLUMNS) - 1))
            lines += ["| " + " | ".join(row.cells()) + " |" for row in task.rows]
        return "\n".join([*lines, "", *(f"- {line}" for line in self.lines())]) + "\n"

    def lines(self) -> list[str]:
        live, steps, speed, machine = self.live, self.live.steps, self.live.latency, self.machine
        assert live.side_by_side is not None
        first, second = live.side_by_side.experts
        training = (
            f"{self.seconds['training'] / 60:.1f} of them for training" if "training" in self.seconds else "the trainings kept from an earlier run"
        )
        return [
            f"On one live model: {first.name} {first.among.value:.1f}%, then swapped to {second.name} {second.among.value:.1f}%, then detached; "
            f"every tensor of the base as it was, to the bit: {'yes' if live.restored else 'NO'}.",
            f"Attach {steps.attach.median:.1f} ms (the first time {steps.first_attach:.0f} ms, the base's fingerprint included), "
            f"swap {(steps.swap or steps.attach).median:.1f} ms, detach {steps.detach.median:.1f} ms.",
            f"Inference with an expert on against the bare base, {speed.batch} x {speed.length} tokens: {speed.ratio.value:.3f} times "
            f"({speed.ratio.low:.3f} to {speed.ratio.high:.3f}) of {speed.base.median:.1f} ms.",
            *(task.line for task in self.tasks),
            "Scale: a factor on the task vector (x), or alpha, what each kept entry is worth in standard deviations of the task vector (std); "
            "chosen on the validation texts only. Intervals are 95 %: Wilson's for an accuracy, bootstrap over the same test texts for a "
            "difference, Student's on paired runs for a latency.",
            "Words alone: tf-idf and logistic regression on the tokens that the model sees. Base alone: the untouched base with the trained head.",
            "PaFi: only the blocks' entries of smallest magnitude are trained, no position is stored; HiWi: an adapter on the feed-forward biases, "
            "folded away. Exact values in 32 bit; ternary: ComPEFT over what the trained entries moved by, their density and std its own.",
            "Bytes include the header and the head. Uncompressed: 16 bits an entry, head too. Prune only: our coded positions, values of 16 bits. "
            "STC: as ComPEFT, whose payload is the same. To 16 bit: the uncompressed bytes over these.",
            f"Machine: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']}; "
            f"{sum(self.seconds.values()) / 60:.1f} minutes, {training}.",
        ]
