"""Signals: a whole checkpoint, exit 75, and the same bytes in the end. Real processes, real signals."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune.errors import EXIT_PREEMPTED
from finetune.models.adapters import WEIGHTS_NAME
from finetune.run_dir import RunDir
from finetune.training.checkpoint import damage, list_checkpoints
from finetune.training.metrics import read_metrics
from tests.fork_server import ForkedRun, ForkServer
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_recipe
from tests.training.test_checkpoint import same_ending

# Signals must arrive in a certain phase: beside other tests two of them came late.
pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]
VALIDATION = {
    "adapter": {"dropout": 0.1},
    "training": {"max_steps": 6},
    "data": {"packing": "isolated", "max_tokens": 160, "validation": {"size": 4}},
    "evaluation": {"every_steps": 3, "num_samples": 1, "max_new_tokens": 4},
    "checkpoint": {"every_steps": 3, "keep_last": 9},
}


def recipe_of(folder: Path, name: str, **sections: Any) -> tuple[Path, RunDir]:
    sections = {"training": {"max_steps": 400, "global_batch_size": 8}, **sections}
    recipe = tiny_recipe(folder, folder / "model", folder / "rows.jsonl", name=name, **sections)
    return write_recipe(folder / f"{name}.yaml", recipe), RunDir(folder / "runs" / name)


def whole_checkpoints(run: RunDir) -> list[int]:
    paths = list_checkpoints(run.checkpoints)
    assert all(damage(path) is None for path in paths)
    return [int(path.name.removeprefix("step-")) for path in paths]


def last_line(run: ForkedRun) -> str:
    assert "Traceback" not in run.output, run.output
    return run.output.strip().splitlines()[-1]


@pytest.mark.parametrize("number", SIGNALS)
def test_fm20_a_signal_in_a_step_saves_and_exits_75(number: signal.Signals, folder: Path, server: ForkServer) -> None:
    recipe, run = recipe_of(folder, f"step-{number.name}")
    process = server.start("run", str(recipe), "--fresh")
    process.wait_for("step", 3)
    process.send(number)
    assert process.wait() == EXIT_PREEMPTED
    (step,) = whole_checkpoints(run)
    said = last_line(process)
    assert said.startswith(f"stopped by {number.name} at step {step} of 400; step {step} is saved in {run.checkpoints}")
    assert said.endswith(f"continue with: finetune run {recipe}")  # not --fresh, which would put it aside


@pytest.mark.parametrize("number", SIGNALS)
def test_fm20_a_signal_before_training_exits_75_with_nothing_to_save(
    number: signal.Signals, folder: Path, server: ForkServer
) -> None:
    """While the model loads, and while the bare base is measured."""
    sections = {"evaluation": {"metrics": ["perplexity"], "before": True}, "data": {"validation": {"size": 4}}}
    recipe, run = recipe_of(folder, f"early-{number.name}", **sections)
    for phase in ("loading", "measuring"):
        gate = folder / f"{phase}-{number.name}"
        process = server.start("run", str(recipe), gates={f"{phase}:1": gate})
        process.wait_for(phase)
        process.send(number)
        assert process.wait() == EXIT_PREEMPTED
        said = last_line(process)
        assert said.startswith(f"stopped by {number.name} before training; there was nothing to save yet"), said
        assert not whole_checkpoints(run)
    server.run("run", str(recipe), "training.max_steps=2")
    assert len(list(read_metrics(run.metrics))) == 2


def test_fm20_a_terminal_that_goes_leaves_a_whole_checkpoint(folder: Path) -> None:
    """SIGHUP comes, and nothing can be written any more."""
    recipe, run = recipe_of(folder, "terminal", training={"max_steps": 100_000, "global_batch_size": 8})
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "finetune", "run", str(recipe)]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    said = b""
    while b"loss" not in said:
        said += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(60) == EXIT_PREEMPTED
    assert len(whole_checkpoints(run)) == 1


def test_fm20_a_signal_while_data_is_prepared_leaves_the_cache_good(folder: Path, tmp_path: Path) -> None:
    """A fresh process, several of its own processes tokenizing: all of them are gone, and the next run is right."""
    rows = write_jsonl(tmp_path / "many.jsonl", alpaca_rows(20_000))
    recipe = write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path, folder / "model", rows, data={"num_workers": 2}))
    environment = {**ENVIRONMENT, "FINETUNE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "finetune", "run", str(recipe), "training.max_steps=1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while len(children) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        children = psutil.Process(process.pid).children()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, error
    assert "stopped by SIGINT before training; there was nothing to save yet" in error and "Traceback" not in error
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
    assert subprocess.run(command, env=environment, timeout=200).returncode == 0


def test_fm20_a_signal_while_the_result_is_measured_loses_nothing(folder: Path, server: ForkServer) -> None:
    sections = {
        "training": {"max_steps": 3},
        "evaluation": {"metrics": ["perplexity"], "before": False},
        "data": {"validation": {"size": 4}},
    }
    recipe, run = recipe_of(folder, "measured", **sections)
    process = server.start("run", str(recipe), gates={"measuring:1": folder / "never"})
    process.wait_for("measuring")
    process.send(signal.SIGTERM)
    assert process.wait() == EXIT_PREEMPTED
    said = last_line(process)
    assert "while the trained adapter was measured" in said and f"the adapter saved in {run.adapter}" in said
    adapter = (run.adapter / WEIGHTS_NAME).read_bytes()
    assert "this run is finished" not in server.run("run", str(recipe))
    assert set(json.loads(run.results.read_text())) == {"after", "training"}
    assert (run.adapter / WEIGHTS_NAME).read_bytes() == adapter
    assert "this run is finished" in server.run("run", str(recipe))


def test_fm20_a_signal_in_a_validation_puts_it_off(folder: Path, server: ForkServer) -> None:
    """The step is saved without it, the same command begins with it, and the ending is that of an undisturbed run."""
    whole_recipe, whole = recipe_of(folder, "validated", **VALIDATION)
    server.run("run", str(whole_recipe))
    recipe, run = recipe_of(folder, "put-off", **VALIDATION)
    for times, step in ((1, 3), (2, 6)):
        gate = folder / f"gate-{step}"
        process = server.start("run", str(recipe), gates={f"validation:{times}": gate})
        process.wait_for("validation", times)
        process.send(signal.SIGTERM)
        gate.touch()
        assert process.wait() == EXIT_PREEMPTED
        assert f"stopped by SIGTERM at step {step} of 6; step {step} is saved" in last_line(process)
        assert f"step {step}  validation loss" not in process.output
        assert whole_checkpoints(run)[-1] == step
    assert "step 6  validation loss" in server.run("run", str(recipe))
    same_ending(whole, run)
    assert whole.samples.read_bytes() == run.samples.read_bytes()
    assert (whole.adapter / WEIGHTS_NAME).read_bytes() == (run.adapter / WEIGHTS_NAME).read_bytes()
    progress = [json.loads((one.checkpoints / "step-000003" / "manifest.json").read_text()) for one in (whole, run)]
    assert progress[0]["progress"]["validation_loss"] == progress[1]["progress"]["validation_loss"]


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal was sent to the process and has not reached its handler."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_fm20_a_second_ctrl_c_ends_at_once(folder: Path, server: ForkServer) -> None:
    """In a step that never ends, with loader processes: the last checkpoint is whole, and no process is left."""
    sections = {"training": {"max_steps": 400, "num_workers": 2}, "checkpoint": {"every_steps": 2}}
    recipe, run = recipe_of(folder, "twice", **sections)
    process = server.start("run", str(recipe), gates={"step:4": folder / "never"})
    process.wait_for("step", 4)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # the loader's server and its two processes
    process.send(signal.SIGINT, to_group=True)
    # Two that are pending at once are one.
    process.wait_until(lambda: not is_pending(process.pid, signal.SIGINT), "the first Ctrl-C")
    assert whole_checkpoints(run) == [2]
    process.send(signal.SIGINT, to_group=True)
    assert process.wait() == 128 + signal.SIGINT
    assert "stopped by SIGINT by a second Ctrl-C; step 2 is saved in" in process.output
    psutil.wait_procs(children, timeout=20)
    assert not any(child.is_running() for child in children)


def test_fm20_a_step_that_outlasts_the_grace_is_given_up(folder: Path, server: ForkServer) -> None:
    sections = {"checkpoint": {"every_steps": 2, "grace_seconds": 0.3}}
    recipe, run = recipe_of(folder, "grace", **sections)
    process = server.start("run", str(recipe), gates={"step:4": folder / "never"})
    process.wait_for("step", 4)
    process.wait_until(lambda: whole_checkpoints(run) == [2], "the checkpoint of step 2")
    process.send(signal.SIGTERM)
    assert process.wait() == EXIT_PREEMPTED
    assert (
        last_line(process) == f"stopped by SIGTERM after the 0.3 s of checkpoint.grace_seconds; step 2 is saved in "
        f"{run.checkpoints / 'step-000002'}; continue with: finetune run {recipe}"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_fm20_a_stopped_run_ends_in_the_same_bytes(workers: int, folder: Path, server: ForkServer) -> None:
    """With loader processes, a Ctrl-C that a terminal sends to all of them."""
    training = {"max_steps": 20, "num_workers": workers}
    whole_recipe, whole = recipe_of(folder, f"whole-{workers}", training=training, adapter={"dropout": 0.1})
    server.run("run", str(whole_recipe))
    recipe, run = recipe_of(folder, f"cut-{workers}", training=training, adapter={"dropout": 0.1})
    for times in (5, 4):
        process = server.start("run", str(recipe))
        process.wait_for("step", times)
        process.send(signal.SIGINT, to_group=True)
        assert process.wait() == EXIT_PREEMPTED
    server.run("run", str(recipe))
    same_ending(whole, run, "step-000020")


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_fm20_under_slurm_sigusr1_requeues_the_job(
    array: bool, number: signal.Signals, folder: Path, server: ForkServer, tmp_path: Path
) -> None:
    """`scontrol` is a program that writes down what it was asked."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "tune", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    slurm |= {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"} if array else {}
    recipe, run = recipe_of(folder, f"slurm-{array}-{number.name}")
    process = server.start("run", str(recipe), **slurm)
    process.wait_for("step", 3)
    process.send(number)
    assert process.wait() == EXIT_PREEMPTED, process.output
    assert whole_checkpoints(run)
    if number == signal.SIGTERM:
        assert not asked.exists()
    else:
        assert asked.read_text() == ("requeue 70_3\n" if array else "requeue 77\n")


