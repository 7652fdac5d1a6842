"""PEFT's LoRA layers, and linear layers without one, as what the kernels compute: `kernels.lora.Projection`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from finetune.kernels.lora import FourBit, Projection
from finetune.kernels.native import is_plain

ADAPTER = "default"

# Where a layer without memory keeps a `FourBit` of its own: the memory estimate's, for weights that it only measures.
STAND_IN = "four_bit_stand_in"

# Rows of a step of decoding: for so few, expanding a 4-bit weight is most of the work.
FEW_ROWS = 64

# Classes whose forward is x Wᵀ + b and nothing else.
PLAIN_LINEAR = ("Linear", "FalconLinear", "NonDynamicallyQuantizableLinear")


def can_fuse(layer: Any) -> bool:
    """Whether a PEFT layer is plain LoRA without dropout on a dense or 4-bit linear layer."""
    return (
        is_plain_linear(layer.get_base_layer())
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
    )


def is_fusable_lora(layer: Any) -> bool:
    """Whether it is a PEFT layer that `can_fuse`."""
    return isinstance(layer, LoraLayer) and can_fuse(layer)


def is_plain_linear(base: Any) -> bool:
    """Whether a module is x Wᵀ + b and nothing else, W dense or in 4 bits."""
    return isinstance(base, torch.nn.Linear) and (type(base).__name__ in PLAIN_LINEAR or _is_4bit(base))


def _is_4bit(base: torch.nn.Module) -> bool:
    return isinstance(base, _linear_4bit())


@cache
def _linear_4bit() -> type:
    from bitsandbytes.nn import Linear4bit

    found: type = Linear4bit
    return found


def is_active(layer: Any) -> bool:
    """Whether a layer's adapter, if it has one, takes part now, beside its base."""
    if not isinstance(layer, LoraLayer):
        return True
    return not layer.disable_adapters and not layer.merged and ADAPTER in layer.active_adapters


def decodes_4bit(layer: Any, x: torch.Tensor) -> bool:
    """Whether bitsandbytes multiplies by the layer's 4-bit weight as it is stored: few rows on a GPU, no gradient.

    A kernel of ours would expand it for every token: of 7 billion weights 31 GB of traffic instead of 3.5.
    """
    few = x.is_cuda and not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]
    return few and _is_4bit(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer)


def projection(layer: Any) -> Projection:
    """What the kernels need of a PEFT LoRA layer, or of a linear layer without an adapter."""
    has_adapter = isinstance(layer, LoraLayer)
    base: Any = layer.base_layer if has_adapter else layer
    expand: Callable[[torch.dtype], torch.Tensor] = partial(expand_4bit if _is_4bit(base) else _dense, base)
    if has_adapter:
        a, b, scale = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
    else:
        device = base.weight.device
        a, b = torch.empty(0, base.in_features, device=device), torch.empty(base.out_features, 0, device=device)
        scale = 1.0
    return Projection(expand, base.bias, a, b, scale, partial(_stored_4bit, base))


def _stored_4bit(base: Any) -> FourBit | None:
    """A bitsandbytes layer's weight for the native kernels; None where they would read it otherwise than it is."""
    found: FourBit | None = vars(base).get(STAND_IN)  # a module's hasattr costs ten times as much
    if found is not None:
        return found
    if not _is_4bit(base):
        return None
    _attach_quant_state(base)
    state, data = base.weight.quant_state, base.weight.data
    if not is_plain(data) or not data.is_contiguous() or data.device.type != "cpu":
        return None
    rounds_alike = state.dtype in (torch.bfloat16, torch.float32)
    nested = state.state2 if state.nested else None
    blocks = (state.blocksize, 32 if nested is None else nested.blocksize)
    if not rounds_alike or any(block % 32 or block & (block - 1) for block in blocks) or state.shape[1] % 32:
        return None
    codes = data.view(torch.uint8)
    if nested is None:
        return FourBit(codes, state.code, state.absmax, block=state.blocksize)
    maxima = (state.absmax, nested.code, nested.absmax, state.offset)
    return FourBit(codes, state.code, None, *maxima, state.blocksize, nested.blocksize)


def _dense(base: Any, dtype: torch.dtype) -> torch.Tensor:
    weight: torch.Tensor = base.weight.to(dtype)
    return weight


def expand_4bit(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, D] that a bitsandbytes 4-bit layer stands for."""
    from finetune.models.four_bit import dequantize_4bit

    _attach_quant_state(base)
    return dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state).to(dtype)


def _attach_quant_state(base: Any) -> None:
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    fix_4bit_weight_quant_state_from_module(base)
