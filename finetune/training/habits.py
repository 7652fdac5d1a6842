"""The well-known habits of fast PyTorch training: which a run has, which not, and why.

Source: PyTorch's Performance Tuning Guide, and the Hugging Face guide on training on one GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from finetune.data.batches import PAD_MULTIPLE, SHORT_ROW, round_up, row_length
from finetune.kernels import native, varlen
from finetune.kernels.attention import NAME as SEGMENTS
from finetune.models.load import DTYPES, PRECISION_DTYPES, base_dtype, compute_dtype
from finetune.recipe.schema import QUANTIZED_4BIT, Recipe
from finetune.training.steps import Packing
from finetune.training.strategy import Placement

# From Ampere on a GPU has units for bf16 (CUDA C++ Programming Guide, table of arithmetic by compute capability).
BF16_CAPABILITY = (8, 0)


class Planned(NamedTuple):
    """A run as it is known before it starts."""

    recipe: Recipe
    placement: Placement
    attention: str  # as `models.attention.choose_attention` resolves it
    packing: Packing
    passes_a_step: float  # forward passes of one process, the mean over the steps


class Habit(NamedTuple):
    """A habit, whether a run has it, and why or why not."""

    name: str
    active: bool
    why: str


def habits_of(run: Planned) -> list[Habit]:
    """Every habit as it stands for a run."""
    return [Habit(name, *look(run)) for name, look in HABITS.items()]


Look = Callable[[Planned], tuple[bool, str]]


def _workers(run: Planned) -> tuple[bool, str]:
    count = run.recipe.training.num_workers
    if count:
        return True, f"{count} processes assemble batches"
    return False, "data is tokenized ahead and mapped into memory, so a batch is a copy (training.num_workers: 0)"


def _pinned(run: Planned) -> tuple[bool, str]:
    if run.placement.accelerator == "cuda":
        return True, "the loader hands out page-locked tensors"
    return False, "nothing is copied to a device"


def _non_blocking(run: Planned) -> tuple[bool, str]:
    if run.placement.accelerator == "cuda":
        return True, "all copies of a step start at once, ahead of its first forward pass"
    return False, "nothing is copied to a device"


def _no_synchronization(run: Planned) -> tuple[bool, str]:
    training = run.recipe.training
    name = training.optimizer.name
    if run.placement.accelerator == "cpu":
        return True, "a CPU has nothing to wait for"
    if training.on_non_finite == "skip":
        return False, "training.on_non_finite: skip reads the loss before every optimizer step; stop does not"
    if training.precision == "16-mixed":
        return False, "the loss scaler of 16-mixed reads the gradient norm before every optimizer step"
    if name != "adamw":
        return False, f"{name} waits for the GPU at every parameter that it updates; adamw does not"
    if run.attention != SEGMENTS and not run.packing.packed:
        return False, f"under {run.attention} transformers looks into the positions of every padded batch"
    return True, "loss and norm are read one step later, when their copy has arrived, and at once where they are logged"


def _unfused(recipe: Recipe) -> str | None:
    """What leaves the adapter's layers to PEFT's own forward, by `models.projections.can_fuse`'s rules; or None."""
    adapter = recipe.adapter
    causes = {
        "adapter.dropout": adapter.dropout > 0,
        "adapter.use_dora": adapter.use_dora,
        "model.quantization: int8": recipe.model.quantization == "int8",
    }
    return ", ".join(key for key, given in causes.items() if given) or None


def _compile(run: Planned) -> tuple[bool, str]:
    if run.recipe.training.compile:
        return True, "each decoder layer is compiled"
    cause = _unfused(run.recipe)
    gain = "LoRA, norms and SwiGLU are fused by hand already"
    if cause is not None:
        gain = f"norms and SwiGLU are fused by hand already; adapter layers run PEFT's own forward ({cause})"
    return False, gain if run.placement.accelerator == "cpu" else f"{gain}; try training.compile: true"


def _multiples(run: Planned) -> tuple[bool, str]:
    packing = run.packing
    if not packing.packed:
        longest = run.recipe.data.max_seq_len
        grows = f"; data.max_seq_len {longest} is none, so the longest rows grow beyond it"
        return True, f"rows are padded to multiples of {PAD_MULTIPLE}{grows if round_up(longest) != longest else ''}"
    multiple, most = packing.row_multiple, packing.max_tokens
    grows = "" if row_length(most, multiple) == most else f"; the fullest rows grow beyond their {most} tokens"
    if most <= SHORT_ROW:
        return True, f"rows are padded to multiples of {PAD_MULTIPLE}{grows}"
    longer = f"rows of over {SHORT_ROW} tokens are padded to multiples of {multiple} (data.row_multiple)"
    if multiple % PAD_MULTIPLE:
        return False, f"{longer}, which is no multiple of 8{grows}"
    return True, f"{longer}, shorter ones of {PAD_MULTIPLE}{grows}"


def _largest_batch(run: Planned) -> tuple[bool, str]:
    if run.recipe.training.auto_micro_batch:
        return True, "training.auto_micro_batch tries before the first step"
    if run.placement.accelerator == "cpu":
        return False, "a larger forward pass is hardly faster on a CPU"
    if run.placement.sharded:
        return False, "not tried under fsdp; raise training.micro_batch_size while memory allows"
    return False, "set training.auto_micro_batch: true"


def _mixed_precision(run: Planned) -> tuple[bool, str]:
    precision = run.recipe.training.precision
    if precision == "32-true":
        return False, "training.precision is 32-true; bf16-mixed is faster on most processors"
    return True, f"training.precision is {precision}; trained parameters stay fp32"


