"""Element-wise parts of a decoder layer that keep only their inputs for the backward pass.

Written out as modules they keep every intermediate; on a CPU each also costs a pass over memory, so there the native
kernels compute them where they can. The torch operations below are the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from finetune.kernels import native, traced


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, the mean and quotient in fp32.

    Source: Zhang and Sennrich 2019. The weight is taken as frozen: it gets no gradient.
    """
    out: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps: float):  # type: ignore[no-untyped-def]
        ctx.native = native.takes(x, weight)
        if ctx.native:
            y, rstd = native_rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, rstd)
            return y
        ctx.fused = _has_fused_norm(x, weight)
        if ctx.fused:
            y, rstd = _fused_rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, rstd)
            return y
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_at_least_fp32(x))
        rstd = torch.rsqrt(norm.square().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        if ctx.native:
            return native_rms_norm_backward(dy.to(x.dtype).contiguous(), x, weight, rstd), None, None
        if ctx.fused:
            return _fused_rms_norm_backward(dy.to(x.dtype).contiguous(), x, weight, rstd), None, None
        scaled = (dy * weight).to(_at_least_fp32(x))
        normal = x * rstd
        mean = (scaled * normal).mean(-1, keepdim=True)
        return scaled.addcmul_(normal, mean, value=-1).mul_(rstd).to(x.dtype), None, None


def native_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x, or of x + `added`, which then takes the sum; and 1 / sqrt(mean(x²) + eps), for the gradient."""
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
    native.call("rms_norm_forward", x, added, weight, added, y, rstd, rstd.numel(), x.shape[-1], eps)
    return y, rstd


def native_rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, added: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the norm's input, plus `added`, the gradient that passes the norm by."""
    dx = torch.empty_like(x)
    native.call("rms_norm_backward", dy, x, added, weight, rstd, dx, rstd.numel(), x.shape[-1])
    return dx


def _has_fused_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch has one kernel for it: on CUDA, where eight small ones are mostly their launches."""
    return (x.is_cuda or traced.stands_for("cuda")) and x.dtype == weight.dtype and x.is_contiguous()


def _fused_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    if traced.current() is not None:
        return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
    return found


def _fused_rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    if traced.current() is not None:
        return torch.empty_like(x)
    dx: torch.Tensor
    dx, _ = torch.ops.aten._fused_rms_norm_backward(dy, x, [x.shape[-1]], rstd, weight, [True, False])
    return dx


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
        ctx.native = native.takes(gate, up)
        if ctx.native:
            return native_silu_mul(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        if ctx.native:
            return native_silu_mul_backward(dy.to(gate.dtype).contiguous(), gate, up)
        d_up = F.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), d_up


def native_silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    y = torch.empty_like(gate)
    native.call("silu_mul_forward", gate, up, y, y.numel())
    return y


def native_silu_mul_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    native.call("silu_mul_backward", dy, gate, up, d_gate, d_up, gate.numel())
    return d_gate, d_up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + (-x2, x1) sin, with x1 and x2 the halves of the last dimension: the rotary embedding of Su et al. 2021.

    x is [B, H, T, D] with any strides; cos and sin [B or 1, T, D] get no gradient.
    """
    out: torch.Tensor = _Rotate.apply(x, cos, sin)
    return out


def takes_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `rotate` is better than a model's own function: by a native kernel, or on a GPU by few launches."""
    if x.ndim != 4 or not x.dtype == cos.dtype == sin.dtype or cos.shape != sin.shape:
        return False
    if x.is_cuda or traced.stands_for("cuda"):
        return cos.ndim == 3 and cos.shape[0] in (1, x.shape[0]) and cos.shape[1:] == x.shape[2:]
    return _native_rotates(x, cos, sin)


def _native_rotates(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    fits = x.shape[0] == 1 and cos.shape == (1, x.shape[2], x.shape[3]) and x.stride(-1) == 1
    return fits and native.in_memory(x) and native.takes(cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.native = _native_rotates(x, cos, sin)
        return native_rotate(x, cos, sin) if ctx.native else _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        dy = dy.to(cos.dtype)
        if ctx.native:
            return native_rotate(dy if dy.stride(-1) == 1 else dy.contiguous(), cos, sin, backward=True), None, None
        return _rotated(dy, cos, sin, backward=True), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> torch.Tensor:
    """`rotate`'s result, or the gradient of x for that of the result, laid out as x; in three passes over memory."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    y = torch.mul(x, cos, out=torch.empty_like(x))
    (x1, x2), (y1, y2), (sin1, sin2) = (tensor.chunk(2, -1) for tensor in (x, y, sin))
    if backward:
        sin1, sin2 = sin2, sin1
    sign = 1 if backward else -1
    y1.addcmul_(x2, sin1, value=sign)
    y2.addcmul_(x1, sin2, value=-sign)
    return y


def native_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> torch.Tensor:
    """`rotate`'s result, or the gradient of x for that of the result; [1, H, T, D], as [1, T, H, D] in memory."""
    _, heads, tokens, dim = x.shape
    y = x.new_empty(1, tokens, heads, dim)
    native.call("rotate", x, cos, sin, y, tokens, heads, dim, x.stride(2), x.stride(1), int(backward))
    return y.transpose(1, 2)
