"""Full disks, a Hub that goes away, hostile files, secrets: real failures, and nothing is lost, run or leaked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.cli import main
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME
from finetune.run_dir import FINGERPRINTS, RECIPE, RunDir
from finetune.training.checkpoint import MANIFEST, STATE, _manifest, damage, list_checkpoints
from tests.export.push_run import hub
from tests.fork_server import ForkServer
from tests.hub_double import HubDouble
from tests.tiny import tiny_recipe, write_recipe

assert hub  # a fixture
PAGE = 4096
CHECKPOINT_FILES = [WEIGHTS_NAME, CONFIG_NAME, STATE, RECIPE, FINGERPRINTS, MANIFEST]
CANARIES = {
    "HF_TOKEN": "hf_CanaryForAWholeRunAbCdEfGhIjKlMnOpQr",
    "WANDB_API_KEY": "fedcba9876543210fedcba9876543210fedcba98",
    "AWS_SECRET_ACCESS_KEY": "canary/wholerun/KEYKEYKEYKEYKEYKEYKEYKEY",
    "OPENAI_API_KEY": "sk-canarywholerun0123456789abcdefghijkl",
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=220m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"a file system can be mounted by root only: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def recipe_of(folder: Path, runs: Path, name: str, **sections: Any) -> tuple[Path, RunDir]:
    recipe = tiny_recipe(folder, folder / "model", folder / "rows.jsonl", name=name, **sections)
    recipe["output_dir"] = str(runs)
    return write_recipe(folder / f"{name}.yaml", recipe), RunDir(runs / name)


def fill(disk: Path, *, leave_pages: int) -> Path:
    """Take all space but some pages."""
    ballast = disk / "ballast"
    state = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - leave_pages * PAGE)
    assert os.statvfs(disk).f_bavail * state.f_frsize == leave_pages * PAGE
    return ballast


def pages(path: Path) -> int:
    return -(-path.stat().st_size // PAGE)


def last_line(output: str) -> str:
    assert "Traceback" not in output, output
    return output.strip().splitlines()[-1]


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_fm19_a_full_disk_at_each_file_of_a_checkpoint(
    name: str, folder: Path, disk: Path, tmp_path: Path, server: ForkServer
) -> None:
    recipe, run = recipe_of(folder, disk, "full", checkpoint={"every_steps": 1, "keep_last": 9})
    gate = tmp_path / "gate"
    process = server.start("run", str(recipe), gates={"writing:2": gate})
    process.wait_for("writing", 2)
    first = run.checkpoints / "step-000001"
    before = CHECKPOINT_FILES[: CHECKPOINT_FILES.index(name)]
    ballast = fill(disk, leave_pages=sum(pages(first / file) for file in before) + pages(first / name) - 1)
    gate.touch()
    assert process.wait() == 1, process.output
    second = run.checkpoints / "step-000002"
    assert last_line(process.output).startswith(
        f"error: cannot write the checkpoint {second}: {name}: No space left on device"
    )
    assert list(run.checkpoints.iterdir()) == [first] and damage(first) is None
    ballast.unlink()
    assert "continuing from step 1 of 4" in server.run("run", str(recipe))
    assert all(damage(path) is None for path in list_checkpoints(run.checkpoints))
    assert run.adapter.is_dir()


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME, "tokenizer", RECIPE, FINGERPRINTS])
def test_fm19_a_full_disk_at_each_file_of_the_adapter(
    name: str, folder: Path, disk: Path, tmp_path: Path, server: ForkServer
) -> None:
    recipe, run = recipe_of(folder, disk, "full")
    server.run("run", str(recipe), f"output_dir={tmp_path}")
    example = tmp_path / "full" / "adapter"
    tokenizer = {path.name for path in example.iterdir()} - set(CHECKPOINT_FILES)
    parts = {part: [part] for part in (WEIGHTS_NAME, CONFIG_NAME)} | {"tokenizer": sorted(tokenizer)}
    parts |= {part: [part] for part in (RECIPE, FINGERPRINTS)}
    sizes = {part: sum(pages(example / file) for file in files) for part, files in parts.items()}
    gate = tmp_path / "gate"
    process = server.start("run", str(recipe), gates={"ending:1": gate})
    process.wait_for("ending")
    before = list(parts)[: list(parts).index(name)]
    ballast = fill(disk, leave_pages=sum(sizes[part] for part in before) + sizes[name] - 1)
    gate.touch()
    assert process.wait() == 1, process.output
    said = last_line(process.output)
    assert said.startswith(f"error: cannot write the adapter {run.adapter}: {name}: ") and "No space left" in said
    assert not run.adapter.exists() and not list(run.root.glob(".adapter*"))
    assert damage(run.checkpoints / "step-000004") is None
    ballast.unlink()
    server.run("run", str(recipe))
    assert (run.adapter / WEIGHTS_NAME).read_bytes() == (example / WEIGHTS_NAME).read_bytes()


def test_fm19_checkpoints_that_become_read_only(folder: Path, disk: Path, tmp_path: Path, server: ForkServer) -> None:
    """In the middle of a run; the lock keeps the run's own directory from being remounted, so it is the one below."""
    runs = tmp_path / "runs"
    (runs / "frozen").mkdir(parents=True)
    (runs / "frozen" / "checkpoints").symlink_to(disk, target_is_directory=True)
    recipe, run = recipe_of(folder, runs, "frozen", checkpoint={"every_steps": 1, "keep_last": 9})
    gate = tmp_path / "gate"
    process = server.start("run", str(recipe), gates={"writing:2": gate})
    process.wait_for("writing", 2)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    gate.touch()
    assert process.wait() == 1, process.output
    said = last_line(process.output)
    assert "step-000002: the directory: Read-only file system; " in said
    assert [path.name for path in disk.iterdir()] == ["step-000001"]
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert "continuing from step 1 of 4" in server.run("run", str(recipe))
    assert run.adapter.is_dir()


