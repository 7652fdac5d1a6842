"""The runs in a directory and their checkpoints, as a table and as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from finetune.errors import BadInputError
from finetune.report import numbers
from finetune.report.run_files import RunFiles, StoredCheckpoint, is_run, open_run

STATE_STYLES = {"finished": "green", "measuring": "cyan", "running": "cyan", "stopped": "yellow", "not started": "dim"}


def find_runs(folder: Path) -> list[RunFiles]:
    """The runs in `folder`, or the one that it is, newest first.

    Raises:
        BadInputError: there is no such directory, or no run in it.
    """
    if not folder.is_dir():
        raise BadInputError(f"{folder}: no such directory; name the one that holds your runs (a recipe's output_dir)")
    paths = [folder] if is_run(folder) else [path for path in folder.iterdir() if path.is_dir() and is_run(path)]
    if not paths:
        raise BadInputError(f"{folder}: holds no runs; name a recipe's output_dir, or train: finetune run RECIPE")
    runs = [open_run(path) for path in paths]
    return sorted(runs, key=lambda run: (-changed_at(run), str(run.run_dir.root)))


def changed_at(run: RunFiles) -> float:
    """When the run last wrote something of its own, in seconds since 1970; a later report does not count."""
    files = [run.run_dir.recipe, run.run_dir.metrics, run.run_dir.results, run.run_dir.checkpoints, run.run_dir.adapter]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def describe_run(run: RunFiles) -> dict[str, Any]:
    """A run as plain values for JSON; times are local ISO 8601."""
    losses, best = run.column("loss"), run.best_validation
    return {
        "name": run.name,
        "path": str(run.run_dir.root),
        "state": run.state,
        "step": run.step,
        "num_steps": run.num_steps,
        "loss": losses[-1][1] if losses else None,
        "best_validation_loss": None if best is None else best[1],
        "changed": datetime.fromtimestamp(changed_at(run)).isoformat(timespec="seconds"),
        "metrics": run.metric_values("after"),
        "problems": run.problems,
        "checkpoints": [_describe_checkpoint(checkpoint) for checkpoint in reversed(run.checkpoints)],
    }


def _describe_checkpoint(checkpoint: StoredCheckpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "loss": checkpoint.loss,
        "validation_loss": checkpoint.validation_loss,
        "size_bytes": checkpoint.size_bytes,
        "whole": checkpoint.damage is None,
        "damage": checkpoint.damage,
    }


def runs_table(runs: Sequence[RunFiles]) -> Table:
    """Runs with their checkpoints beneath them, newest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("step", "loss", "validation", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for run in runs:
        table.add_row(*_run_row(run))
        for checkpoint in reversed(run.checkpoints):
            table.add_row(*_checkpoint_row(checkpoint))
        for problem in run.problems:
            table.add_row(Text(f"  {problem}", style="red"))
        table.add_section()
    return table


def _run_row(run: RunFiles) -> list[Text]:
    losses, best = run.column("loss"), run.best_validation
    steps = f"{run.step:,}" if run.num_steps is None else f"{run.step:,}/{run.num_steps:,}"
    state = Text(run.state, style=STATE_STYLES[run.state])
    state.append(f", {numbers.age(time.time() - changed_at(run))}", style="dim")
    return [
        Text(run.run_dir.root.name or str(run.run_dir.root), style="bold"),
        Text(steps),
        Text(numbers.decimal(losses[-1][1] if losses else None)),
        Text(numbers.decimal(None if best is None else best[1])),
        Text(""),
        state,
    ]


def _checkpoint_row(checkpoint: StoredCheckpoint) -> list[Text]:
    whole = checkpoint.damage is None
    return [
        Text(f"  {checkpoint.path.name}", style="dim"),
        Text(f"{checkpoint.step:,}"),
        Text(numbers.decimal(checkpoint.loss)),
        Text(numbers.decimal(checkpoint.validation_loss)),
        Text(numbers.size(checkpoint.size_bytes)),
        Text("whole", style="green") if whole else Text(f"damaged: {checkpoint.damage}", style="red"),
    ]
