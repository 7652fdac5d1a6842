"""Activations moved to host memory between the forward and the backward pass.

Copies run on the compute stream through page-locked memory, which torch keeps for reuse, and nothing waits for them.
"""

from __future__ import annotations

from typing import Any

import torch

# Smaller tensors cost more in calls than they free.
MIN_BYTES = 2**20

Kept = torch.Tensor | tuple[torch.device, torch.Tensor]


def offloaded(min_bytes: int = MIN_BYTES) -> Any:
    """A context: what autograd saves within it lies in host memory until it is used. Parameters stay where they are."""

    def to_host(tensor: torch.Tensor) -> Kept:
        if isinstance(tensor, torch.nn.Parameter) or tensor.nbytes < min_bytes:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def to_device(kept: Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        device, host = kept
        return host.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(to_host, to_device)
