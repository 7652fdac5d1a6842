"""Numbers as people read them: counts, sizes, times and metrics. One place, so that page and terminal agree."""

from __future__ import annotations

import math

MISSING = "–"

# Of these, less is better, and they are no shares.
LESS_IS_BETTER = ("perplexity", "loss", "validation_loss")


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return MISSING if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """Three digits and a unit: 950, 12.3k, 4.56M."""
    if value is None:
        return MISSING
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}" if abs(value) < 999.5 * limit else f"{value / limit:,.0f}{unit}"
    return f"{value:.3g}"


def size(num_bytes: float | None) -> str:
    """Bytes in decimal units: 19.8 kB, 2.57 GB."""
    if num_bytes is None:
        return MISSING
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(num_bytes) >= limit:
            value = num_bytes / limit
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """Two units of time: 38 s, 5 min 12 s, 2 h 04 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    total = round(seconds)
    hours, minutes = divmod(total // 60, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {total % 60:02d} s" if minutes else f"{total} s"


def age(seconds: float) -> str:
    """How long ago, in one unit: just now, 5 min ago, 3 h ago, 12 d ago."""
    for limit, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{int(seconds // limit):,} {unit} ago"
    return "just now"


def decimal(value: float | None) -> str:
    """Four significant digits, for losses and norms."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """A learning rate: 0.002, 2.5e-05."""
    return MISSING if value is None else f"{value:.3g}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share between 0 and 1, of which more is better."""
    return metric not in LESS_IS_BETTER


def metric_value(metric: str, value: float | None) -> str:
    """A metric's value: shares as per cent."""
    if value is None:
        return MISSING
    return f"{value:.1%}" if is_share(metric) else f"{value:,.3f}"


def metric_change(metric: str, before: float | None, after: float | None) -> str:
    """By how much a metric moved, with its sign; shares in points."""
    if before is None or after is None:
        return MISSING
    return f"{(after - before) * 100:+.1f} points" if is_share(metric) else f"{after - before:+,.3f}"


def is_better(metric: str, before: float | None, after: float | None) -> bool | None:
    """Whether a metric moved the right way; None where it did not move or one side is missing."""
    if before is None or after is None or before == after:
        return None
    return (after > before) == is_share(metric)
