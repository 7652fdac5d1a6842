"""The state of a run copied to host memory in the middle of training, so that it can be written alongside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel

from finetune.models.adapters import adapter_tensors


@dataclass
class Snapshot:
    """Everything a checkpoint says, copied off the model: training may go on while it is written."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    progress: dict[str, Any] = field(default_factory=dict)  # counters of callbacks: plain numbers and strings


class HostBuffers:
    """Host memory for one snapshot, kept from one to the next: touching new pages takes longer than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The buffer `name` with the values of `tensor`; from a GPU they have arrived after a synchronization."""
        tensor = tensor.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._allocate(name, tensor)
        return buffer.copy_(tensor, non_blocking=True)

    def reserve(self, tensors: dict[str, torch.Tensor]) -> None:
        """Allocate and touch memory for `tensors` ahead of the first snapshot."""
        for name, tensor in tensors.items():
            self._allocate(name, tensor).zero_()

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()

    def _allocate(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # Page-locked where it comes from a GPU: the copy is several times as fast.
        pinned = tensor.device.type == "cuda"
        self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return self._buffers[name]


def snapshot_tensors(model: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a snapshot copies, by the names of its buffers."""
    tensors = {f"adapter/{name}": tensor for name, tensor in adapter_tensors(model).items()}
    tensors.update(_walk(optimizer.state_dict(), "optimizer"))
    return tensors


def take_snapshot(
    step: int,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    scaler_state: dict[str, Any],
    progress: dict[str, Any],
    buffers: HostBuffers,
) -> Snapshot:
    """Copy the adapter and the optimizer's state into `buffers`; it holds until the next snapshot is taken."""
    adapter = {name: buffers.copy(f"adapter/{name}", tensor) for name, tensor in adapter_tensors(model).items()}
    optimizer_state = _copied(optimizer.state_dict(), "optimizer", buffers)
    scaler = _copied(scaler_state, "scaler", buffers)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Snapshot(step, adapter, optimizer_state, scaler, dict(progress))


def _copied(value: Any, name: str, buffers: HostBuffers) -> Any:
    if isinstance(value, torch.Tensor):
        return buffers.copy(name, value)
    if isinstance(value, dict):
        return {key: _copied(item, f"{name}/{key}", buffers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, f"{name}/{index}", buffers) for index, item in enumerate(value))
    return value


def _walk(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(item, f"{name}/{key}")
