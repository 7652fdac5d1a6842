"""bf16 products in fp32 on a CPU without units for bf16: most laptops' processors, and servers' of some years ago.

There torch 2.13 multiplies bf16 matrices in a plain loop: on an AMD Zen 3 core at 10 GFLOP/s, and at 0.3 to 2 where a
gradient is computed, while fp32 products reach 75 to 90. So the operations below take their bf16 operands as fp32 and
round the result once, which is what units for bf16 do. Other dtypes, devices and torch.compile's kernels stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Attention's forward kernel is as fast in bf16.
OPERATIONS = (
    *(f"{name}{overload}" for name in ("mm", "bmm") for overload in ("", ".out")),
    *(f"{name}{overload}" for name in ("addmm", "baddbmm") for overload in ("", ".out")),
    "addmm_",
    "baddbmm_",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
# So few rows times a transposed weight, as in decoding, are faster as torch reads them: 0.12 against 0.23 ms for one
# row and 576 x 1,536 weights, 0.42 against 0.33 for four.
FEW_ROWS = 2


@cache
def has_bf16_units() -> bool:
    """Whether torch multiplies bf16 matrices in oneDNN on this CPU, which it does not without AVX-512 or Arm's bf16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def multiply_in_fp32() -> bool:
    """Replace the operations for this process, once, if the CPU wants that; whether they are replaced."""
    if has_bf16_units():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
        for name in OPERATIONS:
            _library.impl(name, _in_fp32(name), "CPU", allow_override=True)
    return True


_library = torch.library.Library("aten", "IMPL")
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _in_fp32(name: str) -> Callable[..., Any]:
    theirs = torch.library.get_kernel(f"aten::{name}", "CPU")
    writes_first, of_matrices = name.endswith("_"), "mm" in name

    def product(*arguments: Any, **options: Any) -> Any:
        out = arguments[0] if writes_first else options.get("out")
        if not any(_is_bf16(argument) for argument in arguments) or (of_matrices and _few_rows(arguments)):
            return theirs.call_boxed(_CPU, *arguments, **options)
        if out is None:
            return _rounded(theirs.call_boxed(_CPU, *map(_widened, arguments), **options))
        options = {**options, "out": _widened(out)} if "out" in options else options
        wide = theirs.call_boxed(_CPU, *map(_widened, arguments), **options)
        out.resize_(wide.shape).copy_(wide)
        return out

    return product


def _is_bf16(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.dtype == torch.bfloat16


def _few_rows(arguments: tuple[Any, ...]) -> bool:
    left, right = [argument for argument in arguments if isinstance(argument, torch.Tensor)][-2:]
    return left.ndim == 2 and left.shape[0] <= FEW_ROWS and right.stride(0) == 1


def _widened(argument: Any) -> Any:
    return argument.float() if _is_bf16(argument) else argument


def _rounded(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_rounded, result))
    return result.to(torch.bfloat16)
