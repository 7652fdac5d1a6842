"""Reading device values without making the device wait: one step later, when their copy has arrived."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

Note = TypeVar("Note")


class HostCopy(Generic[Note]):
    """One copy under way from the device to page-locked host memory, with a note about what it is.

    On a CPU there is nothing to wait for, and a value comes back at once.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event, Note] | None = None

    def push(self, values: torch.Tensor, note: Note) -> tuple[torch.Tensor, Note] | None:
        """Start copying `values`; returns the values that can be read now: a CPU's own, a GPU's of the last push."""
        if values.device.type == "cpu":
            return values, note
        before = self.flush()
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (host, event, note)
        return before

    def flush(self) -> tuple[torch.Tensor, Note] | None:
        """What is under way, waited for."""
        if self._pending is None:
            return None
        host, event, note = self._pending
        event.synchronize()
        self._pending = None
        return host, note
