"""`finetune report`, `runs`, `compare` and `watch` on runs written without training."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from finetune.cli import main
from finetune.files import sole_owner
from finetune.report.compare import recipe_differences
from finetune.report.run_files import RunFiles, open_run
from finetune.report.terminal_chart import draw_curves
from finetune.report.watch import frame, seconds_left
from tests.report.example_runs import write_run


def test_report_prints_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path)
    assert main(["report", str(run_dir.root)]) == 0
    assert Path(capsys.readouterr().out.strip()) == run_dir.report and run_dir.report.is_file()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_runs_lists_newest_first_with_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write_run(tmp_path, "old"), write_run(tmp_path, "new", until=57)
    for path in (old.root, *old.root.rglob("*")):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    (new.checkpoints / "step-000050" / "manifest.json").unlink()
    (tmp_path / "not-a-run").mkdir()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["state"], run["step"]) for run in found] == [
        ("new", "stopped", 57),
        ("old", "finished", 100),
    ]
    assert found[0]["checkpoints"][0]["whole"] is False and "manifest.json" in found[0]["checkpoints"][0]["damage"]
    first = found[1]["checkpoints"][0]
    assert first["step"] == 100 and first["whole"] is True and first["loss"] > 0 and first["size_bytes"] > 0

    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.index("new") < out.index("old") and "57/100" in out and "damaged" in out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["runs", str(old.root)]) == 0
    assert "step-000080" in capsys.readouterr().out


def test_a_directory_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert "holds no runs" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "nowhere")]) == 2


def test_compare_sets_numbers_and_recipes_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path, "one")
    two = write_run(tmp_path, "two", until=57, adapter={"rank": 8}, training={"optimizer": {"lr": 1e-3}})
    page = tmp_path / "compare.html"
    assert main(["compare", str(one.root), str(two.root), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "exact match, after" in out and "91.0%" in out and "adapter.rank" in out
    differences = recipe_differences([open_run(one.root), open_run(two.root)])
    assert differences == [("adapter.rank", ["16", "8"]), ("training.optimizer.lr", ["0.002", "0.001"])]
    three = write_run(tmp_path, "three", evaluation={"source": {"path": "/data/test.jsonl"}})
    differences = recipe_differences([open_run(one.root), open_run(three.root)])
    assert differences == [("evaluation.source.path", ["–", "/data/test.jsonl"])]
    html = page.read_text()
    assert html.count('<figure class="chart') == 6 and html.count('class="line s2"') == 5
    pages = [str(page), str(one.root / "recipe.yaml"), str(one.root)]
    assert [main(["compare", str(one.root), str(two.root), "--html", each]) for each in pages] == [0, 2, 2]
    err = capsys.readouterr().err
    assert "recipe.yaml: exists, and is no earlier output" in err and "one: is a directory; name a file in it" in err
    assert main(["compare", str(one.root), str(one.root)]) == 0
    assert "The recipes are the same" in capsys.readouterr().out


def test_compare_needs_two_runs_and_a_file_it_can_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path).root)
    assert main(["compare", run]) == 2
    assert "two runs or more" in capsys.readouterr().err
    assert main(["compare", run, run, "--html", "/proc/none/page.html"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_watch_once_prints_a_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path, until=57)
    with sole_owner(run_dir.lock):
        assert main(["watch", str(run_dir.root), "--once"]) == 0
    out = capsys.readouterr().out
    for text in (
        "running",
        "step 57 of 100",
        "left",
        "loss 0.",
        "validation 0.",
        "tokens/s",
        "memory 2.67 GB",
        "wrote",
    ):
        assert text in out, text
    assert any(0x2800 < ord(char) <= 0x28FF for char in out)
    # Where the output is no terminal there is nothing to follow.
    assert main(["watch", str(run_dir.root)]) == 0


@pytest.mark.parametrize("end", ["finished", "stopped"])
def test_watch_follows_a_run_until_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    run_dir = write_run(tmp_path, until=57)
    whole = write_run(tmp_path, "whole")
    lock = ExitStack()
    lock.enter_context(sole_owner(run_dir.lock))
    _, *rows = whole.metrics.read_text().splitlines(keepends=True)

    def train_on() -> None:
        with run_dir.metrics.open("a") as file:
            file.writelines(rows[57:58] if end == "stopped" else rows[57:])

    def finish() -> None:
        shutil.copytree(whole.adapter, run_dir.adapter)
        shutil.copy(whole.results, run_dir.results)

    # What happens while the command sleeps; a third sleep would fail.
    happens = iter([train_on, finish if end == "finished" else lock.close])
    monkeypatch.setattr("time.sleep", lambda seconds: next(happens)())
    terminal = Console(width=100, height=40, force_terminal=True, file=io.StringIO(), soft_wrap=True)
    monkeypatch.setattr("finetune.console.stdout", terminal)
    with lock:
        assert main(["watch", str(run_dir.root)]) == 0
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue())  # type: ignore[attr-defined]
    seen = ["57 of 100", *(["58 of 100"] if end == "stopped" else ["100 of 100", "finished"])]
    assert all(text in frames for text in seen), frames
    said = {"finished": "the run is finished", "stopped": "the run was stopped at step 58; the command that began it"}
    assert said[end] in frames


def test_watch_of_a_run_before_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path, until=1)
    run_dir.metrics.unlink()
    assert main(["watch", str(run_dir.root), "--once"]) == 0
    assert "no step has been logged yet" in capsys.readouterr().out


def test_the_time_left_follows_the_last_rows(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, until=50, speed=980.0).root)
    assert seconds_left(run) == pytest.approx(50 * 3.0, rel=0.01)
    run.metrics = run.metrics[:1]
    assert seconds_left(run) == pytest.approx(99 * 3.0, rel=0.01)
    assert seconds_left(RunFiles(run.run_dir)) is None


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (140, 60)])
def test_a_frame_fits_its_terminal(tmp_path: Path, width: int, height: int) -> None:
    run = open_run(write_run(tmp_path, until=57).root)
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(frame(run, width=width, height=height))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= height or height < 24


def test_a_falling_curve_goes_down_in_braille() -> None:
    rows = draw_curves([([(1.0, 2.0), (100.0, 0.0)], "blue")], width=30, height=8, number=str)
    filled = [row.plain.index(next(char for char in row.plain if ord(char) > 0x2800)) for row in rows[:-1]]
    assert filled == sorted(filled) and len(rows) == 8 and "100" in rows[-1].plain
