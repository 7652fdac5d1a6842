"""What a process knows about its place among the processes of a run. Works with and without torch.distributed."""

from __future__ import annotations

import os

# The names that SLURM gives to a shell. As Lightning's SLURMEnvironment: what is started there is not srun's.
_SLURM_SHELLS = ("bash", "interactive")


def global_rank() -> int:
    """Rank of this process among all processes of the run; 0 where there is only one."""
    # torchrun sets RANK. Our own launcher, which is Lightning's, sets LOCAL_RANK alone; it may do so within a shell of
    # SLURM's, where SLURM_PROCID is that of the shell: 0 for all that is started there.
    own = "SLURM_PROCID" if _started_by_srun() else "LOCAL_RANK"
    return int(os.environ.get("RANK", os.environ.get(own, "0")))


def is_rank_zero() -> bool:
    """Whether this process prints, prepares data and writes files."""
    return global_rank() == 0


def _started_by_srun() -> bool:
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _SLURM_SHELLS
