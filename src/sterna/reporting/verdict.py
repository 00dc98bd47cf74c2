"""The one sentence on top of a report, and the few figures below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sterna.reporting.amounts import bracket, difference, digits, milliseconds, ratio, score, signed, size, times
from sterna.reporting.report import Candidate, Report, TaskReport, is_noise, mean
from sterna.reporting.texts import Text, metric_title, same, t
from sterna.scoring.intervals import Estimate


@dataclass(frozen=True, slots=True)
class Figure:
    """One large figure, what it is, and its interval where it has one."""

    value: str
    what: Text
    beside: str = ""


def loss(one: Candidate, task: TaskReport) -> float | None:
    """How much worse than the tuned model, in the metric's units; negative where it is better; None without a tuned model."""
    if one.to_tuned is None:
        return None
    return -one.to_tuned.value if task.metric.higher_is_better else one.to_tuned.value


def worst(compared: Sequence[tuple[TaskReport, Candidate]]) -> tuple[TaskReport, Candidate, Estimate]:
    """The largest loss, as a share of the tuned model's score, since tasks may have metrics of their own; of candidates that are compared."""

    def share(item: tuple[TaskReport, Candidate]) -> float:
        tuned = item[0].of("tuned")
        return (loss(item[1], item[0]) or 0.0) / max(abs(tuned.score.value) if tuned else 1.0, 1e-9)

    task, one = max(compared, key=share)
    assert one.to_tuned is not None
    return task, one, one.to_tuned


def served(report: Report) -> list[tuple[TaskReport, Candidate]]:
    """The tasks that have an expert, with it."""
    return [(task, one) for task in report.tasks if (one := task.of("expert")) is not None]


def verdict(report: Report) -> list[Text]:
    """One sentence with its numbers; before it another one, where a pilot's gates left tasks without an expert."""
    found = served(report)
    without = [task.name for task in report.tasks if task.of("expert") is None]
    if not found:
        return [t("verdict.none", tasks=_listed(without))]
    sentences = [t("verdict.stopped", tasks=_listed(without))] if without else []
    total, copy = sum(one.bytes or 0 for _, one in found), sum(_copy(task) for task, _ in found)
    smaller = t("verdict.smaller", times=digits(copy / total, 2 if copy < 10 * total else 3)) if copy and total else same("")
    fields = {"size": size(total), "copy": size(copy), "ratio": smaller, "live": _live(report)}
    if len(found) == 1:
        task, one = found[0]
        return [*sentences, t("verdict.one", task=task.name, score=_judged(task, one), **fields)]
    return [*sentences, t("verdict.many", n=len(found), score=_all_judged(found), **fields)]


def figures(report: Report) -> list[Figure]:
    found = served(report)
    result: list[Figure] = []
    if found:
        bytes_ = mean([one.bytes or 0 for _, one in found])
        result.append(Figure(size(bytes_), t("key.size" if len(found) == 1 else "key.size.mean")))
        if copy := mean([_copy(task) for task, _ in found]):
            result.append(Figure(times(copy / bytes_), t("key.smaller")))
        if compared := [(task, one) for task, one in found if one.to_tuned is not None]:
            task, _, to_tuned = worst(compared)
            what = t("key.difference", metric=metric_title(task.metric.title)) if len(found) == 1 else t("key.difference.worst")
            result.append(Figure(signed(to_tuned.value, task.metric), what, _beside(to_tuned, task)))
    if report.steps is not None:
        swap = report.steps.swap
        result.append(Figure(milliseconds((swap or report.steps.attach).median), t("key.swap" if swap else "key.attach")))
    if report.latency is not None:
        at = report.latency.ratio
        result.append(Figure(f"{at.value:.2f}\u00d7", t("key.latency"), ratio(at, 2).partition(" ")[2]))
    return result


def _beside(estimate: Estimate, task: TaskReport) -> str:
    return bracket(signed(estimate.low, task.metric), signed(estimate.high, task.metric))


def _copy(task: TaskReport) -> int:
    """Bytes of a full copy, 0 where they are not known."""
    return task.bytes("copy") or 0


def _judged(task: TaskReport, one: Candidate) -> Text:
    tuned, base, metric = task.of("tuned"), task.of("base"), task.metric
    said = {"metric": metric_title(metric.title), "value": score(one.score.value, metric)}
    if tuned is not None and one.to_tuned is not None:
        lost = loss(one, task) or 0.0
        key = "noise" if is_noise(one.to_tuned) else "worse" if lost > 0 else "better"
        return t(f"verdict.{key}", tuned=score(tuned.score.value, metric), difference=difference(one.to_tuned, metric), **said)
    if base is not None and one.to_base is not None:
        return t("verdict.against.base", base=score(base.score.value, metric), difference=difference(one.to_base, metric), **said)
    return t("verdict.alone", **said)


def _all_judged(found: list[tuple[TaskReport, Candidate]]) -> Text:
    compared = [(task, one) for task, one in found if one.to_tuned is not None]
    if not compared:
        return t("verdict.uncompared")
    worse = [(task, one) for task, one in compared if (loss(one, task) or 0.0) > 0 and one.to_tuned is not None and not is_noise(one.to_tuned)]
    task, _, to_tuned = worst(worse or compared)
    said = {"difference": difference(to_tuned, task.metric), "task": task.name}
    return t("verdict.some.worse", worse=len(worse), compared=len(compared), **said) if worse else t("verdict.all.noise", **said)


def _live(report: Report) -> Text:
    text = same("")
    if report.steps is not None:
        steps = report.steps
        swap, attach = (milliseconds(times.median) if times else "" for times in (steps.swap, steps.attach))
        text = t("verdict.swap", swap=swap) if swap else t("verdict.attach", attach=attach)
        if report.latency is not None:
            more = t("verdict.latency", ratio=ratio(report.latency.ratio, 2))
            text = Text(text.en + more.en, text.ja + more.ja)
    return text


def _listed(names: list[str]) -> Text:
    return Text(", ".join(names), "、".join(names))
