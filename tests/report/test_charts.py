"""Axes, thinning and averaging of curves, and the SVG that comes of them."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from finetune.report import numbers
from finetune.report.charts import (
    Chart,
    Series,
    draw_chart,
    draw_histogram,
    draw_percentiles,
    nice_ticks,
    script_json,
    smooth,
    thin,
    value_axis,
)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.03, 0.51), (1e-6, 2e-3), (-3, 12), (0, 3_597_963_264), (1, 94)])
def test_ticks_are_round_and_within_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 4)
    assert 2 <= len(ticks) <= 9 and low <= ticks[0] and ticks[-1] <= high
    step = ticks[1] - ticks[0]
    assert f"{step:e}"[0] in "125"
    assert all(later - earlier == pytest.approx(step) for earlier, later in pairwise(ticks))


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [2.0, 2.0], [1.9, 0.31, 0.3], [1e-9, 2e-9]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_an_axis_holds_its_values_and_is_labelled_at_its_ends(values: list[float], from_zero: bool) -> None:
    axis = value_axis(values, from_zero=from_zero)
    assert all(0 <= axis.place(value) <= 1 for value in values) and len(axis.ticks) >= 2
    assert not from_zero or axis.low == 0
    if len(set(values)) > 1:
        assert axis.place(axis.ticks[0]) == pytest.approx(0, abs=1e-6)
        assert axis.place(axis.ticks[-1]) == pytest.approx(1, abs=1e-6)


def test_thinning_keeps_ends_and_extremes() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(20_000)]
    points[777] = (777.0, 9.0)
    thinned = thin(points)
    assert len(thinned) <= 810 and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert (777.0, 9.0) in thinned and thinned == sorted(thinned)
    assert thin(points[:100]) == points[:100]


def test_the_average_starts_at_the_first_value_and_does_not_lag() -> None:
    falling = [(float(x), 100.0 - x) for x in range(100)]
    averaged = smooth(falling)
    assert averaged[0] == falling[0] and [x for x, _ in averaged] == [x for x, _ in falling]
    assert averaged[50][1] == pytest.approx(50.0)
    assert all(y == pytest.approx(3.0) for _, y in smooth([(x, 3.0) for x in range(7)]))


def test_a_chart_draws_every_point_and_tells_its_values() -> None:
    points = [(1.0, 2.0), (2.0, 1.0), (3.0, 1.5)]
    dots = Series("validation", [(2.0, 1.2)], 2, "dots")
    html = draw_chart(Chart("loss", "Loss <of> it", [Series("training", points), dots]))
    line = re.search(r'<path class="line s1" d="M([^"]+)"', html)
    assert line is not None and len(line.group(1).split("L")) == 3
    assert html.count('class="dot s2"') == 1 and "Loss &lt;of&gt; it" in html
    assert "Loss &lt;of&gt; it: training from 2 at step 1 to 1.5 at step 3" in html
    assert '"text":["2","1","1.5"]' in html and "NaN" not in html


def test_a_chart_of_nothing_or_of_one_point_is_still_a_figure() -> None:
    assert "No values yet" in draw_chart(Chart("lr", "Learning rate", [Series("lr", [])]))
    single = draw_chart(Chart("lr", "Learning rate", [Series("lr", [(5.0, 0.0)])], numbers.rate, from_zero=True))
    assert 'class="dot s1"' in single and "nan" not in single


def test_histograms_and_percentiles_are_marked() -> None:
    html = draw_histogram([0, 10, 20, 30], [4, 0, 2], {"median 12": 12}, title="Lengths")
    bars = re.search(r'class="bars" d="([^"]+)"', html)
    assert bars is not None and bars.group(1).count("Z") == 2 and "median 12" in html
    lengths = {"p5": 5, "p50": 12, "p95": 25, "p99": 29, "max": 30}
    assert "p95 25" in draw_percentiles(lengths, {"median 12": 12}, title="Lengths")


def test_data_cannot_end_its_script() -> None:
    assert "</script" not in script_json({"label": "</script><script>alert(1)"})


def test_numbers_read_well() -> None:
    assert [numbers.short(value) for value in (0, 950, 12_340, 999_600, 4.56e6)] == [
        "0",
        "950",
        "12.3k",
        "1,000k",
        "4.56M",
    ]
    assert [numbers.size(value) for value in (559, 19_848, 2.565e9, 64 << 30)] == [
        "559 B",
        "19.8 kB",
        "2.56 GB",
        "68.7 GB",
    ]
    assert [numbers.duration(value) for value in (38, 312, 7_440, None)] == ["38 s", "5 min 12 s", "2 h 04 min", "–"]
    assert [numbers.age(value) for value in (5, 301, 7_300, 200_000)] == ["just now", "5 min ago", "2 h ago", "2 d ago"]
    assert numbers.metric_change("exact_match", 0.02, 0.91) == "+89.0 points" and numbers.is_better(
        "perplexity", 9.0, 2.0
    )
    assert numbers.decimal(float("nan")) == "not a number"
