"""The CPU kernels in `cpp/`: compiled once for this machine by its g++, kept in the cache, called through ctypes.

Written as torch operations, attention by blocks, norms, SwiGLU and rotary embedding take more of a CPU's step than the
matrix products: each is several passes over memory, and attention's small products run far below the machine's rate.
Where a kernel cannot be had (no g++, another processor, another dtype) the torch operations compute the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from finetune.files import cache_dir, locked
from finetune.kernels import traced
from finetune.machine import KERNEL_SWITCH

SOURCES = Path(__file__).with_name("cpp")
# Contraction: a * b + c in one rounding, which is faster and more exact. Without trapping math, g++ 12 computed both
# sides of exp's clamps for every element: SwiGLU took six times as long, from denormal numbers.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast")
# With the switch at FP32, those for processors without units for bf16, on any x86: to compare and to test them.
FP32 = "fp32"
WITHOUT_BF16_UNITS = ("-mno-amx-bf16", "-mno-avx512bf16")
# Tokens and widths must be multiples of it for attention and linear layers.
TILE = 32

# What holds its values itself, unlike a tracer's tensor or a shard's.
PLAIN = (torch.Tensor, torch.nn.Parameter)

# A structure is made by a function, and only if the kernel is called.
Structure = Callable[[], ctypes.Structure | ctypes.Array[Any]]
Argument = torch.Tensor | Structure | int | float | None


class NativeKernelsMissingError(Exception):
    """Why there are no native kernels here, in one line."""


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the pointwise kernels compute on these: plain bf16 in a CPU's memory, dense, and the kernels are here."""
    return all(in_memory(t) and t.is_contiguous() for t in tensors) and library() is not None


def in_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is bf16 values in this process's memory, not a shard's or a wrapper's."""
    return is_plain(tensor) and tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds its values itself; in an estimate for a CPU, what stands for it counts."""
    return type(tensor) in PLAIN or traced.stands_for("cpu")


def keeps(kernel: str, *sizes: int) -> None:
    """In an estimate, note what a call of these sizes keeps, as the kernel's `<name>_scratch` has it."""
    trace = traced.current()
    if trace is not None and (scratch := getattr(_load()[0], f"{kernel}_scratch", None)) is not None:
        scratch.restype = ctypes.c_int64
        trace.kept[kernel] = max(trace.kept.get(kernel, 0), scratch(*map(ctypes.c_int64, sizes)))


def computes_products() -> bool:
    """Whether there are kernels for attention, the loss and linear layers here.

    There are two kinds: for AMX, where Linux grants it, and in fp32 where a processor has AVX2 and no units for bf16.
    """
    return library() is not None and _products_granted()


def call(name: str, *arguments: Argument) -> None:
    """Call a kernel on tensors' memory and plain numbers, with torch's number of threads.

    The caller answers for shapes, strides and dtypes, and keeps the tensors until this returns.
    """
    if traced.current() is not None:
        return
    function = getattr(_load()[0], name)
    if function.argtypes is None:  # of the first call: each argument's kind is the same in every one
        function.argtypes = [*map(_kind, arguments), ctypes.c_int]
    values = [
        value.data_ptr() if isinstance(value, torch.Tensor) else ctypes.byref(value()) if callable(value) else value
        for value in arguments
    ]
    function(*values, torch.get_num_threads())


def _kind(value: Argument) -> Any:
    if isinstance(value, float):
        return ctypes.c_float
    return ctypes.c_int64 if isinstance(value, int) else ctypes.c_void_p


def library() -> ctypes.CDLL | None:
    """The kernels; None where they cannot be had, and `why_missing` says why.

    None too while torch.compile traces: it fuses the torch operations and could not look into a kernel.
    """
    return None if torch.compiler.is_compiling() else _load()[0]


def why_missing() -> str | None:
    """Why `library` is None; None if it is not."""
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return ctypes.CDLL(str(_built())), None
    except (NativeKernelsMissingError, OSError) as error:
        return None, str(error)


@lru_cache(maxsize=1)
def _products_granted() -> bool:
    """Whether they were compiled, and Linux gives this process AMX's tile registers, which it must ask for."""
    found = _load()[0]
    if found is None or not hasattr(found, "lora_forward"):
        return False
    return not hasattr(found, "request_amx") or found.request_amx() == 0


def _built() -> Path:
    """The shared library's path, after compiling it if this machine has not yet."""
    switch = os.environ.get(KERNEL_SWITCH)
    if switch == "0":
        raise NativeKernelsMissingError(f"{KERNEL_SWITCH} is 0")
    compiler = shutil.which("g++")
    if platform.system() != "Linux" or compiler is None:
        raise NativeKernelsMissingError("they are compiled with g++ on Linux, which is not here")
    sources = sorted(SOURCES.glob("*.cpp"))
    flags = (*FLAGS, *WITHOUT_BF16_UNITS) if switch == FP32 else FLAGS
    name = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        name.update(path.read_bytes())
    # A cache may be shared by machines that differ.
    name.update("\n".join((compiler, *flags, _processor(), torch.__version__)).encode())
    path = cache_dir() / "kernels" / f"{name.hexdigest()[:20]}.so"
    if path.is_file():
        return path
    # Of several processes one compiles, which takes every core; the others wait for it.
    with locked(path.with_suffix(".lock")):
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                _compile([compiler, *flags], sources, Path(folder) / path.name)
                os.replace(Path(folder) / path.name, path)
    return path


def _compile(compiler: list[str], sources: list[Path], path: Path) -> None:
    objects = [path.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor() as pool:
        one = partial(_call, *compiler, "-fopenmp", "-fPIC", "-o")
        list(pool.map(one, objects, repeat("-c"), sources))
    # torch's own OpenMP by its path: a second one would have threads of its own that wait for the same cores.
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    _call(compiler[0], "-shared", *objects, openmp[0] if openmp else "-fopenmp", "-o", path)


def _call(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise NativeKernelsMissingError(f"g++ could not compile them: {first}")


def _processor() -> str:
    """What -march=native depends on."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return platform.machine()
