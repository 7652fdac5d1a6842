"""One variant of a training benchmark in a process of its own: `python -m finetune.training.bench_worker`, from JSON.

Reads a task from stdin and writes its result as one line on stdout. Times are of a CUDA device's own clock where there
is one; that takes no synchronization within the steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from finetune.data.batches import MicroBatch
from finetune.kernels.products import has_bf16_units
from finetune.machine import describe_machine, library_versions, peak_memory_bytes, release_freed_memory
from finetune.models.flops import TokenCounts, needed_flops, packed_counts, padded_counts, training_work
from finetune.models.fused import unfuse
from finetune.models.load import quiet_libraries
from finetune.recipe.load import load_recipe
from finetune.training.module import FinetuneModule
from finetune.training.strategy import build_trainer
from finetune.training.train import Job, build_loader, prepare_job

PHASES = ("data", "forward", "backward", "optimizer")


class Clock:
    """Sums the time between pairs of marks, by phase."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {phase: [] for phase in PHASES}

    def now(self) -> Any:
        """A mark: on CUDA an event that the device passes, else the time."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, phase: str, start: Any) -> None:
        """The span from `start` to now."""
        self._spans[phase].append((start, self.now()))

    def wait(self) -> float:
        """The time when the device has done all that it was given."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def totals(self) -> dict[str, float]:
        """Seconds by phase."""
        return {phase: sum(_seconds(*span) for span in spans) for phase, spans in self._spans.items()}


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


class StepTimer(L.Callback):
    """Counts and times the steps after `warmup`."""

    def __init__(self, job: Job, warmup: int, *, fused: bool, trace: Path | None) -> None:
        self._job, self._warmup, self._fused, self._trace = job, warmup, fused, trace
        self.seconds = 0.0
        self.num_steps = 0
        self.counts = TokenCounts(0, 0, 0)
        self.real_tokens = self.computed_tokens = self.num_samples = 0
        self.losses: list[torch.Tensor] = []
        self._profiler: torch.profiler.profile | None = None
        self._running = False

    def on_train_start(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        """Put clocks around forward and backward."""
        if not self._fused:
            unfuse(module.model)
        self.work = training_work(module.model)
        self.clock = Clock(module.device)
        self._fetched = self.clock.now()
        module.loss_model.forward = self._timed("forward", module.loss_model.forward)  # type: ignore[method-assign]
        module.manual_backward = self._timed("backward", module.manual_backward)  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """The batch is here."""
        if self._running:
            self.clock.add("data", self._fetched)

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Gradients are complete; clipping is part of the update."""
        self._update = self.clock.now()

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Count what the step did; start after the warm-up, stop after the last step."""
        if self._running:
            self._add_step(module)
        if module.step == self._warmup:
            self._start()
        elif module.step == module.num_steps:
            self.seconds = self.clock.wait() - self._started
            if self._profiler is not None:
                self._profiler.stop()
                self._profiler.export_chrome_trace(str(self._trace))
        self._fetched = self.clock.now()

    def _start(self) -> None:
        if self._trace is not None:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        self._running = True
        self._started = self.clock.wait()

    def _add_step(self, module: FinetuneModule) -> None:
        batch, result = module.last_batch, module.last
        assert batch is not None and result is not None
        self.clock.add("optimizer", self._update)
        self.losses.append(result.loss)
        self.num_steps += 1
        self.real_tokens += batch.num_real_tokens
        for micro in batch.micro_batches:
            self.num_samples += len(micro.samples)
            self.computed_tokens += micro.num_computed_tokens
            self.counts = self.counts + self._count(micro)

    def _count(self, micro: MicroBatch) -> TokenCounts:
        supervised = len(micro.targets)
        if micro.layout is not None:
            return packed_counts(micro.layout, supervised)
        return padded_counts(self._job.data.train.lengths[micro.samples].tolist(), supervised)

    def _timed(self, phase: str, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock.now()
            result = call(*args, **kwargs)
            if self._running:
                self.clock.add(phase, start)
            return result

        return timed


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Run the task's steps and say what they took."""
    job = prepare_job(load_recipe(Path(task["recipe"]), task["overrides"]))
    if not task["steps"]:
        return {}
    trace = Path(task["trace"]) if task.get("trace") else None
    timer = StepTimer(job, task["warmup"], fused=task["fused"], trace=trace)
    module = FinetuneModule(job.recipe, job.source, job.tokenizer, job.placement, job.attention, job.plan.num_steps)
    trainer = build_trainer(job.placement, job.recipe.training, [timer])
    steps = job.steps_of(job.data.train, rank=0, world_size=1)
    trainer.fit(module, build_loader(steps, job.recipe, job.placement))
    memory, device = peak_memory_bytes(), module.device
    del trainer, module
    release_freed_memory()  # the products below need room
    return {
        "seconds": timer.seconds,
        "steps": timer.num_steps,
        "samples": timer.num_samples,
        "real_tokens": timer.real_tokens,
        "computed_tokens": timer.computed_tokens,
        "flops": needed_flops(timer.work, timer.counts),
        "phases": timer.clock.totals(),
        "losses": [loss.item() for loss in timer.losses],
        "peak_memory_bytes": memory,
        # Here and now: the machine may be slower in another round.
        "peak_flops_per_second": matmul_peak(device),
        "peak_dtype": str(peak_dtype(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
        "versions": library_versions(),
    }


def peak_dtype(device: torch.device) -> torch.dtype:
    """bf16, or fp32 on a CPU that has no units for bf16: there it is faster."""
    return torch.bfloat16 if device.type == "cuda" or has_bf16_units() else torch.float32


def matmul_peak(device: torch.device) -> float:
    """The best rate (FLOP/s) of a product of square matrices in `peak_dtype`, after a warm-up."""
    best = 0.0
    for size in (8192, 16384) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(peak_dtype(device)) for _ in range(2))
        clock = Clock(device)
        times = []
        for _ in range(6):
            start = clock.wait()
            a @ b
            times.append(clock.wait() - start)
        best = max(best, 2 * size**3 / statistics.median(times[1:]))
    return best


def main() -> int:
    """Do the task on stdin."""
    quiet_libraries()
    print(json.dumps(measure(json.load(sys.stdin))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
