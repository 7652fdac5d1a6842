"""Whatever a killed process leaves, the next one finds what was there before or what was to be there."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from finetune import files
from finetune.errors import BadInputError
from finetune.files import new_directory, recover_directory, replace_directory, require_own, write_atomic


def killed_at_call(number: int, path: Path) -> None:
    """A process that replaces `path` by a new directory and is killed ahead of its n-th rename or removal."""
    pid = os.fork()
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        return
    calls = iter(range(1, 99))

    def counted(name: str, owner: object) -> None:
        original = getattr(owner, name)

        def wrapper(*given: object, **options: object) -> object:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **options)

        setattr(owner, name, wrapper)

    counted("rename", files.os)
    counted("rmtree", files.shutil)
    with new_directory(path.with_name(".it-new")) as folder:
        (folder / "file").write_text("new")
    replace_directory(path.with_name(".it-new"), path)
    os._exit(0)


# 1: the new one becomes whole; 2: an older leftover goes; 3 and 4: the two renames; 5: the old one goes.
@pytest.mark.parametrize("number", range(1, 6))
def test_a_killed_replacement_comes_back(number: int, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.mkdir()
    (path / "file").write_text("old")
    killed_at_call(number, path)
    recover_directory(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["it"]
    assert (path / "file").read_text() == ("new" if number == 5 else "old")


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    """Temporary files and directories of our own, and nothing else that begins with a dot."""
    kept = [".lock", ".gitignore", ".hidden.json", "results.json", "step-000002"]
    for name in kept:
        (tmp_path / name).touch()
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        write_atomic(tmp_path / "results.json", "{}")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    pid = os.fork()
    if pid == 0:
        with new_directory(tmp_path / "step-000004") as folder:
            (folder / "file").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - set(kept)
    assert len(left) == 2 and all(name.startswith(".") for name in left), left
    recover_directory(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_lock_that_was_removed_while_it_was_opened_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.fcntl.flock

    def removed_first(*given: Any) -> None:
        (tmp_path / ".lock").unlink()
        real(*given)

    monkeypatch.setattr(files.fcntl, "flock", removed_first)
    with pytest.raises(BlockingIOError, match="just ended"), files.sole_owner(tmp_path / ".lock"):
        pass


def test_a_pipe_is_written_and_never_replaced(tmp_path: Path) -> None:
    pipe, mark = tmp_path / "pipe", re.compile(b"x")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        require_own(pipe, "--output", mark)
        write_atomic(pipe, "text")
        assert os.read(reader, 99) == b"text" and pipe.is_fifo()
        with pytest.raises(BadInputError, match="is a device or pipe"):
            require_own(pipe, "--out", mark, streams=False)
    finally:
        os.close(reader)


def test_an_open_descriptor_is_written_as_it_stands(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        log.write("before ")
        log.flush()
        (tmp_path / "out").symlink_to(f"/proc/self/fd/{log.fileno()}")
        require_own(tmp_path / "out", "--output", re.compile(b"x"))
        write_atomic(tmp_path / "out", "text")
        assert os.fstat(log.fileno()).st_ino == (tmp_path / "log").stat().st_ino
    assert (tmp_path / "log").read_text() == "before text" and (tmp_path / "out").is_symlink()


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    for text in ("mine 1", "mine 2"):
        require_own(link, "--output", re.compile(b"mine"))
        write_atomic(link, text)
        assert link.is_symlink() and target.read_text() == text
    with pytest.raises(BadInputError, match="is no earlier output"):
        require_own(link, "--output", re.compile(b"other"))
    assert [path.name for path in target.parent.iterdir()] == ["target"]
