"""Which setting to try next. It knows a candidate by its bytes, which cost no evaluation, and its score, which costs one; greater scores are better.

What it uses: at one density the score over ln(alpha) has one peak; in u = alpha * sqrt(density), the norm of what is kept over that of all, the peak
lies nearly at the same place for every density (`Ridge`), so a density begins where the others ended; and the best score grows with density.
Everything is decided by what was scored, in a fixed order: the same scores give the same search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from sterna.precision import HeadPrecision
from sterna.searching.allocation import AllocationName, closed_form_alpha
from sterna.searching.candidates import Setting
from sterna.summary import ternary_entropy

START = 0.05
"""The density that a search for the smallest begins at."""
STEP = math.log(1.5)
"""Between neighbouring scales of a climb."""
CLOSE = 1.1
"""Two sizes nearer than this factor are not told apart further."""
SHRINK = 0.85
"""What a challenger must save to be worth an evaluation."""
_CURVATURE = 0.5
"""Loss of score at (ln u - peak)^2 = 1, in units of the tuned model's gain over the base, where nothing was measured yet."""
_SPREAD, _SLOPE, _ERROR = 0.35, 0.1, 0.25
"""Standard deviations of a peak's place before any was seen, of its slope over ln(density), and of one that was measured."""
_MOST = 5
"""Scales of one climb, before the parabola's."""


