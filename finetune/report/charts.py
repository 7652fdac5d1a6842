"""Figures as inline SVG: curves, bars and boxes with axes. The drawing stretches to any width, labels are text.

The SVG's own coordinates are 0 to 1000 both ways, y downwards; lines keep their width however it is stretched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from finetune.report import numbers

Point = tuple[float, float]

SIZE = 1000
# More points than pixels cost bytes and show nothing.
MAX_POINTS = 800
# The label of a curve that is alone in its figure.
SINGLE = "value"
# Below this many points a curve is read as it is.
MIN_SMOOTHED = 40


@dataclass(frozen=True)
class Series:
    """One curve: points by rising x, and a colour from 1 to 8."""

    label: str
    points: Sequence[Point]
    color: int = 1
    style: Literal["line", "faint", "dots"] = "line"
    in_legend: bool = True


@dataclass(frozen=True)
class Chart:
    """A figure of curves over one pair of axes."""

    key: str
    title: str
    series: Sequence[Series]
    number: Callable[[float], str] = numbers.decimal
    from_zero: bool = False
    large: bool = False
    note: str = ""
    x_label: str = "step"
    x_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """A range of values and the round ones that are labelled."""

    low: float
    high: float
    ticks: list[float] = field(default_factory=list)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) that lie within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def value_axis(values: Sequence[float], *, from_zero: bool, about: int = 4) -> Axis:
    """An axis for `values` that ends on labelled ticks, so that no curve touches its frame unexplained."""
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        low = 0.0
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = abs(high) * 0.1 or 1.0
        low, high = (0.0 if from_zero and low >= 0 else low - margin), high + margin
    ticks = nice_ticks(low, high, about)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    low = min(low, math.floor(low / step + 1e-9) * step)
    high = max(high, math.ceil(high / step - 1e-9) * step)
    return Axis(low, high, nice_ticks(low, high, about))


def step_axis(low: float, high: float) -> Axis:
    """An axis over whole steps; ticks too close to its ends are left to them."""
    high = high if high > low else low + 1
    ticks = [tick for tick in nice_ticks(low, high, 5) if tick == int(tick)]
    return Axis(low, high, ticks)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` of the points: the ends, and the lowest and the highest of each stretch between."""
    if len(points) <= limit:
        return list(points)
    kept = [points[0]]
    stretch = (len(points) - 2) / (limit // 2 - 1)
    start = 1.0
    while round(start) < len(points) - 1:
        part = points[round(start) : min(round(start + stretch), len(points) - 1)]
        if part:
            kept.extend(sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}))
        start += stretch
    return [*kept, points[-1]]


def smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over a window of about a twelfth of the points around each; at the start a narrower one, so that a
    steep fall is not lifted."""
    half = max(1, len(points) // 24)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    averaged = []
    for index, (x, _) in enumerate(points):
        first, last = max(0, index - half), min(len(points) - 1, index + min(half, index))
        averaged.append((x, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return averaged


def raw_and_smooth(label: str, points: Sequence[Point], color: int) -> list[Series]:
    """A curve as it is; where it has many points, faint, with its average over it."""
    if len(points) < MIN_SMOOTHED:
        return [Series(label, points, color)]
    return [
        Series(label, points, color, "faint", in_legend=False),
        Series(f"{label}, averaged", smooth(points), color),
    ]


def draw_chart(chart: Chart) -> str:
    """The figure's HTML; a line of text where no series has a point."""
    series = [each for each in chart.series if each.points]
    if not series:
        return _figure(chart, "", '<p class="empty">No values yet.</p>')
    series = [Series(s.label, thin(s.points), s.color, s.style, s.in_legend) for s in series]
    xs = [x for each in series for x, _ in each.points]
    low, high = chart.x_range or (min(xs), max(xs))
    x_axis = step_axis(min(low, *xs), max(high, *xs)) if len(xs) > 1 else step_axis(min(low, xs[0] - 1), xs[0])
    y_axis = value_axis([y for each in series for _, y in each.points], from_zero=chart.from_zero)
    paths = [_grid(y_axis), *(_curve(each, x_axis, y_axis) for each in series)]
    data = {
        "x": [x_axis.low, x_axis.high],
        "y": [y_axis.low, y_axis.high],
        "label": chart.x_label,
        "series": [_data(each, chart.number) for each in series if each.in_legend],
    }
    plot = _plot("".join(paths), x_axis, y_axis, chart.number, _spoken(chart, series), data)
    return _figure(chart, _legend(series, chart.number), plot)


