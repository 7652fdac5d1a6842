"""This project, as `finetune run` trains."""

from __future__ import annotations

from pathlib import Path

import measure
import torch

from finetune.models.load import quiet_libraries
from finetune.recipe.load import load_recipe
from finetune.training.bench_worker import StepTimer
from finetune.training.module import FinetuneModule
from finetune.training.strategy import build_trainer
from finetune.training.train import build_loader, prepare_job


def main() -> None:
    """Train on the task's rows and report."""
    task = measure.read_task()
    quiet_libraries()
    job = prepare_job(load_recipe(Path(task["recipe"]), task["overrides"]))
    timer = StepTimer(job, measure.WARMUP_STEPS, fused=True, trace=None)
    module = FinetuneModule(job.recipe, job.source, job.tokenizer, job.placement, job.attention, job.plan.num_steps)
    trainer = build_trainer(job.placement, job.recipe.training, [timer])
    trainer.fit(module, build_loader(job.steps_of(job.data.train, rank=0, world_size=1), job.recipe, job.placement))
    memory = measure.peak_memory_bytes()
    model = module.model.to(measure.device()).eval()
    with torch.autocast(measure.device().type, torch.bfloat16):
        loss = measure.mean_loss(lambda ids: model(input_ids=ids).logits, measure.read_samples(task["held_out"]))
    measure.report(
        steps=timer.num_steps,
        seconds=timer.seconds,
        real_tokens=timer.real_tokens,
        computed_tokens=timer.computed_tokens,
        peak_memory_bytes=memory,
        losses=[value.item() for value in timer.losses],
        held_out_loss=loss,
    )


if __name__ == "__main__":
    main()
