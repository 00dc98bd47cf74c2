"""sterna inspect: what an expert is, for which base, how large, and where its non-zeros are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sterna.commands.shared import ExpertFile, Json, changed, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from sterna.summary import MaskSummary, Summary


_SOURCES = {"full": "full fine-tune", "lora": "LoRA", "ia3": "(IA)3", "pafi": "PaFi run", "hiwi": "HiWi run"}
_METHODS = {"exact": "exact values", "lossless": "every bit"}


def inspect(expert: ExpertFile, as_json: Json = False) -> None:
    """Show what an expert is, for which base, how large it is, and the density of each tensor."""
    from sterna.summary import inspect as run

    summary = run(expert)
    if as_json:
        print_json(summary.to_dict())
        return
    from rich.console import Console

    console = Console()
    console.print(_facts(summary))
    console.print(_tensors(summary))


def _facts(summary: Summary) -> Table:
    from rich.table import Table
    from rich.text import Text

    facts = summary.facts
    base = facts.base
    scale = f"scale {facts.scale:.4g}" if facts.scope == "global" else "a scale for each tensor"
    bits, entropy = summary.bits_per_parameter, summary.entropy_bits_per_parameter
    unchanged = "" if facts.method != "compeft" else "nothing is changed"
    coded = summary.bytes_streams + summary.bytes_table
    coding = f" ({summary.coding})" if summary.coding else ""
    rows = {
        "method": _merged(facts.merge) if facts.merge else f"{_METHODS.get(facts.method, facts.method)} of a {_SOURCES[facts.source]}",
        "density": f"{facts.density:g}, alpha {facts.alpha:g}, {scale}" if facts.density is not None else "",
        "mask": _mask(summary.mask) if summary.mask else "",
        "tuning": json.dumps(dict(facts.tuning), ensure_ascii=False) if facts.tuning else "",
        "base": f"{base.name}{f'@{base.revision}' if base.revision else ''}, {base.parameters:,} parameters",
        "fingerprint": base.fingerprint,
        "class": facts.architecture or "",
        "file": f"{summary.bytes:,} bytes ({size(summary.bytes)}): {coded:,} coded{coding}, {_exact(summary)}, {summary.bytes_header:,} header",
        "against 16 bit": f"{summary.ratio_to_16bit:.1f} times smaller than a 16-bit delta",
        "bits a parameter": f"{bits:.4f} coded; i.i.d. entropy {entropy:.4f}, ratio {bits / entropy:.3f}" if entropy else unchanged,
        "bits a change": f"{summary.bits_per_change:.3f}" if summary.bits_per_change else "",
        "changed": changed(summary) if facts.method == "lossless" else "",
        "non-zeros": f"{summary.nonzeros:,} of {summary.parameters:,}" if facts.method == "compeft" else "",
        "recipe": _recipe(facts.merge) if facts.merge else "",
        **{f"parent {model['task']}": _parent(model) for model in _models(facts.merge)},
        **{f"head {task}": json.dumps(dict(held), ensure_ascii=False) for task, held in facts.heads.items()},
        "config": json.dumps(dict(facts.config), ensure_ascii=False) if facts.config else "",
        "added tokens": ", ".join(str(token.get("content")) for token in facts.tokens),
        "excluded": ", ".join(facts.excluded),
        "dropped": ", ".join(facts.dropped),
        "digest": summary.digest,
        "content digest": summary.content_digest,
        "writer": facts.writer,
        **{f"meta {key}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in facts.metadata.items()},
    }  # fmt: skip
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(Text(printable(name)), Text(printable(value)))
    return table


def _exact(summary: Summary) -> str:
    head = f" ({summary.bytes_head:,} the head)" if summary.bytes_head else ""
    return f"{summary.bytes_exact:,} exact{head}"


def _mask(mask: MaskSummary) -> str:
    asked = f"density {mask.density:g}, " if mask.density is not None else ""
    seed = f" of seed {mask.seed}" if mask.order == "random" else ""
    return f"{mask.order}{seed}, {asked}{mask.count:,} entries of {mask.tensors} tensors, values {mask.values}"


def _models(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The recipe's parents that have a task; a file may say anything."""
    models = recipe.get("models", ())
    return [model for model in models if isinstance(model, dict) and "task" in model] if isinstance(models, list) else []


def _merged(recipe: Mapping[str, Any]) -> str:
    return f"merged by {recipe.get('merge_method')} of {len(_models(recipe))} experts"


def _recipe(recipe: Mapping[str, Any]) -> str:
    return json.dumps({key: recipe[key] for key in ("semantics", "seed", "parameters", "recompress") if key in recipe}, ensure_ascii=False)


def _parent(model: Mapping[str, Any]) -> str:
    inner = model.get("recipe")
    made = f", made by {inner.get('merge_method')} of {', '.join(str(each['task']) for each in _models(inner))}" if isinstance(inner, dict) else ""
    return f"{model.get('model')}: {json.dumps(model.get('parameters'), ensure_ascii=False)}, content digest {model.get('content_digest')}{made}"


def printable(text: str) -> str:
    """The text with whatever could steer a terminal written as an escape: the file may be anybody's."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _tensors(summary: Summary) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", title="")
    for name in ("tensor", "change"):
        table.add_column(name, overflow="fold")
    for name in ("shape", "density", "non-zeros", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for tensor in summary.tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        density = f"{tensor.density:.4f}" if tensor.entries else "exact"
        table.add_row(Text(tensor.name), tensor.change, shape, density, f"{tensor.nonzeros:,}" if tensor.entries else "", f"{tensor.bytes:,}")
    return table
