"""Which rank a process takes itself for, by what each launcher sets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from finetune.distributed import global_rank

SRUN = {"SLURM_JOB_NAME": "tune", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1"}
RANKS = {
    "alone": ({}, 0),
    "torchrun": (TORCHRUN, 5),
    "torchrun, one a machine by srun": ({**SRUN, **TORCHRUN}, 5),
    "a cluster's variables, but no torchrun": ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"}, 0),
    "srun": (SRUN, 3),
    "srun, its local rank passed on": ({**SRUN, "LOCAL_RANK": "1"}, 3),
    "our launcher": ({"LOCAL_RANK": "1"}, 1),
    "ours in an interactive shell": ({**SHELL, "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1", "LOCAL_RANK": "1"}, 1),
    "ours in a batch script": ({**SHELL, "SLURM_JOB_NAME": "tune", "LOCAL_RANK": "1"}, 1),
}


@pytest.mark.parametrize(("environment", "rank"), RANKS.values(), ids=RANKS)
def test_every_process_knows_its_rank(environment: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", environment)
    assert global_rank() == rank


# Starts another process and is killed when that one is ready.
PARENT = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""
CHILD = """
import sys, time
from finetune.distributed import end_with_rank_zero
end_with_rank_zero()
print(flush=True)
time.sleep({seconds})
print('stayed', file=sys.stderr)
"""


@pytest.mark.parametrize(("launcher", "seconds"), [("our launcher", 600), ("torchrun", 0.2), ("srun", 0.2)])
def test_a_process_of_our_launcher_ends_with_rank_zero_however_that_ends(launcher: str, seconds: float) -> None:
    command = [sys.executable, "-c", PARENT, CHILD.format(seconds=seconds)]
    environment = {**os.environ, **RANKS[launcher][0]}
    # Both have stderr: its end is the end of the last.
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, timeout=100, text=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == ("" if launcher == "our launcher" else "stayed\n")
