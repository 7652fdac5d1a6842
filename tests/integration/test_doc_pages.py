"""The pages of docs/ that tell how to do something: their commands are run as they stand, on tiny models.

`<!-- run -->` before a block of commands has it run, each line with exit code 0 (`<!-- run: 2 -->`: with 2, and the
`text` block after it is what is then said); `<!-- file: NAME -->` writes the block.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^<!-- (run|file)(?:: (.+?))? -->\n```\w+\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.M | re.S)
PAGES = {path.stem: BLOCK.findall(path.read_text(encoding="utf-8")) for path in sorted(DOCS.glob("*.md"))}
# The demo's recipe on a tiny model, a few of its rows.
SHORT = """
    training.max_steps=2 training.schedule.warmup_steps=1 data.max_seq_len=2048 data.max_tokens=4096
    data.sources.0.max_rows=16 data.num_workers=0 evaluation.max_rows=2 evaluation.max_new_tokens=4
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: a recipe, its rows, its model, and the finished run `runs/my-run`."""
    folder = tmp_path_factory.mktemp("start")
    model = write_model(folder / "model", "llama")
    rows = write_jsonl(folder / "rows.jsonl", alpaca_rows(24))
    recipe = tiny_recipe(folder, model, rows, name="my-run", output_dir="runs", checkpoint={"every_steps": 2})
    write_recipe(folder / "my-run.yaml", recipe)
    assert in_folder(folder, "finetune run my-run.yaml", folder / "model") == 0
    return folder


def in_folder(folder: Path, line: str, model: Path) -> int:
    """The exit code of one line of a page."""
    line = line.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))
    words = shlex.split(line, comments=True)
    assert words[0] == "finetune", line
    if words[1] in ("run", "preview") and words[2] == "tickets.yaml":
        words += [f"model.name={model}", *SHORT.split()]
    before = Path.cwd()
    os.chdir(folder)
    try:
        if "distributed.devices=2" not in words:
            return main(words[1:])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent)}
        return subprocess.run([sys.executable, "-m", *words], env=environment, timeout=200).returncode
    finally:
        os.chdir(before)


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_the_commands_of_a_page_work(page: str, start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(start, folder)
    for kind, argument, block, said in PAGES[page]:
        if kind == "file":
            (folder / argument).write_text(block, encoding="utf-8")
            continue
        for line in block.splitlines():
            capfd.readouterr()
            assert in_folder(folder, line, start / "model") == int(argument or 0), line
            shown = capfd.readouterr().err.replace(f"{folder}/", "")
            for expected in said.splitlines():
                assert expected in shown, f"{line}\n{shown}"


def test_every_task_has_a_page_whose_commands_are_run() -> None:
    assert {name for name, blocks in PAGES.items() if blocks} >= {
        "first-run",
        "own-data",
        "large-models",
        "many-gpus",
        "serving",
        "troubleshooting",
    }
