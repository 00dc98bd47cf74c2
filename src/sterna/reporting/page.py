"""A report as one HTML file that needs nothing else: both languages, charts, the numbers behind them, and a small script."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from markupsafe import Markup

from sterna.errors import InvalidArgument
from sterna.reporting import amounts, charts
from sterna.reporting.report import Candidate, DtypeRun, Gate, Kept, Report, TaskReport, Times, Way, frontier, is_noise, mean
from sterna.reporting.scales import linear, logarithmic
from sterna.reporting.tables import SPEEDS, WAIT, shown, tables
from sterna.reporting.texts import LANGUAGES, Text, label, metric_title, same, t
from sterna.reporting.verdict import figures, served, verdict
from sterna.writing import whole_file

WAYS: tuple[Way, ...] = ("expert", "lora", "delta", "copy")
SPEED = 10e6
"""Bits a second, until the page's reader says otherwise."""

NOTHING = Markup()

_T = TypeVar("_T")


def write_page(report: Report, path: str | os.PathLike[str], language: str = "en") -> None:
    """Write the page, whole or not at all. Raises CannotWrite, or InvalidArgument as `page` does."""
    html = page(report, language)
    with whole_file(path) as file:
        file.write(html.encode())


def page(report: Report, language: str = "en") -> str:
    """The page's HTML. Names are a user's: they are escaped, and characters that no page may hold are replaced.

    Raises:
        InvalidArgument: a language that there is no text in.
    """
    checked_language(language)
    from jinja2 import Environment, PackageLoader, StrictUndefined

    report = cleaned(report)
    loader = PackageLoader("sterna", "reporting")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    files = importlib.resources.files("sterna.reporting")
    script, style = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    said = verdict(report)
    return environment.get_template("page.html").render(
        report=report,
        language=language,
        script=Markup(script),
        script_digest=digest,
        style=Markup(style),
        t=t,
        amounts=amounts,
        symbol=charts.symbol,
        tables=tables(report),
        shown=shown,
        verdict=Text(" ".join(one.en for one in said), "".join(one.ja for one in said)),
        figures=figures(report),
        sections=_sections(report),
        gate_value=gate_value,
        metrics={task.name: task.metric for task in report.tasks},
        speed=SPEED,
        speed_place=1000 * math.log(SPEED / SPEEDS[0]) / math.log(SPEEDS[-1] / SPEEDS[0]),
        wait_ms=round(1e3 * WAIT),
        memory_gb=f"{memory_shown(report.memory.base) / 1e9:g}" if report.memory else "",
        json=_json(report),
    )


def checked_language(language: str) -> None:
    """Raise InvalidArgument for a language that there is no text in."""
    if language not in LANGUAGES:
        raise InvalidArgument(f"language is {language!r}; expected one of {', '.join(LANGUAGES)}")


