"""A decoder layer of Llama's form as one autograd function over the native kernels.

    h = x + o(attention(rotated q, k, v of norm(x)));  y = h + down(silu(gate) * up of norm(h))

The kernels are those that its parts use when each runs for itself. What goes is between them: a dozen graph nodes and
module calls for every layer (a tenth of a small model's step on AMX), and the passes over memory that add residuals and
their gradients, which norms now do.

Shapes: T tokens, D model width, H query heads and G key heads of size E.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from finetune.kernels import native, native_attention
from finetune.kernels.layout import RowLayout
from finetune.kernels.lora import Projection, compute_dtype, matrices_of, native_backward, native_forward, native_takes
from finetune.kernels.pointwise import (
    native_rms_norm,
    native_rms_norm_backward,
    native_rotate,
    native_silu_mul,
    native_silu_mul_backward,
)


class Norm(NamedTuple):
    """An RMSNorm: its frozen weight and what is added to the mean of squares."""

    weight: torch.Tensor
    eps: float


class DecoderLayer(NamedTuple):
    """A layer's parts, as they are at this moment: under FSDP weights are whole only within its passes."""

    input_norm: Norm
    qkv: Sequence[Projection]
    o: Sequence[Projection]
    post_norm: Norm
    gate_up: Sequence[Projection]
    down: Sequence[Projection]
    head_size: int
    scale: float
    # Qwen 3 normalizes each head of q and of k before the rotation.
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @property
    def groups(self) -> tuple[Sequence[Projection], ...]:
        """Projections by their input, in the order of the passes."""
        return self.qkv, self.o, self.gate_up, self.down


def native_decoder_layer(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: DecoderLayer, layout: RowLayout
) -> torch.Tensor | None:
    """The layer's output [1, T, D] for x [1, T, D], cos and sin [1, T, E]; None if the kernels do not compute these."""
    matrices = list(chain.from_iterable(map(matrices_of, layer.groups)))
    if not _takes(x, cos, sin, layer, matrices):
        return None
    out: torch.Tensor = _DecoderLayer.apply(x, cos, sin, layer, layout, *matrices)
    return out


def _takes(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: DecoderLayer, matrices: Sequence[torch.Tensor]
) -> bool:
    if x.ndim != 3 or x.shape[0] != 1 or compute_dtype(x) != torch.bfloat16:
        return False
    norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
    heads, kv_heads = (layer.qkv[index].b_OR.shape[0] // layer.head_size for index in (0, 1))
    return (
        native_takes(x, matrices)
        and native.takes(cos, sin, *(norm.weight for norm in norms if norm is not None))
        and cos.shape == (1, x.shape[1], layer.head_size)
        and native_attention.takes_sizes(x.shape[1], heads, kv_heads, layer.head_size)
    )


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, layer: DecoderLayer, layout: RowLayout, *matrices):  # type: ignore[no-untyped-def]
        normed, rstd = native_rms_norm(x, *layer.input_norm)
        (q, k, v), xa_qkv = native_forward(normed, layer.qkv)
        q, k, v = (projected.view(1, x.shape[1], -1, layer.head_size).transpose(1, 2) for projected in (q, k, v))
        (q_kept, q), (k_kept, k) = _head_norm(q, layer.q_norm), _head_norm(k, layer.k_norm)
        q, k = native_rotate(q, cos, sin), native_rotate(k, cos, sin)
        attended, lse = native_attention.native_forward(q, k, v, layout, layer.scale)
        (h,), xa_o = native_forward(_joined(attended), layer.o)
        h_normed, h_rstd = native_rms_norm(x, *layer.post_norm, added=h)  # h takes x + h
        (gate, up), xa_gate_up = native_forward(h_normed, layer.gate_up)
        activated = native_silu_mul(gate, up)
        (y,), xa_down = native_forward(activated, layer.down)
        ctx.save_for_backward(
            *(cos, sin, x, rstd, normed, xa_qkv, *q_kept, *k_kept),
            *(q, k, v, attended, lse, xa_o),
            *(h, h_rstd, h_normed, xa_gate_up, gate, up, activated, xa_down),
        )
        ctx.layer, ctx.layout = layer, layout
        return y.add_(h)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        layer: DecoderLayer = ctx.layer
        # From its end on, each part takes what is its own: where a layer is recomputed nothing else holds that.
        saved = list(ctx.saved_tensors)
        dh, *d_mlp = _mlp_backward(dy.to(saved[2].dtype).contiguous(), saved, layer)
        dq, dk, dv, *d_o = _attention_backward(dh, saved, layer, ctx.layout)
        dk = _head_norm_backward(dk, layer.k_norm, saved)
        dq = _head_norm_backward(dq, layer.q_norm, saved)
        x, rstd, normed, xa_qkv = _last(saved, 4)
        needs_dx = ctx.needs_input_grad[0]
        dx, d_qkv = native_backward(normed, xa_qkv, layer.qkv, [*map(_joined, (dq, dk, dv))], needs_dx=needs_dx)
        if dx is not None:
            dx = native_rms_norm_backward(dx, x, layer.input_norm.weight, rstd, added=dh)
        return dx, None, None, None, None, *d_qkv, *d_o, *d_mlp


