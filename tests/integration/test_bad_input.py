"""What users get wrong: one clear error that names file, row or key, the right exit code, nothing half-written."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli import main
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe

# Each case with the message expected, word for word; `…` stands for what a library says in its own words.
CASES: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("broken.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for architecture in ("llama", "falcon"):
        write_model(folder / architecture, architecture)
    return folder


def write_case(folder: Path, models: Path, case: dict[str, Any]) -> list[str]:
    """The case's model, data and recipe in `folder`; returns the arguments of the command."""
    model = folder / "model"
    shutil.copytree(models / case.get("architecture", "llama"), model)
    for name in case.get("without", []):
        (model / name).unlink()
    write_jsonl(folder / "rows.jsonl", alpaca_rows(24))
    for name, content in case.get("files", {}).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode(case.get("encoding", "utf-8"), "surrogatepass"))
    if "text" in case:
        (folder / "recipe.yaml").write_text(case["text"])
    else:
        recipe = _merged(tiny_recipe(folder, Path("./model"), Path("rows.jsonl")), case.get("recipe", {}))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["run", str(folder / "recipe.yaml"), *case.get("overrides", [])]


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`; `~` takes a key away."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if value is None:
            del merged[key]
        else:
            merged[key] = _merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_bad_input_is_named(
    case: dict[str, Any], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(write_case(tmp_path, models, case)) == 2
    shown = capsys.readouterr().err
    said = shown[shown.index("error: ") + len("error: ") :].strip().replace(f"{tmp_path}/", "")
    pattern = ".*".join(re.escape(part) for part in case["says"].strip().split("…"))
    assert re.fullmatch(pattern, said, re.DOTALL), said
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    if "the model has no module" in said:
        assert "tokenizing" not in shown and "loading" not in shown, "names are looked for before all work"


def test_there_are_forty_cases_and_none_is_twice() -> None:
    assert len(CASES) >= 40
    assert len({case["name"] for case in CASES}) == len(CASES)


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(models: Path, tmp_path: Path) -> None:
    """A limit on file sizes is a real failed write: the adapter of 60 kB does not fit into 20 kB."""
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(24))
    recipe = tiny_recipe(tmp_path, models / "llama", rows, checkpoint={"every_steps": 1})
    path = write_recipe(tmp_path / "r.yaml", recipe)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    main(["run", str(path), "name=warm"])
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "run", str(path)],
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "cannot write the checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir()) == []


def test_int8_cannot_be_sharded_and_nothing_is_looked_for(tmp_path: Path, capsys: Any) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "no-model", tmp_path / "no-rows.jsonl")
    path = write_recipe(tmp_path / "r.yaml", recipe)
    assert main(["run", str(path), "model.quantization=int8", "distributed.strategy=fsdp"]) == 2
    error = capsys.readouterr().err
    assert "int8 weights cannot be sharded by distributed.strategy fsdp; use nf4" in " ".join(error.split())
    assert "no-model" not in error and "no-rows" not in error


def test_an_output_that_cannot_be_written_is_named(models: Path, tmp_path: Path, capsys: Any) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(24))
    recipe = tiny_recipe(tmp_path, models / "llama", rows, output_dir=str(blocker))
    assert main(["run", str(write_recipe(tmp_path / "r.yaml", recipe))]) == 2
    assert "output_dir: cannot write" in capsys.readouterr().err