def draw_histogram(edges: Sequence[float], counts: Sequence[int], marks: dict[str, float], *, title: str) -> str:
    """Bars of `counts` between `edges` (one more of them), with labelled marks at values of the x axis."""
    x_axis = step_axis(edges[0], max(edges[-1], *marks.values()) if marks else edges[-1])
    # A quarter of the height is left to the marks' labels.
    y_axis = value_axis([0.0, 1.25 * max(counts)], from_zero=True, about=3)
    bars = []
    for left, right, number in zip(edges, edges[1:], counts, strict=False):
        x0, x1 = SIZE * x_axis.place(left), SIZE * x_axis.place(right)
        gap = min(1.5, 0.15 * (x1 - x0))
        top = SIZE * (1 - y_axis.place(number))
        if number:
            bars.append(f"M{x0 + gap:.1f} {SIZE}V{top:.1f}H{x1 - gap:.1f}V{SIZE}Z")
    paths = _grid(y_axis) + f'<path class="bars" d="{"".join(bars)}"/>' + _mark_lines(marks, x_axis)
    data = {
        "x": [x_axis.low, x_axis.high],
        "bins": [
            [left, right, f"{numbers.count(left)} to {numbers.count(right - 1)} tokens", numbers.count(number)]
            for left, right, number in zip(edges, edges[1:], counts, strict=False)
        ],
    }
    spoken = f"{title}: {sum(counts):,} samples of {edges[0]:,.0f} to {edges[-1]:,.0f} tokens"
    chart = Chart("lengths", title, [], note="samples by tokens")
    labels = _mark_labels(marks, x_axis)
    return _figure(chart, "", _plot(paths, x_axis, y_axis, numbers.short, spoken, data, labels))


def draw_percentiles(lengths: dict[str, int], marks: dict[str, float], *, title: str) -> str:
    """A box from p5 to p95 with the median and a line to the longest, where only percentiles are known."""
    high = max([*lengths.values(), *marks.values()])
    x_axis = step_axis(0, high)
    x = {name: SIZE * x_axis.place(value) for name, value in lengths.items()}
    low, median, top, longest = (x[name] for name in ("p5", "p50", "p95", "max"))
    paths = (
        f'<path class="whisker" d="M{top:.1f} 700H{longest:.1f}M{longest:.1f} 610V790"/>'
        f'<path class="bars" d="M{low:.1f} 500H{top:.1f}V900H{low:.1f}Z"/>'
        f'<path class="median" d="M{median:.1f} 500V900"/>' + _mark_lines(marks, x_axis)
    )
    spoken = f"{title}: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items())
    note = "tokens per sample: p5 to p95, median, longest"
    chart = Chart("lengths", title, [], note=note)
    plot = _plot(paths, x_axis, Axis(0, 1), numbers.count, spoken, None, _mark_labels(marks, x_axis), low=True)
    return _figure(chart, "", plot)


def _figure(chart: Chart, legend: str, body: str) -> str:
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    large = " large" if chart.large else ""
    return (
        f'<figure class="chart{large}" id="chart-{escape(chart.key)}">'
        f"<figcaption><h3>{escape(chart.title)}</h3>{note}{legend}</figcaption>{body}</figure>"
    )


