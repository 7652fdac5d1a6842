"""Importing torch, transformers, PEFT and Lightning without what takes long and is not needed."""

from __future__ import annotations

import functools
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from finetune.machine import limit_kernel_cache


@contextmanager
def importing_libraries() -> Iterator[None]:
    """For imports of the libraries and of our own modules that import them; the libraries are quiet from then on.

    The first time in a process nothing is collected meanwhile, and what is there at the end is never looked at again:
    nearly all that an import makes stays. Of 5.0 s this saves 0.9 s, and 0.2 s at each full collection later.
    """
    limit_kernel_cache()
    if "torch" in sys.modules or not gc.isenabled():
        _quiet_libraries()
        yield
        return
    gc.disable()
    try:
        _import_bitsandbytes()
        _quiet_libraries()
        yield
        gc.freeze()
    finally:
        gc.enable()


def _quiet_libraries() -> None:
    from finetune.models.load import quiet_libraries

    quiet_libraries()  # before Lightning is imported: it talks then


def _import_bitsandbytes() -> None:
    """Let bitsandbytes compile its fallbacks when they are called, not when it is imported.

    `torch.compile` imports the compiler, which takes 0.8 s; a CPU calls the fallbacks to quantize only.
    """
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises to install further packages
    compile_now: Any = torch.compile

    def compile_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_when_called, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            return compiled()(*arguments, **keywords)

        return call

    torch.compile = compile_when_called  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_now
