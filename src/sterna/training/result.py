"""What a training gave, in numbers and file names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sterna.expert.changes import Set
from sterna.expert.expert import Expert

FORMAT = 1


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """`metrics` holds, for the trained model and for the base with the written expert on it, the scores of each split that was held out.

    `sizes` are bytes on disk. `counts` are numbers: trained by the method and in the head, and stored in the expert (levels that are not zero, and
    exact values). `seconds` are those of the training, interrupted parts included as far as their checkpoints go, and of what came after.
    """

    output: str
    metrics_file: str
    config_file: str
    run_dir: str
    method: str
    task: str
    ends_as: str
    folder_because: str | None
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]
    rows: Mapping[str, int]
    classes: tuple[str, ...]
    sizes: Mapping[str, int | float]
    counts: Mapping[str, int | float]
    steps: int
    resumed_from: int | None
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"format": FORMAT, **asdict(self)}

    def for_file(self) -> dict[str, Any]:
        """Plain JSON without folders, which differ from machine to machine."""
        own = ("metrics_file", "config_file", "run_dir", "resumed_from")
        return {name: value for name, value in self.to_dict().items() if name not in own} | {"output": Path(self.output).name}


def expert_sizes(expert: Expert) -> dict[str, int | float]:
    """Bytes of the expert's file, of the head in it, and how many numbers it stores."""
    from sterna.summary import inspect

    heads = [tensor for change in expert.changes if isinstance(change, Set) and change.role == "head" for _, tensor in change.exact]
    exact = sum(tensor.numel() for change in expert.changes for _, tensor in change.exact)
    levels = sum(ternary.count for change in expert.changes for ternary in change.ternaries)
    bytes_head = sum(tensor.numel() * tensor.element_size() for tensor in heads)
    return {"bytes": inspect(expert).bytes, "bytes_head": bytes_head, "stored": exact + levels}
