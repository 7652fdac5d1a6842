"""Who prepares first: rank 0, then one process of each other machine, then all others.

So one process downloads, converts and tokenizes, and the others find what it made, on a shared disk or on their own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from finetune.errors import FinetuneError, first_line
from finetune.training.strategy import launcher

# Within which all processes are to be started: where rank 0 fails at once, nobody answers the others.
MEETING_TIMEOUT = timedelta(minutes=30)
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
    first, own = f"{call}/first", f"{call}/node-{environment.node_rank()}"
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


def of_rank_zero(name: str, value: Any, *, until_heard: bool = False) -> Any:
    """What rank 0 gives for `name`, in every process that torchrun or srun started: text, a number. All call it once.

    Before there is a process group: for what must not depend on each one's clock or view of a disk. `until_heard`: rank
    0 waits for the others, since under SLURM they could not read from a process that has ended.

    Raises:
        FinetuneError: if rank 0 is gone.
    """
    environment = launcher()
    if environment is None or environment.world_size() == 1:
        return value
    store, key = _store(), f"value/{name}"
    if environment.global_rank() > 0:
        value = json.loads(_read(store, key))
        store.add(f"{key}/heard", 1)
        return value
    store.set(key, json.dumps(value))
    while until_heard and store.add(f"{key}/heard", 0) < environment.world_size() - 1:
        time.sleep(0.1)
    return value


@cache
def _store() -> Store:
    """Keys that all processes see. Kept for good: under SLURM rank 0 itself serves them, here and to Lightning."""
    environment = launcher()
    assert environment is not None
    address, port = environment.main_address, environment.main_port
    rank, world_size = environment.global_rank(), environment.world_size()
    try:
        url = f"tcp://{address}:{port}"
        store: Store = next(rendezvous(url, rank, world_size, timeout=MEETING_TIMEOUT))[0]
    except DistError as error:
        raise FinetuneError(
            f"rank {rank} cannot meet the other processes at {address}:{port} (MASTER_ADDR and MASTER_PORT): "
            f"{first_line(error)}\n  If another program has that port, set MASTER_PORT to a free one on every machine. "
            "Or some were never started (with SLURM, srun starts them), or have failed and say why."
        ) from error
    # torchrun serves the same keys again to processes that it starts anew.
    return PrefixStore(f"finetune/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{world_size}", store)


def _wait(store: Store, key: str) -> None:
    if _read(store, key) != b"done":
        raise FinetuneError("the process that prepares the run for this one has failed; its own message says why")


def _read(store: Store, key: str) -> bytes:
    # In steps, so that a signal is acted on; a blocking wait would also need a time limit.
    try:
        while not store.check([key]):
            time.sleep(0.1)
        value: bytes = store.get(key)
    except DistError as error:
        raise FinetuneError("rank 0 is gone; its own message says why") from error
    return value
