"""Activations moved to host memory between the forward and the backward pass.

Copies run on the compute stream through page-locked memory, which torch keeps for reuse, and nothing waits for them.
"""

from __future__ import annotations

from typing import Any

import torch

# Smaller tensors cost more in calls than they free.
MIN_BYTES = 2**20

Kept = torch.Tensor | tuple[torch.device, torch.Tensor]


def offloaded(min_bytes: int | None = None) -> Any:
    """A context: what autograd saves within it lies in host memory until it is used. Parameters stay where they are.

    Tensors of fewer than `min_bytes` stay too; None means `MIN_BYTES`.
    """
    least = MIN_BYTES if min_bytes is None else min_bytes

    def to_host(tensor: torch.Tensor) -> Kept:
        if _is_weight(tensor):
            return tensor
        if tensor.nbytes < least:
            # Not the tensor itself: where a node saves its own output, that would be a cycle, and a pass that fails
            # would keep its graph until Python collects.
            return tensor.detach()
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def to_device(kept: Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        device, host = kept
        return host.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(to_host, to_device)


def _is_weight(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one: a linear layer saves its weight transposed."""
    owner = tensor if tensor._base is None else tensor._base
    return isinstance(owner, torch.nn.Parameter)
