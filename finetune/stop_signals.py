"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C of a run: while it loads or measures they end it, while it trains they are noted.

A thread hears of every signal through `signal.set_wakeup_fd`, even while the main thread waits in C code for a product
or another rank, and ends the process where the main thread does not: after the grace, or at a second Ctrl-C.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from finetune.distributed import is_rank_zero
from finetune.errors import EXIT_PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# How long the main thread may take to unwind where there is nothing to save.
UNWIND_SECONDS = 5.0

_CLOSE = 0  # no signal has this number
_SHOW_CURSOR = "\x1b[?25h\n"

_active: StopSignals | None = None


class StopRequested(BaseException):
    """Raised in the main thread by a signal outside training; no `Exception`, so that no library takes it for one."""


class StopSignals:
    """The stop signals of this process, from `with` to its end. `saved` and `doing` are what the last line says."""

    def __init__(self, continue_with: str) -> None:
        self.received: signal.Signals | None = None
        self.saved = "there was nothing to save yet"
        self.doing = "before training"
        self._continue_with = continue_with
        self._heard: signal.Signals | None = None  # by the watching thread
        self._is_deferred = False
        self._grace = UNWIND_SECONDS
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        global _active
        if threading.current_thread() is not threading.main_thread():
            return self  # called as a library: signals are the caller's
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        if self._previous[signal.SIGHUP] == signal.SIG_IGN:  # by nohup
            del self._previous[signal.SIGHUP]
        self.install()
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        _active = self
        self._watch_thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._watch_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        if not self._previous:
            return
        _active = None
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._write, bytes([_CLOSE]))
        self._watch_thread.join()
        os.close(self._read)
        os.close(self._write)
        if self.received is not None:
            kill_children()

    def install(self) -> None:
        """Take the handlers over: Lightning puts one of its own before SIGTERM's, which talks to other ranks."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def defer(self, grace_seconds: float) -> None:
        """From here on a signal is noted in `received`, and the process has `grace_seconds` to end by itself."""
        self._grace = grace_seconds
        self._is_deferred = True

    def end_deferral(self) -> None:
        """From here on a signal ends the process at once, one that came before included.

        Raises:
            StopRequested: if one came before.
        """
        self._is_deferred = False
        self._grace = UNWIND_SECONDS
        if self.received is not None:
            raise StopRequested

    def last_line(self, doing: str | None = None) -> str:
        """What ended the run, what is saved, and the command that continues."""
        received = self.received or self._heard
        name = "a signal" if received is None else received.name
        return f"stopped by {name} {doing or self.doing}; {self.saved}; continue with: {self._continue_with}"

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            if not self._is_deferred:
                raise StopRequested

    def _watch(self) -> None:
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                grace = f"after the {self._grace:g} s of checkpoint.grace_seconds" if self._is_deferred else None
                self._end(EXIT_PREEMPTED, grace)
            for number in os.read(self._read, 64):
                if number == _CLOSE:
                    return
                if number not in SIGNALS:
                    continue
                if deadline is None:
                    deadline = time.monotonic() + self._grace
                    self._heard = signal.Signals(number)
                elif number == signal.SIGINT:
                    self._end(128 + signal.SIGINT, "by a second Ctrl-C")

    def _end(self, code: int, doing: str | None) -> None:
        """End the process from the watching thread, whatever the main one is in."""
        if is_rank_zero():
            cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
            with suppress(OSError):  # the terminal may have gone
                os.write(2, f"{cursor}{self.last_line(doing)}\n".encode())
        kill_children()
        os._exit(code)


def kill_children() -> None:
    """End all processes that this one started; multiprocessing's tracker ends by itself when it has cleaned up."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
        except psutil.Error:
            continue


@contextmanager
def blocked() -> Iterator[None]:
    """Processes started within this do not hear the stop signals, which a terminal or SLURM sends to all of a run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(worker: int = 0) -> None:
    """In a process that loads or tokenizes: its parent ends it when its work is done; a second SIGTERM is its own."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _ignore_once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)


def _forget_in_child() -> None:
    """A forked process shares the pipe with its parent, and must not write to it."""
    if _active is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


os.register_at_fork(after_in_child=_forget_in_child)
