"""What the user sees: one rich console on stderr, silent on every rank but 0; results go to stdout."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from finetune.distributed import is_rank_zero

console = Console(stderr=True, highlight=False, quiet=not is_rank_zero(), soft_wrap=True)
stdout = Console(highlight=False, quiet=not is_rank_zero(), soft_wrap=True)


def say(message: str) -> None:
    """Print one plain line of progress."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    """Print one line that the user should act on."""
    console.print(f"warning: {message}", style="yellow", markup=False)


class _Lossy(io.FileIO):
    """A descriptor that takes everything; what it cannot pass on is lost."""

    def write(self, data: Any) -> int:
        """The number of bytes taken: all, or as many as were written."""
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """Let stdout and stderr lose what cannot be written: no work ends with its terminal, a pipe's reader or a log."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            raw = io.BufferedWriter(_Lossy(stream.fileno(), "w", closefd=False))
            lossy = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, lossy)


# The display that is on the screen; a second one would fight with it for the same lines.
_shown: list[Progress] = []


class Bar:
    """The handle that `progress_bar` yields: `advance(n)` moves it."""

    def __init__(self, progress: Progress | None, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar on the screen."""
        return self._progress is not None

    def advance(self, amount: int = 1) -> None:
        """Move the bar forward by `amount` units."""
        if self._progress is not None:
            self._progress.advance(self._task, amount)

    def update(self, completed: int, status: str) -> None:
        """Set the bar to `completed` units and the words behind it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=completed, status=status)


@contextmanager
def progress_bar(description: str, total: int | None, *, line: bool = True) -> Iterator[Bar]:
    """A bar on a terminal, beneath the one that is shown already; elsewhere one line, unless `line` is false."""
    if not console.is_terminal or not is_rank_zero():
        if line:
            say(description if total is None else f"{description} ({total:,})")
        yield Bar(None, TaskID(0))
        return
    with _display() as progress:
        task = progress.add_task(description, total=total, status="")
        try:
            yield Bar(progress, task)
        finally:
            progress.remove_task(task)


@contextmanager
def _display() -> Iterator[Progress]:
    if _shown:
        yield _shown[-1]
        return
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _Rest(),  # the column that gives way on a narrow terminal
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        _shown.append(progress)
        try:
            yield progress
        finally:
            _shown.pop()


class _Rest(ProgressColumn):
    """The words that a task's owner gives, else the time that is over and the time that is left."""

    def render(self, task: Task) -> Text:
        """One cell."""
        text = Text(task.fields["status"])
        if not text:
            text = Text("  ").join([TimeElapsedColumn().render(task), TimeRemainingColumn().render(task)])
        text.no_wrap, text.overflow = True, "ellipsis"
        return text