def test_fm20_under_slurm_a_run_that_is_loading_or_measuring_is_requeued_where_anything_is_saved(
    folder: Path, server: ForkServer, tmp_path: Path
) -> None:
    """Its job's time is over all the same; with nothing saved it might never come further."""
    asked, scontrol = tmp_path / "asked", tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "tune", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    sections = {
        "training": {"max_steps": 2},
        "evaluation": {"metrics": ["perplexity"], "before": False},
        "data": {"validation": {"size": 4}},
    }
    recipe, _ = recipe_of(folder, "slurm-phases", **sections)
    for phase, requeued in (("loading", ""), ("measuring", "requeue 77\n"), ("loading", "requeue 77\nrequeue 77\n")):
        process = server.start("run", str(recipe), gates={f"{phase}:1": folder / "never"}, **slurm)
        process.wait_for(phase)
        process.send(signal.SIGUSR1)
        assert process.wait() == EXIT_PREEMPTED, process.output
        assert (asked.read_text() if asked.exists() else "") == requeued, phase


def test_fm20_two_processes_stop_at_the_same_step(folder: Path) -> None:
    """A fresh command that starts the second process itself; only the first one gets the signal."""
    recipe, run = recipe_of(folder, "two")
    overrides = ("distributed.strategy=ddp", "distributed.devices=2")
    command = [sys.executable, "-m", "finetune", "run", str(recipe), *overrides]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(read_metrics(run.metrics))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, error
    assert error.count("stopped by SIGTERM") == 1, error
    assert len(whole_checkpoints(run)) == 1
