"""A LoRA linear layer as one autograd function: y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

PEFT's layer takes several graph nodes, casts x to fp32 and back, and makes the update a tensor of its own. Here it is
four products forward and five backward in the compute dtype, and only x and x Aᵀ are kept. A frozen 4-bit weight
is expanded when it is needed and dropped again. The adapter's parameters stay PEFT's own.

Shapes: T tokens, D inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# Gives the frozen weight [O, D] in the compute dtype. Called in forward and again in backward: under FSDP the weight is
# whole only then, and a 4-bit weight is expanded each time.
Weight = Callable[[torch.dtype], torch.Tensor]


def lora_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, a_RD: torch.Tensor, b_OR: torch.Tensor, scale: float
) -> torch.Tensor:
    """The layer's output [..., O] in the compute dtype: autocast's where it is on, else x's."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    out: torch.Tensor = _LoraLinear.apply(x.to(dtype), weight, bias, a_RD, b_OR, scale)
    return out


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight: Weight, bias, a_RD, b_OR, scale: float):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            x_TD = x.reshape(-1, x.shape[-1])
            xa_TR = x_TD @ a_RD.to(x.dtype).t()
            y_TO = F.linear(x_TD, weight(x.dtype), None if bias is None else bias.to(x.dtype))
            y_TO.addmm_(xa_TR, b_OR.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, xa_TR, a_RD, b_OR)
        ctx.weight, ctx.scale = weight, scale
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        x, xa_TR, a_RD, b_OR = ctx.saved_tensors
        x_TD = x.reshape(-1, x.shape[-1])
        dy_TO = dy.reshape(-1, dy.shape[-1]).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            dxa_TR = (dy_TO @ b_OR.to(x.dtype)).mul_(ctx.scale)
            da = (dxa_TR.t() @ x_TD).to(a_RD.dtype)
            db = (dy_TO.t() @ xa_TR).to(b_OR.dtype).mul_(ctx.scale)
            dx = None
            if ctx.needs_input_grad[0]:
                dx_TD = dy_TO @ ctx.weight(x.dtype)
                dx_TD.addmm_(dxa_TR, a_RD.to(x.dtype))
                dx = dx_TD.view_as(x)
        return dx, None, None, da, db, None
