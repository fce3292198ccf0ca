"""Charts as inline SVG with HTML labels: drawn once, any width.

The drawing area is an SVG of 1000 x 1000 units that stretches to whatever box it gets (strokes keep their width), and the
tick labels are HTML placed by percent, so text has the same size on a phone and on a wide screen. Colours are names of
CSS variables (report.css), which follow light and dark. What the pointer shows travels as JSON in `data-hover`.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

SIZE = 1000
TONES = 4
"""From one colour of a ramp to the next."""
Values = Sequence[float | None]


def short(value: float) -> str:
    """A number as a label: 0.25, 1,200, 35k, 1.6M, 2e-06."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e9):
        return f"{value:.1e}".replace(".0e", "e")
    for unit, name in ((1e6, "M"), (1e4, "k")):
        if size >= unit:
            scale = 1e6 if name == "M" else 1e3
            return f"{value / scale:.1f}".removesuffix(".0") + name
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share as a label: 0.125 is 12.5%."""
    return f"{100 * value:.3g}%"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, count)
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, linear or logarithmic. `ticks`: (value, label)."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()
    label: str = ""

    def place(self, value: float) -> float:
        """Where a value lies, as a share of the axis (may be outside 0..1)."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def can_place(self, value: float | None) -> bool:
        return value is not None and math.isfinite(value) and (not self.log or value > 0)


def linear_axis(
    values: Iterable[float | None],
    label: str = "",
    include: Sequence[float] = (),
    form: Callable[[float], str] = short,
    ticks: int = 5,
    pad: float = 0.06,
    exact: bool = False,
) -> Axis:
    """An axis over all finite `values` and `include`; `exact` ends at the extremes, else there is some air."""
    finite = [value for value in values if value is not None and math.isfinite(value)] + list(include)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    if not exact:
        air = (high - low) * pad
        low = low if low in include else low - air
        high = high if high in include else high + air
    return Axis(low, high, ticks=tuple((tick, form(tick)) for tick in nice_ticks(low, high, ticks)), label=label)


def log_axis(values: Iterable[float | None], label: str = "") -> Axis:
    """A logarithmic axis over the positive finite values, from a power of ten to a power of ten."""
    positive = [value for value in values if value is not None and math.isfinite(value) and value > 0]
    low = math.floor(math.log10(min(positive))) if positive else -1
    high = math.ceil(math.log10(max(positive))) if positive else 0
    high = max(high, low + 1)
    every = max(1, math.ceil((high - low) / 5))
    ticks = tuple((10.0**power, short(10.0**power)) for power in range(low, high + 1, every))
    return Axis(10.0**low, 10.0**high, log=True, ticks=ticks, label=label)


@dataclass(frozen=True)
class Ramp:
    """Colours for values: the six colours `age0` to `age5`, one at each anchor, and tones between them.

    Attributes:
        anchors: six values, rising or falling. What lies beyond an end has the end's colour.
        labels: of the anchors.
    """

    anchors: tuple[float, ...]
    labels: tuple[str, ...]

    def tone(self, value: float) -> int:
        """0 at the first anchor, TONES more at each further one."""
        ends = list(pairwise(self.anchors))
        parts = [min(1.0, max(0.0, (value - first) / (second - first))) for first, second in ends]
        return round(TONES * sum(parts))

    def html(self) -> str:
        last = len(self.anchors) - 1
        colours = ",".join(f"var(--age{index})" for index in range(last + 1))
        spans = "".join(
            f'<span style="left:{100 * index / last:.0f}%">{escape(label)}</span>'
            for index, label in enumerate(self.labels)
        )
        return f'<div class="ramp"><i style="background:linear-gradient(in oklab to right,{colours})"></i>{spans}</div>'


def _tone_colour(tone: int) -> str:
    index, further = divmod(tone, TONES)
    if not further:
        return f"var(--age{index})"
    return f"color-mix(in oklab,var(--age{index + 1}) {100 * further // TONES}%,var(--age{index}))"


