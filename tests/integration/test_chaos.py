"""Runs that are killed again and again end in the bytes of one that was not: real processes, real kills, seeded."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from finetune.models.adapters import WEIGHTS_NAME
from finetune.run_dir import RunDir
from finetune.training.checkpoint import list_checkpoints
from tests.fork_server import ForkServer
from tests.tiny import tiny_recipe, write_recipe
from tests.training.test_checkpoint import same_ending

NUM_STEPS = 40
KILLS = ["loading"] * 6 + ["step"] * 7 + ["validation"] * 6 + ["writing"] * 6
# `make chaos N=200`: as many runs, each with seeds of its own, as give that many kills.
ROUNDS = -(-int(os.environ.get("CHAOS_KILLS", len(KILLS))) // len(KILLS))
SECTIONS = {
    "adapter": {"dropout": 0.1},
    "training": {"max_steps": NUM_STEPS},
    "data": {"packing": "isolated", "max_tokens": 160, "validation": {"size": 4}},
    "evaluation": {"every_steps": 3, "num_samples": 1, "max_new_tokens": 4, "metrics": ["perplexity"], "before": True},
    "checkpoint": {"every_steps": 2, "keep_last": 3},
    "logging": {"every_steps": 4},
}


def recipe_of(folder: Path, name: str) -> Path:
    recipe = tiny_recipe(folder, folder / "model", folder / "rows.jsonl", name=name, **SECTIONS)
    return write_recipe(folder / f"{name}.yaml", recipe)


@pytest.fixture(scope="module")
def whole(folder: Path, server: ForkServer) -> RunDir:
    """The run that nobody disturbs."""
    server.run("run", str(recipe_of(folder, "whole")))
    return RunDir(folder / "runs" / "whole")


def same_work(left: RunDir, right: RunDir) -> None:
    """The same bytes at the end, and the same rows and completions on the way."""
    same_ending(left, right, f"step-{NUM_STEPS:06d}")
    for name in (WEIGHTS_NAME, "adapter_config.json", "tokenizer.json"):
        assert (left.adapter / name).read_bytes() == (right.adapter / name).read_bytes()
    assert left.samples.read_bytes() == right.samples.read_bytes()
    assert [path.name for path in list_checkpoints(left.checkpoints)] == [
        path.name for path in list_checkpoints(right.checkpoints)
    ]
    assert not [path for folder in (right.root, right.checkpoints) for path in folder.glob(".*") if path != right.lock]


def saved_step(run: RunDir) -> int:
    return max((int(path.name.removeprefix("step-")) for path in list_checkpoints(run.checkpoints)), default=0)


@pytest.mark.timeout(300 * ROUNDS)
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_fm17_fm19_killed_at_any_instant_a_run_ends_in_the_same_bytes(
    seed: int, folder: Path, server: ForkServer, whole: RunDir
) -> None:
    rng = random.Random(seed)
    name = f"killed-{seed}"
    command, run = ("run", str(recipe_of(folder, name))), RunDir(folder / "runs" / name)
    hits: Counter[str] = Counter()
    plan = rng.sample(KILLS, len(KILLS))
    while plan:
        left = NUM_STEPS - saved_step(run)
        # Loading costs no progress: what is left of the steps must do for the kills that are left.
        phase = plan.pop() if left > 6 else "loading"
        if left <= 6:
            plan.pop()
        times = rng.randint(1, max(2, left // (plan.count("step") + 1))) if phase == "step" else 1
        attempt = server.start(*command)
        attempt.wait_for(phase, times)
        time.sleep(rng.uniform(0, 0.006))  # the instant within the phase
        attempt.send(signal.SIGKILL)
        assert attempt.wait() == -signal.SIGKILL
        hits.update(attempt.marks.phases() or ["between"])
    for phase in ("ending", "measuring"):
        attempt = server.start(*command)
        attempt.wait_for(phase)
        attempt.send(signal.SIGKILL)
        assert attempt.wait() == -signal.SIGKILL
        hits.update([phase])
    print(f"killed {len(KILLS) + 2} times: {dict(hits)}")
    assert min(hits[phase] for phase in ("loading", "step", "validation", "writing")) >= 2, hits
    server.run(*command)
    same_work(whole, run)
    assert "this run is finished" in server.run(*command)


@pytest.mark.slow
def test_fm17_fresh_processes_are_killed_too(folder: Path, whole: RunDir) -> None:
    """The command as a user starts it, killed while it loads, after some steps, and in the middle of a write."""
    name = "fresh"
    recipe, run = recipe_of(folder, name), RunDir(folder / "runs" / name)
    command = [sys.executable, "-m", "finetune", "run", str(recipe)]
    environment, nowhere = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    for reached in (
        lambda: run.lock.exists(),
        lambda: saved_step(run) >= 8,
        lambda: saved_step(run) >= 16 and any(run.checkpoints.glob(".step-*.tmp-*")),
    ):
        with subprocess.Popen(command, env=environment, stderr=nowhere, stdout=nowhere) as process:
            deadline = time.monotonic() + 120
            while not reached():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.0005)
            process.kill()
    assert subprocess.run(command, env=environment, timeout=200).returncode == 0
    same_work(whole, run)
