"""What happens around a step: progress, metrics, validation, checkpoints, and stopping in good order."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch

from finetune.console import Bar, progress_bar, say
from finetune.data.dataset import TokenDataset
from finetune.errors import EXIT_PREEMPTED, FinetuneError
from finetune.machine import peak_memory_bytes
from finetune.recipe.schema import Recipe
from finetune.run_dir import RunDir
from finetune.training.checkpoint import Checkpoint, prune, take_snapshot, write_checkpoint
from finetune.training.host_copy import HostCopy
from finetune.training.metrics import MetricsFile
from finetune.training.module import FinetuneModule, StepResult
from finetune.training.steps import StepBatch, StepDataset, StepPlan
from finetune.training.trackers import TrackerGroup
from finetune.training.validation import keep_samples, mean_loss, read_samples, write_samples


@dataclass
class RunState:
    """What the callbacks share and a checkpoint keeps."""

    step: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    validated_at: int | None = None
    best_validation_loss: float | None = None
    bad_validations: int = 0
    num_skipped_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stop_reason: str | None = field(default=None)  # early_stopping or the name of a signal; not kept

    def to_progress(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {key: value for key, value in vars(self).items() if key != "stop_reason"}

    def load(self, progress: dict[str, Any]) -> None:
        """Take the values of a checkpoint."""
        for key, value in progress.items():
            setattr(self, key, value)


class NonFiniteStop(L.Callback):
    """Stop before anything is saved when the loss or a gradient is NaN or infinite.

    On a GPU the values of a step are looked at one step later, when their copy has arrived: nothing waits for them.
    """

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset = dataset
        self._copy: HostCopy[tuple[StepBatch, StepResult]] = HostCopy()

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Look at this step's values, or on a GPU at the last step's."""
        assert module.last is not None and module.last_batch is not None
        if module.recipe.training.on_non_finite == "skip":
            return
        values = torch.stack([module.last.loss, module.last.grad_norm])
        self._look(self._copy.push(values, (module.last_batch, module.last)))

    def check_now(self) -> None:
        """Wait for what is under way: nothing bad may be saved."""
        self._look(self._copy.flush())

    def _look(self, arrived: tuple[torch.Tensor, tuple[StepBatch, StepResult]] | None) -> None:
        if arrived is not None:
            self._check(arrived[0], *arrived[1])

    def _check(self, values: torch.Tensor, batch: StepBatch, result: StepResult) -> None:
        if torch.isfinite(values).all():
            return
        losses = [loss.item() for loss in result.micro_losses]
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
        origins = sorted({self._dataset.origin(s) for i in bad for s in batch.micro_batches[i].samples})
        shown = ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")
        raise FinetuneError(
            f"step {batch.step + 1}: the loss is {values[0].item()} and the gradient norm {values[1].item()}.\n"
            f"  The samples computed: {shown}.\n"
            "  The last checkpoint is untouched. Lower training.optimizer.lr, look at these rows, "
            "or set training.on_non_finite: skip."
        )


