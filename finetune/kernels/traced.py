"""The switch for estimates: within `traced`, tensors have no data and stand for those of a device.

Kernels allocate as they would there. They compute nothing, and of pieces that each give back what they took they run
only those that decide how much that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Trace:
    """What tensors stand for, and what is noted meanwhile."""

    device_type: str
    kept: dict[str, int] = field(default_factory=dict)  # bytes that each native kernel keeps from call to call


_current: Trace | None = None


def current() -> Trace | None:
    """The estimate that is being made; None in all other work."""
    return _current


def stands_for(device_type: str) -> bool:
    """Whether an estimate for such a device is being made."""
    return _current is not None and _current.device_type == device_type


@contextmanager
def traced(device_type: str) -> Iterator[Trace]:
    """Within this, tensors without memory take the paths of a device of this type."""
    global _current
    outer, _current = _current, Trace(device_type)
    try:
        yield _current
    finally:
        _current = outer
