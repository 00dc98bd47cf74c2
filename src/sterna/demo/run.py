"""The demo from end to end: two trainings, experts of both beside their controls, and both on one live model, one after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sterna
from sterna.demo.assets import asset_path, cache_folder
from sterna.demo.data import Split, Task, newsgroups, split_rows, tweets
from sterna.demo.evaluation import BATCH, Tokens, counter, tokenized
from sterna.demo.models import load_classifier
from sterna.demo.options import DemoOptions, checked
from sterna.demo.report import DemoResult, TaskResult
from sterna.demo.study import Findings, Study, findings
from sterna.demo.subjects import full_subject, lora_subject
from sterna.demo.tables import read_rows
from sterna.demo.training import Recipe, load_lora, run_folder, train
from sterna.demo.tunings import with_tunings
from sterna.errors import CannotWrite
from sterna.needs import check_needs
from sterna.progress import Progress, silent
from sterna.training.models import length_limit, load_tokenizer, model_folder

if TYPE_CHECKING:
    from sterna.reporting.measure import LivePart
    from sterna.reporting.report import DtypeRun


def run_demo(options: DemoOptions | None = None, progress: Progress = silent) -> DemoResult:
    """Run the demo and return what it found. Bad options and bad data are refused before anything is trained.

    The trainings are kept in the cache under a digest of all that determines them, so a second run only evaluates.

    Raises:
        SternaError: see `checked`, `read_rows`, `split_rows`, `model_folder`, `train`, and the product's own errors.
    """
    from sterna.demo.page import report_of_demo
    from sterna.reporting.machine import machine
    from sterna.reporting.page import write_page

    options = checked(options or DemoOptions())
    check_needs()
    cache = options.cache or cache_folder()
    tasks = tasks_of(options, cache)
    base = asset_path("encoder", cache) if options.model is None else model_folder(options.model)
    folder = options.output or cache / "demo" / ("experts-quick" if options.quick else "experts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot write experts to {folder}: {error.strerror or error}; choose another output folder") from error
    clock, tokenizer = Clock(), load_tokenizer(base)
    options = replace(options, max_length=length_limit(base, tokenizer, options.max_length))
    studies = [_study(task, recipe, base, tokenizer, cache, clock, progress) for task, recipe in zip(tasks, recipes_of(options), strict=True)]
    tuned: dict[str, Path] = {
        recipe.kind: _trained(tasks[0], recipe, base, tokenizer, studies[0].train, cache, clock, progress) for recipe in tuned_recipes_of(options)
    }
    model = load_classifier(base, None, tokenizer)
    with clock("evaluation"):
        found = [findings(study, model, options, folder, progress) for study in studies]
        found[0] = with_tunings(studies[0], model, found[0], tuned, folder, progress)
    with clock("live"):
        live, dtypes = _live(base, tasks, studies, found, options, progress)
    result = DemoResult(
        tasks=tuple(_task_result(*parts) for parts in zip(tasks, recipes_of(options), studies, found, strict=True)),
        live=live,
        dtypes=dtypes,
        files=tuple(str(path) for part in found for path in part.files),
        seconds=clock.seconds,
        machine=machine(),
    )
    page = folder / "report.html"
    write_page(report_of_demo(result, studies, found), page)
    return replace(result, page=str(page))


def tasks_of(options: DemoOptions, cache: Path) -> tuple[Task, Task]:
    """The task of the full fine-tune and that of the LoRA: two bundled ones, or a person's own data twice."""
    if options.data is None:
        texts = asset_path("texts", cache)
        return newsgroups(texts, options.sizes, options.seed), tweets(texts, replace(options.sizes, train=options.lora_rows), options.seed)
    rows = read_rows(options.data, options.text_column, options.label_column)
    test = None if options.test_data is None else read_rows(options.test_data, options.text_column, options.label_column)
    first = split_rows(options.data.stem, rows, options.sizes, options.seed, test)
    fewer = Split(first.train.texts[: options.lora_rows], first.train.labels[: options.lora_rows])
    return first, replace(first, name=f"{first.name}, LoRA", train=fewer)


