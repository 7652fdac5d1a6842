"""Cross-entropy of a language-model head over supervised positions only, a chunk of tokens at a time.

Neither the logits nor their gradient ever exist for more than one chunk, so memory is bounded by the chunk and not
by tokens x vocabulary. Each chunk's gradient is taken in the forward pass, so nothing is computed twice. On many CPUs
a frozen plain head has a native kernel that keeps the logits in the caches: `cpp/cross_entropy.cpp` for AMX,
`cpp/cross_entropy_fma.cpp`.

Shapes: N supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from finetune.kernels import native, traced

# fp32 logits of one chunk. 32 MB stays near the caches of a CPU. On a GPU that is 64 tokens of a vocabulary of 128,000,
# too few to fill it; 256 MB is below its other needs.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}

# fp32 logits that fit into a core's second cache.
CACHED_BYTES = 2**20

# Tokens of a chunk are padded to a multiple of this.
CHUNK_STEP = 32

Head = Callable[[torch.Tensor], torch.Tensor]


def _starts(count: int, size: int) -> range:
    """Where pieces of `size` rows begin, `count` rows in all.

    In an estimate two stand for all: every later one takes the same memory.
    """
    starts = range(0, count, size)
    return starts if traced.current() is None else starts[:2]


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens whose fp32 logits fill one chunk on such a device, at least 16 and a multiple of 8."""
    return max(16, CHUNK_BYTES[device_type] // (4 * vocab_size) // 8 * 8)


def _device_type(tensor: torch.Tensor) -> str:
    """The type of device that a tensor is on, or stands for in an estimate."""
    return "cuda" if tensor.is_cuda or traced.stands_for("cuda") else "cpu"


def chunked_cross_entropy(
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    head: Head,
    params: list[torch.Tensor],
    vocab_size: int,
    plain_weight_VD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed loss (fp32 scalar) of predicting `targets_N` from `head(hidden_ND)`.

    `head` maps [n, D] to logits [n, V] with all of the model's own post-processing; `params` are its trainable
    parameters (none for a frozen head), which receive their gradient too. `plain_weight_VD` is given where the head is
    the product with that frozen weight and nothing else.
    """
    if hidden_ND.shape[0] == 0:
        # Keeps the graph whole for a micro-batch without labels: every rank must run the same backward.
        return hidden_ND.float().sum() * 0.0
    loss: torch.Tensor
    if plain_weight_VD is not None and _native_takes(hidden_ND, plain_weight_VD):
        loss = _NativeCrossEntropy.apply(hidden_ND, targets_N, plain_weight_VD)
    elif torch.is_grad_enabled():
        loss = _ChunkedCrossEntropy.apply(hidden_ND, targets_N, head, vocab_size, *params)
    else:
        loss = _summed_loss(hidden_ND, targets_N, head, vocab_size)
    return loss


def _native_takes(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> bool:
    return hidden_ND.shape[1] % native.TILE == 0 and native.takes(hidden_ND, weight_VD) and native.computes_products()


class _NativeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, targets_N, weight_VD):  # type: ignore[no-untyped-def]
        (count, dim), vocab_size = hidden_ND.shape, weight_VD.shape[0]
        losses, grad, sums = torch.empty(count), None, None
        if ctx.needs_input_grad[0]:
            grad = torch.empty_like(hidden_ND)
            sums = torch.empty(count + -count % native.TILE, dim, dtype=torch.float32)
            ctx.save_for_backward(grad)
        tensors = (hidden_ND, weight_VD, targets_N.contiguous(), losses, grad, sums)
        native.keeps("cross_entropy", count, dim)
        native.call("cross_entropy", *tensors, count, vocab_size, dim)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss):  # type: ignore[no-untyped-def]
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss, None, None


def _summed_loss(hidden_ND: torch.Tensor, targets_N: torch.Tensor, head: Head, vocab_size: int) -> torch.Tensor:
    size = chunk_tokens(vocab_size, _device_type(hidden_ND))
    loss = hidden_ND.new_zeros((), dtype=torch.float32)
    for hidden, targets in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
        loss = loss + F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, targets_N, head: Head, vocab_size: int, *params):  # type: ignore[no-untyped-def]
        size = chunk_tokens(vocab_size, _device_type(hidden_ND))
        grad_hidden = torch.empty_like(hidden_ND)
        grad_params = [torch.zeros_like(param) for param in params]
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in _starts(hidden_ND.shape[0], size):
            targets = targets_N[start : start + size]
            # Few chunk lengths, since a kernel is compiled and kept for each: see kernels.attention.
            padding = -len(targets) % min(CHUNK_STEP, size)
            part = F.pad(hidden_ND[start : start + size].detach(), (0, 0, 0, padding)).requires_grad_()
            with torch.enable_grad():
                logits = head(part)
            part_loss, grad_logits = _loss_and_gradient(logits.detach(), F.pad(targets, (0, padding)), len(targets))
            loss += part_loss
            grads = torch.autograd.grad(logits, [part, *params], grad_logits)
            del logits, grad_logits
            grad_hidden[start : start + size] = grads[0][: len(targets)]
            for total, grad in zip(grad_params, grads[1:], strict=True):
                total += grad
        ctx.save_for_backward(grad_hidden, *grad_params)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss):  # type: ignore[no-untyped-def]
        grad_hidden, *grad_params = ctx.saved_tensors
        return (grad_hidden * grad_loss, None, None, None, *(grad * grad_loss for grad in grad_params))


def _loss_and_gradient(
    logits_nV: torch.Tensor, targets_n: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of the first `count` tokens and its gradient (softmax minus one-hot) in the logits' dtype.

    Tokens after the first `count` are padding. The fp32 values of a few tokens exist at a time: seven passes over them
    stay in a CPU's caches.
    """
    grad = torch.empty_like(logits_nV)
    loss = torch.zeros((), dtype=torch.float32, device=logits_nV.device)
    size = len(logits_nV) if _device_type(logits_nV) == "cuda" else max(1, CACHED_BYTES // (4 * logits_nV.shape[1]))
    for start in _starts(len(logits_nV), size):
        index = targets_n[start : start + size, None]
        values = logits_nV[start : start + size].to(torch.float32, copy=True)
        picked = values.gather(1, index)
        top = values.amax(1, keepdim=True)
        total = values.sub_(top).exp_().sum(1, keepdim=True)
        loss += (total.log() + top - picked)[: max(0, count - start)].sum()
        values.mul_(total.reciprocal_()).scatter_add_(1, index, torch.full_like(picked, -1.0))
        grad[start : start + size] = values
    grad[count:] = 0.0
    return loss, grad
