"""One frame of `finetune watch`: how far a run is, its loss curve, its speed, and what it writes."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune.report import numbers
from finetune.report.charts import thin
from finetune.report.listing import STATE_STYLES
from finetune.report.overview import subtitle
from finetune.report.run_files import RunFiles
from finetune.report.terminal_chart import draw_curves

# Speed for the time that is left: over so many logged rows, short enough to follow a change.
_RECENT_ROWS = 20
_SHOWN_SAMPLES = 2
_MAX_CHARS = 200


def frame(run: RunFiles, *, width: int, height: int) -> Group:
    """The run as it stands, in `width` columns and about `height` rows."""
    parts: list[RenderableType] = [_title(run), _progress(run, width)]
    losses, validation = run.column("loss"), run.column("validation_loss")
    samples = _samples(run)
    if losses:
        rows = max(6, min(20, height - 8 - 4 * len(samples)))
        # Two dots to a column: more points than those only thicken the line.
        curves = [(thin(losses, 4 * width), "bright_blue"), (validation, "bright_yellow")]
        parts += ["", _legend(run), *draw_curves(curves, width=width, height=rows, number=numbers.decimal)]
        parts += ["", _numbers(run)]
    else:
        parts += ["", Text("no step has been logged yet", style="dim")]
    for problem in run.problems:
        parts.append(Text(problem, style="red"))
    return Group(*parts, *samples)


def seconds_left(run: RunFiles) -> float | None:
    """Time to the last step at the speed of the last rows; None where it cannot be told."""
    total = run.num_steps
    if total is None or len(run.metrics) < 1:
        return None
    last, first = run.metrics[-1], run.metrics[-min(len(run.metrics), _RECENT_ROWS)]
    steps = (last["step"] or 0) - (first["step"] or 0) if first is not last else last["step"] or 0
    seconds = (last["seconds"] or 0) - (first["seconds"] or 0) if first is not last else last["seconds"] or 0
    if steps <= 0 or seconds <= 0:
        return None
    return max(0, total - (last["step"] or 0)) * seconds / steps


def _title(run: RunFiles) -> Text:
    state = run.state
    return (
        Text(run.name, style="bold")
        .append("  ")
        .append(state, style=STATE_STYLES[state])
        .append(f"  {subtitle(run)}", style="dim")
    )


def _progress(run: RunFiles, width: int) -> RenderableType:
    total = run.num_steps
    done = f"step {run.step:,}" if total is None else f"step {run.step:,} of {total:,}"
    left = seconds_left(run) if run.state == "running" else None
    text = done if left is None else f"{done}, {numbers.duration(left)} left"
    if total is None:
        return Text(text)
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=total, completed=min(run.step, total), width=max(10, width - len(text) - 2)), text)
    return row


def _legend(run: RunFiles) -> Text:
    losses, best = run.column("loss"), run.best_validation
    line = Text("loss ").append(numbers.decimal(losses[-1][1]), style="bold bright_blue")
    if best is not None:
        validation = run.column("validation_loss")
        value = validation[-1][1] if validation else best[1]
        line.append("   validation ").append(numbers.decimal(value), style="bold bright_yellow")
        line.append(f"   best {numbers.decimal(best[1])} at step {best[0]:,}", style="dim")
    return line


def _numbers(run: RunFiles) -> Text:
    last = run.metrics[-1]
    pairs = [
        ("lr", numbers.rate(last.get("lr"))),
        ("grad norm", numbers.decimal(last.get("grad_norm"))),
        ("tokens/s", numbers.count(last.get("tokens_per_second"))),
        ("memory", numbers.size(last.get("peak_memory_bytes"))),
        ("time", numbers.duration(last.get("seconds"))),
    ]
    line = Text()
    for name, value in pairs:
        line.append(f"{name} ", style="dim").append(value, style="bold").append("  ")
    return line


def _samples(run: RunFiles) -> list[Text]:
    """The last completions, two lines each."""
    steps = [row["step"] for row in run.samples if isinstance(row.get("step"), int)]
    if not steps:
        return []
    newest = [row for row in run.samples if row.get("step") == max(steps)][:_SHOWN_SAMPLES]
    lines = [Text(f"\nsamples at step {max(steps):,}", style="dim")]
    for row in newest:
        lines.append(Text("expected  ", style="dim").append(_one_line(row.get("expected")), style="default"))
        right = str(row.get("completion", "")).strip() == str(row.get("expected", "")).strip()
        lines.append(
            Text("wrote     ", style="dim").append(
                _one_line(row.get("completion")), style="green" if right else "default"
            )
        )
    return lines


def _one_line(text: object) -> str:
    shown = " ↵ ".join(line.strip() for line in str(text or "").strip().splitlines())
    return shown if len(shown) <= _MAX_CHARS else f"{shown[: _MAX_CHARS - 1]}…"
