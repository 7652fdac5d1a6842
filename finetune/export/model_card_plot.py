"""The loss curve as an SVG image, drawn from the rows of metrics.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Point = tuple[float, float]

WIDTH, HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 44
_NUM_TICKS = 5
_STYLE = (
    "text{font:12px sans-serif;fill:#57606a}.grid{stroke:#d0d7de}.axis{stroke:#57606a}"
    ".loss{stroke:#0969da}.validation{stroke:#bc4c00}polyline{fill:none;stroke-width:1.8}circle.validation{fill:#bc4c00}"
)


def read_curve(path: Path, column: str) -> list[Point]:
    """(step, value) of every row of a metrics file that holds a finite number in `column`; none without the file."""
    if not path.is_file():
        return []
    points: list[Point] = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                point = (float(row["step"]), float(row[column]))
            except (KeyError, TypeError, ValueError):
                continue  # an empty cell, or a last line that a kill left half written
            if math.isfinite(point[1]):
                points.append(point)
    return points


def draw_loss(loss: Sequence[Point], validation: Sequence[Point]) -> str | None:
    """An SVG of the training and validation loss over the steps; None with fewer than two points."""
    if len(loss) < 2:
        return None
    frame = _Frame.around([*loss, *validation])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-label="loss over optimizer steps">',
        f'<style>{_STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_axes(frame),
        f'<polyline class="loss" points="{frame.path(loss)}"/>',
    ]
    if validation:
        parts.append(f'<polyline class="validation" points="{frame.path(validation)}"/>')
        parts += [f'<circle class="validation" cx="{x}" cy="{y}" r="3"/>' for x, y in map(frame.place, validation)]
    parts += _legend(bool(validation))
    return "\n".join([*parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class _Frame:
    first: float
    last: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[Point]) -> _Frame:
        steps, values = [x for x, _ in points], [y for _, y in points]
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        last = max(steps) if max(steps) > min(steps) else min(steps) + 1
        return cls(min(steps), last, low - margin, high + margin)

    def place(self, point: Point) -> tuple[float, float]:
        across = (point[0] - self.first) / (self.last - self.first)
        up = (point[1] - self.low) / (self.high - self.low)
        x = _LEFT + across * (WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1)

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{x},{y}" for x, y in map(self.place, points))


def _axes(frame: _Frame) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for tick in range(_NUM_TICKS):
        share = tick / (_NUM_TICKS - 1)
        value = frame.low + share * (frame.high - frame.low)
        step = frame.first + share * (frame.last - frame.first)
        x, y = frame.place((step, value))
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{step:.0f}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
    return parts


def _legend(has_validation: bool) -> list[str]:
    entries = [("loss", "training loss")] + ([("validation", "validation loss")] if has_validation else [])
    parts = []
    for index, (name, label) in enumerate(entries):
        x = _LEFT + 140 * index
        parts.append(f'<line class="{name}" x1="{x}" y1="16" x2="{x + 22}" y2="16" stroke-width="2"/>')
        parts.append(f'<text x="{x + 28}" y="20">{label}</text>')
    return parts
