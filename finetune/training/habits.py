"""The well-known habits of fast PyTorch training: which a run has, which not, and why.

Source: PyTorch's Performance Tuning Guide, and the Hugging Face guide on training on one GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from finetune.kernels import native
from finetune.models.load import compute_dtype
from finetune.recipe.schema import QUANTIZED_4BIT, Recipe
from finetune.training.strategy import Placement

# From Ampere on a GPU has units for bf16 (CUDA C++ Programming Guide, table of arithmetic by compute capability).
BF16_CAPABILITY = (8, 0)


class Habit(NamedTuple):
    """A habit, whether a run has it, and why or why not."""

    name: str
    active: bool
    why: str


def habits_of(recipe: Recipe, placement: Placement, *, packed: bool) -> list[Habit]:
    """Every habit as it stands for a run."""
    return [Habit(name, *look(recipe, placement, packed)) for name, look in HABITS.items()]


Look = Callable[[Recipe, Placement, bool], tuple[bool, str]]


def _workers(recipe: Recipe, _: Placement, __: bool) -> tuple[bool, str]:
    count = recipe.training.num_workers
    if count:
        return True, f"{count} processes assemble batches"
    return False, "data is tokenized ahead and mapped into memory, so a batch is a copy; set training.num_workers: 2"


def _pinned(_: Recipe, placement: Placement, __: bool) -> tuple[bool, str]:
    if placement.accelerator == "cuda":
        return True, "the loader hands out page-locked tensors"
    return False, "nothing is copied to a device"


def _non_blocking(_: Recipe, placement: Placement, __: bool) -> tuple[bool, str]:
    if placement.accelerator == "cuda":
        return True, "all copies of a step start at once, ahead of its first forward pass"
    return False, "nothing is copied to a device"


def _no_synchronization(recipe: Recipe, placement: Placement, _: bool) -> tuple[bool, str]:
    if recipe.training.on_non_finite == "skip":
        return False, "training.on_non_finite: skip reads the loss before every optimizer step; stop does not"
    if placement.accelerator == "cuda":
        return True, "loss and norm are read one step later, when their copy has arrived"
    return True, "a CPU has nothing to wait for"


def _compile(recipe: Recipe, placement: Placement, _: bool) -> tuple[bool, str]:
    if recipe.training.compile:
        return True, "each decoder layer is compiled"
    gain = "LoRA, norms and SwiGLU are fused by hand already"
    return False, gain if placement.accelerator == "cpu" else f"{gain}; try training.compile: true"


def _multiples(recipe: Recipe, _: Placement, packed: bool) -> tuple[bool, str]:
    length = recipe.data.max_seq_len
    note = "" if length % 8 == 0 else f"; data.max_seq_len {length} is none, so the longest rows grow beyond it"
    return True, f"rows are padded to multiples of {'8 or 32' if packed else '8'}{note}"


def _largest_batch(recipe: Recipe, placement: Placement, _: bool) -> tuple[bool, str]:
    if recipe.training.auto_micro_batch:
        return True, "training.auto_micro_batch tries before the first step"
    if placement.accelerator == "cpu":
        return False, "a larger forward pass is hardly faster on a CPU"
    if placement.sharded:
        return False, "not tried under fsdp; raise training.micro_batch_size while memory allows"
    return False, "set training.auto_micro_batch: true"


def _mixed_precision(recipe: Recipe, _: Placement, __: bool) -> tuple[bool, str]:
    precision = recipe.training.precision
    if precision == "32-true":
        return False, "training.precision is 32-true; bf16-mixed is faster on most processors"
    return True, f"training.precision is {precision}; trained parameters stay fp32"


def _packing(_: Recipe, __: Placement, packed: bool) -> tuple[bool, str]:
    if packed:
        return True, "rows are filled with samples that cannot see each other"
    return False, "samples are padded to the longest of their batch; set data.packing: isolated where the model allows"


def _set_to_none(_: Recipe, __: Placement, ___: bool) -> tuple[bool, str]:
    return False, "not needed: all gradients are one flat buffer, cleared by one fill and reduced by one call"


def _accumulation(recipe: Recipe, placement: Placement, _: bool) -> tuple[bool, str]:
    training = recipe.training
    per_rank = -(-training.global_batch_size // placement.world_size)
    passes = -(-per_rank // training.micro_batch_size)
    if passes > 1:
        return True, f"about {passes} forward passes a step and process, one reduction of gradients"
    return False, "a step is one forward pass a process"


def _no_grad(_: Recipe, __: Placement, ___: bool) -> tuple[bool, str]:
    return True, "validation, metrics and generation run without gradients"


def _distributed(_: Recipe, placement: Placement, __: bool) -> tuple[bool, str]:
    if placement.world_size == 1:
        return False, "one process"
    return True, f"{placement.strategy} over {placement.world_size} processes"


def _checkpointing(recipe: Recipe, _: Placement, __: bool) -> tuple[bool, str]:
    wanted = recipe.training.gradient_checkpointing
    if wanted:
        which = "activations" if wanted is True else f"those of the first {wanted} layers"
        return True, f"{which} are computed twice (about a third more work for them); less of it where memory allows"
    return False, "activations are kept, which is faster"


def _activation_offload(recipe: Recipe, placement: Placement, _: bool) -> tuple[bool, str]:
    if placement.accelerator == "cpu":
        return False, "activations are in host memory already"
    if recipe.training.activation_offload:
        return True, "activations wait in host memory for the backward pass"
    return False, "activations stay on the GPU, which is faster"


def _attention(recipe: Recipe, placement: Placement, _: bool) -> tuple[bool, str]:
    if recipe.model.attention == "eager":
        return False, "model.attention is eager; auto picks a fused kernel"
    kernel = "by blocks" if placement.accelerator == "cpu" else "torch's scaled_dot_product_attention"
    return True, kernel


def _native_kernels(recipe: Recipe, placement: Placement, _: bool) -> tuple[bool, str]:
    if placement.accelerator != "cpu":
        return False, "they are for CPUs"
    if not recipe.training.precision.startswith("bf16"):
        return False, "they compute in bf16; set training.precision: bf16-mixed"
    if (reason := native.why_missing()) is not None:
        return False, reason
    if native.computes_products():
        return True, "attention, loss, linear layers, norms, SwiGLU and rotation"
    return True, "norms, SwiGLU and rotation; the others need AMX, or AVX2 where there are no units for bf16"


def _fused_optimizer(recipe: Recipe, _: Placement, __: bool) -> tuple[bool, str]:
    name = recipe.training.optimizer.name
    if name == "adafactor" or (name == "adamw" and recipe.training.precision == "16-mixed"):
        return False, f"{name} runs one parameter at a time here"
    return True, f"{name} updates all parameters in few kernels"


HABITS: dict[str, Look] = {
    "loader workers": _workers,
    "pinned memory": _pinned,
    "non-blocking copies": _non_blocking,
    "no needless synchronization": _no_synchronization,
    "torch.compile": _compile,
    "multiples of 8": _multiples,
    "largest batch": _largest_batch,
    "mixed precision": _mixed_precision,
    "packing": _packing,
    "fused attention": _attention,
    "native CPU kernels": _native_kernels,
    "fused optimizer": _fused_optimizer,
    "zero_grad(set_to_none)": _set_to_none,
    "gradient accumulation": _accumulation,
    "gradient checkpointing": _checkpointing,
    "activation offload": _activation_offload,
    "no-grad evaluation": _no_grad,
    "DDP or FSDP, not DataParallel": _distributed,
}


def why_bf16_is_slow(recipe: Recipe, placement: Placement) -> str | None:
    """Which GPU of this machine has no units for the bf16 that the recipe computes in, and what to set instead."""
    asked = []
    if recipe.training.precision.startswith("bf16"):
        asked.append(f"training.precision: {recipe.training.precision}")
    if recipe.model.quantization in QUANTIZED_4BIT and compute_dtype(recipe.model, recipe.training.precision) == "bf16":
        asked.append(f"model.compute_dtype: {recipe.model.compute_dtype}")
    if placement.accelerator != "cuda" or not asked:
        return None
    least, index = min((torch.cuda.get_device_capability(index), index) for index in range(placement.devices))
    if least >= BF16_CAPABILITY:
        return None
    return (
        f"{torch.cuda.get_device_name(index)} (compute capability {least[0]}.{least[1]}) has no units for bf16 and "
        f"emulates it slowly ({', '.join(asked)}); set training.precision: 16-mixed and model.compute_dtype: auto"
    )
