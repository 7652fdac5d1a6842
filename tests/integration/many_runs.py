"""One of several processes, each of which runs many recipes: starting processes costs more than the tiny runs.

Usage: python -m torch.distributed.run --nproc-per-node N many_runs.py RECIPE [RECIPE ...]
A recipe that comes twice is cut back to its first checkpoint and continued; the first adapter is kept beside.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finetune.cli import main
from finetune.distributed import is_rank_zero
from finetune.models.adapters import adapter_state
from finetune.run_dir import RunDir
from finetune.training.module import FinetuneModule

step, all_reduce = FinetuneModule.training_step, dist.all_reduce
reduced: list[int] = []  # elements of every all-reduce of a step
most_micro_batches: dict[str, int] = {}  # of a step, by strategy


def checked_step(self: FinetuneModule, batch: Any, index: int) -> None:
    """Every step: modules in training mode (failure mode 3), one adapter on every rank (13), one sum of gradients."""
    assert all(module.training for module in self.model.modules()), f"evaluation mode at step {self.step}"
    digest = hashlib.sha256()
    for name, tensor in adapter_state(self.model).items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    if self.placement.world_size > 1:
        digests: list[Any] = [None] * self.placement.world_size
        dist.all_gather_object(digests, digest.hexdigest())
        assert len(set(digests)) == 1, f"ranks differ before step {self.step}"
    reduced.clear()
    step(self, batch, index)
    # The loss is one number; micro-batches add up before anything travels.
    gradients = [numel for numel in reduced if numel > 1]
    assert gradients == ([self.gradients.flat.numel()] if self.placement.world_size > 1 else []), gradients
    most_micro_batches[self.placement.strategy] = max(
        most_micro_batches.get(self.placement.strategy, 0), len(batch.micro_batches)
    )


def counted_all_reduce(tensor: torch.Tensor, *given: Any, **options: Any) -> Any:
    reduced.append(tensor.numel())
    return all_reduce(tensor, *given, **options)


def cut(run: RunDir) -> None:
    """As if the run had been killed after its first step."""
    run.adapter.rename(run.root / "adapter-uninterrupted")
    for path in run.checkpoints.iterdir():
        if path.name != "step-000001":
            shutil.rmtree(path)


dist.all_reduce = counted_all_reduce
FinetuneModule.training_step = checked_step  # type: ignore[method-assign]
seen: set[Path] = set()
for recipe in map(Path, sys.argv[1:]):
    if recipe in seen and is_rank_zero():
        cut(RunDir(recipe.parent / "runs" / recipe.stem))
    seen.add(recipe)
    code = main(["run", str(recipe)])
    assert code == 0, f"{recipe}: exit code {code}"
assert min(most_micro_batches.values()) > 1, most_micro_batches
