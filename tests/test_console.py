"""Progress: bars on a terminal, one beneath the other; lines elsewhere; nothing on other ranks."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from finetune import console


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    shown = Console(file=screen, force_terminal=True, width=100, soft_wrap=True)
    monkeypatch.setattr(console, "console", shown)
    return screen


def test_bars_within_bars_share_the_screen(terminal: io.StringIO) -> None:
    with console.progress_bar("training", 4, line=False) as outer:
        outer.update(2, "loss 0.5")
        with console.progress_bar("tokenizing a[b]", 3) as inner:
            inner.advance(2)
            assert [task.description for task in console._shown[-1].tasks] == ["training", "tokenizing a[b]"]
            console._shown[-1].refresh()
        assert [task.completed for task in console._shown[-1].tasks] == [2]
        assert outer.is_shown
    assert not console._shown
    text = terminal.getvalue()
    assert "training" in text and "2/4" in text and "loss 0.5" in text and "tokenizing a[b]" in text and "2/3" in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_count_stands_whole_on_a_narrow_terminal(terminal: io.StringIO, width: int) -> None:
    console.console.width = width
    with console.progress_bar("training", 4000) as bar:
        bar.update(40, "left 39:39  loss 5.2644  lr 3.42e-03  605 tok/s  0.44 GB")
        console._shown[-1].refresh()
    assert "40/4000" in terminal.getvalue() and "left 39:39" in terminal.getvalue()


def test_an_error_leaves_no_bar_behind(terminal: io.StringIO) -> None:
    with pytest.raises(KeyError), console.progress_bar("training", 4), console.progress_bar("validating", 3):
        raise KeyError
    assert not console._shown
    with console.progress_bar("again", 1) as bar:
        bar.advance()


def test_without_a_terminal_there_is_one_line_on_rank_0_alone() -> None:
    code = (
        "from finetune.console import progress_bar\n"
        "with progress_bar('merging', 1200) as bar:\n    bar.advance(); assert not bar.is_shown\n"
        "with progress_bar('validating', 3, line=False) as bar:\n    bar.advance()\n"
    )

    def said(rank: str) -> str:
        environment = {**os.environ, "LOCAL_RANK": rank}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == ""
        return done.stderr

    assert said("0") == "merging (1,200)\n"
    assert said("1") == ""


def test_what_nobody_reads_ends_no_work() -> None:
    """The reader of a pipe goes, and a log's disk is full."""
    code = (
        "import sys; from finetune import console; console.outlive_readers(); sys.stdin.read();"
        "[console.say('line') or console.stdout.print('line') for _ in range(9)]; sys.exit(3)"
    )
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=full)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 3
