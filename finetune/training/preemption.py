"""Stopping in good order: every rank at the same step, everything saved, and the job queued again under SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from finetune.console import say, warn
from finetune.stop_signals import StopSignals
from finetune.training.host_copy import HostCopy
from finetune.training.module import FinetuneModule
from finetune.training.state import RunState


class Preemption(L.Callback):
    """A stop signal to any rank ends the run after the current step, or between two batches of a validation."""

    def __init__(self, state: RunState, signals: StopSignals, grace_seconds: float) -> None:
        self._state, self._signals, self._grace_seconds = state, signals, grace_seconds
        self._votes: HostCopy[int] = HostCopy()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take the handlers back from Lightning; what comes before the first step still ends the run at once."""
        self._signals.install()

    def on_train_batch_start(self, *_: Any) -> None:
        """From the first step on there is work to save."""
        self._signals.defer(self._grace_seconds)

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Stop if any rank was asked to: the votes are counted on every step, so that all stop at the same one.

        On a GPU they are read a step later, so nothing waits for them.
        """
        arrived = self._votes.push(self._vote(module), module.step)
        if arrived is not None and module.step < module.num_steps:
            self._act(trainer, int(arrived[0].item()))

    def interrupts(self, trainer: L.Trainer, module: FinetuneModule) -> bool:
        """Whether to leave a validation for later; asked by all ranks alike, and waits for their votes."""
        self._act(trainer, int(self._vote(module).item()))
        return self._state.is_preempted

    def _vote(self, module: FinetuneModule) -> torch.Tensor:
        received = self._signals.received
        votes = torch.full((1,), float(received or 0), device=module.device)
        if module.placement.world_size > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes

    def _act(self, trainer: L.Trainer, number: int) -> None:
        if number:
            self._state.stop_reason = signal.Signals(number).name
            trainer.should_stop = True


def requeue(stop_reason: str | None) -> None:
    """Under SLURM, put the job back into the queue when SIGUSR1 announced its end, as Lightning does.

    Source: Lightning's `_SignalConnector`. An interactive job is left alone.
    """
    if stop_reason != signal.SIGUSR1.name or not SLURMEnvironment.detect():
        return
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        warn(f"the job was not requeued: scontrol: {error}; run the same command again")
        return
    if done.returncode == 0:
        say(f"requeued SLURM job {job}")
    else:
        warn(f"the job was not requeued: scontrol requeue {job}: {done.stderr.strip()}; run the same command again")
