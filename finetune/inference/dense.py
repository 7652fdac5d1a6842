"""A temporary dense copy of quantized and adapted layers, for decoding on CPU.

A product with a 4-bit weight expands the whole weight first; decoding repeats that for every token. Expanding
once, with the adapter added, leaves one plain product per layer. On a CPU without units for bf16 the copies are
fp32, which every product would widen its weight to. The model keeps its modules and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.distributed.tensor import DTensor

from finetune.kernels.products import has_bf16_units
from finetune.models.four_bit import dequantize_4bit

# Of the memory that is free, the share that copies may take.
MAX_SHARE = 0.25


@contextmanager
def dense_weights(model: torch.nn.Module, max_bytes: int | None = None) -> Iterator[int]:
    """Within this, 4-bit linear layers and layers with LoRA are plain linear ones; yields the copies' bytes.

    The weights are those of the quantized model plus its adapter, rounded to the dtype of the base. Nothing
    changes (0 bytes) on another device than the CPU, for a sharded model, or if the copies would take more
    than `max_bytes` (default: a quarter of the free memory). Of a layer that is no plain LoRA (DoRA, a
    merged adapter) only the 4-bit base is expanded.
    """
    limit = int(psutil.virtual_memory().available * MAX_SHARE) if max_bytes is None else max_bytes
    for wide in (False,) if has_bf16_units() else (True, False):
        places = _places(model, wide)
        size = sum(_copy_bytes(layer, wide) for _, _, layer in places)
        if size <= limit:
            break
    else:
        places, size = [], 0
    try:
        for parent, name, layer in places:
            parent._modules[name] = _dense_copy(layer, wide)
        yield size
    finally:
        for parent, name, layer in places:
            parent._modules[name] = layer


class _WideLinear(torch.nn.Linear):
    """A product in fp32 of what comes and goes in bf16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        # Dense: of the last position of every prompt torch would copy the weight once a prompt.
        return torch.nn.functional.linear(x.float().contiguous(), self.weight, bias).to(x.dtype)


Place = tuple[torch.nn.Module, str, torch.nn.Module]


def _places(model: torch.nn.Module, wide: bool) -> list[Place]:
    """(parent, name, layer) of everything that is replaced; a layer's own parts are not."""
    found: list[Place] = []
    pending = [model]
    while pending:
        parent = pending.pop()
        for name, child in parent._modules.items():
            if child is None:
                continue
            if _is_replaceable(child) or (wide and _is_narrow_linear(child)):
                found.append((parent, name, child))
            elif not isinstance(child, TrainableTokensLayer):  # multiplies by its part's weight itself
                pending.append(child)
    return found


def _is_replaceable(module: torch.nn.Module) -> bool:
    if isinstance(module, LoraLayer):
        base = module.get_base_layer()
        if module.merged or any(module.lora_variant.get(name) for name in module.active_adapters):
            return False
        if any(getattr(module, "lora_bias", {}).get(name) for name in module.active_adapters):
            return False
        if isinstance(base, Linear8bitLt) or not isinstance(base, torch.nn.Linear):
            return False
    elif isinstance(module, Linear4bit):
        base = module
    else:
        return False
    if isinstance(base, Linear4bit) and getattr(base.weight, "quant_state", None) is None:
        return False
    return _is_whole_on_cpu(base.weight)


def _is_narrow_linear(module: torch.nn.Module) -> bool:
    """Whether it is a plain linear layer in bf16, such as the head."""
    is_bf16 = type(module) is torch.nn.Linear and module.weight.dtype == torch.bfloat16
    return is_bf16 and _is_whole_on_cpu(module.weight)


def _is_whole_on_cpu(weight: Any) -> bool:
    return weight.device.type == "cpu" and not isinstance(weight, DTensor)


def _base_layer(layer: torch.nn.Module) -> torch.nn.Linear:
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    assert isinstance(base, torch.nn.Linear)
    return base


def _dtype(base: torch.nn.Linear) -> torch.dtype:
    dtype: torch.dtype = base.weight.quant_state.dtype if isinstance(base, Linear4bit) else base.weight.dtype
    return dtype


def _copy_bytes(layer: torch.nn.Module, wide: bool) -> int:
    base = _base_layer(layer)
    itemsize = 4 if wide else _dtype(base).itemsize
    return base.in_features * base.out_features * itemsize


def _dense_copy(layer: torch.nn.Module, wide: bool) -> torch.nn.Linear:
    """A linear layer that computes what `layer` does; a `wide` one in fp32."""
    base = _base_layer(layer)
    wide = wide and _dtype(base) == torch.bfloat16
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
    else:
        weight = base.weight.data
    if isinstance(layer, LoraLayer) and not layer.disable_adapters:
        total = weight.float()
        if total is weight:
            total = weight.clone()
        for name in layer.active_adapters:
            if name in layer.lora_A:
                up, down = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
                total.addmm_(up.float(), down.float(), alpha=layer.scaling[name])
        weight = total
    with torch.device("meta"):
        kind = _WideLinear if wide else torch.nn.Linear
        dense = kind(base.in_features, base.out_features, bias=False)
    weight = weight.to(_dtype(base))
    dense.weight = torch.nn.Parameter(weight.float() if wide else weight, requires_grad=False)
    dense.bias = base.bias
    dense.training = False
    return dense
