"""Who prepares first: rank 0, then one process of each other machine, then all others.

So one process downloads, converts and tokenizes, and the others find what it made, on a shared disk or on their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from finetune.errors import FinetuneError
from finetune.training.strategy import PROCESS_GROUP_TIMEOUT, launcher

# Every process comes to the same calls in the same order: each call has keys of its own.
_calls = count()


@contextmanager
def in_turn() -> Iterator[None]:
    """Run the block when the processes that come first are done with it, however long they take.

    Only where torchrun or srun started the processes: our own launcher starts the others when the first has prepared.

    Raises:
        FinetuneError: if a process that comes first failed, or is gone.
    """
    environment = launcher()
    if environment is None or environment.world_size() == 1:
        yield
        return
    store, rank = _store(), environment.global_rank()
    call = next(_calls)
    first, own = f"finetune/{call}/first", f"finetune/{call}/node-{environment.node_rank()}"
    leads = environment.local_rank() == 0
    if rank > 0:
        _wait(store, first if leads else own)
    keys = [first, own] if rank == 0 else [own] if leads else []
    try:
        yield
    except BaseException:
        for key in keys:
            store.set(key, "failed")
        raise
    for key in keys:
        store.set(key, "done")


@cache
def _store() -> Store:
    """Keys that all processes see. Kept for good: under SLURM rank 0 itself serves them, here and to Lightning."""
    environment = launcher()
    assert environment is not None
    url = f"tcp://{environment.main_address}:{environment.main_port}"
    rank, world_size = environment.global_rank(), environment.world_size()
    store: Store = next(rendezvous(url, rank, world_size, timeout=PROCESS_GROUP_TIMEOUT))[0]
    return store


def _wait(store: Store, key: str) -> None:
    # In steps, so that a signal is acted on; a blocking wait would also need a time limit.
    try:
        while not store.check([key]):
            time.sleep(0.1)
        state = store.get(key)
    except DistError as error:
        raise FinetuneError("rank 0 is gone; its own message says why") from error
    if state != b"done":
        raise FinetuneError("the process that prepares the run for this one has failed; its own message says why")