def _mlp_backward(dy: torch.Tensor, saved: list[torch.Tensor], layer: DecoderLayer) -> list[torch.Tensor]:
    """The gradient of h, and of the MLP's matrices."""
    activated, xa_down = _last(saved, 2)
    d_activated, d_down = native_backward(activated, xa_down, layer.down, [dy], needs_dx=True)
    del activated
    d_gate_up = native_silu_mul_backward(d_activated, *_last(saved, 2))
    del d_activated
    h, h_rstd, h_normed, xa_gate_up = _last(saved, 4)
    d_normed, d_matrices = native_backward(h_normed, xa_gate_up, layer.gate_up, d_gate_up, needs_dx=True)
    dh = native_rms_norm_backward(d_normed, h, layer.post_norm.weight, h_rstd, added=dy)
    return [dh, *d_matrices, *d_down]


def _attention_backward(
    dh: torch.Tensor, saved: list[torch.Tensor], layer: DecoderLayer, layout: RowLayout
) -> list[torch.Tensor]:
    """The gradients of q, k and v as they are projected (or normalized), and of o's matrices."""
    q, k, v, attended, lse, xa_o = _last(saved, 6)
    cos, sin = saved[:2]
    d_attended, d_o = native_backward(_joined(attended), xa_o, layer.o, [dh], needs_dx=True)
    d_attended = d_attended.view(1, q.shape[2], -1, layer.head_size).transpose(1, 2)
    dq, dk, dv = native_attention.native_backward(d_attended, q, k, v, attended, lse, layout, layer.scale)
    dq, dk = native_rotate(dq, cos, sin, backward=True), native_rotate(dk, cos, sin, backward=True)
    return [dq, dk, dv, *d_o]


def _last(saved: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Take the last `count` off."""
    taken = saved[-count:]
    del saved[-count:]
    return taken


def _joined(heads: torch.Tensor) -> torch.Tensor:
    """[1, T, H * E] of heads [1, H, T, E] that lie in memory as [1, T, H, E]."""
    return heads.transpose(1, 2).flatten(2)


def _head_norm(heads: torch.Tensor, norm: Norm | None) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What the gradient needs, and the heads [1, H, T, E], each normalized."""
    if norm is None:
        return (), heads
    rows = heads.transpose(1, 2)
    normed, rstd = native_rms_norm(rows, *norm)
    return (rows, rstd), normed.transpose(1, 2)


def _head_norm_backward(grad: torch.Tensor, norm: Norm | None, saved: list[torch.Tensor]) -> torch.Tensor:
    if norm is None:
        return grad
    rows, rstd = _last(saved, 2)
    return native_rms_norm_backward(grad.transpose(1, 2), rows, norm.weight, rstd).transpose(1, 2)
