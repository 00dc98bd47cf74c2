"""sterna merge: several experts for one base become one."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sterna.commands.evaluate import show
from sterna.commands.fields import parse_metadata
from sterna.commands.rows import need_scoring
from sterna.commands.shared import Json, by_task, print_json, progress_bar, size, warn
from sterna.errors import InvalidArgument
from sterna.progress import Progress

if TYPE_CHECKING:
    from sterna.expert.expert import Expert
    from sterna.scoring.evaluated import Evaluated

RECIPES = (".yaml", ".yml")


class SemanticsName(StrEnum):
    PAPER = "paper"
    PEFT = "peft"
    MERGEKIT = "mergekit"


def merge(
    sources: Annotated[
        list[Path] | None, typer.Argument(metavar="RECIPE.yaml | EXPERT ...", help="A recipe, or the experts to merge.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="EXPERT", help="The expert file to write.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="How: ties, linear, task_arithmetic, dare_ties, ... (docs/merging.md).")] = None,
    weights: Annotated[str | None, typer.Option(metavar="W,W,...", help="A weight for each expert; 1 each by default.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of each expert's entries that the method keeps.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Share of outliers that breadcrumbs drops.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,TASK,...", help="Names of the experts' tasks; else what they say, or their files.")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="Another parameter of the method, as lambda=0.3.")
    ] = None,
    semantics: Annotated[SemanticsName | None, typer.Option(help="Whose choices are followed where public tools differ; paper by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is dropped at random.")] = None,
    recompress: Annotated[
        str | None, typer.Option(metavar="DENSITY[,ALPHA]", help="Make the result ternary again by ComPEFT; alpha is 4 where it is not given.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="The base: for experts of PaFi and HiWi, which hold new values, and for --data.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE | TASK=FILE", help="Rows to score on, before and after --recompress; may be given again.", show_default=False),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="EXPERT", help="Make this merged expert again; parents are looked for beside it and in the files and folders given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge experts for one base, by a method or a recipe; heads are carried along by their tasks' names."""
    from sterna.merging.merge import merge as run
    from sterna.merging.replay import replay as again

    paths = list(sources or [])
    options: dict[str, Any] = {
        "weights": weights,
        "density": density,
        "gamma": gamma,
        "tasks": tasks,
        "semantics": semantics,
        "seed": seed,
        "recompress": recompress,
    }
    given = [f"--{name}" for name, value in {"method": method, "parameter": parameter, **options}.items() if value is not None]
    recipes = [path for path in paths if path.suffix in RECIPES]
    if output is None:
        raise InvalidArgument("--output is missing; expected the expert file to write (-o EXPERT)")
    if (replay is not None or recipes) and given:
        raise InvalidArgument(f"{', '.join(given)} cannot be given beside {'--replay' if replay else 'a recipe'}, which says everything")
    if data and (recompress is None or base is None):
        raise InvalidArgument("--data shows what --recompress loses over --base; to score any merged expert: sterna evaluate BASE EXPERT --data ...")
    with progress_bar() as progress:
        if replay is not None:
            expert = again(replay, paths, base=base, warn=warn, progress=progress)
        elif recipes:
            if len(paths) > 1:
                raise InvalidArgument(f"{len(paths)} arguments beside a recipe; expected the recipe alone")
            expert = run(paths[0], base=base, warn=warn, progress=progress)
        elif not paths:
            raise InvalidArgument("experts are missing; expected a recipe, two or more expert files, or --replay EXPERT")
        else:
            options["weights"] = _numbers(weights, "--weights") if weights is not None else None
            options["tasks"] = tasks.split(",") if tasks is not None else None
            options["semantics"] = semantics.value if semantics is not None else None
            options["recompress"] = dict(zip(("density", "alpha"), _numbers(recompress, "--recompress"), strict=False)) if recompress else False
            options["parameters"] = parse_metadata(parameter or [], "--parameter")
            expert = run(paths, method, **options, base=base, warn=warn, progress=progress)
            if data:
                whole = run(paths, method, **{**options, "recompress": False}, base=base, progress=progress)
                scored = _scored(str(base), whole, expert, data, progress)
    expert.save(output)
    if data and not as_json:
        show(scored)
    _report(output, as_json, scored.to_dict() if data else None)


def _scored(base: str, whole: Expert, expert: Expert, data: list[str], progress: Progress) -> Evaluated:
    """The scores of a merged expert, and of the same made ternary, on the same rows."""
    need_scoring()
    from sterna.scoring.evaluate import evaluate

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.safetensors" for name in ("merged", "recompressed")]
        for made, file in zip((whole, expert), files, strict=True):
            made.save(file)
        return evaluate(base, files, data=by_task(data, "--data"), warn=warn, progress=progress)


def _report(output: Path, as_json: bool, scores: dict[str, Any] | None) -> None:
    from sterna.expert.file import load
    from sterna.summary import inspect

    summary = inspect(load(output))
    if as_json:
        print_json({"file": str(output), **summary.to_dict(), **({"scores": scores} if scores else {})})
        return
    how = summary.facts.merge["merge_method"]
    names = ", ".join(str(model["task"]) for model in summary.facts.merge["models"])
    heads = f"; heads of {', '.join(summary.facts.heads)}" if summary.facts.heads else ""
    coded = f"; {summary.nonzeros:,} of {summary.parameters:,} entries ({summary.nonzeros / max(summary.parameters, 1):.3f}), "
    coded += f"{summary.bits_per_parameter:.2f} bits a parameter"
    if not summary.parameters:  # new values alone, as of PaFi
        coded = f"; {summary.mask.count:,} new values" if summary.mask else ""
    lost = summary.facts.merge.get("loss")
    loss = f"; {lost['relative']:.2%} lost (most of {lost['largest']['tensor']}: {lost['largest']['relative']:.2%})" if lost else ""
    print(f"{output}: {size(summary.bytes)}; {how} of {names}{coded}{loss}{heads}; content digest {summary.content_digest}")


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgument(f"{option} is {text!r}; expected numbers with commas between them, as 1,1,0.5") from None
