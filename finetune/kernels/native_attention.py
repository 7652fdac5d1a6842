"""Attention over a packed row by the native kernels: `cpp/attention.h` says how.

Shapes: T tokens of the row, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from finetune.kernels import native
from finetune.kernels.layout import RowLayout

# As in `cpp/attention.h`.
MAX_HEAD_SIZE = 256


class Visibility(NamedTuple):
    """Which keys each query sees: own_start <= key <= query, or prefix_start <= key < prefix_end."""

    own_start: torch.Tensor  # int32 [T]
    prefix_start: torch.Tensor  # int32 [T]
    prefix_end: torch.Tensor  # int32 [T]
    visits: torch.Tensor  # uint8 [T/32, T/32], queries by keys: 0 no pair, 1 every pair, 2 some


class _Row(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_void_p) for name in ("own_start", "prefix_start", "prefix_end", "visits")),
        ("scale", ctypes.c_float),
    )


class _Heads(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel computes these: one row in bf16 on a CPU, heads of one size."""
    batch, heads, tokens, dim = query.shape
    one_row = native.in_memory(query) and batch == 1 and dim == value.shape[-1]
    return one_row and takes_sizes(tokens, heads, key.shape[1], dim)


def takes_sizes(tokens: int, heads: int, kv_heads: int, dim: int) -> bool:
    """Whether the kernel computes these sizes: tokens and the heads' size multiples of 32.

    Heads of more than 256 are left to torch: the kernel's blocks are sized for less.
    """
    return (
        tokens % native.TILE == 0
        and dim % native.TILE == 0
        and dim <= MAX_HEAD_SIZE
        and heads % kv_heads == 0
        and native.computes_products()
    )


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, scale: float | None
) -> torch.Tensor:
    """Attention [1, H, T, D] of query [1, H, T, D] and key, value [1, G, T, D] within the row's samples."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = _PackedAttention.apply(query, key, value, layout, scale)
    return out


@lru_cache(maxsize=8)
def visibility(layout: RowLayout, num_tokens: int) -> Visibility:
    """A row's visibility; tokens after the last group see each other causally."""
    own, prefix_start, prefix_end = (torch.zeros(num_tokens, dtype=torch.int32) for _ in range(3))
    start = 0
    for group in layout:
        first, own_start = start, start + group.prefix_len
        own[first:own_start] = first
        for length in group.suffix_lens:
            own[own_start : own_start + length] = own_start
            own_start += length
        prefix_start[first + group.prefix_len : own_start] = first
        prefix_end[first + group.prefix_len : own_start] = first + group.prefix_len
        start = own_start
    own[start:] = start
    edge = torch.arange(0, num_tokens, native.TILE)
    pairs = _overlap(own, torch.arange(1, num_tokens + 1), edge) + _overlap(prefix_start, prefix_end, edge)
    pairs = pairs.view(-1, native.TILE, len(edge)).sum(1)
    visits = torch.where(pairs == native.TILE * native.TILE, 1, torch.where(pairs > 0, 2, 0)).to(torch.uint8)
    return Visibility(own, prefix_start, prefix_end, visits.contiguous())


def _overlap(start: torch.Tensor, end: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """Tokens of [start, end) in each tile [T, T/32]."""
    return (torch.minimum(end[:, None], edge + native.TILE) - torch.maximum(start[:, None], edge)).clamp_(min=0)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, layout: RowLayout, scale: float):  # type: ignore[no-untyped-def]
        query, key, value = (_dense_heads(tensor) for tensor in (query, key, value))
        out, lse = native_forward(query, key, value, layout, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out):  # type: ignore[no-untyped-def]
        query, key, value, out, lse = ctx.saved_tensors
        grad_out = _dense_heads(grad_out.to(query.dtype))
        return *native_backward(grad_out, query, key, value, out, lse, ctx.layout, ctx.scale), None, None


def native_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [1, H, T, D], as [1, T, H, D] in memory, and the log-sum-exp [H, T] of each query's scores."""
    _, heads, tokens, dim = query.shape
    out = query.new_empty(1, tokens, heads, dim).transpose(1, 2)
    lse = torch.empty(heads, tokens)
    packed = query.new_empty(key.numel())
    row = partial(_row, query, key, layout, scale)
    native.call("attention_forward", row, *map(_heads, (query, key, value)), out, lse, packed)
    return out, lse


def native_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: RowLayout,
    scale: float,
) -> list[torch.Tensor]:
    """The gradients of query, key and value, as [1, T, H, D] in memory."""
    grads = [
        tensor.new_empty(1, tensor.shape[2], tensor.shape[1], tensor.shape[3]).transpose(1, 2)
        for tensor in (query, key, value)
    ]
    heads_of = map(_heads, (query, key, value, out, grad_out))
    row = partial(_row, query, key, layout, scale)
    native.call("attention_backward", row, *heads_of, lse, *grads)
    return grads


def _row(query: torch.Tensor, key: torch.Tensor, layout: RowLayout, scale: float) -> _Row:
    _, heads, tokens, dim = query.shape
    # The cache keeps the tensors while the kernel reads them.
    seen = visibility(layout, tokens)
    return _Row(tokens, heads, key.shape[1], dim, *(tensor.data_ptr() for tensor in seen), scale)


def _heads(tensor: torch.Tensor) -> native.Structure:
    return lambda: _Heads(tensor.data_ptr(), tensor.stride(2), tensor.stride(1))


def _dense_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a head's elements side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
