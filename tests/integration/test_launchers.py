"""Processes that SLURM started: real ones, with srun's variables, on loopback. Who prepares, who waits, who prints."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.run_dir import RunDir
from finetune.training.metrics import read_metrics
from tests.fork_server import ForkServer
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe

REPOSITORY = Path(__file__).parents[2]
# Loaded by every process at its start: notes who waits and who tokenizes, and holds rank 0's work until a lock is free.
PROBE = """
import fcntl, os, sys
if 'finetune' in ' '.join(sys.orig_argv):
    folder, rank = os.environ['PROBE'], os.environ['SLURM_PROCID']
    import finetune.data.prepare as prepare, finetune.training.turns as turns
    wait, encode = turns._wait, prepare._encode

    def note(name):
        open(os.path.join(folder, f'{name}-{rank}'), 'w').close()

    def noted_wait(*arguments):
        note('waits')
        wait(*arguments)

    def held_encode(*arguments):
        with open(os.path.join(folder, 'lock')) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        note('tokenized')
        return encode(*arguments)

    turns._wait, prepare._encode = noted_wait, held_encode
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    rows = write_jsonl(folder / "rows.jsonl", alpaca_rows(24))
    training = {"max_steps": 2, "optimizer": {"lr": 1e-3, "eps": 1.0}}
    model = write_model(folder / "model", "llama")
    return write_recipe(folder / "tiny.yaml", tiny_recipe(folder, model, rows, training=training))


def start(
    recipe: Path, nodes: int, tasks_per_node: int, *extra: str, homes: Sequence[Path] = (), **variables: str
) -> list[subprocess.Popen[str]]:
    """`finetune run` as srun starts it on `nodes`; the processes by rank, each in a directory of `homes`."""
    with socket.socket() as probe:
        for job in range(os.getpid() % 5000, 9999):  # Lightning's port is 15000 + the job's last four digits
            try:
                probe.bind(("127.0.0.1", 15000 + job))
                break
            except OSError:
                continue
    common = {
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": f"77{job:04}",
        "SLURM_JOB_NAME": "finetune",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks_per_node),
        **variables,
    }
    processes = []
    for rank in range(nodes * tasks_per_node):
        node, local = divmod(rank, tasks_per_node)
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        command = [sys.executable, "-m", "finetune", "run", str(recipe), *extra]
        environment = {**os.environ, **common, **own}
        home = homes[rank] if homes else None
        if home is not None:
            home.mkdir(exist_ok=True)
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=home))
    return processes


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.05)


def test_fm29_slurm_ranks_wait_for_rank_zero_which_alone_prepares_and_prints(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PROBE)
    python_path = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    variables = {"PYTHONPATH": python_path, "PROBE": str(tmp_path), "FINETUNE_CACHE": str(tmp_path / "cache")}
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = start(recipe, 1, 2, "name=two", "distributed.strategy=ddp", **variables)
        wait_for(tmp_path / "waits-1", processes[1])
        assert all(process.poll() is None for process in processes)
        assert not list(tmp_path.glob("tokenized-*"))
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(path.name for path in tmp_path.glob("tokenized-*")) == ["tokenized-0"]
    assert "step 2/2" in outputs[0][1] and "adapter" in outputs[0][0]
    assert outputs[1] == ("", "")


def test_slurm_on_two_nodes_computes_what_one_process_does(recipe: Path, server: ForkServer) -> None:
    """--ntasks=4 without --ntasks-per-node: srun does not set SLURM_NTASKS_PER_NODE then."""
    server.run("run", str(recipe), "name=alone")
    processes = start(recipe, 2, 2, "name=four", "distributed.strategy=fsdp")
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert outputs[1:] == [("", "")] * 3
    runs = [list(read_metrics(RunDir(recipe.parent / "runs" / name).metrics)) for name in ("alone", "four")]
    for one, four in zip(*runs, strict=True):
        assert (four["loss"], four["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), rel=1e-5)


def test_a_preparation_that_fails_ends_every_rank(recipe: Path) -> None:
    processes = start(recipe, 2, 1, "name=bad", "data.sources.0.path=/nowhere.jsonl", "distributed.strategy=ddp")
    outputs = [process.communicate(timeout=60)[1] for process in processes]
    assert processes[0].returncode == 2 and "/nowhere.jsonl" in outputs[0]
    assert processes[1].returncode == 1 and "its own message says why" in outputs[1]


def test_our_own_launcher_works_in_a_shell_of_slurms(recipe: Path) -> None:
    """`srun --pty bash`: SLURM_PROCID is the shell's, 0, for every process that is started there."""
    overrides = ("name=shell", "distributed.devices=2", "distributed.strategy=ddp")
    (process,) = start(recipe, 1, 1, *overrides, SLURM_JOB_NAME="bash")
    output = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert output[1].count("step 2/2") == 1 and "2 x cpu, ddp" in output[1]


def test_a_finished_run_that_rank_zero_alone_sees_ends_every_rank(recipe: Path, tmp_path: Path) -> None:
    """Each machine has a disk of its own: the second command has nothing to do, and nobody waits."""
    words = []
    for _ in range(2):
        homes = [tmp_path / str(rank) for rank in range(2)]
        overrides = ("name=apart", "output_dir=runs", "distributed.strategy=ddp")
        processes = start(recipe, 2, 1, *overrides, homes=homes)
        outputs = [process.communicate(timeout=200) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        words.append(outputs[0][1])
    assert "this run is finished" in words[1] and "this run is finished" not in words[0]
