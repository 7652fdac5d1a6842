"""What a process knows about its place among the processes of a run. Works with and without torch.distributed."""

from __future__ import annotations

import os
import signal
import sys

# The names that SLURM gives to a shell. As Lightning's SLURMEnvironment: what is started there is not srun's.
_SLURM_SHELLS = ("bash", "interactive")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def global_rank() -> int:
    """Rank of this process among all processes of the run; 0 where there is only one."""
    # Our own launcher, which is Lightning's, sets LOCAL_RANK alone; it may do so within a shell of SLURM's, where
    # SLURM_PROCID is that of the shell: 0 for all that is started there.
    if _started_by_torchrun():
        return int(os.environ["RANK"])
    return int(os.environ.get("SLURM_PROCID" if _started_by_srun() else "LOCAL_RANK", "0"))


def is_rank_zero() -> bool:
    """Whether this process prints, prepares data and writes files."""
    return global_rank() == 0


def end_with_rank_zero() -> None:
    """In a process that rank 0 has started: the kernel kills it when rank 0 is gone, even by a kill.

    It would wait in a collective for hours. torchrun and srun look after their processes themselves.
    """
    started = global_rank() > 0 and not _started_by_torchrun() and not _started_by_srun()
    if started and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _started_by_torchrun() -> bool:
    # RANK alone is also set by Kubernetes' PyTorchJob for a torchrun that is still to be started.
    return "TORCHELASTIC_RUN_ID" in os.environ


def _started_by_srun() -> bool:
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _SLURM_SHELLS
