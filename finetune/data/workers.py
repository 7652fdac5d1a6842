"""Encoding in parallel: processes for many rows, the tokenizer's own threads for few. Order is kept."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from finetune.data.masking import Chunk, Encoder
from finetune.data.sources import RawRow
from finetune.errors import FinetuneError
from finetune.stop_signals import blocked, leave_to_parent

# Fewer rows are done before processes have started.
_MANY_ROWS = 5_000
_ROWS_PER_CHUNK = 500

_worker_encoder: Encoder | None = None


def encode_stream(encoder: Encoder, rows: Iterator[RawRow], num_workers: int | None) -> Iterator[Chunk]:
    """Chunks of encoded rows, in the order of `rows`, with `num_workers` processes (None: one per core).

    Raises:
        FinetuneError: a worker process died.
    """
    workers = num_cores() if num_workers is None else num_workers
    first = list(islice(rows, _MANY_ROWS + 1))
    batches = _batches(chain(first, rows))
    if workers < 2 or len(first) <= _MANY_ROWS:
        for batch in batches:
            yield encoder.encode(batch)
        return
    yield from _encode_in_processes(encoder, batches, workers)


def num_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    while batch := list(islice(rows, _ROWS_PER_CHUNK)):
        yield batch


def _encode_in_processes(encoder: Encoder, batches: Iterator[list[RawRow]], workers: int) -> Iterator[Chunk]:
    # Forked workers start at once and touch neither torch nor a device; elsewhere they are spawned.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    waiting: deque[Future[Chunk]] = deque()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork of a process that has threads; here it is harmless, see above.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            for batch in batches:
                # The first call forks. A stop signal within fork's own hooks would end as a traceback of theirs.
                with blocked():
                    waiting.append(pool.submit(_encode_in_worker, batch))
                if len(waiting) > 2 * workers:  # bounds memory: rows are read no faster than they are encoded
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise FinetuneError(
            "a process that tokenizes the data died (out of memory, or killed). "
            "Run again with fewer: data.num_workers: 1."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    leave_to_parent()
    # One process per core already: threads besides would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = encoder


def _encode_in_worker(batch: list[RawRow]) -> Chunk:
    assert _worker_encoder is not None
    return _worker_encoder.encode(batch)