class Problem(Protocol):
    """What is searched: scores are in units where greater is better. `base` and `tuned` are the scores of the two models."""

    @property
    def base(self) -> float: ...

    @property
    def tuned(self) -> float: ...

    def bytes(self, setting: Setting) -> int: ...

    def score(self, setting: Setting) -> float: ...


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting that was scored: bytes of its file, and its score as the strategy sees it (greater is better)."""

    setting: Setting
    bytes: int
    score: float


@dataclass(frozen=True, slots=True)
class Family:
    """Settings that differ in density and alpha alone."""

    allocation: AllocationName = "global"
    planes: int = 1
    head: HeadPrecision = "exact"

    def at(self, density: float, scale: float) -> Setting:
        """The setting of u = exp(scale), with numbers that a person can read."""
        density = _short(density)
        return Setting(density, _short(math.exp(scale) / math.sqrt(density)), self.allocation, self.planes, self.head)


class Spent(Exception):
    """The evaluations that were allowed are used up."""


@dataclass
class Ridge:
    """Where ln u of the best scale lies over ln(density), by how much it differs from the closed form: a line by least squares with a prior, from the
    peaks that were found."""

    mean: float = 0.0
    peaks: list[tuple[float, float]] = field(default_factory=list)

    def at(self, density: float) -> tuple[float, float]:
        """The place that is expected, and its standard deviation."""
        x = math.log(density / START)
        a, b, c = _SPREAD**-2, 0.0, _SLOPE**-2  # the precision matrix [[a, b], [b, c]] of intercept and slope
        p = q = 0.0
        for place, height in self.peaks:
            t = math.log(place / START)
            a, b, c = a + _ERROR**-2, b + t * _ERROR**-2, c + t * t * _ERROR**-2
            difference = (height - _formula(place) - self.mean) * _ERROR**-2
            p, q = p + difference, q + difference * t
        determinant = a * c - b * b
        intercept, slope = (c * p - b * q) / determinant, (a * q - b * p) / determinant
        variance = (c - 2 * b * x + a * x * x) / determinant
        return _formula(density) + self.mean + intercept + slope * x, math.sqrt(variance)


class Explorer:
    """Tries settings, each once, `most` of them at most; `tell` hears of each. Raises Spent where one more is wanted."""

    def __init__(self, problem: Problem, most: int, tell: Callable[[Trial], None] = lambda trial: None) -> None:
        self._problem, self._most, self._tell = problem, most, tell
        self._ridges: dict[tuple[AllocationName, int], Ridge] = {}
        self._curvature = _CURVATURE * max(abs(problem.tuned - problem.base), 1e-12)
        self.trials: dict[Setting, Trial] = {}

    def trial(self, setting: Setting) -> Trial:
        if setting not in self.trials:
            if len(self.trials) >= self._most:
                raise Spent
            found = Trial(setting, self._problem.bytes(setting), self._problem.score(setting))
            self.trials[setting] = found
            self._tell(found)
        return self.trials[setting]

    def expected(self, family: Family, density: float) -> tuple[Setting, float]:
        """The setting of a density with the scale that is expected to be best, and how much another may gain at most, by what is known."""
        place, spread = self._ridge(family).at(density)
        return family.at(density, place), self._curvature * (2 * spread) ** 2

    def climb(self, family: Family, density: float, wanted: float) -> Trial:
        """The best trial of a density: as soon as one reaches `wanted`, or none can by what is known of peaks, or the peak is found."""
        first, gain = self.expected(family, density)
        best = self.trial(first)
        if best.score >= wanted or (best.score + gain < wanted < math.inf):
            return best
        start = _place(first)
        found = {start: best.score}

        def look(place: float) -> Trial:
            nonlocal best
            trial = self.trial(family.at(density, place))
            found[_place(trial.setting)] = trial.score
            best = max(best, trial, key=lambda trial: trial.score)
            return trial

        for direction in (STEP, -STEP):
            top, place = best.score, start + direction
            if direction < 0 and _place(best.setting) > start:
                break  # it went up, so the peak is not below
            while len(found) < _MOST and look(place).score > top:
                if best.score >= wanted:
                    return best
                top, place = best.score, place + direction
        self._learn(family, density, found, look, wanted)
        return best

    def _learn(self, family: Family, density: float, found: dict[float, float], look: Callable[[float], Trial], wanted: float) -> None:
        """Fit a parabola around the best scale, look where its vertex is if that may change anything, and remember the peak."""
        middle = max(found, key=lambda place: found[place])
        sides = [max((p for p in found if p < middle), default=None), min((p for p in found if p > middle), default=None)]
        if None not in sides:
            vertex, curvature = _vertex([(p, found[p]) for p in (sides[0], middle, sides[1]) if p is not None])
            if curvature > 0:
                self._curvature = max(self._curvature / 2, curvature)
                hoped = found[middle] + curvature * (vertex - middle) ** 2
                middle = vertex
                if (wanted <= hoped or math.isinf(wanted)) and abs(vertex - max(found, key=lambda place: found[place])) > STEP / 4:
                    look(vertex)
        self._ridge(family).peaks.append((density, middle))

    def _ridge(self, family: Family) -> Ridge:
        """That of the family's allocation and planes; a new one begins where the plainest one is."""
        key = (family.allocation, family.planes)
        if key not in self._ridges:
            plain = next(iter(self._ridges.values()), Ridge())
            self._ridges[key] = Ridge(plain.at(START)[0] - _formula(START)) if self._ridges else plain
        return self._ridges[key]

    def smallest(self, families: Sequence[Family], wanted: float) -> None:
        """Try settings until the smallest that reaches `wanted` is known; the first family is the one that others challenge. Raises Spent."""
        best = self._bracket(families[0], wanted)
        if best is None:
            best = next((trial for trial in (self._richer(family, wanted) for family in families) if trial is not None), None)
        if best is None:
            return
        for family in families[1:]:
            while (density := density_for(self._problem.bytes, family, SHRINK * best.bytes)) is not None:
                trial = self.climb(family, density, wanted)
                if trial.score < wanted:
                    break
                best = trial
        self._heads([trial for trial in self.trials.values() if trial.score < wanted], lambda size: size < SHRINK * best.bytes)

    def _richer(self, family: Family, wanted: float) -> Trial | None:
        """Where the first family reaches nothing: a family with an exact head, at densities at which only its kind of change is left to blame."""
        for density in (0.2, 0.5):
            trial = self.climb(replace(family, head="exact"), density, wanted)
            if trial.score >= wanted:
                return trial
        return None

    def _bracket(self, family: Family, wanted: float) -> Trial | None:
        """The smallest passing trial of a family: densities are bracketed by factors, and then by where the score crosses `wanted`."""
        empty = self._problem.bytes(family.at(1e-9, 0.0))
        passing: Trial | None = None
        failing: Trial | None = None
        density = START
        while True:
            trial = self.climb(family, density, wanted)
            if trial.score >= wanted:
                passing = trial
            else:
                failing = trial
            if passing is None:
                assert failing is not None
                if failing.setting.density >= 1:
                    return None
                density = min(4 * density, 1.0)
            elif failing is None:
                if passing.bytes <= CLOSE * empty:
                    return passing
                density = passing.setting.density / 4
            else:
                if passing.bytes <= CLOSE * failing.bytes:
                    return passing
                density = _between(failing, passing, wanted)

    def best_under(self, families: Sequence[Family], size: int) -> None:
        """Try settings until the best one of at most `size` bytes is known. Raises Spent."""
        best: Trial | None = None
        for family in families:
            density = density_for(self._problem.bytes, family, size)
            if density is None:
                continue
            if best is not None:
                setting, gain = self.expected(family, density)
                if self.trial(setting).score + gain < best.score:
                    continue
            found = self.climb(family, density, math.inf)
            best = found if best is None or found.score > best.score else best
            while best is found and found.setting.density > 1e-4:  # fewer entries may even be better
                lower = self.trial(self.expected(family, found.setting.density / 3)[0])
                if lower.score <= best.score:
                    break
                best = found = lower
        self._heads([best] if best else [], lambda bytes_there: bytes_there <= size)

    def _heads(self, trials: Sequence[Trial], allowed: Callable[[int], bool]) -> None:
        """The best of some trials with its head in a higher precision, where the size allows it."""
        if not trials or (top := max(trials, key=lambda trial: trial.score)).setting.head != "int8":
            return
        richer: tuple[HeadPrecision, ...] = ("exact", "fp16")
        for head in richer:
            setting = replace(top.setting, head=head)
            if allowed(self._problem.bytes(setting)):
                self.trial(setting)
                return