def _json(report: Report) -> Markup:
    """The report as JSON that no parser of HTML can leave: only `<`, `>` and `&` would matter, and JSON has another way to write them."""
    text = json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def cleaned(value: _T) -> _T:
    """The same with every text free of control characters, lone surrogates and characters that turn the writing's direction."""
    if isinstance(value, str):
        return "".join("\ufffd" if _unsafe(letter) else letter for letter in value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: cleaned(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, tuple):
        return tuple(cleaned(item) for item in value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {cleaned(name): cleaned(item) for name, item in value.items()}  # type: ignore[return-value]
    return value


def _unsafe(letter: str) -> bool:
    turning = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return unicodedata.category(letter) in ("Cc", "Cs", "Cn", "Zl", "Zp") or letter in turning


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a chart: what it is, its drawing, and its value in words."""

    label: Text
    chart: Markup
    value: str
    note: Text | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A chart: lines over one axis, or one drawing, under a heading."""

    rows: tuple[Row, ...] = ()
    axis: Markup = NOTHING
    title: Text | None = None
    under: Text | None = None
    drawing: Markup = NOTHING
    legend: tuple[tuple[str, Text], ...] = ()
    facts: tuple[tuple[Text, Text], ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its name (the template adds what only it has), its texts, its charts, and the tables behind them."""

    name: str
    lead: tuple[Text, ...]
    groups: tuple[Group, ...]
    tables: tuple[str, ...]
    alarm: Text | None = None


def _sections(report: Report) -> list[Section]:
    """What was measured, in the page's order."""
    made = [_scores(report), _gates(report), _storage(report), _transfer(report), _steps(report), _latency(report), _memory(report)]
    made += [_frontier(report), _layers(report), _robust(report), _side(report)]
    return [section for section in made if section is not None]


def _says(name: Text, value: str) -> Text:
    return Text(f"{name.en}: {value}", f"{name.ja}: {value}")


def _kind(one: Candidate) -> str:
    return "chosen" if one.chosen else one.kind


def _named(one: Candidate) -> Text:
    return t(f"kind.{one.kind}") if one.kind in ("base", "tuned") else label(one.label)


def _scores(report: Report) -> Section:
    groups = []
    for task in report.tasks:
        wanted = [one for one in task.candidates if one.kind in ("base", "tuned", "words") or one.chosen]
        scale = linear([x for one in wanted for x in (one.score.low, one.score.high)])
        tuned = task.of("tuned")
        guides = [tuned.score.value] if tuned else []
        rows = [_score_row(one, task, scale, guides) for one in wanted]
        under = t("scores.rows", rows=f"{task.rows:,}", metric=metric_title(task.metric.title))
        if not task.metric.higher_is_better:
            lower = t("scores.lower")
            under = Text(f"{under.en}; {lower.en}", f"{under.ja}、{lower.ja}")
        axis = charts.axis(scale, lambda value: f"{value:g}")
        groups.append(Group(tuple(rows), axis, same(task.name), under, facts=_compared(task)))
    return Section("scores", (t("scores.lead"),), tuple(groups), ("scores",))


def _score_row(one: Candidate, task: TaskReport, scale: Any, guides: Sequence[float]) -> Row:
    value = amounts.interval(one.score, task.metric)
    name = t("kind.chosen") if one.chosen else _named(one)
    drawn = charts.row([charts.Mark(_kind(one), one.score.value, _says(name, value), one.score.low, one.score.high)], scale, guides)
    return Row(name, drawn, value, label(one.label) if one.chosen and one.label else None, _kind(one))


def _compared(task: TaskReport) -> tuple[tuple[Text, Text], ...]:
    one = task.of("expert")
    facts = []
    for key, estimate in (("tuned", one.to_tuned), ("base", one.to_base)) if one else ():
        if estimate is not None:
            judged = t("scores.noise" if is_noise(estimate) else "scores.real")
            said = amounts.difference(estimate, task.metric)
            facts.append((t(f"scores.to.{key}"), Text(f"{said}, {judged.en}", f"{said}、{judged.ja}")))
    return tuple(facts)


def kept_on_average(tasks: Sequence[TaskReport]) -> list[Kept]:
    """Each way to keep a task, with its mean bytes over the tasks that have all of the ways that any has."""
    result = []
    for way in WAYS:
        found = [kept for task in tasks for kept in task.kept if kept.way == way]
        if found:
            result.append(Kept(way, round(mean([kept.bytes for kept in found])), all(kept.measured for kept in found)))
    return result


def _storage(report: Report) -> Section | None:
    kept = kept_on_average([task for task, _ in served(report)])
    if not kept:
        return None
    most = max(one.bytes for one in kept)
    rows = []
    for one in kept:
        text, name = amounts.size(one.bytes), t(f"way.{one.way}")
        kind = "expert" if one.way == "expert" else "other"
        rows.append(Row(name, charts.bar(one.bytes, most, kind, _says(name, text)), text, None if one.measured else t("way.computed"), kind))
    lead = t("storage.lead", mean=t("storage.mean") if len(served(report)) > 1 else same(""))
    return Section("storage", (lead, t("storage.delta")), (Group(tuple(rows)),), ("storage",))


def _transfer(report: Report) -> Section | None:
    kept = kept_on_average([task for task, _ in served(report)])
    if not kept:
        return None
    ways = [(one.way, one.bytes, _says(t(f"way.{one.way}"), amounts.size(one.bytes))) for one in kept]
    drawing = charts.transfer(ways, WAIT)
    taken = [amounts.duration(charts.seconds(one.bytes, SPEED, WAIT)) for one in kept]
    rows = [Row(t(f"way.{one.way}"), Markup(one.bytes), time, kind=one.way) for one, time in zip(kept, taken, strict=True)]
    return Section("transfer", (t("transfer.lead"), t("transfer.note")), (Group(tuple(rows), drawing=drawing),), ("transfer",))


def _timed(named: Sequence[tuple[Text, Times, str]]) -> Group:
    scale = linear([value for _, times, _ in named for value in times.samples], zero=True)
    rows = []
    for name, times, kind in named:
        low, high = times.quartiles
        said = amounts.milliseconds_between(times.median, low, high)
        drawn = charts.row([charts.Mark(kind, times.median, _says(name, said), low, high)], scale, samples=times.samples)
        rows.append(Row(name, drawn, said, kind=kind))
    return Group(tuple(rows), charts.axis(scale, lambda value: f"{value:g} ms"))


def _steps(report: Report) -> Section | None:
    steps = report.steps
    if steps is None:
        return None
    named = [("attach", steps.attach), ("swap", steps.swap), ("detach", steps.detach)]
    lead = [t("steps.lead"), t("steps.first", first=amounts.milliseconds(steps.first_attach))]
    if report.restored:
        lead.append(t("steps.restored"))
    group = _timed([(t(f"step.{name}"), times, "expert") for name, times in named if times is not None])
    return Section("steps", tuple(lead), (group,), ("steps",), t("steps.not.restored") if report.restored is False else None)


def _latency(report: Report) -> Section | None:
    found = report.latency
    if found is None:
        return None
    at = found.ratio
    said = t("latency.same" if at.low <= 1 <= at.high else "latency.slower" if at.low > 1 else "latency.faster")
    lead = t("latency.lead", batch=found.batch, length=found.length, pairs=len(found.base.samples))
    group = _timed([(t("latency.base"), found.base, "base"), (t("latency.attached"), found.attached, "expert")])
    scale = linear([at.low, at.high, 1.0], least=0.1)
    text = amounts.ratio(at)
    drawn = charts.row([charts.Mark("expert", at.value, _says(t("latency.ratio"), text), at.low, at.high)], scale, [1.0])
    paired = Group((Row(t("latency.ratio"), drawn, text, kind="expert"),), charts.axis(scale, lambda value: f"{value:g}\u00d7"))
    return Section("latency", (lead, said), (group, paired), ("latency",))


def _memory(report: Report) -> Section | None:
    found = report.memory
    if found is None:
        return None
    lead = t("memory.lead", base=amounts.size(found.base), expert=amounts.size(found.expert), undo=amounts.size(found.undo))
    memory = memory_shown(found.base)
    counts = (("experts", found.experts(memory), "expert"), ("copies", found.copies(memory), "other"))
    most = max(max(count for _, count, _ in counts), 1)
    rows = [
        Row(t(f"memory.{name}"), charts.bar(count, most, kind, _says(t(f"memory.{name}"), f"{count:,}")), f"{count:,}", kind=kind)
        for name, count, kind in counts
    ]
    return Section("memory", (lead, t("memory.note")), (Group(tuple(rows)),), ("memory",))


def memory_shown(base: int) -> int:
    """The memory that the page starts with: a usual size of at least four bases."""
    return next((size for size in (10**9 * 2**power for power in range(12)) if size >= 4 * base), 4 * base)


LEGEND = ("chosen", "expert", "tuned", "base", "control")


def _frontier(report: Report) -> Section | None:
    groups = []
    for task in report.tasks:
        for candidates, rows in ((task.candidates, None), (task.trail, task.trail_rows)):
            sized = [one for one in candidates if one.bytes and one.kind not in ("base", "words")]
            if len(sized) > 2:
                groups.append(_scattered(task, sized, rows))
    if not groups:
        return None
    lower = any(not task.metric.higher_is_better for task in report.tasks)
    return Section("frontier", (t("frontier.lead.lower" if lower else "frontier.lead"), t("frontier.axis.x")), tuple(groups), ("scores", "trail"))


def _scattered(task: TaskReport, sized: Sequence[Candidate], rows: int | None) -> Group:
    """Scores against bytes; `rows` where they are those of a choice, not the test's."""
    best = frontier(sized, task.metric.higher_is_better)
    points = sorted((_point(one, task) for one in sized), key=lambda point: (point.kind != "chosen", point.kind != "tuned"))
    x, y = logarithmic([one.bytes or 1 for one in sized]), linear([one.score.value for one in sized], least=1.0 if task.metric.points else 0.0)
    shown_size = lambda value: charts.plain(amounts.size(value))  # noqa: E731
    drawing = charts.scatter(points, x, y, shown_size, lambda value: f"{value:g}", [_point(one, task) for one in best])
    legend = (*((kind, t(f"kind.{kind}")) for kind in LEGEND if any(point.kind == kind for point in points)), ("line", t("kind.frontier")))
    metric, base = metric_title(task.metric.title), task.of("base")
    under = t("frontier.trail", metric=metric, rows=f"{rows:,}") if rows else t("scores.rows", metric=metric, rows=f"{task.rows:,}")
    facts = ((t("kind.base"), same(amounts.interval(base.score, task.metric))),) if base and not rows else ()
    return Group(title=same(task.name), under=under, drawing=drawing, legend=legend, facts=facts)


def _point(one: Candidate, task: TaskReport) -> charts.Point:
    assert one.bytes is not None
    name = label(one.label) if one.label else t(f"kind.{one.kind}")
    known = one.score.low < one.score.high
    value = amounts.interval(one.score, task.metric) if known else amounts.score(one.score.value, task.metric)
    says = _says(name, f"{amounts.size(one.bytes)}, {value}")
    beside = same(f"{one.density:g}") if one.kind == "expert" and one.density is not None else name
    return charts.Point(_kind(one), one.bytes, one.score.value, says, beside)


def _layers(report: Report) -> Section | None:
    groups = []
    for task, _ in served(report):
        if not any(layer.nonzeros for layer in task.layers):
            continue
        most = max(layer.density for layer in task.layers)
        scale = linear([0.0, 100 * most], zero=True)
        ticks = [(tick / 100, f"{tick:g} %") for tick in scale.ticks(4)]
        says = [(layer.name or "\u2013", layer.density, _says(same(layer.name or "\u2013"), amounts.share(layer.density))) for layer in task.layers]
        groups.append(Group(title=same(task.name) if len(report.tasks) > 1 else None, drawing=charts.columns(says, scale.high / 100, ticks)))
    lead = (t("layers.lead"),) if groups else (t("layers.none"),)
    return Section("layers", lead, tuple(groups), ("layers",)) if served(report) else None


def _robust(report: Report) -> Section | None:
    groups = [_dtype_group([run for run in report.dtypes if run.task == task.name], task) for task in report.tasks]
    groups = [group for group in groups if group.rows]
    lead = [t("robust.dtypes")] if groups else []
    same_bits = all(run.same_bits for run in report.threads)
    if report.threads:
        named = [(t("robust.thread") if run.threads == 1 else t("robust.threads.n", n=run.threads), run.attach, "expert") for run in report.threads]
        groups.append(_timed(named))
        lead += [t("robust.threads")] if same_bits else []
    alarm = None if same_bits else t("robust.threads.not")
    behind = tuple(name for name, there in (("dtypes", report.dtypes), ("threads", report.threads)) if there)
    return Section("robust", tuple(lead), tuple(groups), behind, alarm) if groups else None


def _dtype_group(runs: Sequence[DtypeRun], task: TaskReport) -> Group:
    scale = linear([value for run in runs if run.score for value in (run.score.low, run.score.high)])
    rows = []
    for run in runs:
        if run.score is None:
            rows.append(Row(same(run.dtype), charts.row([], scale), "\u2013", t("robust.refused"), "expert"))
            continue
        said = amounts.interval(run.score, task.metric)
        drawn = charts.row([charts.Mark("expert", run.score.value, _says(same(run.dtype), said), run.score.low, run.score.high)], scale)
        note = t("robust.swallowed", share=amounts.share(run.swallowed)) if run.swallowed else None
        rows.append(Row(same(run.dtype), drawn, said, note, "expert"))
    return Group(tuple(rows), charts.axis(scale, lambda value: f"{value:g}"), same(task.name))


def gate_value(gate: Gate, value: float, task: TaskReport | None) -> str:
    """A gate's number in its unit."""
    if gate.name in ("bytes", "memory"):
        return amounts.size(value)
    if gate.name == "latency":
        return f"{value:.3f}\u00d7"
    return amounts.milliseconds(value) if gate.name == "attach" else amounts.score(value, task.metric) if task else f"{value:g}"


def _gates(report: Report) -> Section | None:
    if not report.gates:
        return None
    return Section("gates", (t("gates.lead"),), (), ("gates",))


def _side(report: Report) -> Section | None:
    found = report.side_by_side
    if found is None:
        return None
    lead = (t("side.lead"), t("side.same")) if found.passed else (t("side.lead"),)
    return Section("side", lead, (), ("side_by_side",), None if found.passed else t("side.other"))
