"""sterna train: a config, or options, become an expert, its metrics and its config."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sterna.commands.shared import Json, print_json, progress_bar, size, warn

if TYPE_CHECKING:
    from sterna.training.result import TrainingResult

METHOD_HELP = "pafi, hiwi, full, head, or a method of PEFT: lora, ia3, prefix_tuning, prompt_tuning, adalora, ..."
DENSITY_HELP = "pafi: the share of values that are trained; other methods: the share of entries that the expert keeps."


def train(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="A config; the options override it.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="The base: a model folder or a hub id.", show_default=False)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help=".csv, .tsv, .jsonl, .parquet, .txt, or a hub id; may be repeated.", show_default=False),
    ] = None,
    validation: Annotated[str | None, typer.Option(metavar="FILE", help="Validation rows, or the fraction to hold out.", show_default="0.1")] = None,
    test: Annotated[str | None, typer.Option(metavar="FILE", help="Test rows, or the fraction to hold out.", show_default=False)] = None,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="classification, regression, causal-lm or seq2seq.", show_default="by the data")
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            "--text-column", "--text", metavar="NAME", help="The column of the text, of the prompt, or of chats.", show_default="by usual names"
        ),
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option("--pair-column", "--pair", metavar="NAME", help="The column of a second text.", show_default=False)
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", "--label", metavar="NAME", help="The column of the label.", show_default="by usual names")
    ] = None,
    target_column: Annotated[
        str | None,
        typer.Option(
            "--target-column", "--target", metavar="NAME", help="The column of the target text, or of the completion.", show_default="by usual names"
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text at most.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help=METHOD_HELP, show_default="pafi")] = None,
    density: Annotated[float | None, typer.Option(help=DENSITY_HELP, show_default="0.005 or 0.1")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of hiwi and lora.", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale of ternary levels, in standard deviations.", show_default="4")] = None,
    values: Annotated[
        str | None, typer.Option(metavar="KIND", help="pafi and hiwi: exact, fp32, fp16, bf16 or ternary.", show_default="exact")
    ] = None,
    head: Annotated[str | None, typer.Option(metavar="KIND", help="How the head is stored: exact, fp16, bf16 or int8.", show_default="exact")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="by the method")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.", show_default="3")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch.", show_default="16")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default="a tenth of the run")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the head, the order of the rows, and dropout.", show_default="0")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any field, as training.warmup_ratio=0.1. May be given again.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="EXPERT", help="The expert file to write; .safetensors is added.", show_default=False)
    ] = None,
    run_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Where checkpoints go.", show_default="EXPERT.run")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over in place of going on from the last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model on your rows and write what it learned as an expert. The same command goes on where it was interrupted."""
    from sterna.needs import needed

    for package in ("pydantic", "yaml"):
        needed(package, "sterna[train]")
    from sterna.training.config import merged, read_yaml
    from sterna.training.errors import Interrupted
    from sterna.training.run import train as run

    raw = merged(
        read_yaml(config) if config else {},
        {
            name: value
            for name, value in {
                "model": model,
                "data.train": data[0] if data and len(data) == 1 else data or None,
                "data.validation": validation,
                "data.test": test,
                "task": task,
                "data.text": text_column,
                "data.text_pair": pair_column,
                "data.label": label_column,
                "data.target": target_column,
                "data.max_length": max_length,
                "method.name": method,
                "compress.alpha": alpha,
                "compress.values": values,
                "compress.head": head,
                "training.learning_rate": learning_rate,
                "training.num_train_epochs": epochs,
                "training.max_steps": max_steps,
                "training.per_device_train_batch_size": batch_size,
                "training.save_steps": save_steps,
                "seed": seed,
                "output": output,
                "run_dir": run_dir,
            }.items()
            if value is not None
        },
    )
    name = str(raw.get("method", {}).get("name", "pafi"))
    own = {"density": "method.density" if name == "pafi" else "compress.density", "rank": "method.rank" if name == "hiwi" else "method.r"}
    raw = merged(raw, {own[option]: value for option, value in {"density": density, "rank": rank}.items() if value is not None})
    raw = merged(raw, _settings(settings or []))
    try:
        with progress_bar() as progress:
            result = run(raw, restart=restart, warn=warn, progress=progress)
    except Interrupted as error:
        again = shlex.join(["sterna", *(word for word in sys.argv[1:] if word != "--restart")])
        raise Interrupted(f"{error}: {again}") from None
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)


def _settings(given: list[str]) -> dict[str, Any]:
    """FIELD=VALUE pairs, the values as YAML. Raises InvalidArgument."""
    from sterna.errors import InvalidArgument
    from sterna.training.config import value_of

    fields: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise InvalidArgument(f"--set {item!r}: expected FIELD=VALUE, as training.warmup_ratio=0.1")
        fields[name] = value_of(value)
    return fields


def _show(result: TrainingResult) -> None:
    from rich.console import Console
    from rich.table import Table

    from sterna.training.metrics import METRICS

    console = Console()
    columns = {"trained": "trained model", "expert": "base with the expert"}
    if result.metrics["trained"]:
        table = Table(box=None, pad_edge=False)
        for title in ("rows", "metric", *(columns[who] for who in result.metrics)):
            table.add_column(title, justify="left" if title in ("rows", "metric") else "right")
        for split, scores in result.metrics["trained"].items():
            for place, metric in enumerate(scores):
                cells = [f"{by[split][metric]:.4f}" for by in result.metrics.values()]
                table.add_row(f"{split}, {result.rows[split]:,}" if not place else "", METRICS[metric].title, *cells)
        console.print(table)
    counts, sizes = result.counts, result.sizes
    trained = f"{counts['trained']:,} numbers trained and {counts['trained_head']:,} in the head"
    if result.ends_as == "expert":
        print(f"{result.output}: {size(int(sizes['bytes']))}, head {size(int(sizes['bytes_head']))}; {trained}, {counts['stored']:,} stored")
    else:
        print(f"{result.output}: a PEFT folder, {size(int(sizes['bytes']))}; {trained}")
    print(
        f"{result.metrics_file}, {result.config_file}; {result.steps:,} steps in {result.seconds['training']:.0f} s; checkpoints in {result.run_dir}"
    )
