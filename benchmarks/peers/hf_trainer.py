"""What peers measure alike that train with transformers' Trainer, or a class of theirs that extends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import measure
import torch
from transformers import Trainer, TrainerCallback


class Clock(TrainerCallback):
    """When each optimizer step was done, and how many micro-batches had been computed by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.micro_batches: list[int] = []
        self._count = 0

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._count += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._count += 1
        measure.synchronize()
        self.ends.append(time.perf_counter())
        self.micro_batches.append(self._count)


class CountingCollator:
    """A collator that notes the real tokens, and those computed, of every batch; for loaders without workers."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.real: list[int] = []
        self.computed: list[int] = []

    def __call__(self, examples: list[Any]) -> Any:
        self.real.append(sum(len(example["input_ids"]) for example in flat(examples)))
        batch = self.collator(examples)
        self.computed.append(batch["input_ids"].numel())
        return batch


def flat(examples: list[Any]) -> Iterator[dict[str, Any]]:
    """The samples of a batch, or of its rows where each is a list of packed samples."""
    for example in examples:
        if isinstance(example, list):
            yield from flat(example)
        else:
            yield example


def train_and_measure(trainer: Trainer, held_out: str, train: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Train with `trainer` (by `train`, if that is more than its own method); the figures that a run reports."""
    if trainer.args.dataloader_num_workers > 0:
        raise ValueError("the loader has workers, but batches are counted in this process")
    collator = trainer.data_collator = CountingCollator(trainer.data_collator)
    clock = Clock()
    trainer.add_callback(clock)
    (train or trainer.train)()
    memory = measure.peak_memory_bytes()
    model = trainer.model.eval()
    with torch.autocast(measure.device().type, torch.bfloat16, enabled=trainer.args.bf16):
        loss = measure.mean_loss(lambda ids: model(input_ids=ids).logits, measure.read_samples(held_out))
    first, last = clock.micro_batches[measure.WARMUP_STEPS - 1], clock.micro_batches[-1]
    return {
        "steps": len(clock.ends) - measure.WARMUP_STEPS,
        "seconds": clock.ends[-1] - clock.ends[measure.WARMUP_STEPS - 1],
        "real_tokens": sum(collator.real[first:last]),
        "computed_tokens": sum(collator.computed[first:last]),
        "peak_memory_bytes": memory,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "held_out_loss": loss,
    }
