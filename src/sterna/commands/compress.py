"""sterna compress: a tuned model becomes an expert file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sterna.commands.shared import BASE_HELP, Json, changed, print_json, progress_bar, size, warn

TUNED_HELP = "The tuned model: as BASE, or a PEFT LoRA or (IA)3 folder, or an exact PaFi or HiWi expert."

CODING_HELP = "fast: attaches at once. small: some 0.6 times the bytes, decoded once before it attaches."
ALPHA_HELP = "Scale of the kept entries, in standard deviations of the task vector: 4 by default."
LOSSLESS_HELP = "Keep every bit of the tuned checkpoint, as a patch of the base's: without density, alpha, scope, coding or head."


class Head(StrEnum):
    """In which precision a head is stored."""

    EXACT = "exact"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class CodingName(StrEnum):
    """How the levels become bytes."""

    FAST = "fast"
    SMALL = "small"


class Scope(StrEnum):
    """Over what the threshold and the standard deviation are taken."""

    GLOBAL = "global"
    TENSOR = "tensor"


def compress(
    base: Annotated[str, typer.Argument(metavar="BASE", help=BASE_HELP, show_default=False)],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help=TUNED_HELP, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="EXPERT", help="The expert file to write.", show_default=False)],
    density: Annotated[float | None, typer.Option(help="Share of the entries that keep their sign: 0.1 by default.", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help=ALPHA_HELP, show_default=False)] = None,
    scope: Annotated[Scope | None, typer.Option(help="One threshold and scale for all tensors (the default), or one for each.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Tensors that stay at the base. May be given again.")] = None,
    head: Annotated[Head, typer.Option(help="Precision in which the task's head is stored.")] = Head.EXACT,
    coding: Annotated[CodingName | None, typer.Option(help=f"{CODING_HELP} By default fast.")] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help=LOSSLESS_HELP)] = False,
    metadata: Annotated[
        list[str] | None, typer.Option("--meta", metavar="KEY=VALUE", help="Metadata to carry, as task=legal. May be given again.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on where base and tuned model do not seem to belong together.")] = False,
    as_json: Json = False,
) -> None:
    """Compress what a tuned model learned over its base into an expert file."""
    from sterna.commands.fields import parse_metadata
    from sterna.compression import compress as run
    from sterna.summary import inspect

    fields = parse_metadata(metadata or [])
    with progress_bar() as progress:
        expert = run(
            base,
            tuned,
            density=density,
            alpha=alpha,
            scope=scope.value if scope else None,
            exclude=exclude or [],
            head=head.value,
            coding=coding.value if coding else None,
            lossless=lossless,
            force=force,
            metadata=fields,
            warn=warn,
            progress=progress,
        )
        expert.save(output)
    summary = inspect(expert)
    if expert.facts.dropped:
        warn(f"the tuned model has no {', '.join(expert.facts.dropped[:4])}{' ...' if len(expert.facts.dropped) > 4 else ''}: dropped")
    if as_json:
        print_json({"file": str(output), **summary.to_dict()})
    elif lossless:
        bits = f", {summary.bits_per_change:.2f} bits each" if summary.bits_per_change else ""
        print(f"{output}: {size(summary.bytes)}; {changed(summary)}{bits}")
    else:
        print(
            f"{output}: {size(summary.bytes)}, {summary.ratio_to_16bit:.1f}x smaller than a 16-bit delta; "
            f"{summary.bits_per_parameter:.3f} bits a parameter ({summary.entropy_bits_per_parameter:.3f} is the i.i.d. entropy)"
        )
