"""What a person names on a command line -> the subjects of a report: expert files by task, rows and tuned models by task."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sterna.errors import InvalidArgument
from sterna.expert.expert import Expert
from sterna.reporting.measure import Subject
from sterna.scoring.bench import Bench, open_bench
from sterna.scoring.evaluate import Model, models_by_task, named_models, tuned_by_task
from sterna.scoring.rows import Rows


def subjects_of(
    base: str | os.PathLike[str],
    experts: Sequence[str | os.PathLike[str]],
    data: Rows | Mapping[str, Rows],
    tuned: Any = None,
    *,
    controls: bool = True,
    **options: Any,
) -> list[Subject]:
    """One subject for each task: the first expert of a task is the one that the report speaks of, those after it stand beside it.

    `data`, `tuned` and which expert is for which task are as in `sterna.evaluate`; `options` are those of
    `open_bench`. `controls`: other ways to store the tuned model beside them.

    Raises NotFound, InvalidFile, InvalidArgument.
    """
    if not experts:
        raise InvalidArgument("no expert is given; expected one or more files")
    by_task: dict[str, Rows] = dict(data) if isinstance(data, Mapping) else {"": data}
    models = named_models([("expert", expert) for expert in experts])
    chosen, tuned_of = models_by_task(models, list(by_task), None), tuned_by_task(tuned, list(by_task))
    return [_subject(base, task, rows, chosen[task], tuned_of.get(task, []), controls, options) for task, rows in by_task.items()]


def _subject(base: Any, task: str, rows: Rows, models: Sequence[Model], tuned: Sequence[Model], controls: bool, options: Any) -> Subject:
    experts = [_expert(model, task) for model in models]
    first, *others = models
    return Subject(
        task or first.task,
        opener(base, rows, [*(model.source for model in tuned), *experts], options),
        experts[0],
        first.name,
        tuned[0].source if tuned else None,
        tuple((model.name, expert) for model, expert in zip(others, experts[1:], strict=True)),
        controls=controls,
    )


def opener(base: Any, rows: Rows, like: Sequence[Any], options: Mapping[str, Any]) -> Callable[[], Bench]:
    """What opens a bench when it is asked to."""
    return lambda: open_bench(base, rows, like=list(like), **options)


def _expert(model: Model, task: str) -> Expert:
    """The model's expert, with the head of the task where it carries several."""
    from sterna.expert.heads import with_head

    assert isinstance(model.source, Expert)
    return with_head(model.source, task if task in model.heads else None)