def _legend(series: Sequence[Series], number: Callable[[float], str]) -> str:
    shown = [each for each in series if each.in_legend]
    # A figure of one curve is named by its title.
    single = len(shown) == 1 and shown[0].label == SINGLE
    items = "".join(
        f'<li class="{"alone" if single else f"s{each.color} {each.style}"}">'
        f"<span>{'' if single else escape(each.label)}</span> "
        f"<b>{escape(number(each.points[-1][1]))}</b></li>"
        for each in shown
    )
    return f'<ul class="legend">{items}</ul>'


def _plot(
    paths: str,
    x_axis: Axis,
    y_axis: Axis,
    number: Callable[[float], str],
    spoken: str,
    data: dict[str, Any] | None,
    extra: str = "",
    *,
    low: bool = False,
) -> str:
    y_labels = "".join(
        f'<span style="bottom:{100 * y_axis.place(tick):.2f}%">{escape(number(tick))}</span>' for tick in y_axis.ticks
    )
    x_labels = "".join(
        f'<span style="left:{100 * x_axis.place(tick):.2f}%">{numbers.short(tick) if tick >= 1e5 else f"{tick:,.0f}"}'
        "</span>"
        for tick in x_axis.ticks
    )
    hover = '<div class="cursor" hidden></div><div class="tip" hidden></div>' if data else ""
    values = f'<script type="application/json">{script_json(data)}</script>' if data else ""
    focus = ' tabindex="0"' if data else ""
    return (
        f'<div class="plot{" low" if low else ""}"><div class="y-axis" aria-hidden="true">{y_labels}</div>'
        f'<div class="canvas"{focus} role="img" aria-label="{escape(spoken)}">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" aria-hidden="true">{paths}</svg>'
        f'{extra}{hover}</div><div class="x-axis" aria-hidden="true">{x_labels}</div>{values}</div>'
    )


def _grid(y_axis: Axis) -> str:
    rows = "".join(f"M0 {SIZE * (1 - y_axis.place(tick)):.1f}H{SIZE}" for tick in y_axis.ticks)
    return f'<path class="grid" d="{rows}"/>'


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    places = [(SIZE * x_axis.place(x), SIZE * (1 - y_axis.place(y))) for x, y in series.points]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    # A stroke of no length with round ends is a round dot, whatever the drawing is stretched to.
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    drawn = f'<path class="{series.style} s{series.color}" d="M{line}"/>' if len(places) > 1 else ""
    if series.style == "dots" or len(places) == 1:
        drawn += f'<path class="dot s{series.color}" d="{dots}"/>'
    return drawn


def _mark_lines(marks: dict[str, float], x_axis: Axis) -> str:
    lines = "".join(f"M{SIZE * x_axis.place(value):.1f} 0V{SIZE}" for value in marks.values())
    return f'<path class="mark" d="{lines}"/>' if lines else ""


def _mark_labels(marks: dict[str, float], x_axis: Axis) -> str:
    labels = []
    for row, (name, value) in enumerate(marks.items()):
        place = x_axis.place(value)
        side = f"right:{100 * (1 - place):.2f}%" if place > 0.6 else f"left:{100 * place:.2f}%"
        labels.append(f'<span class="mark-label" style="{side};top:{1.25 * row:.2f}em">{escape(name)}</span>')
    return "".join(labels)


def _data(series: Series, number: Callable[[float], str]) -> dict[str, Any]:
    return {
        "label": series.label,
        "color": series.color,
        "x": [x for x, _ in series.points],
        "y": [float(f"{y:.6g}") for _, y in series.points],
        "text": [number(y) for _, y in series.points],
    }


def _spoken(chart: Chart, series: Sequence[Series]) -> str:
    parts = []
    for each in series:
        if each.in_legend:
            (x0, y0), (x1, y1) = each.points[0], each.points[-1]
            parts.append(
                f"{each.label} from {chart.number(y0)} at {chart.x_label} {x0:,.0f} "
                f"to {chart.number(y1)} at {chart.x_label} {x1:,.0f}"
            )
    return f"{chart.title}: {'; '.join(parts)}"


def script_json(value: Any) -> str:
    """JSON that can stand within a script element: it cannot end it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
