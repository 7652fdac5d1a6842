"""Attention over packed rows by blocks: its cost is quadratic in the samples, not in the row.

`segments` is registered as an attention implementation of transformers. It computes one kernel call per
block of the row's layout and merges a sample's view of its prefix with its view of itself by their
log-sum-exp; the backward pass hands each block the merged result, which makes its gradient exact
(the identity that ring attention uses: Liu et al. 2023, section 3). On CUDA a row is one call of
torch's variable-length flash kernel (`kernels.varlen`). Without a layout it is plain causal
attention, which is also right for right-padded batches: no real token comes after a pad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from finetune.kernels import native_attention, traced, varlen
from finetune.kernels.layout import Block, RowLayout, attention_blocks, block_mask

NAME = "segments"

# Queries of one tile of the backward pass: its fp32 scores stay near the caches.
QUERY_TILE = 256

# Blocks are computed at multiples of this length.
LENGTH_STEP = 32

# The layout of the row being computed. A module global, not a thread-local: with gradient checkpointing
# the autograd engine calls the forward pass again from its own threads.
_layout: RowLayout | None = None


@contextmanager
def packed_row(layout: RowLayout | None) -> Iterator[None]:
    """Within this, `segments` attention isolates the samples of `layout`. Must enclose the backward pass too."""
    global _layout
    outer, _layout = _layout, layout
    try:
        yield
    finally:
        _layout = outer


def row_layout() -> RowLayout:
    """The layout of the row being computed; empty outside `packed_row`."""
    return _layout or ()


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [B, T, H, D] for query [B, H, T, D] and key, value [B, H_kv, T, D], by transformers' interface.

    Raises:
        NotImplementedError: for what it would compute wrongly: attention dropout, a logit cap, a mask, or a
            sample longer than the layer's sliding window.
    """
    _refuse_what_would_be_wrong(module, attention_mask, dropout, _)
    num_tokens = query.shape[2]
    layout = row_layout()
    # Rotary embeddings can leave q and k in fp32 beside v in autocast's dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if sliding_window is not None and longest_sample(layout, num_tokens) > sliding_window:
        raise NotImplementedError(
            f"segments attention: a sample is longer than the sliding window of {sliding_window} tokens"
        )
    if layout and varlen.takes(query, value):
        out = varlen.varlen_attention(query, key, value, layout, scaling)
    elif layout and native_attention.takes(query, key, value):
        out = native_attention.packed_attention(query, key, value, layout, scaling)
    elif layout:
        out = block_attention(query, key, value, attention_blocks(layout, num_tokens), scaling)
    else:
        out = _torch_attention(query, key, value, None, scaling)
    return out.transpose(1, 2), None


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scale: float | None
) -> torch.Tensor:
    """Attention [1, H, T, D] where each query sees the union of its blocks (causal ones first)."""
    if query.device.type == "cpu":
        out: torch.Tensor = _CpuBlockAttention.apply(query, key, value, _decisive(blocks), scale)
        return out
    return _masked_block_attention(query, key, value, blocks, scale)


def _refuse_what_would_be_wrong(
    module: torch.nn.Module, mask: torch.Tensor | None, dropout: float, extra: dict[str, Any]
) -> None:
    if mask is not None:
        raise NotImplementedError("segments attention takes a row layout, not a mask")
    if dropout and module.training:
        raise NotImplementedError("segments attention has no dropout on attention weights")
    if extra.get("softcap") is not None or extra.get("s_aux") is not None:
        raise NotImplementedError("segments attention has no logit cap and no attention sinks")


def longest_sample(layout: RowLayout, num_tokens: int) -> int:
    """Tokens of the row's longest sample, its prefix with it."""
    if not layout:
        return num_tokens
    return max(group.prefix_len + max(group.suffix_lens, default=0) for group in layout)


def _masked_block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scale: float | None
) -> torch.Tensor:
    """The same by one dense mask: any device, quadratic in the row."""
    num_tokens = query.shape[2]
    return _torch_attention(query, key, value, _row_mask(tuple(blocks), num_tokens, query.device), scale)


# A mask is quadratic in the row: only that of the row being computed is kept.
@lru_cache(maxsize=1)
def _row_mask(blocks: tuple[Block, ...], num_tokens: int, device: torch.device) -> torch.Tensor:
    """`block_mask`, computed once for all layers."""
    with torch.inference_mode(False):  # a measurement's may be used in training
        return block_mask(list(blocks), num_tokens, device)


def _torch_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """torch's attention by a mask, or causal without one."""
    if _needs_all_heads(query, key, value, masked=mask is not None):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _needs_all_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, masked: bool) -> bool:
    """Whether torch, given fewer key heads than query heads, would write out all scores.

    On CUDA only its flash kernel takes them so, which takes no mask; the memory-efficient one needs a key head each.
    """
    return query.is_cuda and key.shape[1] != query.shape[1] and (masked or not varlen.takes(query, value))


