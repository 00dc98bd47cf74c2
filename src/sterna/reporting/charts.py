"""Charts as inline SVG that follows the page's width: places are percent across and pixels down, so no text is ever scaled; colours are the page's.

Everything that carries a value can be reached by the keyboard and says itself in its title.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from sterna.reporting.scales import Scale
from sterna.reporting.texts import Text, same, tspans

NOTHING = same("")
SHAPES = {
    "expert": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0",
    "chosen": "M-7,0a7,7 0 1,0 14,0a7,7 0 1,0 -14,0",
    "tuned": "M0,-6.5L6.5,0L0,6.5L-6.5,0Z",
    "base": "M-4.5,-4.5H4.5V4.5H-4.5Z",
    "control": "M-4.5,-4.5L4.5,4.5M4.5,-4.5L-4.5,4.5",
    "words": "M0,-5L5,4H-5Z",
}
"""One shape for each kind, so that nothing depends on colour."""

WIDTHS = (236, 300, 420, 540, 660, 800)
"""Widths in pixels beside the gutter at which labels inside a chart must not touch."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with what it says; `low` and `high` draw its interval."""

    kind: str
    value: float
    says: Text
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a scatter chart; `label` stands beside it where there is room."""

    kind: str
    x: float
    y: float
    says: Text
    label: Text = NOTHING


def _saying(says: Text) -> Markup:
    """The attributes by which a drawing says itself; the page's script puts the reader's language into `aria-label` and the title."""
    return Markup('tabindex="0" role="img" aria-label="{0}" data-en="{0}" data-ja="{1}"').format(says.en, says.ja)


def width_of(text: str, size: float = 12.5) -> float:
    """Pixels that a text takes, rather too many."""
    return sum(size * (1.02 if ord(letter) > 0x2E7F else 0.6) for letter in text)


def mark(kind: str, x: float, y: float | str, says: Text) -> Markup:
    """A shape at x percent and y pixels (or "50%") that the keyboard reaches and that says itself."""
    return Markup('<g class="mark {}" {}><title>{}</title>{}</g>').format(kind, _saying(says), says.en, _shape(kind, x, y))


def symbol(kind: str) -> Markup:
    """A shape for a legend."""
    return Markup('<svg class="symbol" width="18" height="16" aria-hidden="true"><g class="mark {}">{}</g></svg>').format(kind, _shape(kind, 50, 8))


def _shape(kind: str, x: float, y: float | str) -> Markup:
    return Markup('<svg x="{}%" y="{}" overflow="visible"><path d="{}"/></svg>').format(x, y, SHAPES[kind])


def _beside_axis(lines: Iterable[tuple[float, str]]) -> list[Markup]:
    """An upright axis: lines at (pixels down, text), their texts in the gutter that the page keeps left of such a chart."""
    drawn = Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/><text x="-8" y="{1}" text-anchor="end">{2}</text>')
    return [drawn.format(y, y + 4, text) for y, text in lines]


def _svg(height: int, parts: Iterable[Markup], kind: str) -> Markup:
    return Markup('<svg class="{}" width="100%" height="{}" role="group">{}</svg>').format(kind, height, Markup("").join(parts))


def row(marks: Sequence[Mark], scale: Scale, guides: Sequence[float] = (), samples: Sequence[float] = ()) -> Markup:
    """One line of a chart of intervals: whiskers, single samples as ticks, and points, before the axis' lines."""
    parts = [Markup('<line class="grid" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(scale.percent(tick)) for tick in scale.ticks()]
    parts += [Markup('<line class="guide" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(scale.percent(guide)) for guide in guides]
    stroke = Markup('<svg x="{}%" y="50%" overflow="visible"><line class="sample" y1="-6" y2="6"/></svg>')
    parts += [stroke.format(scale.percent(value)) for value in samples]
    for one in marks:
        if one.low is not None and one.high is not None:
            low, high = scale.percent(one.low), scale.percent(one.high)
            parts.append(Markup('<line class="whisker {}" x1="{}%" x2="{}%" y1="50%" y2="50%"/>').format(one.kind, low, high))
    parts += [mark(one.kind, scale.percent(one.value), "50%", one.says) for one in marks]
    return _svg(34, parts, "row")


def axis(scale: Scale, shown: Callable[[float], str]) -> Markup:
    """The axis below such lines: its marked values."""
    return _svg(22, [_tick(scale, tick, shown(tick), 15) for tick in scale.ticks()], "axis")


def _tick(scale: Scale, value: float, text: str, y: float) -> Markup:
    at = scale.percent(value)
    anchor = "start" if at < 9 else "end" if at > 91 else "middle"
    return Markup('<text x="{}%" y="{}" text-anchor="{}">{}</text>').format(at, y, anchor, text)


def bar(value: float, most: float, kind: str, says: Text) -> Markup:
    """A bar from zero, as long as value / most, never thinner than a hairline."""
    share = 100 * value / most if most else 0.0
    shape = Markup('<rect class="track" width="100%" height="10"/><rect class="bar" style="width:max(2px, {:.4f}%)" height="10"/>').format(share)
    inner = Markup('<g class="{}" {}><title>{}</title>{}</g>').format(kind, _saying(says), says.en, shape)
    return _svg(10, [inner], "bar-chart")


def columns(values: Sequence[tuple[str, float, Text]], most: float, ticks: Sequence[tuple[float, str]], height: int = 180) -> Markup:
    """Upright bars: (name, value, what it says) each, over lines at `ticks`; names stand below where there is room for all."""
    top, bottom = 18, height - 22
    parts = []
    lines = [(round(bottom - (bottom - top) * value / most, 1), text) for value, text in ticks]
    each = 100.0 / max(len(values), 1)
    every = _thinned([name for name, _, _ in values], each)
    for place, (name, value, says) in enumerate(values):
        x, high = each * place, round((bottom - top) * value / most, 1)
        shape = Markup('<rect x="{:.3f}%" y="{}" width="{:.3f}%" height="{}"/>').format(x + each * 0.14, bottom - high, each * 0.72, max(high, 1))
        parts.append(Markup('<g class="column" {}><title>{}</title>{}</g>').format(_saying(says), says.en, shape))
        if place % every == 0:
            parts.append(Markup('<text x="{:.3f}%" y="{}" text-anchor="middle">{}</text>').format(x + each / 2, height - 6, name))
    return _svg(height, [*_beside_axis(lines), *parts], "columns axed")


def _thinned(names: Sequence[str], each: float) -> int:
    """Every how many-th name fits at the smallest width."""
    room = WIDTHS[0] * each / 100
    return max(1, -int(-(max((width_of(name) for name in names), default=1) + 6) // max(room, 1)))


def scatter(
    points: Sequence[Point],
    x: Scale,
    y: Scale,
    shown_x: Callable[[float], str],
    shown_y: Callable[[float], str],
    line: Sequence[Point] = (),
    height: int = 340,
) -> Markup:
    """Points over two axes; `line` is joined by steps, since what lies between two points of a frontier is the smaller one."""
    top, bottom = 24, height - 24

    def down(value: float) -> float:
        return round(bottom - (bottom - top) * y.share(value), 1)

    parts = [_tick(x, tick, shown_x(tick), height - 6) for tick in x.ticks(4)]
    ends = [*(x.percent(one.x) for one in line[1:]), 100.0]
    steps = [(x.percent(one.x), end, down(one.y)) for one, end in zip(line, ends, strict=True)] if line else []
    parts += [Markup('<line class="frontier" x1="{0}%" x2="{1}%" y1="{2}" y2="{2}"/>').format(*step) for step in steps]
    riser = Markup('<line class="frontier" x1="{0}%" x2="{0}%" y1="{1}" y2="{2}"/>')
    parts += [riser.format(end, level, following) for (_, end, level), (_, _, following) in pairwise(steps)]
    parts += [mark(one.kind, x.percent(one.x), down(one.y), one.says) for one in points]
    placed = placed_labels([(x.percent(one.x), down(one.y), one.label) for one in points], steps, top, bottom)
    for one, place in zip(points, placed, strict=True):
        if place is not None:
            dx, dy, anchor = place
            text = Markup('<text class="label {}" x="{}%" y="{}" dx="{}" dy="{}" text-anchor="{}">{}</text>')
            parts.append(text.format(one.kind, x.percent(one.x), down(one.y), dx, dy, anchor, tspans(one.label)))
    return _svg(height, [*_beside_axis([(down(tick), shown_y(tick)) for tick in y.ticks()]), *parts], "scatter axed")


Place = tuple[float, float, str]
Box = tuple[float, float, float, float]


def placed_labels(
    points: Sequence[tuple[float, float, Text]], steps: Sequence[tuple[float, float, float]], top: float, bottom: float
) -> list[Place | None]:
    """Where each label (percent, pixels down, text) can stand so that at no width it touches another, a point, a line or an edge; None: nowhere.

    `steps` are level lines (from percent, to percent, pixels down).
    """
    boxes: list[list[Box]] = []
    for width in WIDTHS:
        near = [(width * at / 100 - 8, down - 8, 16.0, 16.0) for at, down, _ in points]
        boxes.append([*near, *((width * start / 100, down - 1, width * (end - start) / 100, 2.0) for start, end, down in steps)])
    places: list[Place | None] = []
    for at, down, text in points:
        found: Place | None = None
        long = max(width_of(said) for said in text)
        for dx, dy, anchor in ((11.0, 4.0, "start"), (-11.0, 4.0, "end"), (0.0, -12.0, "middle"), (0.0, 21.0, "middle")) if long else ():
            start = {"start": dx, "end": dx - long, "middle": -long / 2}[anchor]
            wanted = [(width * at / 100 + start, down + dy - 12, long, 16.0) for width in WIDTHS]
            if all(_free(box, width, top, bottom, others) for width, box, others in zip(WIDTHS, wanted, boxes, strict=True)):
                found = (dx, dy, anchor)
                for box, others in zip(wanted, boxes, strict=True):
                    others.append(box)
                break
        places.append(found)
    return places


def _free(box: Box, width: float, top: float, bottom: float, others: Sequence[Box]) -> bool:
    inside = box[0] >= 0 and box[0] + box[2] <= width and box[1] >= top - 16 and box[1] + box[3] <= bottom + 2
    return inside and not any(_touch(box, other) for other in others)


def _touch(one: Box, other: Box) -> bool:
    return one[0] < other[0] + other[2] and other[0] < one[0] + one[2] and one[1] < other[1] + other[3] and other[1] < one[1] + one[3]


def transfer(ways: Sequence[tuple[str, int, Text]], wait: float, height: int = 320, speeds: tuple[float, float] = (56e3, 1e9)) -> Markup:
    """Seconds against link speed, both logarithmic: one line for each (kind, bytes, name); the page draws them anew when its reader changes `wait`.

    The page's script knows the axes by the data attributes.
    """
    from sterna.reporting.amounts import duration, speed

    x = Scale(*speeds, log=True, inset=0.0)
    y = Scale(1e-3, max([10.0, *(seconds(size, speeds[0], 1.0) for _, size, _ in ways)]) * 1.2, log=True)
    top, bottom = 20, height - 24

    def down(value: float) -> float:
        return round(bottom - (bottom - top) * y.share(value), 1)

    known = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0, 360000.0, 3600000.0)
    lines = [(down(tick), plain(duration(tick))) for tick in known if y.low <= tick <= y.high]
    parts = []
    parts += [_tick(x, tick, plain(speed(tick)), height - 6) for tick in (56e3, 1e6, 1e7, 1e9)]
    parts.append(Markup('<g class="spare">{}</g>').format(_tick(x, 1e8, plain(speed(1e8)), height - 6)))
    for kind, size, name in ways:
        path = Markup('<g class="way {}" data-bytes="{}" {}><title>{}</title>').format(kind, size, _saying(name), name.en)
        grid = [speeds[0] * (speeds[1] / speeds[0]) ** (i / 32) for i in range(33)]
        places = [(x.percent(one), down(seconds(size, one, wait))) for one in grid]
        for (x1, y1), (x2, y2) in pairwise(places):
            path += Markup('<line x1="{}%" y1="{}" x2="{}%" y2="{}"/>').format(x1, y1, x2, y2)
        parts.append(path + Markup("</g>"))
    parts.append(Markup('<line class="cursor" x1="50%" x2="50%" y1="{}" y2="{}"/>').format(top - 12, bottom))
    start = Markup('<svg class="transfer axed" width="100%" height="{}" role="group" data-top="{}" data-bottom="{}" data-low="{}" data-high="{}">')
    return start.format(height, top, bottom, y.low, y.high) + Markup("").join([*_beside_axis(lines), *parts]) + Markup("</svg>")


def plain(amount: str) -> str:
    """A round amount without zeros after its point."""
    number, _, unit = amount.partition("\u00a0")
    return f"{float(number.replace(',', '')):g}\u00a0{unit}"


def seconds(size: float, speed: float, wait: float) -> float:
    """Seconds until `size` bytes have arrived over a link of `speed` bits a second whose first byte takes `wait` seconds."""
    return wait + 8 * size / speed
