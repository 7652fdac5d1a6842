"""Signals: a whole checkpoint, exit 75, and the same bytes in the end. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.errors import EXIT_PREEMPTED
from finetune.models.adapters import WEIGHTS_NAME
from finetune.training.checkpoint import damage, list_checkpoints
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    model = write_model(folder / "model", "llama")
    rows = write_jsonl(folder / "rows.jsonl", alpaca_rows(24))
    training = {"max_steps": 400, "global_batch_size": 8}
    return write_recipe(folder / "tiny.yaml", tiny_recipe(folder, model, rows, training=training))


def start(recipe: Path, name: str, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune", "run", str(recipe), f"name={name}", *extra]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def wait_for_step(recipe: Path, name: str, step: int) -> None:
    metrics = recipe.parent / "runs" / name / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.is_file() and len(metrics.read_text().splitlines()) > step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_fm20_a_signal_in_a_step_saves_and_exits_75(recipe: Path, number: signal.Signals) -> None:
    process = start(recipe, number.name)
    wait_for_step(recipe, number.name, 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED
    last = error.strip().splitlines()[-1]
    assert f"stopped by {number.name}" in error and "run the same command again" in last, error
    (checkpoint,) = list_checkpoints(recipe.parent / "runs" / number.name / "checkpoints")
    assert damage(checkpoint) is None


def test_fm20_a_signal_before_training_exits_75_with_nothing_to_save(recipe: Path) -> None:
    process = start(recipe, "early")
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (EXIT_PREEMPTED, -signal.SIGTERM)
    assert not list_checkpoints(recipe.parent / "runs" / "early" / "checkpoints")


def test_fm20_two_processes_stop_at_the_same_step(recipe: Path) -> None:
    process = start(recipe, "two", "distributed.strategy=ddp", "distributed.devices=2")
    wait_for_step(recipe, "two", 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED
    (checkpoint,) = list_checkpoints(recipe.parent / "runs" / "two" / "checkpoints")
    assert damage(checkpoint) is None


def test_fm20_a_stopped_run_ends_in_the_same_bytes(recipe: Path) -> None:
    steps = "training.max_steps=40"
    assert start(recipe, "whole", steps).wait(timeout=200) == 0
    process = start(recipe, "cut", steps)
    wait_for_step(recipe, "cut", 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert start(recipe, "cut", steps).wait(timeout=200) == 0
    runs = recipe.parent / "runs"
    whole, cut = ((runs / name / "adapter" / WEIGHTS_NAME).read_bytes() for name in ("whole", "cut"))
    assert whole == cut
