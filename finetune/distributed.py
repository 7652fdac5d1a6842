"""What a process knows about its place among the processes of a run. Works with and without torch.distributed."""

from __future__ import annotations

import os

# torchrun sets the first of each pair; SLURM (srun) the second.
_RANK_VARIABLES = ("RANK", "SLURM_PROCID")
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID")


def _first_int(names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = os.environ.get(name)
        if value is not None:
            return int(value)
    return default


def global_rank() -> int:
    """Rank of this process among all processes of the run; 0 where there is only one."""
    return _first_int(_RANK_VARIABLES, _first_int(_LOCAL_RANK_VARIABLES, 0))


def local_rank() -> int:
    """Rank of this process on its machine; 0 where there is only one."""
    return _first_int(_LOCAL_RANK_VARIABLES, 0)


def is_rank_zero() -> bool:
    """Whether this process prints, prepares data and writes files."""
    return global_rank() == 0
