"""What the user sees: one rich console on stderr, silent on every rank but 0; results go to stdout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from finetune.distributed import is_rank_zero

console = Console(stderr=True, highlight=False, quiet=not is_rank_zero(), soft_wrap=True)
stdout = Console(highlight=False, quiet=not is_rank_zero(), soft_wrap=True)


def say(message: str) -> None:
    """Print one plain line of progress."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    """Print one line that the user should act on."""
    console.print(f"warning: {message}", style="yellow", markup=False)


class Bar:
    """The handle that `progress_bar` yields: `advance(n)` moves it."""

    def __init__(self, progress: Progress | None, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: int = 1) -> None:
        """Move the bar forward by `amount` units."""
        if self._progress is not None:
            self._progress.advance(self._task, amount)  # type: ignore[arg-type]


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Bar]:
    """A bar on a terminal, one line where the output is not a terminal."""
    if not console.is_terminal or not is_rank_zero():
        say(description if total is None else f"{description} ({total:,})")
        yield Bar(None, 0)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, progress.add_task(description, total=total))
