"""Which rank a process takes itself for, by what each launcher sets."""

from __future__ import annotations

import pytest

from finetune.distributed import global_rank

SRUN = {"SLURM_JOB_NAME": "tune", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
RANKS = {
    "alone": ({}, 0),
    "torchrun": ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
    "torchrun, one a machine by srun": ({**SRUN, "RANK": "5", "LOCAL_RANK": "1"}, 5),
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
