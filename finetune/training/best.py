"""The weights that a run ends with: the last step's, or those of the step with the lowest validation loss."""

from __future__ import annotations

import lightning as L
import torch.distributed as dist

from finetune.console import say, warn
from finetune.models.adapters import load_adapter, trainable_parameters
from finetune.run_dir import RunDir
from finetune.training.checkpoint import checkpoint_name, damage
from finetune.training.module import FinetuneModule
from finetune.training.state import RunState


def take_best(trainer: L.Trainer, module: FinetuneModule, run: RunDir, state: RunState) -> None:
    """Put the adapter of the best step's checkpoint into the model, on every rank; called by all of them.

    Says which step that is. Where its checkpoint is damaged or gone, warns and leaves the last weights.
    """
    step = state.best_step
    if step is None or step == module.step:
        return
    path = run.checkpoints / checkpoint_name(step)
    why_not = None
    if trainer.is_global_zero:
        why_not = damage(path)
        if why_not is None:
            load_adapter(module.model, path)
    # Another machine need not see the checkpoint: the weights come from rank 0.
    why_not = trainer.strategy.broadcast(why_not)
    if why_not is not None:
        warn(
            f"the adapter has the weights of step {module.step}, the last: those of step {step}, where validation loss "
            f"was lowest, cannot be taken: {path} is not a whole checkpoint: {why_not}"
        )
        return
    if module.placement.world_size > 1:
        for parameter in trainable_parameters(module.model):
            dist.broadcast(parameter.data, 0)
    state.adapter_step = step
    say(f"the adapter has the weights of step {step}, where validation loss was lowest: {state.lowest_loss:.4f}")