@dataclass
class Plot:
    """One drawing area. Call the drawing methods in painter's order, then `html`."""

    x: Axis
    y: Axis
    title: str
    height: int = 240
    x_labels: bool = True
    form: Callable[[float], str] = short
    x_name: str = "step"
    _shapes: list[str] = field(default_factory=list)
    _legend: list[tuple[str, str, str, float]] = field(default_factory=list)
    _hover: list[dict] = field(default_factory=list)
    _ramp: str = ""
    _cells: dict = field(default_factory=dict)

    def _point(self, x: float, y: float) -> str:
        clipped = min(1.0, max(0.0, self.y.place(y)))
        return f"{SIZE * self.x.place(x):.1f} {SIZE * (1 - clipped):.1f}"

    def _runs(self, xs: Values, *columns: Values) -> Iterable[list[tuple[float, ...]]]:
        """Unbroken stretches of points: a gap where a value is missing, not finite, or not placeable."""
        run: list[tuple[float, ...]] = []
        for point in zip(xs, *columns, strict=True):
            if self.x.can_place(point[0]) and all(self.y.can_place(value) for value in point[1:]):
                run.append(tuple(value for value in point if value is not None))
            elif run:
                yield run
                run = []
        if run:
            yield run

    def _remember(self, name: str, colour: str, xs: Values, texts: Sequence[str | None]) -> None:
        points = [
            (round(SIZE * self.x.place(x)), f"{self.x_name} {short(x)}".strip(), text)
            for x, text in zip(xs, texts, strict=True)
            if x is not None and text is not None
        ]
        self._hover.append({"name": name, "colour": colour, "points": points})

    def line(
        self,
        name: str,
        xs: Values,
        ys: Values,
        colour: str,
        dashed: bool = False,
        dots: bool = False,
        hover: bool = True,
    ) -> None:
        """A line through the points; `dots` marks each; a point with no neighbours is a dot anyway."""
        style = ' stroke-dasharray="5 4"' if dashed else ""
        for run in self._runs(xs, ys):
            path = "M" + "L".join(self._point(*point) for point in run) + ("z" if len(run) == 1 else "")
            mark = "line lone" if len(run) == 1 else "line"
            self._shapes.append(f'<path class="{mark}" d="{path}" style="stroke:var(--{colour})"{style}/>')
        if dots:
            self.dots("", xs, ys, colour, size=7)
        if name:
            self._legend.append((name, colour, "dashed" if dashed else "line", 1.0))
        if hover:
            texts = [self.form(y) if y is not None and math.isfinite(y) else "not finite" for y in ys]
            self._remember(name, colour, xs, texts)

    def band(self, name: str, xs: Values, lows: Values, highs: Values, colour: str, opacity: float = 0.18) -> None:
        """The area between two lines, with its own hover text."""
        self.fill_between(xs, lows, highs, colour, opacity)
        self._legend.append((name, colour, "band", min(1.0, 2 * opacity)))
        pairs = zip(lows, highs, strict=True)
        texts = [f"{self.form(a)} to {self.form(b)}" if a is not None and b is not None else None for a, b in pairs]
        self._remember(name, colour, xs, texts)

    def fill_between(self, xs: Values, lows: Values, highs: Values, colour: str, opacity: float) -> None:
        """The area between two lines, with neither hover text nor a place in the legend."""
        for run in self._runs(xs, lows, highs):
            there = [self._point(x, high) for x, _, high in run]
            back = [self._point(x, low) for x, low, _ in reversed(run)]
            path = "M" + "L".join(there + back) + "z"
            self._shapes.append(f'<path d="{path}" style="fill:var(--{colour});opacity:{opacity}"/>')

    def dots(self, name: str, xs: Values, ys: Values, colour: str, size: float = 5, opacity: float = 1.0) -> None:
        """Round dots (zero-length strokes with round ends: they stay round however the area is stretched)."""
        points = [self._point(*point) for run in self._runs(xs, ys) for point in run]
        if points:
            path = "".join(f"M{point}h0" for point in points)
            look = f"stroke:var(--{colour});stroke-width:{size}px;opacity:{opacity}"
            self._shapes.append(f'<path class="dots" d="{path}" style="{look}"/>')
        if name:
            self._legend.append((name, colour, "dot", 1.0))

    def area(self, xs: Values, ys: Values, base: float, colour: str, opacity: float = 0.7) -> None:
        """The area between a line and a level."""
        for run in self._runs(xs, ys):
            corners = [(run[0][0], base), *run, (run[-1][0], base)]
            path = "M" + "L".join(self._point(*point[:2]) for point in corners) + "z"
            self._shapes.append(f'<path d="{path}" style="fill:var(--{colour});opacity:{opacity}"/>')

    def stacked_bars(
        self, lefts: Sequence[float], rights: Sequence[float], parts: Sequence[tuple[str, str, Values]]
    ) -> None:
        """Bars [left, right], each a stack of parts (name, colour, one value a bar)."""
        tops = [0.0] * len(lefts)
        middles = [(left + right) / 2 for left, right in zip(lefts, rights, strict=True)]
        for name, colour, values in parts:
            path = ""
            for index, value in enumerate(values):
                bottom, top = tops[index], tops[index] + (value or 0.0)
                gap = (rights[index] - lefts[index]) * 0.06
                start, end = lefts[index] + gap, rights[index] - gap
                corners = [(start, bottom), (start, top), (end, top), (end, bottom)]
                path += "M" + "L".join(self._point(*corner) for corner in corners) + "z"
                tops[index] = top
            self._shapes.append(f'<path d="{path}" style="fill:var(--{colour})"/>')
            self._legend.append((name, colour, "bar", 1.0))
            self._remember(name, colour, middles, [self.form(value or 0.0) for value in values])

    def cells(
        self,
        spans: Sequence[tuple[float, float]],
        values: Sequence[Values],
        ramp: Ramp,
        row_name: str,
    ) -> None:
        """A heat map: a column for each of `spans` [left, right], a row for each element of its `values`.

        Row r lies around r on the y axis. Where nothing was measured a cell stays empty.
        """
        paths: dict[int, str] = {}
        for row in range(max((len(column) for column in values), default=0)):
            for left, right, found in _strips(spans, [_tone_at(column, row, ramp) for column in values]):
                a, b = self._point(left, row + 0.5), self._point(right, row - 0.5)
                (x0, top), (x1, bottom) = a.split(), b.split()
                paths[found] = paths.get(found, "") + f"M{x0} {top}H{x1}V{bottom}H{x0}z"
        for tone, path in sorted(paths.items()):
            self._shapes.append(f'<path class="cells" d="{path}" style="fill:{_tone_colour(tone)}"/>')
        self._ramp = ramp.html()
        self._cells = {
            "row": row_name,
            "spans": [[round(SIZE * self.x.place(edge), 1) for edge in span] for span in spans],
            "names": [_span_name(self.x_name, *span) for span in spans],
            "values": [[self.form(v) if v is not None else "not measured" for v in column] for column in values],
        }

    def level(self, y: float, colour: str = "axis") -> None:
        """A dashed line across at one height."""
        if 0 <= self.y.place(y) <= 1:
            ends = f"M{self._point(self.x.low, y)}L{self._point(self.x.high, y)}"
            self._shapes.append(f'<path class="level" d="{ends}" style="stroke:var(--{colour})"/>')

    def upright(self, x: float, colour: str = "axis") -> None:
        """A dashed line from bottom to top at one place."""
        if 0 <= self.x.place(x) <= 1:
            ends = f"M{self._point(x, self.y.low)}L{self._point(x, self.y.high)}"
            self._shapes.append(f'<path class="level" d="{ends}" style="stroke:var(--{colour})"/>')

    def html(self) -> str:
        """The chart as an HTML fragment."""
        y_ticks = [(self.y.place(value), label) for value, label in self.y.ticks]
        x_ticks = [(self.x.place(value), label) for value, label in self.x.ticks]
        grid = "".join(f'<path class="grid" d="M0 {SIZE * (1 - at):.1f}h{SIZE}"/>' for at, _ in y_ticks)
        svg = (
            f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(self.title, quote=True)}">{grid}{"".join(self._shapes)}</svg>'
        )
        hover = escape(json.dumps(self._hover, separators=(",", ":")), quote=True) if self._hover else "[]"
        cells = (
            f' data-cells="{escape(json.dumps(self._cells, separators=(",", ":")), quote=True)}"' if self._cells else ""
        )
        y_spans = "".join(f'<span style="bottom:{100 * at:.2f}%">{escape(label)}</span>' for at, label in y_ticks)
        below = ""
        if self.x_labels:
            x_spans = "".join(f'<span style="left:{100 * at:.2f}%">{escape(label)}</span>' for at, label in x_ticks)
            below = f'<div class="x-ticks">{x_spans}</div><div class="x-label">{escape(self.x.label)}</div>'
        return (
            f'<div class="chart">{self._head()}<div class="frame" style="height:{self.height}px">'
            f'<div class="y-ticks">{y_spans}</div><div class="area" data-hover="{hover}"{cells}>{svg}</div></div>{below}</div>'
        )

    def _head(self) -> str:
        items = "".join(
            f'<li><i class="key {kind}" style="--key:var(--{colour});opacity:{opacity:g}"></i>{escape(name)}</li>'
            for name, colour, kind, opacity in self._legend
        )
        return f'<div class="head"><span>{escape(self.y.label)}</span><ul>{items}</ul>{self._ramp}</div>'


def _tone_at(column: Values, row: int, ramp: Ramp) -> int | None:
    value = column[row] if row < len(column) else None
    return None if value is None else ramp.tone(value)


def _strips(spans: Sequence[tuple[float, float]], tones: Sequence[int | None]) -> Iterable[tuple[float, float, int]]:
    """(left, right, tone) of a row: neighbours of one tone as one, which keeps the page small."""
    strip: tuple[float, float, int] | None = None
    for (left, right), found in zip(spans, tones, strict=True):
        if strip is not None and found == strip[2] and left == strip[1]:
            strip = (strip[0], right, strip[2])
            continue
        if strip is not None:
            yield strip
        strip = None if found is None else (left, right, found)
    if strip is not None:
        yield strip


def _span_name(x_name: str, left: float, right: float) -> str:
    """Of the whole numbers inside: a span from 0.5 to 4.5 is "step 1 to 4"."""
    first, last = math.ceil(left), math.floor(right)
    return f"{x_name} {first:,}" + (f" to {last:,}" if last > first else "")
