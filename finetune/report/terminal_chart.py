"""A curve in the terminal: braille dots, two by four to a character, with axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from finetune.report.charts import Axis, Point, step_axis, value_axis

# Source: Unicode 16, "Braille Patterns": bit of the dot at (column, row) of a cell.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800


class Canvas:
    """Dots on a grid of characters; the last curve drawn gives a character its style."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._cells = [[0] * width for _ in range(height)]
        self._styles = [[""] * width for _ in range(height)]

    def dot(self, x: int, y: int, style: str) -> None:
        """Set the dot at (x, y), counted from the upper left, two to a character across and four down."""
        if 0 <= x < 2 * self.width and 0 <= y < 4 * self.height:
            self._cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
            self._styles[y // 4][x // 2] = style

    def curve(self, places: Sequence[tuple[float, float]], style: str) -> None:
        """Lines from each of the places to the next; both coordinates from 0 to 1, upwards."""
        across, down = 2 * self.width - 1, 4 * self.height - 1
        dots = [(round(x * across), round((1 - y) * down)) for x, y in places]
        for (x0, y0), (x1, y1) in zip(dots, dots[1:] or dots, strict=False):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for index in range(steps + 1):
                self.dot(round(x0 + (x1 - x0) * index / steps), round(y0 + (y1 - y0) * index / steps), style)

    def lines(self) -> list[Text]:
        """The rows as styled text."""
        rows = []
        for cells, styles in zip(self._cells, self._styles, strict=True):
            row = Text()
            for cell, style in zip(cells, styles, strict=True):
                row.append(chr(_BLANK + cell) if cell else " ", style=style)
            rows.append(row)
        return rows


def draw_curves(
    curves: Sequence[tuple[Sequence[Point], str]], *, width: int, height: int, number: Callable[[float], str]
) -> list[Text]:
    """Curves as (points, style) over common axes, in `height` rows of `width` characters; needs one point at least."""
    points = [point for curve, _ in curves for point in curve]
    x_axis = step_axis(min(x for x, _ in points), max(x for x, _ in points))
    y_axis = value_axis([y for _, y in points], from_zero=False)
    labels = _label_rows(y_axis, height - 1, number)
    margin = max(len(label) for label in labels.values())
    canvas = Canvas(max(10, width - margin - 2), height - 1)
    for curve, style in curves:
        canvas.curve([(x_axis.place(x), y_axis.place(y)) for x, y in curve], style)
    rows = [
        Text(f"{labels.get(index, ''):>{margin}} ", style="dim").append("┤" if index in labels else "│").append(row)
        for index, row in enumerate(canvas.lines())
    ]
    return [*rows, _steps_line(x_axis, margin + 2, canvas.width)]


def _label_rows(axis: Axis, height: int, number: Callable[[float], str]) -> dict[int, str]:
    return {round((1 - axis.place(tick)) * (height - 1)): number(tick) for tick in axis.ticks}


def _steps_line(axis: Axis, start: int, width: int) -> Text:
    line = [" "] * (start + width)
    for tick in axis.ticks:
        label = f"{tick:,.0f}"
        first = min(start + round(axis.place(tick) * (width - 1)) - len(label) // 2, start + width - len(label))
        before = line[max(0, first - 1) : first + len(label) + 1]
        if first >= 0 and not "".join(before).strip():
            line[first : first + len(label)] = label
    return Text("".join(line), style="dim")