def recipes_of(options: DemoOptions) -> tuple[Recipe, Recipe]:
    full = Recipe("full", options.learning_rate, options.epochs, options.batch, options.max_length, options.seed)
    return full, replace(full, kind="lora", learning_rate=options.lora_learning_rate, rank=options.lora_rank)


def tuned_recipes_of(options: DemoOptions) -> tuple[Recipe, Recipe]:
    """PaFi and HiWi on the rows of the full fine-tune."""
    full, _ = recipes_of(options)
    pafi = replace(full, kind="pafi", learning_rate=options.tuned_learning_rate)
    return pafi, replace(pafi, kind="hiwi", rank=options.hiwi_rank)


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds spent in each named stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def _study(task: Task, recipe: Recipe, base: Path, tokenizer: Any, cache: Path, clock: Clock, progress: Progress) -> Study:
    train_tokens, validation, test = (tokenized(tokenizer, split, recipe.max_length) for split in (task.train, task.validation, task.test))
    folder = _trained(task, recipe, base, tokenizer, train_tokens, cache, clock, progress)
    if recipe.kind == "full":
        subject = full_subject(load_classifier(folder, None, tokenizer), load_classifier(base, task.classes, tokenizer))
    else:
        subject = lora_subject(load_lora(base, folder, task, tokenizer))
    return Study(task.name, base, folder, subject, tokenizer, train_tokens, validation, test)


def _trained(task: Task, recipe: Recipe, base: Path, tokenizer: Any, tokens: Tokens, cache: Path, clock: Clock, progress: Progress) -> Path:
    """The folder of a training, done now where the cache lacks it."""
    folder = run_folder(recipe, base, task, cache / "demo" / "runs")
    if not folder.is_dir():
        with clock("training"):
            step = counter(progress, f"training on {task.name}, {recipe.kind}", recipe.epochs * len(tokens), "texts")
            train(recipe, base, task, tokens, tokenizer, folder, step)
    return folder


def _live(
    base: Path, tasks: Sequence[Task], studies: Sequence[Study], found: Sequence[Findings], options: DemoOptions, progress: Progress
) -> tuple[LivePart, tuple[DtypeRun, ...]]:
    """Both experts on one freshly loaded model, and each on the base in other precisions: as `sterna report` measures them."""
    from sterna.reporting.measure import Subject, dtype_runs, live_part
    from sterna.scoring.bench import Bench, open_bench

    subjects: list[Subject] = []
    benches: list[Bench] = []
    for task, study, part in zip(tasks, studies, found, strict=True):
        rows = [{"text": text, "label": task.classes[label]} for text, label in zip(task.test.texts, task.test.labels, strict=True)]
        expert = sterna.load(part.expert)
        bench = open_bench(base, rows, like=expert, task="classification", max_length=options.max_length, batch=BATCH)
        benches.append(replace(bench, model=benches[0].model) if benches else bench)
        subjects.append(Subject(study.name, partial(replace, bench), expert))
    live = live_part(subjects, benches, options.repeats, progress)
    assert live is not None
    dtypes = [run for subject, bench in zip(subjects, benches, strict=True) for run in dtype_runs(subject, bench, progress)]
    return live, tuple(dtypes)


def _task_result(task: Task, recipe: Recipe, study: Study, found: Findings) -> TaskResult:
    return TaskResult(
        name=task.name,
        training="full fine-tuning" if recipe.kind == "full" else f"LoRA, rank {recipe.rank},",
        classes=len(task.classes),
        train_rows=len(task.train),
        validation_rows=len(task.validation),
        test_rows=len(task.test),
        parameters=study.subject.tau.numel(),
        rows=found.rows,
    )
