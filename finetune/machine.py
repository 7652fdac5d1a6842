"""What this machine is and how much memory the process has used."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune.errors import OutOfMemory

# Set to 0, this keeps the native CPU kernels out of use; set to fp32, those for units of bf16.
KERNEL_SWITCH = "FINETUNE_NATIVE_KERNELS"


def peak_memory_bytes() -> int:
    """Peak memory of this process: on the GPU where torch uses one, else resident host memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        # Of this program alone: what getrusage gives begins with the peak of the process that started it.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


# What the allocators of the host and of CUDA, and cuBLAS, say where they raise no error of its own class.
_ALLOCATION_FAILED = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's or the host's allocator has failed."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED)


@contextmanager
def naming_out_of_memory(phase: str, todo: str) -> Iterator[None]:
    """Say in which phase memory ran out within, and what to do about it; also decorates a function.

    Raises:
        OutOfMemory: instead of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {phase}, after {peak_memory_bytes() / 1e9:.1f} GB.\n  {todo}") from error


def describe_machine() -> dict[str, Any]:
    """Processor, memory and GPUs, for reports; nothing that identifies the machine."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    names = ("torch", "transformers", "peft", "bitsandbytes", "lightning", "tokenizers", "datasets", "finetune")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def limit_kernel_cache() -> None:
    """Bound the compiled kernels that oneDNN keeps; takes effect only before torch is imported.

    Packed rows have many shapes. With its default of 1,024 kernels the cache grew by 0.3 GB in ten rows of
    SmolLM2-135M.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def refuse_telemetry() -> None:
    """Switch off what libraries report about their use, unless the user has set it; ours reports nothing.

    Sources: huggingface_hub's, wandb's and gradio's documentation of their environment variables.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


def release_freed_memory() -> None:
    """Give the memory that a phase leaves behind back to the system: the next one needs other sizes."""
    import gc

    gc.collect()
    trim_freed_memory()


def trim_freed_memory() -> None:
    """Give back what malloc holds and nobody uses; takes some milliseconds."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
