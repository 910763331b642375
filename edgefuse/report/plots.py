"""Pictures inside a page, as SVG without scripts: they take the page's colours, light or dark, and its width, wide or narrow.

Places along x are percentages of the picture's width, and nothing is stretched: letters keep their size on a telephone.
Axes stand outside of the drawn area, in the padding that the page gives to its frame.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

BINS = 100
TICKS = 5
BAND, DOTS = 26, 9  # pixels of a histogram, and from its foot to the processes
BAR = 20  # pixels of a bar or an interval
AXIS = 18  # pixels below the last row
PARETO = 260  # pixels of height
NARROW = 250  # pixels: how wide a picture is at least, to tell which marks would cover each other
MARK = 9  # pixels: the radius of a numbered mark


@dataclass(frozen=True, slots=True)
class Strip:
    """Samples of one subject: of all calls, and the medians of the processes."""

    label: str
    values: Sequence[float]
    medians: Sequence[float]
    p50: float
    told: str
    color: int


@dataclass(frozen=True, slots=True)
class Point:
    """What something takes (x) and what it gets wrong (y)."""

    label: str
    x: float
    y: float
    color: int


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio and between what it lies; the ends are None where there is no interval."""

    label: str
    middle: float
    low: float | None
    high: float | None
    told: str


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that consists of parts."""

    label: str
    parts: Mapping[str, float]
    told: str


def strips(those: Sequence[Strip], unit: str, title: str) -> str:
    """Histograms of all calls, each above the medians of its processes, on one axis."""
    ordered = [sorted(each.values) for each in those]
    smallest = min(values[0] for values in ordered)
    usual = [1.15 * values[math.ceil(0.9 * len(values)) - 1] for values in ordered]  # far beyond it a system did something else
    largest = max([*usual, *(median for each in those for median in each.medians)]) or 1.0
    low = 0.0 if smallest < 0.5 * largest else smallest - 0.05 * (largest - smallest or largest)
    axis = _Axis(low, largest + 0.02 * (largest - low))
    return _rows([_strip(each, axis) for each in those], axis, unit, title)


def _strip(each: Strip, axis: _Axis) -> _Row:
    inside = [value for value in each.values if value < axis.high]
    counts = Counter(int(axis.of(value) * BINS / 100) for value in inside)
    outline = "".join(f"V{1 - counts[index] / max(counts.values()):.3g}h1" for index in range(BINS))
    beyond, middle = len(each.values) - len(inside), axis.at(each.p50)
    drawn = [
        f'<svg width="100%" height="{BAND}" viewBox="0 0 {BINS} 1" preserveAspectRatio="none">',
        f'<path class="fill{each.color}" d="M0 1{outline}V1z"/></svg>',
        f'<line class="axis" x1="0" x2="100%" y1="{BAND}" y2="{BAND}"/>',
        *(f'<circle class="ring{each.color}" cx="{axis.at(value)}" cy="{BAND + DOTS}" r="3.5"/>' for value in each.medians),
        f'<line class="middle" x1="{middle}" x2="{middle}" y1="-2" y2="{BAND + DOTS + 6}"/>',
    ]
    told = f"{each.told}; {beyond} of them slower than what is drawn" if beyond else each.told
    return _Row(each.label, told, "".join(drawn), BAND + 2 * DOTS)


def intervals(those: Sequence[Interval], title: str) -> str:
    """Ratios with their intervals, and a line where nothing differs."""
    ends = [end for each in those for end in (each.middle, each.low, each.high) if end is not None]
    low, high = min(*ends, 1.0), max(*ends, 1.0)
    room = 0.06 * (high - low or 0.1)
    axis = _Axis(low - room, high + room)
    return _rows([_interval(each, axis) for each in those], axis, "ratio: left of 1 is less", title)


def _interval(each: Interval, axis: _Axis) -> _Row:
    one, middle = axis.at(1), BAR / 2
    drawn = [f'<line class="one" x1="{one}" x2="{one}" y1="0" y2="{BAR}"/>']
    if each.low is not None and each.high is not None:
        drawn.append(f'<line class="interval" x1="{axis.at(each.low)}" x2="{axis.at(each.high)}" y1="{middle}" y2="{middle}"/>')
    drawn.append(f'<circle class="dot0" cx="{axis.at(each.middle)}" cy="{middle}" r="5"/>')
    return _Row(each.label, each.told, "".join(drawn), BAR)


def pareto(those: Sequence[Point], x: str, y: str, title: str) -> str:
    """Numbered points, what nothing beats in both joined by a line, and below it what each number is."""
    across, up = _around([each.x for each in those]), _around([each.y for each in those])
    best = front(those)
    parts = [across.grid(PARETO), across.numbers(PARETO, x), up.drawn_up(y)]
    for one, other in pairwise(best):  # first at the same WER to the next latency, then down
        turn = across.at(other.x)
        parts.append(f'<line class="front" x1="{across.at(one.x)}" y1="{up.up(one.y)}" x2="{turn}" y2="{up.up(one.y)}"/>')
        parts.append(f'<line class="front" x1="{turn}" y1="{up.up(one.y)}" x2="{turn}" y2="{up.up(other.y)}"/>')
    for number, (each, height) in enumerate(zip(those, _apart([(across.of(p.x), up.up(p.y)) for p in those]), strict=True), 1):
        place = across.at(each.x)
        parts += [
            f'<line class="axis" x1="{place}" x2="{place}" y1="{up.up(each.y)}" y2="{height:.1f}"/>',
            f'<circle class="dot{each.color}" cx="{place}" cy="{up.up(each.y)}" r="3"/>',
            f'<circle class="dot{each.color}" cx="{place}" cy="{height:.1f}" r="{MARK}"/>',
            f'<text class="number" x="{place}" y="{height + 4:.1f}">{number}</text>',
        ]
    best_of_both = " - on the front: nothing is both quicker and righter"
    told = "".join(
        f'<li><b class="text{each.color}">{escape(each.label)}</b>{best_of_both if each in best else ""}</li>' for each in those
    )
    return _figure(_svg(title, PARETO, "".join(parts)), title, f"<ol>{told}</ol>")


def front(those: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, the quickest first."""
    best: list[Point] = []
    for each in sorted(those, key=lambda point: (point.x, point.y)):
        if not best or each.y < best[-1].y:
            best.append(each)
    return best