def _tf32(run: Planned) -> tuple[bool, str]:
    if run.placement.accelerator == "cpu":
        return False, "it is for GPUs"
    if _computes_in(run.recipe) == torch.float32:
        return False, "fp32 products stay exact; training.precision: bf16-mixed is the faster choice"
    return False, "products that take time are of 16 bits already, and fp32 ones, such as rotary angles, stay exact"


def _packing(run: Planned) -> tuple[bool, str]:
    if run.packing.packed:
        return True, "rows are filled with samples that cannot see each other"
    return False, "samples are padded to the longest of their batch; set data.packing: isolated where the model allows"


def _set_to_none(_: Planned) -> tuple[bool, str]:
    return False, "not needed: all gradients are one flat buffer, cleared by one fill and reduced by one call"


def _accumulation(run: Planned) -> tuple[bool, str]:
    passes, several = round(run.passes_a_step, 1), run.placement.world_size > 1
    if passes <= 1:
        return False, f"a step is one forward pass{' a process' if several else ''}"
    found = f"about {passes:.1f} forward passes a step" + (
        " and process, one reduction of gradients" if several else ", one optimizer step after them"
    )
    later = "; fewer if training.auto_micro_batch finds larger ones"
    return True, f"{found}{later if run.recipe.training.auto_micro_batch else ''}"


def _no_grad(_: Planned) -> tuple[bool, str]:
    return True, "validation, metrics and generation run without gradients"


def _distributed(run: Planned) -> tuple[bool, str]:
    if run.placement.world_size == 1:
        return False, "one process"
    return True, f"{run.placement.strategy} over {run.placement.world_size} processes"


def _checkpointing(run: Planned) -> tuple[bool, str]:
    wanted = run.recipe.training.gradient_checkpointing
    if wanted:
        which = "activations" if wanted is True else f"those of the first {wanted} layers"
        return True, f"{which} are computed twice (about a third more work for them); less of it where memory allows"
    return False, "activations are kept, which is faster"


def _activation_offload(run: Planned) -> tuple[bool, str]:
    if run.placement.accelerator == "cpu":
        return False, "activations are in host memory already"
    if run.recipe.training.activation_offload:
        return True, "activations wait in host memory for the backward pass"
    return False, "activations stay on the GPU, which is faster"


def _computes_in(recipe: Recipe) -> torch.dtype:
    """The dtype of activations: autocast's, or without it that of the base."""
    precision = recipe.training.precision
    if precision.endswith("-mixed"):
        return DTYPES[PRECISION_DTYPES[precision]]
    return base_dtype(recipe.model, precision)


def _attention(run: Planned) -> tuple[bool, str]:
    name, packed = run.attention, run.packing.packed
    if name == "eager":
        if run.recipe.model.attention == "eager":
            return False, "model.attention is eager; auto takes a fused kernel where one computes the model's scores"
        return False, "auto is eager here: no fused kernel computes this model's scores"
    if name == SEGMENTS and packed:
        return True, _segments_kernel(run)
    if name in (SEGMENTS, "sdpa"):
        return True, f"torch's scaled_dot_product_attention{' with a dense mask' if packed else ''}"
    return True, f"transformers' {name}"


def _segments_kernel(run: Planned) -> str:
    """What computes a packed row under `segments`: `kernels.attention.segment_attention` chooses."""
    dtype = _computes_in(run.recipe)
    if run.placement.accelerator == "cuda":
        masked = "torch's scaled_dot_product_attention with a dense mask"
        if dtype not in varlen.DTYPES:
            return f"{masked}: the flash kernel takes bf16 and fp16"
        return f"torch's variable-length flash kernel; before Ampere, or for heads it does not take, {masked}"
    blocks = "torch's flash kernel by blocks"
    if dtype != torch.bfloat16 or run.recipe.training.compile or not native.computes_products():
        return blocks
    return f"the native kernel for rows and heads of a multiple of {native.TILE}, else {blocks}"


def _native_kernels(run: Planned) -> tuple[bool, str]:
    if run.placement.accelerator != "cpu":
        return False, "they are for CPUs"
    if _computes_in(run.recipe) != torch.bfloat16:
        return False, "they compute in bf16; set training.precision: bf16-mixed"
    if (reason := native.why_missing()) is not None:
        return False, reason
    if run.recipe.training.compile:
        return False, "layers compute torch's operations, which training.compile: true compiles"
    # The kernels of rotation and attention take a batch of one row, as a packed one is.
    packed = run.packing.packed
    pointwise = "norms, SwiGLU and rotation" if packed else "norms and SwiGLU"
    if not native.computes_products():
        return True, f"{pointwise}; the others need AMX, or AVX2 where there are no units for bf16"
    attention = "attention, " if packed and run.attention == SEGMENTS else ""
    cause = _unfused(run.recipe)
    linear = "linear layers" if cause is None else f"linear layers without an adapter ({cause} leaves those to PEFT)"
    return True, f"{attention}loss of a plain frozen head, {linear}, {pointwise}"


def _fused_optimizer(run: Planned) -> tuple[bool, str]:
    training = run.recipe.training
    name = training.optimizer.name
    if name == "adafactor" or (name == "adamw" and training.precision == "16-mixed"):
        return False, f"{name} runs several kernels for one parameter after the other here"
    if name == "adamw":
        return True, "adamw updates all parameters in few kernels"
    return True, f"{name} is one kernel a parameter"


HABITS: dict[str, Look] = {
    "loader workers": _workers,
    "pinned memory": _pinned,
    "non-blocking copies": _non_blocking,
    "no needless synchronization": _no_synchronization,
    "torch.compile": _compile,
    "multiples of 8": _multiples,
    "largest batch": _largest_batch,
    "mixed precision": _mixed_precision,
    "TF32": _tf32,
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
