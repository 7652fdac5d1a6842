"""Element-wise parts of a decoder layer that keep only their inputs for the backward pass.

Written out as modules they keep every intermediate; on a CPU each also costs a pass over memory and its page faults.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, the mean and quotient in fp32.

    Source: Zhang and Sennrich 2019. The weight is taken as frozen: it gets no gradient.
    """
    out: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps: float):  # type: ignore[no-untyped-def]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_at_least_fp32(x))
        rstd = torch.rsqrt(norm.square().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        scaled = (dy * weight).to(_at_least_fp32(x))
        normal = x * rstd
        mean = (scaled * normal).mean(-1, keepdim=True)
        return scaled.addcmul_(normal, mean, value=-1).mul_(rstd).to(x.dtype), None, None


def _at_least_fp32(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the SwiGLU of Shazeer 2020; silu(gate) is computed again in the backward pass."""
    out: torch.Tensor = _SiluMul.apply(gate, up)
    return out


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate, up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), d_up