def test_fm30_a_hub_that_goes_away_during_a_run(
    hub: HubDouble, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It grants access and is gone when the adapter is pushed: training ends as ever, and the failure is said then."""
    recipe, run = recipe_of(folder, tmp_path, "pushed", hub={"push": True, "repo_id": "acme/tickets"})
    hub.fail("^(POST|PUT)", 503, times=10**6)
    assert main(["run", str(recipe)]) == 1
    error = capsys.readouterr().err
    assert "may write to acme/tickets" in error and "step 4/4" in error
    assert error.count("trying again in") == 3
    assert f"finetune push {run.root} acme/tickets" in error and "Traceback" not in error
    assert load_file(run.adapter / WEIGHTS_NAME) and "training" in json.loads(run.results.read_text())
    hub.faults.clear()
    assert main(["run", str(recipe)]) == 0
    assert "this run is finished" in capsys.readouterr().err
    pushed = hub.content("acme/tickets", WEIGHTS_NAME)
    assert pushed == (run.adapter / WEIGHTS_NAME).read_bytes()


def test_fm30_a_token_that_is_refused_ends_a_run_before_its_first_step(
    hub: HubDouble, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrongwrong")
    sections = {"hub": {"push": True, "repo_id": "acme/tickets"}, "checkpoint": {"every_steps": 1}}
    recipe, run = recipe_of(folder, tmp_path, "refused", **sections)
    assert main(["run", str(recipe)]) == 1
    said = "".join(capsys.readouterr())
    assert "token was not accepted" in said and "Traceback" not in said
    assert "step 1/" not in said and "loading" not in said
    assert not list(run.checkpoints.glob("*")) and not run.adapter.exists()


class Payload:
    """What a hostile pickle does: it runs a command when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


def test_a_hostile_checkpoint_is_refused_and_runs_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its manifest matches, so that nothing but the reading itself can refuse it."""
    recipe, run = recipe_of(folder, tmp_path, "hostile", checkpoint={"every_steps": 2})
    assert main(["run", str(recipe)]) == 0
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000004")
    checkpoint, proof = run.checkpoints / "step-000002", tmp_path / "proof"
    state = torch.load(checkpoint / STATE, weights_only=True)
    torch.save({**state, "scaler": Payload(proof)}, checkpoint / STATE)
    progress = json.loads((checkpoint / MANIFEST).read_text())["progress"]
    (checkpoint / MANIFEST).write_text(_manifest(checkpoint, 2, progress))
    assert damage(checkpoint) is None
    capsys.readouterr()
    assert main(["run", str(recipe)]) == 2
    assert f"{checkpoint / STATE}: refused" in capsys.readouterr().err
    assert not proof.exists()
    torch.load(checkpoint / STATE, weights_only=False)
    assert proof.exists()  # the payload is live


@pytest.mark.parametrize("verb", [["merge"], ["generate", "--prompt", "tell"], ["push", "acme/x", "--dry-run"]])
def test_an_adapter_that_is_a_pickle_is_not_read(
    verb: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = recipe_of(folder, tmp_path, "pickle")
    assert main(["run", str(recipe)]) == 0
    shutil.rmtree(run.checkpoints)
    (run.adapter / WEIGHTS_NAME).unlink()
    proof = tmp_path / "proof"
    torch.save({"base_model.model.x.lora_A.weight": Payload(proof)}, run.adapter / "adapter_model.bin")
    capsys.readouterr()
    assert main([verb[0], str(run.root), *verb[1:]]) != 0
    assert "Traceback" not in capsys.readouterr().err
    assert not proof.exists()


def test_code_of_a_base_is_not_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, proof = tmp_path / "model", tmp_path / "proof"
    shutil.copytree(folder / "model", model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    config["model_type"] = "own"
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(proof)!r}, 'w')\nclass OwnConfig: ...\nclass OwnModel: ...\n")
    recipe, _ = recipe_of(folder, tmp_path, "code", model={"name": str(model)})
    assert main(["run", str(recipe)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not proof.exists()


def test_fm30_no_secret_of_the_environment_is_in_a_file_or_an_output(
    folder: Path, tmp_path: Path, server: ForkServer
) -> None:
    """A whole run with every tracker that writes here, stopped by nothing, resumed once, measured and reported."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    recipe, run = recipe_of(
        folder,
        tmp_path,
        "canaries",
        logging={"every_steps": 1, "trackers": ["wandb", "tensorboard"], "log_adapter": True},
        checkpoint={"every_steps": 2},
        data={"validation": {"size": 4}},
        evaluation={"every_steps": 2, "metrics": ["perplexity"], "before": True, "num_samples": 1, "max_new_tokens": 4},
    )
    environment = {**CANARIES, "WANDB_MODE": "offline"}
    output = server.run("run", str(recipe), "training.max_steps=2", **environment)
    output += server.run("run", str(recipe), "--accept-changes", **environment)
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and run.report in files
    for name, canary in CANARIES.items():
        assert canary not in output, name
        assert not [path for path in files if canary.encode() in path.read_bytes()], name
