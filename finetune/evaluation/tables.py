"""Before and after as tables for the terminal: they fit 80 columns and use what is there beyond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from finetune.evaluation.metrics import METRICS, is_match
from finetune.evaluation.task import Sample

# Longer texts are cut in the middle: the end of a prompt is often the question.
_MAX_CHARS = 400
_MISSING = "–"


def comparison_table(before: Mapping[str, float] | None, after: Mapping[str, float]) -> Table:
    """One row a metric: before, after, change. Task metrics are shares; of any other, less is better."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("metric", no_wrap=True)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    earlier = before or {}
    for name in dict.fromkeys([*earlier, *after]):
        old, new = earlier.get(name), after.get(name)
        table.add_row(name, _value(name, old), _value(name, new), _change(name, old, new))
    return table


def models_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """One row a metric, one column a model."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("metric", no_wrap=True)
    for model in results:
        table.add_column(model, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for metrics in results.values() for name in metrics):
        table.add_row(name, *(_value(name, metrics.get(name)) for metrics in results.values()))
    return table


def _value(name: str, value: float | None) -> str:
    if value is None:
        return _MISSING
    return f"{value:.1%}" if name in METRICS else f"{value:,.3f}"


def _change(name: str, old: float | None, new: float | None) -> Text:
    if old is None or new is None:
        return Text(_MISSING)
    is_share = name in METRICS
    change = new - old
    text = f"{change * 100:+.1f} points" if is_share else f"{change:+,.3f}"
    if change == 0:
        return Text(text)
    return Text(text, style="green" if (change > 0) == is_share else "red")


def samples_table(before: Sequence[Sample] | None, after: Sequence[Sample]) -> Table:
    """Every sample as prompt, expected answer and completions one under the other; right ones are green."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, show_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for index, sample in enumerate(after):
        table.add_row("prompt", _shorten(sample.prompt))
        table.add_row("expected", _shorten(sample.expected))
        if before is not None and index < len(before):
            table.add_row("before", _completion(before[index]))
        table.add_row("after", _completion(sample), end_section=True)
        table.add_section()
    return table


def _completion(sample: Sample) -> Text:
    text = _shorten(sample.completion)
    if is_match(sample.expected, sample.completion):
        text.stylize("green")
    if not sample.stopped:
        text.append(" [cut]", style="yellow")
    return text


def _shorten(text: str) -> Text:
    text = text.strip()
    if len(text) > _MAX_CHARS:
        half = _MAX_CHARS // 2
        text = f"{text[:half].rstrip()} […] {text[-half:].lstrip()}"
    return Text(text or "(nothing)")