class _CpuBlockAttention(torch.autograd.Function):
    """One call of torch's CPU flash kernel per block, merged by log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query, key, value, blocks: list[Block], scale: float | None):  # type: ignore[no-untyped-def]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.float32)
        for q0, q1, k0, k1, causal in blocks:
            q_stop = _stop(q0, q1, query.shape[2])
            k_stop = k0 + q_stop - q0 if causal else k1
            part, part_lse = flash(
                query[:, :, q0:q_stop], key[:, :, k0:k_stop], value[:, :, k0:k_stop], 0.0, causal, scale=scale
            )
            part, part_lse = part[:, :, : q1 - q0], part_lse[:, :, : q1 - q0]
            if causal:
                out[:, :, q0:q1] = part
                lse[:, :, q0:q1] = part_lse
                continue
            own, own_lse = out[:, :, q0:q1], lse[:, :, q0:q1]
            merged_lse = torch.logaddexp(own_lse, part_lse)
            weight = torch.exp(part_lse - merged_lse).unsqueeze(-1)
            out[:, :, q0:q1] = torch.lerp(own.float(), part.float(), weight)
            lse[:, :, q0:q1] = merged_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out):  # type: ignore[no-untyped-def]
        query, key, value, out, lse = ctx.saved_tensors
        scale = ctx.scale if ctx.scale is not None else query.shape[-1] ** -0.5
        delta = (grad_out.float() * out.float()).sum(-1)
        grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for tile in _decisive([tile for block in ctx.blocks for tile in _tiles(block)]):
            _tile_backward(query, key, value, grad_out, lse, delta, grads, tile, scale)
        return (*grads, None, None)


def _decisive(blocks: list[Block]) -> list[Block]:
    """All blocks; in an estimate for a GPU the largest of each kind, since every other takes no more memory.

    On a CPU the others count too: glibc keeps what small ones give back.
    """
    if not traced.stands_for("cuda"):
        return blocks
    largest = {block.causal: block for block in sorted(blocks, key=Block.num_scores)}
    return list(largest.values())


def _stop(start: int, stop: int, limit: int) -> int:
    """`stop` moved on so that few lengths occur: what lies behind it is computed too and left out.

    For every new shape oneDNN compiles and keeps a kernel: with samples' own lengths that was 30 MB more a row.
    """
    return min(limit, start - (start - stop) // LENGTH_STEP * LENGTH_STEP)


def _tiles(block: Block) -> list[Block]:
    """A block cut along its queries; a causal one's keys end with them."""
    q_start, q_end, k_start, k_end, causal = block
    tiles = []
    for start in range(q_start, q_end, QUERY_TILE):
        stop = min(start + QUERY_TILE, q_end)
        tiles.append(Block(start, stop, k_start, k_start + stop - q_start if causal else k_end, causal))
    return tiles


def _tile_backward(query, key, value, grad_out, lse, delta, grads, tile: Block, scale: float) -> None:  # type: ignore[no-untyped-def]
    """Add one tile's gradients. torch's own CPU backward kernel needs five times as long on blocks of 128 tokens.

    Scores and their gradient are fp32, since both end in a difference; the products that only sum are in the inputs'
    dtype. Heads that share a key head are stacked along the queries, which also sums their key gradients.
    """
    q0, q1, k0, k1, causal = tile
    num_tokens, kv_heads = query.shape[2], key.shape[1]
    q_stop, k_stop = _stop(q0, q1, num_tokens), _stop(k0, k1, num_tokens)
    q_at, k_at = (slice(None), slice(None), slice(q0, q_stop)), (0, slice(None), slice(k0, k_stop))
    q, do = (tensor[q_at].reshape(kv_heads, -1, tensor.shape[-1]) for tensor in (query, grad_out))
    k, v = key[k_at], value[k_at]
    lse, delta = (tensor[q_at].reshape(kv_heads, -1, 1) for tensor in (lse, delta))
    probs = torch.bmm(q.float(), k.float().transpose(1, 2)).mul_(scale).sub_(lse).exp_()
    by_head = probs.view(kv_heads, -1, q_stop - q0, k_stop - k0)
    by_head[:, :, q1 - q0 :] = 0.0
    by_head[:, :, :, k1 - k0 :] = 0.0
    if causal:
        by_head.tril_(q0 - k0)
    d_scores = torch.bmm(do.float(), v.float().transpose(1, 2)).sub_(delta).mul_(probs).mul_(scale).to(q.dtype)
    grads[2][k_at].add_(torch.bmm(probs.to(q.dtype).transpose(1, 2), do))
    grads[1][k_at].add_(torch.bmm(d_scores.transpose(1, 2), q))
    grads[0][q_at].add_(torch.bmm(d_scores, k).view(1, query.shape[1], q_stop - q0, -1))


def register(function: Callable[..., Any] = segment_attention) -> None:
    """Make `segments` known to transformers, without a mask function: it gets none."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, function)
