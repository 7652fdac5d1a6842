"""The curves of one run, and of several laid over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.report import numbers
from finetune.report.charts import MIN_SMOOTHED, SINGLE, Chart, Series, raw_and_smooth, smooth
from finetune.report.run_files import RunFiles


@dataclass(frozen=True)
class Measure:
    """A column of metrics.csv as a curve."""

    column: str
    title: str
    number: Callable[[float], str]
    note: str = ""
    from_zero: bool = True


OTHERS = (
    Measure("lr", "Learning rate", numbers.rate),
    Measure("grad_norm", "Gradient norm", numbers.decimal, "before clipping"),
    Measure("tokens_per_second", "Throughput", numbers.short, "tokens per second"),
    Measure("peak_memory_bytes", "Peak memory", numbers.size),
)
NUM_COLORS = 8


def run_charts(run: RunFiles) -> list[Chart]:
    """Loss with validation loss over it, then learning rate, gradient norm, throughput and memory."""
    loss = raw_and_smooth("training", run.column("loss"), 1)
    validation = Series("validation", run.column("validation_loss"), 2, "dots")
    charts = [Chart("loss", "Loss", [*loss, validation], large=True, note="nats per supervised token")]
    for measure in OTHERS:
        series = [Series(SINGLE, run.column(measure.column), 1)]
        charts.append(_chart(measure, series))
    return charts


def overlay_charts(runs: Sequence[RunFiles], labels: Sequence[str]) -> list[Chart]:
    """The same figures with one curve a run; loss is averaged where there are many points."""
    colors = [1 + index % NUM_COLORS for index in range(len(runs))]
    each = list(zip(runs, labels, colors, strict=True))
    losses = [(label, run.column("loss"), color) for run, label, color in each]
    averaged = any(len(points) >= MIN_SMOOTHED for _, points, _ in losses)
    curves = [Series(label, _averaged(points), color) for label, points, color in losses]
    note = "nats per supervised token, averaged" if averaged else "nats per supervised token"
    charts = [Chart("loss", "Loss", curves, large=True, note=note)]
    if any(run.column("validation_loss") for run in runs):
        dots = [Series(label, run.column("validation_loss"), color, "dots") for run, label, color in each]
        charts.append(Chart("validation_loss", "Validation loss", dots, large=True))
    for measure in OTHERS:
        charts.append(_chart(measure, [Series(label, run.column(measure.column), color) for run, label, color in each]))
    return charts


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return smooth(points) if len(points) >= MIN_SMOOTHED else points


def _chart(measure: Measure, series: Sequence[Series]) -> Chart:
    return Chart(measure.column, measure.title, series, measure.number, from_zero=measure.from_zero, note=measure.note)
