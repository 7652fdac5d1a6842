"""What happens around a step: progress, metrics, and the stop at a value that is not finite."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from finetune.console import Bar, progress_bar, say
from finetune.data.dataset import TokenDataset
from finetune.errors import FinetuneError
from finetune.machine import peak_memory_bytes
from finetune.recipe.schema import Recipe
from finetune.run_dir import RunDir
from finetune.training.host_copy import HostCopy
from finetune.training.metrics import MetricsFile
from finetune.training.module import FinetuneModule, StepResult
from finetune.training.state import RunState
from finetune.training.steps import StepBatch, StepPlan
from finetune.training.trackers import TrackerGroup
from finetune.training.validation import keep_samples, read_samples


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
        # Gradients alone that are not finite under a loss scaler are its business: it has left the step out.
        if torch.isfinite(values[:1] if result.overflowed else values).all():
            return
        origins = self._suspects(batch, [loss.item() for loss in result.micro_losses])
        shown = ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")
        raise FinetuneError(
            f"step {batch.step + 1}: the loss is {values[0].item()} and the gradient norm {values[1].item()}.\n"
            f"  The samples computed: {shown}.\n"
            "  The last checkpoint is untouched. Lower training.optimizer.lr, look at these rows, "
            "or set training.on_non_finite: skip."
        )

    def _suspects(self, batch: StepBatch, losses: list[float]) -> list[str]:
        """Origins of the samples whose loss is not finite, of all ranks; of all the step's if there are none.

        Collective: the values that led here are sums over all ranks, so every rank is here at the same step.
        """
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        asked = bad or range(len(losses))
        found = bool(bad), [self._dataset.origin(s) for i in asked for s in batch.micro_batches[i].samples]
        ranks: list[Any] = [found]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, found)
        worst = max(is_bad for is_bad, _ in ranks)
        return sorted({origin for is_bad, origins in ranks if is_bad == worst for origin in origins})


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
        self._window_tokens = self._run_tokens = 0

    def on_train_start(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        """Open the outputs."""
        self._started = self._window_start = time.perf_counter()
        self._seconds_before = self._state.seconds
        if not trainer.is_global_zero:
            return
        made_up = self._state.validation_loss if self._state.validated_at == module.step else None
        self._metrics.start(module.step, made_up)
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
        self._state.unlogged_supervised += batch.num_supervised
        self._state.seconds = self._seconds_before + time.perf_counter() - self._started
        self._state.num_skipped_steps = module.num_skipped_steps
        if self._bar is not None:
            self._bar.update(module.step, self._status)
        validates = module.step in (self._state.validated_at, self._state.put_off_at)
        if module.step % self._every == 0 or validates or module.step == self._plan.num_steps:
            self._log(trainer, module)

    def _log(self, trainer: L.Trainer, module: FinetuneModule) -> None:
        assert module.last is not None
        self._state.loss = module.last.loss.item()
        supervised, self._state.unlogged_supervised = self._state.unlogged_supervised, 0
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
            "skipped_steps": self._state.num_skipped_steps,
            "supervised_tokens": supervised,
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
        self._window_tokens, self._window_start = 0, now

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
        if self._trackers is not None and not self._state.is_preempted:
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


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03."""
    total = round(seconds)
    hours, rest = divmod(total, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