def _between(failing: Trial, passing: Trial, wanted: float) -> float:
    """Where the line through the two crosses, over ln(density), and not too near to either."""
    share = (wanted - failing.score) / (passing.score - failing.score) if passing.score > failing.score else 0.5
    low, high = math.log(failing.setting.density), math.log(passing.setting.density)
    return math.exp(low + min(max(share, 0.3), 0.7) * (high - low))


def _vertex(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where the parabola through three points has its peak, and how much it falls at distance 1 (not above 0: it has none)."""
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    second = (right - left) / (x2 - x0)
    return ((x0 + x1) / 2 - left / (2 * second) if second < 0 else x1), -second


def _formula(density: float) -> float:
    """ln u of the closed form."""
    return math.log(closed_form_alpha(density) * math.sqrt(density))


def _place(setting: Setting) -> float:
    return math.log(setting.alpha * math.sqrt(setting.density))


def density_for(sized: Callable[[Setting], int], family: Family, size: float) -> float | None:
    """The largest density, to a few parts in a hundred, whose file has at most `size` bytes; None where even an empty one has more.

    `sized` gives the bytes of a setting's file.
    """
    empty = sized(family.at(1e-9, 0.0))
    if empty >= size:
        return None
    density, best = START, None
    for _ in range(8):
        bytes_here = sized(family.at(density, 0.0))
        if bytes_here <= size and (best is None or density > best):
            best = density
        if 0.97 * size <= bytes_here <= size or (density >= 1 and bytes_here <= size):
            break
        share = (0.985 * size - empty) / max(bytes_here - empty, 1)
        density = min(_density_of_entropy(share * ternary_entropy(density)), 1.0)
    return best


def _density_of_entropy(bits: float) -> float:
    """The density at which ternary levels have that many bits an entry; 1 at most."""
    low, high = 1e-9, 2 / 3  # where the entropy is largest
    if bits >= ternary_entropy(high):
        return 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ternary_entropy(middle) < bits else (low, middle)
    return low


def _short(number: float) -> float:
    """Three significant digits."""
    return float(f"{number:.3g}")
