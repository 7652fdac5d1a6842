"""Several runs side by side: their numbers, what differs between their recipes, and their curves over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from finetune.recipe.keys import flatten, place_at
from finetune.report import numbers
from finetune.report.charts import draw_chart
from finetune.report.curves import NUM_COLORS, overlay_charts
from finetune.report.listing import STATE_STYLES
from finetune.report.overview import plain_name
from finetune.report.page import page, table
from finetune.report.run_files import RunFiles

# Every run has its own; a difference in them says nothing.
_OWN_KEYS = ("name", "output_dir")
_MISSING = object()


@dataclass(frozen=True)
class Measured:
    """One line of the comparison: a value a run, as text, and which of them is best."""

    name: str
    texts: list[str]
    best: int | None
    """Index of the best value; None where there is none, or several share it."""


def labels_of(runs: Sequence[RunFiles]) -> list[str]:
    """A name a run: its recipe's, or its path where two share one."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.run_dir.root) for name, run in zip(names, runs, strict=True)]


def measured_lines(runs: Sequence[RunFiles]) -> list[Measured]:
    """Task metrics before and after, losses, steps, time, speed and memory."""
    lines = [_line("state", [run.state for run in runs], str)]
    names = dict.fromkeys(n for run in runs for when in ("before", "after") for n in run.metric_values(when))
    for name in names:
        for when in ("before", "after"):
            values = [run.metric_values(when).get(name) for run in runs]
            if any(value is not None for value in values):
                more = numbers.is_share(name) if when == "after" else None
                show = lambda value, name=name: numbers.metric_value(name, value)  # noqa: E731
                lines.append(_line(f"{plain_name(name)}, {when}", values, show, more_is_better=more))
    losses = [run.column("loss") for run in runs]
    lines += [
        _line("training loss, last", [points[-1][1] if points else None for points in losses], numbers.decimal),
        _line(
            "validation loss, best",
            [None if (best := run.best_validation) is None else best[1] for run in runs],
            numbers.decimal,
            more_is_better=False,
        ),
        _line("steps done", [run.step for run in runs], numbers.count),
        _line("training time", [_training(run, "seconds") for run in runs], numbers.duration),
        _line("tokens", [_training(run, "tokens") for run in runs], numbers.count),
        _line("tokens per second", [_speed(run) for run in runs], numbers.count, more_is_better=True),
        _line("peak memory", [_training(run, "peak_memory_bytes") for run in runs], numbers.size, more_is_better=False),
    ]
    return [line for line in lines if any(text != numbers.MISSING for text in line.texts)]


def _line(
    name: str, values: Sequence[Any], show: Callable[[Any], str], *, more_is_better: bool | None = None
) -> Measured:
    texts = [numbers.MISSING if value is None else show(value) for value in values]
    known = [value for value in values if value is not None]
    best = None
    if more_is_better is not None and len(known) > 1:
        best = list(values).index(max(known) if more_is_better else min(known))
        # What reads the same is no better.
        best = best if texts.count(texts[best]) == 1 else None
    return Measured(name, texts, best)


def _training(run: RunFiles, name: str) -> float | None:
    """A number of the whole training; of an unfinished run, as of its last logged step."""
    training = run.results.get("training")
    if isinstance(training, dict) and isinstance(training.get(name), int | float):
        return float(training[name])
    value = run.metrics[-1].get(name) if run.metrics else None
    return None if value is None else float(value)


def _speed(run: RunFiles) -> float | None:
    tokens, seconds = _training(run, "tokens"), _training(run, "seconds")
    return tokens / seconds if tokens and seconds else None


def recipe_differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """(dotted key, a value a run) of every key that is not the same in all recipes.

    A key that a recipe lacks, in a section that it leaves out or has not known yet, stands for its default.
    """
    recipes = [flatten(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in _OWN_KEYS)
    rows = []
    for key in keys:
        values = [recipe.get(key, _MISSING) for recipe in recipes]
        present = [value for value in values if value is not _MISSING]
        ignored = (_default(key), None) if len(present) < len(values) else ()
        if any(value != present[0] for value in present) or (ignored and present[0] not in ignored):
            rows.append((key, [numbers.MISSING if value is _MISSING else _shown(value) for value in values]))
    return rows


def _default(key: str) -> Any:
    place = place_at(tuple(key.split(".")))
    return place.node.get("default", _MISSING) if place is not None else _MISSING


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(_shown(each) for each in value) + "]"
    return str(value)


def compare_table(runs: Sequence[RunFiles]) -> Table:
    """The numbers, one run a column; the best of a line is bold."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    result.add_column("", no_wrap=True)
    for label in labels_of(runs):
        result.add_column(label, justify="right", overflow="fold")
    for line in measured_lines(runs):
        cells = [
            Text(text, style=STATE_STYLES.get(text, "") if line.name == "state" else ("bold" if i == line.best else ""))
            for i, text in enumerate(line.texts)
        ]
        result.add_row(line.name, *cells)
    return result


def differences_table(runs: Sequence[RunFiles]) -> Table | None:
    """The keys that differ, one run a column; None where none does."""
    rows = recipe_differences(runs)
    if not rows:
        return None
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    result.add_column("recipe", no_wrap=True)
    for label in labels_of(runs):
        result.add_column(label, justify="right", overflow="fold")
    for key, values in rows:
        result.add_row(key, *(Text(value) for value in _shortened(values)))
    return result


def compare_html(runs: Sequence[RunFiles]) -> str:
    """The comparison as a self-contained page."""
    labels = labels_of(runs)
    names = "".join(
        f'<li class="s{1 + index % NUM_COLORS}"><b>{escape(label)}</b></li>' for index, label in enumerate(labels)
    )
    header = f'<h1>{len(runs)} runs compared</h1><ul class="legend runs">{names}</ul>'
    lines = [
        [escape(line.name), *(_best(text) if i == line.best else escape(text) for i, text in enumerate(line.texts))]
        for line in measured_lines(runs)
    ]
    differences = [_difference_row(key, values) for key, values in recipe_differences(runs)]
    same = '<p class="empty">The recipes are the same, names aside.</p>'
    curves = "".join(draw_chart(chart) for chart in overlay_charts(runs, labels))
    sections = [
        ("numbers", "Numbers", table(["", *labels], lines)),
        ("recipes", "What differs between the recipes", table(["key", *labels], differences) if differences else same),
        ("curves", "Curves", f'<div class="charts">{curves}</div>'),
    ]
    return page(f"{', '.join(labels)} · comparison", header, sections, what="Comparison", contents=False)


def _best(text: str) -> str:
    return f'<b class="good">{escape(text)}</b>'


def _difference_row(key: str, values: list[str]) -> list[str]:
    """A key that can break at its joints, and its values; whole paths are shown under the pointer."""
    joints = escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>")
    cells = [
        f'<span class="key" title="{escape(value)}">{escape(short)}</span>'
        for value, short in zip(values, _shortened(values), strict=True)
    ]
    return [f'<span class="key">{joints}</span>', *cells]


def _shortened(values: list[str]) -> list[str]:
    """Paths as their last parts, unless they are told apart by others."""
    short = [PurePath(value).name if value.startswith("/") or "://" in value else value for value in values]
    return short if len(set(short)) == len(set(values)) else values
