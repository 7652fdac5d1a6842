"""Runs of the command in forked processes: libraries are imported once, and every run is a real process.

Run as a script this is the server: for every line of JSON on its stdin it forks a run, prints the run's pid, waits, and
prints its exit code. A run marks in a small shared file what it is in at any instant (`PHASES`), and waits at a gate
where the test has put one: so a test can send a signal at a chosen instant, and knows which it was.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PHASES = ("loading", "measuring", "step", "validation", "writing", "ending")
TIMEOUT_SECONDS = 120.0


class Marks:
    """For each phase, whether the process is in it and how often it was entered; survives the process."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(2 * len(PHASES)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def enter(self, phase: str) -> int:
        index = 2 * PHASES.index(phase)
        self._map[index + 1] = min(255, self._map[index + 1] + 1)
        self._map[index] = 1
        return self._map[index + 1]

    def leave(self, phase: str) -> None:
        self._map[2 * PHASES.index(phase)] = 0

    def is_in(self, phase: str) -> bool:
        return self._map[2 * PHASES.index(phase)] == 1

    def times(self, phase: str) -> int:
        return self._map[2 * PHASES.index(phase) + 1]

    def phases(self) -> list[str]:
        return [phase for phase in PHASES if self.is_in(phase)]


class ForkedRun:
    """One run of the command."""

    def __init__(self, server: subprocess.Popen[str], pid: int, log: Path, marks: Marks) -> None:
        self._server, self.pid, self._log, self.marks = server, pid, log, marks
        self._code: int | None = None

    def wait_for(self, phase: str, times: int = 1) -> None:
        """Until the run is in `phase` for the n-th time (or later)."""
        self.wait_until(lambda: self.marks.is_in(phase) and self.marks.times(phase) >= times, f"{phase} {times}")

    def wait_until(self, met: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not met():
            assert time.monotonic() < deadline, f"{what} was not reached:\n{self.output}"
            assert not self._has_ended(), f"the run ended before {what}:\n{self.output}"
            time.sleep(0.0005)

    def _has_ended(self) -> bool:
        with open(f"/proc/{self.pid}/stat") as file:  # a zombie until the server has waited for it
            return file.read().rpartition(")")[2].split()[0] == "Z"

    def send(self, number: int, *, to_group: bool = False) -> None:
        (os.killpg if to_group else os.kill)(self.pid, number)

    def wait(self) -> int:
        """The exit code; negative for a signal."""
        if self._code is None:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.write("wait\n")
            self._server.stdin.flush()
            self._code = int(self._server.stdout.readline())
        return self._code

    @property
    def largest_pass_bytes(self) -> int:
        """Address space that the largest forward and backward pass took."""
        return max(map(int, self._log.with_suffix(".passes").read_text().split()))

    @property
    def validation_bytes(self) -> list[int]:
        """Resident memory that each validation took."""
        return [int(line) for line in self._log.with_suffix(".validations").read_text().split()]

    @property
    def has_been_waited_for(self) -> bool:
        return self._code is not None

    @property
    def output(self) -> str:
        """What the run has written to stdout and stderr; to stderr alone, where stdout is kept apart."""
        return self._log.read_text()

    @property
    def stdout(self) -> str:
        """What a run that keeps it apart has written to stdout."""
        return self._log.with_suffix(".out").read_text()


class ForkServer:
    """Starts runs of `threads` threads, one at a time.

    `environment` is what it imports the libraries under, instead of this process's.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None, threads: int = 1) -> None:
        self._folder, self._count = folder, 0
        self._last: ForkedRun | None = None
        root = str(Path(__file__).resolve().parents[1])
        own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": root}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **own} if environment is None else {**environment, **own}
        command = [sys.executable, "-m", "tests.fork_server"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, cwd=root)

    def start(
        self,
        *argv: str,
        gates: dict[str, Path] | None = None,
        headroom_bytes: int | None = None,
        ranks: int = 1,
        cwd: Path | None = None,
        stdin: str = "",
        apart: bool = False,
        **environment: str,
    ) -> ForkedRun:
        """Run the command. `gates` holds the run up at "phase:n-th time" until the file exists.

        `headroom_bytes` is the address space that a forward and backward pass may take besides what is there before.
        `apart` keeps stdout from stderr. With several `ranks`, the run's process starts that many with torchrun's
        variables, and waits for them; "{rank}" in the `environment` is each one's own.
        """
        if self._last is not None and not self._last.has_been_waited_for:
            self._last.send(signal.SIGKILL, to_group=True)  # of a test that failed
            self._last.wait()
        self._count += 1
        log, marks = self._folder / f"{self._count}.log", self._folder / f"{self._count}.marks"
        mapped = Marks(marks)
        log.with_suffix(".in").write_text(stdin)
        job = {
            "argv": argv,
            "log": str(log),
            "marks": str(marks),
            "gates": {place: str(path) for place, path in (gates or {}).items()},
            "environment": environment,
            "headroom": headroom_bytes,
            "ranks": ranks,
            "cwd": None if cwd is None else str(cwd),
            "apart": apart,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._last = ForkedRun(self._process, int(self._process.stdout.readline()), log, mapped)
        return self._last

    def run(self, *argv: str, expect: int = 0, **options: Any) -> str:
        """Run the command to its end; its output."""
        started = self.start(*argv, **options)
        assert started.wait() == expect, started.output
        return started.output

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT_SECONDS)
        self._process.stdout.close()


def serve() -> None:
    """The server's loop."""
    import bitsandbytes  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import finetune.commands.run
    import finetune.evaluation.task
    import finetune.export.hub_publish
    import finetune.inference.generate
    import finetune.report.html
    import finetune.training.train  # noqa: F401

    gc.collect()
    gc.freeze()  # a run's collections leave what was imported alone, and do not copy its pages
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        print(pid, flush=True)
        # Waited for only when the test asks: until then its pid is its own.
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _child(job: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    paths = {suffix: Path(job["log"]).with_suffix(suffix) for suffix in (".log", ".out", ".in")}
    for descriptor, suffix in ((1, ".out" if job["apart"] else ".log"), (2, ".log")):
        os.dup2(os.open(paths[suffix], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(paths[".in"], os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8")  # the server's own has been read from
    if job["cwd"] is not None:
        os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    if job["ranks"] > 1:
        _become_ranks(job["ranks"], job["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        _mark(Marks(Path(job["marks"])), job["gates"])
        _measure_passes(job["headroom"], Path(job["log"]).with_suffix(".passes"))
        _measure_validation(Path(job["log"]).with_suffix(".validations"))
        from finetune.cli import main

        code = main(job["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become_ranks(count: int, own: dict[str, str]) -> None:
    """Returns in `count` new processes; this one waits for them and ends with the first code that is not 0."""
    from lightning.fabric.utilities import rank_zero_only as fabric_rank_zero_only
    from lightning.pytorch.utilities import rank_zero_only

    from finetune import console

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    common |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": 0}
    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(
                {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            )
            os.environ.update({name: value.format(rank=rank) for name, value in own.items()})
            # What Lightning and our consoles found at their import, before there were ranks.
            for only in (rank_zero_only, fabric_rank_zero_only):
                only.rank = rank
            for screen in (console.console, console.stdout):
                screen.quiet = rank > 0
            return
        children.append(pid)
    codes = [0]
    while children:
        pid, status = os.wait()
        children.remove(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:
            for other in children:
                os.kill(other, signal.SIGTERM)
    os._exit(next((code for code in codes if code), 0) & 0xFF)


def _mark(marks: Marks, gates: dict[str, str]) -> None:
    """Have the phases marked by what opens and closes them."""
    import finetune.commands.run as command
    from finetune.training import checkpoint_writer, train
    from finetune.training.module import FinetuneModule
    from finetune.training.validation import Validation

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        times = marks.enter(name)
        gate = gates.get(f"{name}:{times}")
        while gate is not None and not Path(gate).exists():
            time.sleep(0.001)
        yield
        marks.leave(name)

    def marked(owner: Any, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with phase(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, wrapper)

    marked(FinetuneModule, "configure_model", "loading")
    marked(FinetuneModule, "training_step", "step")
    marked(Validation, "_validate", "validation")
    marked(checkpoint_writer, "write_checkpoint", "writing")
    marked(train, "save_final_adapter", "ending")
    marked(command._Measure, "_measure", "measuring")


def _measure_passes(headroom: int | None, report: Path) -> None:
    """Write down what each forward and backward pass takes, and let the system refuse more than `headroom` bytes."""
    from finetune.training.module import FinetuneModule

    original = FinetuneModule._micro_loss
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def wrapper(*args: Any) -> Any:
        before = _address_space("VmSize")
        if headroom is not None:
            resource.setrlimit(resource.RLIMIT_AS, (before + headroom, limits[1]))
        try:
            return original(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            with report.open("a") as file:
                file.write(f"{_address_space('VmPeak') - before}\n")

    FinetuneModule._micro_loss = wrapper  # type: ignore[method-assign]


def _measure_validation(report: Path) -> None:
    """Write down how much resident memory each validation takes besides what was there before."""
    from finetune.training import validation

    original = validation.mean_loss

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before = _address_space("VmRSS")
        result = original(*args, **kwargs)
        with report.open("a") as file:
            file.write(f"{_address_space('VmHWM') - before}\n")
        return result

    validation.mean_loss = wrapper


def _address_space(which: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(which))


if __name__ == "__main__":
    serve()
