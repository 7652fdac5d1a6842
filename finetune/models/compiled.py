"""torch.compile for decoder layers, one by one: the code of one layer serves all, for rows of any length and layout.

Compiled code is found by guards on all that was read while it was traced. An object that is made for one layer alone
would be compared by identity, and every layer compiled anew; so would every row, if its layout were read. Hence layers
keep the model's own forwards, which the compiler fuses itself, LoRA is written in plain operations, and what it cannot
look into (attention by blocks, quantized weights) runs between the compiled parts as it does without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from finetune.kernels import attention
from finetune.models.fused import Fused, lora_forward, traced_lora_forward
from finetune.models.heads import decoder_layers
from finetune.models.projections import can_fuse


def make_traceable(model: PeftModel) -> Fused:
    """In place of `models.fused.fuse` for a model whose layers are to be compiled."""
    count = Fused()
    attention.register(_uncompiled(attention.segment_attention))
    for module in model.modules():
        _prepare(module, count)
    return count


def compile_layers(model: PeftModel, backend: str | Callable[..., Any] = "inductor") -> int:
    """Have decoder layers of a traceable model compiled when they are first called, by a backend of torch.compile.

    The value is how many are left as they are: within a checkpoint nothing may run between compiled parts.
    """
    left = 0
    for layer in decoder_layers(model):
        if getattr(layer, "gradient_checkpointing", False):
            left += 1
            continue
        # Dynamic, or each length of a row would be one more kind of call.
        layer.compile(backend=backend, dynamic=True)
    return left


def _prepare(module: Any, count: Fused) -> None:
    """Give a module a forward that the compiler can trace, or one that it leaves alone."""
    if isinstance(module, LoraLayer):
        fits = can_fuse(module)
        count.lora += fits
        count.left_to_peft += not fits
        if _is_quantized(module.get_base_layer()):
            module.forward = MethodType(_uncompiled(lora_forward if fits else type(module).forward), module)
        elif fits:
            module.forward = MethodType(traced_lora_forward, module)
    elif _is_quantized(module):
        module.forward = MethodType(_uncompiled(type(module).forward), module)


def _is_quantized(module: Any) -> bool:
    return type(module).__module__.startswith("bitsandbytes")


@cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function between compiled parts; the same object for all layers. Not at import: it imports the compiler."""
    found: Callable[..., Any] = torch.compiler.disable(function)
    return found