class Meter(L.Callback):
    """Progress on the screen, metrics.csv and trackers. Reads device values only where something is printed."""

    def __init__(self, recipe: Recipe, run: RunDir, state: RunState, plan: StepPlan, lengths: Any) -> None:
        self._every = recipe.logging.every_steps
        self._metrics = MetricsFile(run.metrics)
        self._recipe, self._run, self._state, self._plan = recipe, run, state, plan
        self._tokens_left = [int(lengths[plan.samples(step)].sum()) for step in range(plan.num_steps)]
        self._trackers: TrackerGroup | None = None
        self._screen = ExitStack()
        self._bar: Bar | None = None
        self._status = ""
        self._window_tokens = self._supervised = self._run_tokens = 0

    def on_train_start(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        """Open the outputs."""
        self._started = self._window_start = time.perf_counter()
        self._seconds_before = self._state.seconds
        if not trainer.is_global_zero:
            return
        self._metrics.start(module.step)
        keep_samples(self._run.samples, module.step)
        self._trackers = TrackerGroup(self._recipe, self._run, module.step)
        self._bar = self._screen.enter_context(progress_bar("training", self._plan.num_steps, line=False))

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Count, and at every n-th step, every validated one and the last one, say."""
        batch = module.last_batch
        assert batch is not None
        self._state.step = module.step
        self._state.tokens += batch.num_real_tokens
        self._window_tokens += batch.num_real_tokens
        self._run_tokens += batch.num_real_tokens
        self._supervised += batch.num_supervised
        self._state.seconds = self._seconds_before + time.perf_counter() - self._started
        self._state.num_skipped_steps = module.num_skipped_steps
        if self._bar is not None:
            self._bar.update(module.step, self._status)
        is_validated = self._state.validated_at == module.step
        if module.step % self._every == 0 or is_validated or module.step == self._plan.num_steps:
            self._log(trainer, module)

    def _log(self, trainer: L.Trainer, module: FinetuneModule) -> None:
        assert module.last is not None
        self._state.loss = module.last.loss.item()
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        speed = self._window_tokens / max(1e-9, now - self._window_start)
        row: dict[str, float | int | None] = {
            "step": module.step,
            "epoch": round(self._plan.epoch(module.step - 1), 4),
            "loss": self._state.loss,
            "grad_norm": module.last.grad_norm.item(),
            "lr": module.last.lr,
            "validation_loss": self._state.validation_loss if self._state.validated_at == module.step else None,
            "supervised_tokens": self._supervised,
            "tokens": self._state.tokens,
            "tokens_per_second": round(speed, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "seconds": round(self._state.seconds, 3),
        }
        self._metrics.append(row)
        if self._trackers is not None:
            self._trackers.log(row, module.step)
            if self._state.validated_at == module.step:
                self._trackers.log_samples(read_samples(self._run.samples, module.step), module.step)
        self._say(row, now)
        self._window_tokens, self._supervised, self._window_start = 0, 0, now

    def _say(self, row: dict[str, Any], now: float) -> None:
        left = sum(self._tokens_left[row["step"] :])
        overall = self._run_tokens / max(1e-9, now - self._started)
        numbers = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tok/s  "
            f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
        )
        rest = f"left {clock(left / max(1e-9, overall))}"
        self._status = f"{rest}  {numbers}"  # a narrow terminal cuts what comes last
        if self._bar is not None and self._bar.is_shown:
            self._bar.update(row["step"], self._status)
        else:
            say(f"step {row['step']}/{self._plan.num_steps}  {numbers}  {rest}")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Hand over the adapter of a run that came to its end."""
        if self._trackers is not None and self._state.stop_reason in (None, "early_stopping"):
            self._trackers.log_adapter(self._run.adapter)

    def close(self) -> None:
        """Leave the terminal and the trackers in order, whatever happened."""
        if self._bar is not None and self._bar.is_shown:
            self._screen.close()
            say(f"step {self._state.step}/{self._plan.num_steps}  {self._status}")
        self._bar = None
        if self._trackers is not None:
            self._trackers.finish()

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Called by Lightning at the end and after an exception."""
        self.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Called by Lightning when training fails."""
        self.close()


class Validation(L.Callback):
    """Validation loss, perplexity and sample completions every n steps; early stopping."""

    def __init__(
        self, recipe: Recipe, run: RunDir, state: RunState, samples: StepDataset, stop_token_ids: tuple[int, ...]
    ) -> None:
        self._section = recipe.evaluation
        self._run, self._state, self._samples = run, state, samples
        self._stop_token_ids = stop_token_ids

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Validate where it is due."""
        every = self._section.every_steps
        if every is None or (module.step % every and module.step != module.num_steps):
            return
        with progress_bar("validating", len(self._samples.dataset), line=False) as bar:
            loss = mean_loss(module, self._samples, on_samples=bar.advance)
        state = self._state
        state.validation_loss, state.validated_at = loss, module.step
        say(f"step {module.step}  validation loss {loss:.4f}  perplexity {math.exp(min(loss, 80)):.2f}")
        write_samples(module, self._samples.dataset, self._stop_token_ids, self._section, self._run)
        stopping = self._section.early_stopping
        margin = stopping.min_delta if stopping else 0.0
        if state.best_validation_loss is None or loss < state.best_validation_loss - margin:
            state.best_validation_loss, state.bad_validations = loss, 0
            return
        state.bad_validations += 1
        if stopping and state.bad_validations >= stopping.patience:
            state.stop_reason = "early_stopping"
            trainer.should_stop = True
            say(f"early stopping: no better validation loss in {state.bad_validations} validations")


class CheckpointWriter(L.Callback):
    """Saves every n steps, every n minutes, at the end and before stopping."""

    def __init__(
        self,
        recipe: Recipe,
        recipe_text: str,
        run: RunDir,
        state: RunState,
        fingerprints: dict[str, Any],
        guard: NonFiniteStop,
    ) -> None:
        self._section = recipe.checkpoint
        self._recipe_text, self._run, self._state = recipe_text, run, state
        self._fingerprints, self._guard = fingerprints, guard
        self._last_time = time.monotonic()
        self.last: Checkpoint | None = None

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Save where it is due."""
        section = self._section
        due = section.every_steps is not None and module.step % section.every_steps == 0
        if section.every_minutes is not None:
            elapsed = time.monotonic() - self._last_time >= 60 * section.every_minutes
            # Rank 0's clock decides: every rank must come to the same answer.
            due = trainer.strategy.broadcast(elapsed) or due
        if due or trainer.should_stop or module.step == module.num_steps:
            self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: FinetuneModule) -> None:
        """Write a checkpoint of the step just done; rank 0 alone, the adapter is whole on every rank."""
        self._guard.check_now()
        self._last_time = time.monotonic()
        if trainer.is_global_zero:
            assert module.last is not None
            self._state.loss = module.last.loss.item()
            optimizer = module.optimizers(use_pl_optimizer=False)
            snapshot = take_snapshot(
                module.step,
                module.model,
                optimizer,  # type: ignore[arg-type]
                trainer.precision_plugin.state_dict(),
                self._state.to_progress(),
            )
            self.last = write_checkpoint(
                self._run.checkpoints, snapshot, module.model, self._recipe_text, self._fingerprints
            )
            prune(self._run.checkpoints, keep_last=self._section.keep_last, keep_best=self._section.keep_best)
        trainer.strategy.barrier()


