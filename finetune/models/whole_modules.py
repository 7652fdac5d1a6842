"""Modules that an adapter trains whole, which are in fp32, on a base in another dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch.utils.hooks import RemovableHandle


def cast_whole_modules(model: torch.nn.Module) -> list[RemovableHandle]:
    """Give each what comes in its own dtype, and hand on what it gives in that of the module that it stands for.

    Autocast gives it what it needs, but would leave an embedding's fp32 values to layer norms, which take none beside
    weights in bf16 on a CPU. The handles undo it.
    """
    handles = []
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        outside = _floating_dtype(wrapper.original_module)
        for module in wrapper.modules_to_save.values():
            inside = _floating_dtype(module)
            if inside is not None and outside not in (None, inside):
                handles.append(module.register_forward_pre_hook(partial(_cast_inputs, inside), with_kwargs=True))
                handles.append(module.register_forward_hook(partial(_cast_output, outside)))
    return handles


def _floating_dtype(module: torch.nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def _cast_inputs(dtype: torch.dtype, module: torch.nn.Module, inputs: Any, options: Any) -> Any:
    device = next(module.parameters()).device.type
    return None if torch.is_autocast_enabled(device) else (_cast(inputs, dtype), _cast(options, dtype))


def _cast_output(dtype: torch.dtype, _: torch.nn.Module, __: Any, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with the floating-point tensors in it in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(each, dtype) for each in value)
    return {key: _cast(each, dtype) for key, each in value.items()} if type(value) is dict else value
