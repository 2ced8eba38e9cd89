"""Curves: as an SVG that stands in a page without a script, and as a line of text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qlora.screen import flat

SIDE = 1000.0  # of the drawing, whatever size it is shown at
COLOURS = 8  # told apart; further series come again with dashes
SPARKS = "▁▂▃▄▅▆▇█"
SPARK = 32  # characters of a curve as text
CURVE = 300  # points of a series that are drawn
STEEP = 20.0  # highest by lowest: from here on an axis may be logarithmic
BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

Point = tuple[float, float | None]  # None: here the curve is broken
Unit = Literal["plain", "bytes"]


@dataclass(frozen=True)
class Series:
    """One curve: points in the order of x, all of them finite numbers."""

    name: str
    points: Sequence[Point]
    dots: bool = False  # each point is marked, because they are few
    loose: bool = False  # between the points nothing is known


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        title: What is drawn.
        series: The curves; those without a point are left out.
        unit: Of the values.
        levels: Values that are lines across, such as a plan.
        marks: Where along x something happened, and what.
        steep: Whether the values may be drawn on a logarithmic axis, if they are far apart.
        most: Points of a series that are drawn: of more, the lowest and highest of each stretch.
    """

    title: str
    series: Sequence[Series]
    unit: Unit = "plain"
    x: str = "step"
    levels: Sequence[tuple[str, float]] = ()
    marks: Sequence[tuple[float, str]] = ()
    steep: bool = False
    most: int = CURVE

    @property
    def drawn(self) -> list[Series]:
        """The series that have something to show."""
        return [one for one in self.series if any(y is not None for _, y in one.points)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points, with the lowest and highest of each stretch: no spike is lost.

    >>> thinned([(x, float(x == 7)) for x in range(100)], 6)
    [(0, 0.0), (7, 1.0), (50, 0.0), (99, 0.0)]
    """
    if len(points) <= most:
        return list(points)
    count = max(1, (most - 1) // 2)
    kept = {len(points) - 1}
    for n in range(count):
        stretch = range(n * len(points) // count, (n + 1) * len(points) // count)
        known = [(y, i) for i in stretch if (y := points[i][1]) is not None]
        if known:
            kept |= {min(known)[1], max(known, key=lambda one: (one[0], -one[1]))[1]}
        else:
            kept.add(stretch[0])
    return [points[i] for i in sorted(kept)]


def figure(value: float, unit: Unit = "plain") -> str:
    """A value as people read it.

    >>> figure(0.012345), figure(7.0832), figure(123456.0), figure(3 * 2**29, "bytes")
    ('0.01235', '7.083', '123,456', '1.50 GiB')
    """
    if unit == "bytes":
        name, size = next(
            ((name, size) for name, size in BYTES if abs(value) >= size), ("bytes", 1)
        )
        return f"{value / size:.2f} {name}" if size > 1 else f"{value:.0f} bytes"
    if abs(value) >= 1000 and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def told(chart: Chart) -> list[str]:
    """The chart as lines of text: each curve small, and where it begins, ends and is lowest."""
    lines = []
    names = max((len(flat(one.name)) for one in chart.drawn), default=0)
    for one in chart.drawn:
        known = [(x, y) for x, y in one.points if y is not None]
        x, low = min(known, key=lambda point: point[1])
        first, last = figure(known[0][1], chart.unit), figure(known[-1][1], chart.unit)
        said = f"{first} to {last}" if len(known) > 1 else first
        if len(known) > 2:
            said += f", lowest {figure(low, chart.unit)} at {chart.x} {figure(x)}"
        lines.append(f"{flat(one.name):<{names}}  {_spark([y for _, y in known])}  {said}")
    lines += [f"{name}: {figure(value, chart.unit)}" for name, value in chart.levels]
    if chart.marks:
        lines.append(f"{len(chart.marks):,} marked: {flat(chart.marks[0][1])}")
    return lines or ["nothing to draw yet"]


def _spark(values: Sequence[float]) -> str:
    picked = [values[i * len(values) // SPARK] for i in range(SPARK)]
    picked = [*picked[:-1], values[-1]] if len(values) > SPARK else list(values)
    low, high = min(picked), max(picked)
    span = (high - low) or 1.0
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1))] for value in picked)


# --- SVG

STYLE = """
.qlora-page figure { margin: .4rem 0 1.4rem; }
.qlora-page figcaption { margin: 0 0 .4rem; color: inherit; }
.qlora-page .keys { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; color: var(--faint);
  font-size: .92em; }
.qlora-page .keys svg { width: 1.6rem; height: .7rem; margin-right: .35rem; vertical-align: baseline; }
.qlora-page .plot { display: grid; grid-template-columns: 4.6rem 1fr; grid-template-rows: 15rem 1.3rem;
  padding-right: 1rem; margin-top: .6rem; }
.qlora-page .ys, .qlora-page .xs { position: relative; color: var(--faint); font-size: .85em;
  font-variant-numeric: tabular-nums; }
.qlora-page .ys span { position: absolute; right: .5rem; transform: translateY(-50%); white-space: nowrap; }
.qlora-page .xs { grid-column: 2; }
.qlora-page .xs span { position: absolute; top: .15rem; transform: translateX(-50%); white-space: nowrap; }
.qlora-page .plot > svg { width: 100%; height: 100%; overflow: visible; display: block; }
.qlora-page svg path, .qlora-page svg line { vector-effect: non-scaling-stroke; fill: none; }
.qlora-page svg .grid { stroke: var(--line); stroke-width: 1; }
.qlora-page svg .curve { stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.qlora-page svg .loose { stroke-width: 1; stroke-dasharray: 1 5; }
.qlora-page svg .dot { stroke-width: 8; stroke-linecap: round; }
.qlora-page svg .touch { stroke: transparent; stroke-width: 14; stroke-linecap: round;
  pointer-events: stroke; }
.qlora-page svg .touch:hover { stroke: var(--text); stroke-opacity: .35; }
.qlora-page svg .level { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 7 5; opacity: .75; }
.qlora-page svg .mark { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 3;
  pointer-events: stroke; }
.qlora-page svg .again1 { stroke-dasharray: 8 4; }
.qlora-page svg .again2 { stroke-dasharray: 2 4; }
""" + "".join(f".qlora-page svg .c{n} {{ stroke: var(--c{n}); }}\n" for n in range(COLOURS))
LIGHT = ["#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#c53030", "#0f7c86", "#97650b", "#5f6570"]
DARK = ["#6aa9e9", "#f0935a", "#62c48a", "#b99cf5", "#f47c7c", "#4fc3cd", "#e0b04c", "#a0a6b0"]


def palette(colours: Sequence[str]) -> str:
    """The colours as declarations for a style sheet."""
    return " ".join(f"--c{n}: {colour};" for n, colour in enumerate(colours))


def svg(chart: Chart) -> str:
    """The chart as HTML: everything in it that was not written here is escaped."""
    series = chart.drawn
    title = f"<figcaption>{_safe(chart.title)}"
    if not series:
        return f"<figure>{title}: nothing to draw yet.</figcaption></figure>"
    axes = _Axes.of(chart)
    thin = [(one, thinned(one.points, chart.most)) for one in series]
    left_out = [
        f"{flat(one.name)}: {len(points):,} of {len(one.points):,} points"
        for one, points in thin
        if len(points) < len(one.points)
    ]
    notes = ["logarithmic"] if axes.logarithmic else []
    if left_out:
        notes.append(f"drawn are the lowest and highest of each stretch, {'; '.join(left_out)}")
    said = f" ({'; '.join(map(_safe, notes))})" if notes else ""
    inside = [
        *_grid(axes),
        *(
            f'<line class="level" x1="0" x2="{SIDE:g}" y1="{axes.y(value):.1f}" y2="{axes.y(value):.1f}">'
            f"<title>{_safe(name)}: {figure(value, chart.unit)}</title></line>"
            for name, value in chart.levels
            if axes.holds(value)
        ),
        *(
            f'<line class="mark" x1="{axes.x(x):.1f}" x2="{axes.x(x):.1f}" y1="0" y2="{SIDE:g}">'
            f"<title>{_safe(chart.x)} {figure(x)}: {_safe(what)}</title></line>"
            for x, what in chart.marks[: chart.most]
        ),
    ]
    for number, (one, points) in enumerate(thin):
        inside += _curve(chart, axes, one, points, _look(number))
    return (
        f"<figure>{title}{said}{_keys(chart, series)}</figcaption>"
        f'<div class="plot"><div class="ys">{"".join(_y_names(axes, chart.unit))}</div>'
        f'<svg viewBox="0 0 {SIDE:g} {SIDE:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{_safe(chart.title)}">{"".join(inside)}</svg>'
        f'<div class="xs">{"".join(_x_names(axes))}</div></div></figure>'
    )


def _safe(said: str) -> str:
    return html.escape(flat(said))


def _look(number: int) -> str:
    again = number // COLOURS % 3
    return f"c{number % COLOURS}" + (f" again{again}" if again else "")


@dataclass(frozen=True)
class _Axes:
    """Where values lie in the drawing."""

    left: float
    right: float
    low: float
    high: float
    logarithmic: bool
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @classmethod
    def of(cls, chart: Chart) -> _Axes:
        points = [p for one in chart.drawn for p in one.points]
        xs = [x for x, y in points if y is not None] + [x for x, _ in chart.marks]
        ys = [y for _, y in points if y is not None] + [value for _, value in chart.levels]
        low, high = min(ys), max(ys)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # all the same, but for rounding
            pad = abs(low) / 4 or 1.0
            low, high = low - pad, high + pad
        steep = chart.steep and low > 0 and high > STEEP * low
        if steep:
            y_ticks = _powers(low, high)
        else:
            if chart.unit == "bytes" or (0 <= low < 0.5 * high):
                low = min(low, 0.0)
            y_ticks = _ticks(low, high, 5, 1024 if chart.unit == "bytes" else 10)
            step = y_ticks[1] - y_ticks[0]
            low = min(low, math.floor(low / step) * step)
            high = max(high, math.ceil(high / step) * step)
            y_ticks = [*y_ticks, y_ticks[-1] + step] if high > y_ticks[-1] + step / 2 else y_ticks
        left, right = min(xs), max(xs)
        if 0 < left < right / 20:  # the first step, or the first line
            left = 0.0
        if left == right:
            left, right = left - 1, right + 1
        x_ticks = [tick for tick in _ticks(left, right, 6, 10) if left <= tick <= right]
        return cls(left, right, low, high, steep, x_ticks, y_ticks)

    def x(self, value: float) -> float:
        return SIDE * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        if self.logarithmic:
            span = math.log(self.high) - math.log(self.low)
            return SIDE * (1 - (math.log(value) - math.log(self.low)) / span)
        return SIDE * (1 - (value - self.low) / (self.high - self.low))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def _ticks(low: float, high: float, count: int, base: int) -> list[float]:
    """Round values from below ``low`` to not above ``high``, at least two of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    size = float(base) ** math.floor(math.log(rough, base)) if rough >= 1 or base == 10 else 1.0
    steps = (1, 2, 5, 10) if base == 10 else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    step = next((size * n for n in steps if size * n >= rough * 0.999), size * base)
    first = math.floor(low / step)
    return [n * step for n in range(first, first + max(2, math.floor(high / step) - first + 1))]


def _powers(low: float, high: float) -> list[float]:
    """Round values within bounds for a logarithmic axis, some three to seven."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    wide = last - first
    within: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        stride = 1 if len(steps) > 1 else max(1, wide // 6)
        powers = range(first, last + 1, stride)
        within = [n * 10.0**p for p in powers for n in steps if low <= n * 10.0**p <= high]
        if len(within) <= 8:
            break
    return within or [low, high]


def _grid(axes: _Axes) -> Iterator[str]:
    for tick in axes.y_ticks:
        if axes.holds(tick):
            at = f"{axes.y(tick):.1f}"
            yield f'<line class="grid" x1="0" x2="{SIDE:g}" y1="{at}" y2="{at}"/>'


def _y_names(axes: _Axes, unit: Unit) -> Iterator[str]:
    for tick in filter(axes.holds, axes.y_ticks):
        yield f'<span style="top: {axes.y(tick) / SIDE:.2%}">{_short(tick, unit)}</span>'


def _x_names(axes: _Axes) -> Iterator[str]:
    for tick in axes.x_ticks:
        yield f'<span style="left: {axes.x(tick) / SIDE:.2%}">{figure(tick)}</span>'


def _short(value: float, unit: Unit) -> str:
    """A round value beside an axis."""
    if unit == "plain":
        return figure(value)
    name, size = next(((name, size) for name, size in BYTES if value >= size), ("", 1))
    return f"{value / size:g} {name}".rstrip()


def _curve(
    chart: Chart, axes: _Axes, one: Series, points: Sequence[Point], look: str
) -> Iterator[str]:
    known = [(axes.x(x), axes.y(y), x, y) for x, y in points if y is not None]
    path, pen_is_down = [], False
    for x, y in points:
        if y is None:
            pen_is_down = False
            continue
        path.append(f"{'L' if pen_is_down else 'M'}{axes.x(x):.1f} {axes.y(y):.1f}")
        pen_is_down = True
    kind = " loose" if one.loose else ""
    yield f'<path class="curve {look}{kind}" d="{"".join(path)}"/>'
    if one.dots or one.loose or len(known) == 1:
        # A line of no length with round ends is a round dot, however the drawing is stretched.
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y, _, _ in known)
        yield f'<path class="dot {look.split()[0]}" d="{dots}"/>'
    for x, y, step, value in known:
        said = f"{_safe(one.name)}, {_safe(chart.x)} {figure(step)}: {figure(value, chart.unit)}"
        yield f'<path class="touch" d="M{x:.1f} {y:.1f}h0"><title>{said}</title></path>'


def _keys(chart: Chart, series: Sequence[Series]) -> str:
    def key(look: str, name: str) -> str:
        line = f'<line class="{look}" x1="0" x2="24" y1="5" y2="5"/>'
        return f'<span><svg viewBox="0 0 24 10" aria-hidden="true">{line}</svg>{_safe(name)}</span>'

    keys = [key(f"curve {_look(number)}", one.name) for number, one in enumerate(series)]
    if len(keys) == 1 and series[0].name == chart.title:
        keys = []
    keys += [key("level", f"{name}: {figure(v, chart.unit)}") for name, v in chart.levels]
    if chart.marks:
        shown = min(len(chart.marks), chart.most)
        of = f" (the first {shown:,} of {len(chart.marks):,})" if shown < len(chart.marks) else ""
        keys.append(key("mark", f"marked{of}: point at it to read what happened"))
    return f'<div class="keys">{"".join(keys)}</div>'