class Preemption(L.Callback):
    """SIGTERM, SIGUSR1 and Ctrl-C end the run after the current step, with a checkpoint; a second Ctrl-C at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, state: RunState, grace_seconds: float) -> None:
        self._state = state
        self._grace_seconds = grace_seconds
        self._votes: HostCopy[int] = HostCopy()
        self._previous: dict[int, Any] = {}
        self._received: str | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take the signals over: Lightning's own SIGTERM handler talks to other ranks from within a signal."""
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self._received = signal.Signals(number).name
        # A step that outlasts the grace is given up: the last checkpoint is whole whatever happens.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(EXIT_PREEMPTED))
        signal.setitimer(signal.ITIMER_REAL, self._grace_seconds)

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Stop if any rank was asked to: the votes are counted on every step, so that all stop at the same one.

        On a GPU they are read a step later, so nothing waits for them.
        """
        votes = torch.full((1,), float(self._received is not None), device=module.device)
        if module.placement.world_size > 1:
            torch.distributed.all_reduce(votes)
        arrived = self._votes.push(votes, module.step)
        if arrived is not None and arrived[0].item() > 0 and module.step < module.num_steps:
            self._state.stop_reason = self._received or "signal"
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03."""
    total = round(seconds)
    hours, rest = divmod(total, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
