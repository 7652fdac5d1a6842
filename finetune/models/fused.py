"""Puts the fused LoRA layer in place of PEFT's forward where it computes the same; elsewhere PEFT's own stays."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from finetune.kernels.lora import lora_linear

ADAPTER = "default"


def fuse_lora(model: PeftModel) -> tuple[int, int]:
    """Replace the forward of every LoRA layer that allows it; (replaced, left to PEFT)."""
    fused = left = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        if can_fuse(module):
            module.forward = MethodType(_fused_forward, module)  # type: ignore[method-assign]
            fused += 1
        else:
            left += 1
    return fused, left


def can_fuse(layer: Any) -> bool:
    """Whether a PEFT layer is plain LoRA without dropout on a dense or 4-bit linear layer."""
    base = layer.get_base_layer()
    return (
        isinstance(base, torch.nn.Linear)
        and (type(base) is torch.nn.Linear or _is_4bit(base))
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
    )


def _is_4bit(base: torch.nn.Module) -> bool:
    from bitsandbytes.nn import Linear4bit

    return isinstance(base, Linear4bit)


def _fused_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or ADAPTER not in layer.active_adapters or args or kwargs:
        out: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    base = layer.base_layer
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return lora_linear(x, _weight_of(base), base.bias, a, b, layer.scaling[ADAPTER])


def _weight_of(base: Any) -> Any:
    if not _is_4bit(base):
        return lambda dtype: base.weight.to(dtype)
    return lambda dtype: expand_4bit(base, dtype)


def expand_4bit(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, D] that a bitsandbytes 4-bit layer stands for."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    fix_4bit_weight_quant_state_from_module(base)
    state = base.weight.quant_state
    return dequantize_4bit(base.weight.data.view(-1, 1), state).to(dtype)