def bars(those: Sequence[Bar], unit: str, title: str, colors: Mapping[str, int]) -> str:
    """Stacked bars on one axis, and a legend."""
    axis = _Axis(0.0, max(sum(each.parts.values()) for each in those) or 1.0)
    names = dict.fromkeys(name for each in those for name in each.parts)
    legend = "".join(f"<li>{_sample(colors[name])} {escape(name)}</li>" for name in names)
    return _rows([_bar(each, axis, colors) for each in those], axis, unit, title, f'<ul class="legend">{legend}</ul>')


def _bar(each: Bar, axis: _Axis, colors: Mapping[str, int]) -> _Row:
    ends = [0.0, *accumulate(each.parts.values())]
    drawn = [
        f'<rect class="fill{colors[name]}" x="{axis.at(begin)}" y="2" width="{axis.of(value):.2f}%" height="{BAR - 4}">'
        f"<title>{escape(name)}</title></rect>"
        for begin, (name, value) in zip(ends[:-1], each.parts.items(), strict=True)
    ]
    return _Row(each.label, each.told, "".join(drawn), BAR)


def _sample(color: int) -> str:
    return f'<svg width="12" height="12" aria-hidden="true"><rect class="fill{color}" width="12" height="12"/></svg>'


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a picture: words, which wrap, above what is drawn."""

    label: str
    told: str
    drawn: str
    height: int


@dataclass(frozen=True, slots=True)
class _Axis:
    """From `low` at 0 % to `high` at 100 %."""

    low: float
    high: float

    def of(self, value: float) -> float:
        """In percent."""
        return 100 * (value - self.low) / (self.high - self.low)

    def at(self, value: float) -> str:
        """The same as an attribute."""
        return f"{self.of(value):.2f}%"

    def up(self, value: float) -> float:
        """In pixels of the height of `pareto`, from above."""
        return round(PARETO * (1 - self.of(value) / 100), 1)

    @property
    def cut(self) -> str:
        """Whether it begins elsewhere than people expect, in words."""
        return "" if self.low <= 0 else " (not from 0)"

    def grid(self, height: float) -> str:
        """Lines across the picture."""
        places = map(self.at, self.ticks())
        return "".join(f'<line class="grid" x1="{place}" x2="{place}" y1="0" y2="{height}"/>' for place in places)

    def numbers(self, top: float, unit: str) -> str:
        """The numbers of the lines, and what they are."""
        told = [f'<text class="tick" x="{self.at(tick)}" y="{top + 14}">{_told(tick)}</text>' for tick in self.ticks()]
        return "".join([*told, f'<text class="unit" x="100%" y="{top + 30}">{escape(unit)}{self.cut}</text>'])

    def drawn_up(self, unit: str) -> str:
        """The same from below, with their numbers to the left."""
        lines = "".join(
            f'<line class="grid" x1="0" x2="100%" y1="{self.up(tick)}" y2="{self.up(tick)}"/>'
            f'<text class="left" x="-6" y="{self.up(tick) + 4}">{_told(tick)}</text>'
            for tick in self.ticks()
        )
        line = f'<line class="axis" x1="0" x2="0" y1="0" y2="{PARETO}"/>'
        return f'{lines}{line}<text x="-30" y="-10">{escape(unit)}{self.cut}</text>'

    def ticks(self) -> list[float]:
        """Round numbers, about `TICKS`."""
        rough = (self.high - self.low) / TICKS
        power = 10 ** math.floor(math.log10(rough))
        step = power * next(each for each in (1, 2, 5, 10) if each * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * index for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _around(values: Sequence[float]) -> _Axis:
    """All of them with room, from 0 unless all of them are far from it."""
    low, high = min(values), max(values)
    if low < (high or 1.0) / 2:
        return _Axis(0.0, 1.1 * (high or 1.0))
    room = max(0.12 * (high - low), 0.02 * high)
    return _Axis(low - room, high + room)


def _apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """Heights at which numbered marks do not cover each other, each as near to its own as those before it let it be."""
    found: list[tuple[float, float]] = []
    for percent, height in places:
        taken = [y for x, y in found if abs(x - percent) * NARROW / 100 < 2 * MARK]
        tries = (height + sign * step for step in range(0, PARETO, 2) for sign in (-1, 1))
        free = (y for y in tries if MARK <= y <= PARETO - MARK and all(abs(y - other) >= 2 * MARK for other in taken))
        found.append((percent, next(free, height)))
    return [height for _, height in found]


def _told(tick: float) -> str:
    return f"{tick:.10g}" if abs(tick) >= 1e-9 else "0"  # noqa: PLR2004 - a sum of floats that should be 0


def _rows(those: Sequence[_Row], axis: _Axis, unit: str, title: str, below: str = "") -> str:
    drawn = [
        f'<p class="name">{escape(each.label)} <span>{escape(each.told)}</span></p>\n'
        f"{_svg(f'{each.label}: {each.told}', each.height, axis.grid(each.height) + each.drawn)}"
        for each in those
    ]
    return _figure("\n".join([*drawn, _svg(unit, AXIS, axis.numbers(0, unit))]), title, below)


def _svg(label: str, height: int, drawn: str) -> str:
    return f'<svg role="img" aria-label="{escape(label)}" width="100%" height="{height}">{drawn}</svg>'


def _figure(drawn: str, title: str, below: str) -> str:
    return f'<figure>\n<figcaption>{escape(title)}</figcaption>\n<div class="plot">\n{drawn}\n</div>\n{below}\n</figure>'
