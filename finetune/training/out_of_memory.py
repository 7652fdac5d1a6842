"""When a forward pass does not fit into memory: what is said, and the same step again in smaller passes."""

from __future__ import annotations

import torch

from finetune.console import say
from finetune.data.batches import MicroBatch
from finetune.errors import BadInputError
from finetune.machine import peak_memory_bytes, release_freed_memory
from finetune.recipe.schema import Recipe
from finetune.training.steps import StepBatch, StepDataset
from finetune.training.strategy import Placement

_GOES_ON = "  What is saved is untouched, and the same command goes on from it."
# The first step allocates the moments.
LESS_FOR_OPTIMIZER = (
    "training.optimizer.name: paged_adamw_8bit takes a quarter of what adamw takes; a lower adapter.rank takes less; "
    "training.micro_batch_size (or data.max_tokens) and training.gradient_checkpointing leave more beside it.\n"
    + _GOES_ON
)
LESS_FOR_VALIDATION = (
    "Completions take less with a lower evaluation.batch_size or evaluation.max_new_tokens, the loss with a lower "
    "training.micro_batch_size (or data.max_tokens); none of them changes what is trained.\n" + _GOES_ON
)


def check_halving(recipe: Recipe, placement: Placement) -> None:
    """Refuse it where strategy auto has become FSDP; an explicit one is refused with the recipe.

    Raises:
        BadInputError: naming both keys.
    """
    if placement.sharded and recipe.training.on_out_of_memory == "halve":
        raise BadInputError(
            "training.on_out_of_memory: halve does not go with fsdp, which distributed.strategy: auto takes here and "
            "whose other processes would wait for the one that computes again; use stop, and a smaller "
            "training.micro_batch_size, or make the model fit one device and set distributed.strategy: ddp"
        )


def out_of_memory_message(step: int, micro: MicroBatch, *, sharded: bool) -> str:
    """What filled the memory and which keys make it less; the result of a run depends on none of them."""
    rows, tokens = micro.input_ids.shape
    smaller = "data.max_tokens" if sharded else "data.max_tokens; training.on_out_of_memory: halve finds it"
    spread = "" if sharded else ", distributed.strategy: fsdp"
    return (
        f"step {step}: out of memory after {peak_memory_bytes() / 1e9:.1f} GB, at a forward pass of {rows} x {tokens} "
        f"tokens, {len(micro.targets)} of them supervised.\n"
        f"  Cheapest first: a smaller training.micro_batch_size (or {smaller}), "
        f"training.gradient_checkpointing: true, model.quantization: nf4{spread}.\n"
        "  None of them changes the result; the last checkpoint is untouched, and the same command continues from it."
    )


class Halving:
    """Splits a rank's forward passes in two wherever one did not fit, and keeps the later ones as small."""

    def __init__(self, steps: StepDataset) -> None:
        self._steps = steps
        self._own: StepDataset | None = None  # the samples of this rank alone, in smaller passes

    def shrink(self, step: int, failed: MicroBatch) -> None:
        """From here on no pass is larger than half of `failed`. Says so, and gives freed memory back."""
        if self._own is None:
            whole = self._steps
            self._own = StepDataset(whole.dataset, whole.plan, whole.packing, rank=0, world_size=1, pad_id=whole.pad_id)
        packing, (rows, tokens) = self._own.packing, failed.input_ids.shape
        size = max(1, min(packing.size, rows * tokens if packing.packed else rows) // 2)
        self._own.packing = packing.with_size(size)
        say(
            f"step {step}: out of memory at a forward pass of {rows} x {tokens} tokens; "
            f"from here on at most {size:,} {packing.unit} a pass, with the same result"
        )
        release_freed_memory()
        if failed.input_ids.is_cuda:
            torch.cuda.empty_cache()

    def split(self, batch: StepBatch) -> StepBatch:
        """`batch` in passes that are small enough; as it is where they are."""
        if self._own is None or all(self._fits(micro) for micro in batch.micro_batches):
            return batch
        samples = [sample for micro in batch.micro_batches for sample in micro.samples]
        device = batch.micro_batches[0].input_ids.device
        micros = [micro.to(device) for micro in self._own.micro_batches(samples)]
        return StepBatch(batch.step, micros, batch.num_supervised, batch.num_real_tokens)

    def _fits(self, micro: MicroBatch) -> bool:
        assert self._own is not None
        packing, count = self._own.packing, len(micro.samples)
        if count < 2:
            return True
        return (micro.num_computed_tokens if packing.packed else count) <= packing.size
