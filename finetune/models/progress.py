"""The bars of transformers and the Hub's client: downloads, loading and quantizing, on a terminal only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.console import console
from finetune.distributed import is_rank_zero


@contextmanager
def library_bars() -> Iterator[None]:
    """Show the libraries' own bars meanwhile, where there is a terminal and on rank 0 alone.

    Elsewhere they would fill a log; the caller's line has said what is being done.
    """
    from transformers.utils import logging

    if not console.is_terminal or not is_rank_zero():
        yield
        return
    logging.enable_progress_bar()  # the Hub client's as well
    try:
        yield
    finally:
        logging.disable_progress_bar()
