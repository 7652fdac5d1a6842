"""The largest forward pass that fits a GPU's memory, found by trial steps before the first real one.

The step plan says which samples make up a step; how they are split into forward passes changes rounding alone, so
what is found here is not part of a run's result.
"""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import numpy as np
import torch
import torch.distributed as dist

from finetune.console import say
from finetune.data.batches import MicroBatch, packed_batch, padded_batch
from finetune.data.packing import PackedGroup, PackedRow
from finetune.errors import BadInputError, FinetuneError
from finetune.kernels.attention import packed_row
from finetune.kernels.lora import unchanged_adapters
from finetune.machine import is_out_of_memory
from finetune.models.fused import forget_pending
from finetune.training.module import FinetuneModule
from finetune.training.steps import StepDataset
from finetune.training.strategy import Placement

# Left free of the GPU's memory: rows of other shapes fragment it, and other libraries allocate beside torch.
FREE_SHARE = 0.08


class AutoMicroBatch(L.Callback):
    """Sets the size of `steps`' forward passes once the model is on its device, before any batch is assembled."""

    def __init__(self, steps: StepDataset) -> None:
        self._steps = steps

    def on_fit_start(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        """Try, and say what was found."""
        steps = self._steps
        packing = steps.packing
        samples = -(-steps.plan.global_batch_size // steps.world_size)
        longest = np.argsort(-steps.dataset.lengths, kind="stable")[:samples].tolist()
        # No forward pass holds more than a rank's share of a step.
        most = max(packing.size, int(steps.dataset.lengths[longest].sum()) if packing.packed else samples)

        def fits(size: int) -> bool:
            micro = trial_batch(steps, longest, size)
            with trainer.precision_plugin.train_step_context():
                return try_step(module, micro)

        try:
            size = largest(fits, packing.size, most)
        except LookupError:
            what = "data.max_tokens" if packing.packed else "training.micro_batch_size"
            raise FinetuneError(
                f"training.auto_micro_batch: no forward pass fits the GPU, not even below {what}: {packing.size}; "
                "try training.gradient_checkpointing: true, model.quantization: nf4 or a smaller data.max_seq_len"
            ) from None
        size = _smallest_of_all_ranks(size, module)
        steps.packing = packing.with_size(size)
        say(f"auto_micro_batch: forward passes of {size:,} {packing.unit}")


def check_placement(placement: Placement) -> None:
    """Refuse what could not be found out honestly.

    Raises:
        BadInputError: on a CPU, where the system kills a process that takes too much instead of telling it, and under
            FSDP, where a rank without memory would leave the others waiting.
    """
    if placement.accelerator != "cuda":
        raise BadInputError(
            "training.auto_micro_batch: true needs a GPU: on a CPU too large a trial ends the process, and larger "
            "forward passes are hardly faster; set training.micro_batch_size (or data.max_tokens) instead"
        )
    if placement.sharded:
        raise BadInputError(
            "training.auto_micro_batch: true does not go with distributed.strategy: fsdp, whose ranks would wait for "
            "the one that ran out of memory; set training.micro_batch_size (or data.max_tokens) instead"
        )


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest size up to `most` that fits, to within an eighth: from `start` by halves or doubles, then between.

    Raises:
        LookupError: if not even 1 fits.
    """
    size = min(start, most)
    if fits(size):
        good = size
        while good < most and fits(min(2 * good, most)):
            good = min(2 * good, most)
        if good == most:
            return good
        bad = min(2 * good, most)
    else:
        bad, good = size, size // 2
        while good and not fits(good):
            bad, good = good, good // 2
        if not good:
            raise LookupError
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def trial_batch(steps: StepDataset, longest: list[int], size: int) -> MicroBatch:
    """The heaviest forward pass of `size`: the longest samples, as many as go in, nothing shared."""
    if not steps.packing.packed:
        return padded_batch(steps.dataset, longest[:size], steps.pad_id)
    ends = np.cumsum(steps.dataset.lengths[longest])
    # A sample longer than the row gets a row of its own, so one is always there.
    count = max(1, int(np.searchsorted(ends, size, side="right")))
    row = PackedRow((PackedGroup(0, tuple(longest[:count])),), int(ends[count - 1]))
    return packed_batch(steps.dataset, row, steps.pad_id, steps.packing.row_multiple)


def try_step(module: FinetuneModule, micro: MicroBatch) -> bool:
    """Whether forward and backward of `micro` fit beside the optimizer's states; leaves no trace."""
    on_cuda = module.device.type == "cuda"
    try:
        _forward_backward(module, micro)
        if not on_cuda:
            return True
        free, total = torch.cuda.mem_get_info(module.device)
        return bool(free >= FREE_SHARE * total)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        forget_pending(module.model)
        return False
    finally:
        module.gradients.zero()
        if on_cuda:
            torch.cuda.synchronize(module.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(module.device)


def _forward_backward(module: FinetuneModule, micro: MicroBatch) -> None:
    # Two moments a parameter: the optimizer allocates its own in its first step.
    states = [torch.empty_like(p) for p in module.parameters() if p.requires_grad for _ in range(2)]
    module.gradients.attach()
    micro = micro.to(module.device)
    with packed_row(micro.layout), unchanged_adapters():
        module.loss_model(micro).backward()
    del states


def _smallest_of_all_ranks(size: int, module: FinetuneModule) -> int:
    if module.placement.world_size == 1:
        return size
    found = torch.tensor(size, device=module.device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)
