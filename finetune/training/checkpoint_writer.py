"""When a checkpoint is due, and writing it alongside training: a step waits for the copy, not for the disk."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning as L

from finetune.console import warn
from finetune.errors import FinetuneError
from finetune.models.adapters import config_text
from finetune.recipe.schema import Recipe
from finetune.run_dir import RunDir
from finetune.stop_signals import StopSignals
from finetune.training.callbacks import NonFiniteStop
from finetune.training.checkpoint import Checkpoint, prune, update_progress, write_checkpoint
from finetune.training.module import FinetuneModule
from finetune.training.snapshot import HostBuffers, Snapshot, snapshot_tensors, take_snapshot
from finetune.training.state import RunState

# Smaller snapshots are allocated anew: touching their pages takes some 50 ms, keeping them takes memory from training.
KEEP_FROM_BYTES = 128 * 2**20


class CheckpointWriter(L.Callback):
    """Saves every n steps, every n minutes, where validation loss is the lowest so far, at the end and before stopping.

    One write is under way at a time.

    A write that failed ends the run at the end of the step in which that is seen.
    """

    def __init__(
        self,
        recipe: Recipe,
        recipe_text: str,
        run: RunDir,
        state: RunState,
        fingerprints: dict[str, Any],
        guard: NonFiniteStop,
        signals: StopSignals,
        resumed: Checkpoint | None,
    ) -> None:
        self._section, self._num_best = recipe.checkpoint, recipe.num_best_kept
        self._recipe_text, self._run, self._state = recipe_text, run, state
        self._fingerprints, self._guard, self._signals = fingerprints, guard, signals
        self._last_time = time.monotonic()
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._keeps_buffers: bool | None = None  # not known before the optimizer's first step
        self._reserving: Future[None] | None = None
        self._pending: Future[Checkpoint] | None = None
        self.last = resumed

    def on_train_start(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        """Note in the checkpoint what a validation that was put off has found by now."""
        if trainer.is_global_zero and self.last is not None and self._state.validated_at == module.step:
            progress = self._state.to_progress()
            if self.last.progress != progress:
                update_progress(self.last, progress)

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Save where it is due."""
        if self._pending is not None and self._pending.done():
            self._finish()
        section = self._section
        due = section.every_steps is not None and module.step % section.every_steps == 0
        due = due or (self._num_best > 0 and self._state.best_step == module.step)
        if section.every_minutes is not None:
            elapsed = time.monotonic() - self._last_time >= 60 * section.every_minutes
            # Rank 0's clock decides: every rank must come to the same answer.
            due = trainer.strategy.broadcast(elapsed) or due
        if due or trainer.should_stop or module.step == module.num_steps:
            self.save(trainer, module)
        elif self._keeps_buffers is None and trainer.is_global_zero:
            # The optimizer has its moments by now.
            tensors = snapshot_tensors(module.model, module.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]
            self._keeps_buffers = sum(tensor.nbytes for tensor in tensors.values()) >= KEEP_FROM_BYTES
            if self._keeps_buffers:
                self._reserving = self._thread.submit(self._buffers.reserve, tensors)

    def save(self, trainer: L.Trainer, module: FinetuneModule) -> None:
        """Begin to write a checkpoint of the step just done; rank 0 alone, the adapter is whole on every rank."""
        self._guard.check_now()
        self._last_time = time.monotonic()
        if trainer.is_global_zero:
            self._finish()
            assert module.last is not None
            self._state.loss = module.last.loss.item()
            snapshot = take_snapshot(
                module.step,
                module.model,
                module.optimizers(use_pl_optimizer=False),  # type: ignore[arg-type]
                trainer.precision_plugin.state_dict(),
                self._state.to_progress(),
                self._buffers,
            )
            self._pending = self._thread.submit(self._write, snapshot, config_text(module.model))
        if trainer.should_stop or module.step == module.num_steps:
            self._finish()
            self._buffers.clear()
            # A rank that ended earlier would take the one that writes with it.
            trainer.strategy.barrier()

    def _write(self, snapshot: Snapshot, adapter_config: str) -> Checkpoint:
        folder = self._run.checkpoints
        checkpoint = write_checkpoint(folder, snapshot, adapter_config, self._recipe_text, self._fingerprints)
        prune(folder, keep_last=self._section.keep_last, keep_best=self._num_best)
        self._signals.saved = f"step {checkpoint.step} is saved in {checkpoint.path}"
        return checkpoint

    def _finish(self) -> None:
        """Wait for what is under way; raises what the write raised."""
        if self._reserving is not None:
            self._reserving.result()
        pending, self._pending = self._pending, None
        if pending is not None:
            self.last = pending.result()
            if not self._keeps_buffers:
                self._buffers.clear()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Let the last checkpoint become whole."""
        try:
            self._finish()
        except FinetuneError as error:
            if error is not exception:
                warn(str(error))

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Called by Lightning at the end and after an exception."""
        self._thread.shutdown()
