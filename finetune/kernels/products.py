"""bf16 products in fp32 on a CPU without units for bf16: most laptops' processors, and servers' of some years ago.

There torch 2.13 multiplies bf16 matrices in a plain loop: on an AMD Zen 3 core at 10 GFLOP/s, and at 0.3 to 2 where a
gradient is computed, while fp32 products reach 75 to 90. So the operations below take their bf16 operands as fp32 and
round the result once, which is what units for bf16 do. Other dtypes, devices and torch.compile's kernels stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

# Attention's forward kernel is as fast in bf16.
OPERATIONS = (
    *("mm", "mm.out", "addmm", "addmm.out", "addmm_"),
    *("bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_"),
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
# Elements of a right operand that are widened at once: more would cost their page faults, and a weight's memory twice.
# Below 64 rows larger parts gain nothing.
WIDENED = 2**20
WIDENED_A_ROW = 2**14
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


def widened_bytes(name: str, arguments: Sequence[Any], result: Any) -> int:
    """fp32 copies that the operation called `name`, as in `aten::mm`, makes of its arguments and its result here."""
    name = name.removeprefix("aten::")
    sizes = [tensor.numel() for tensor in filter(_is_bf16, arguments)]
    if name not in OPERATIONS or not sizes:
        return 0
    if name.removesuffix("_") in _WIDE:
        left, right = sizes[-2:]
        sizes = [left, min(right, WIDENED)]
    results = result if isinstance(result, tuple) else (result,)
    return 4 * sum((*sizes, *(tensor.numel() for tensor in results)))


def _in_fp32(name: str) -> Callable[..., Any]:
    theirs = torch.library.get_kernel(f"aten::{name}", "CPU")
    functional = name.removesuffix(".out").removesuffix("_")
    compute = _WIDE.get(functional) or partial(_widened_call, functional)

    def product(*arguments: Any, **options: Any) -> Any:
        if not any(map(_is_bf16, arguments)) or (functional in _WIDE and _few_rows(*arguments[-2:])):
            return theirs.call_boxed(_CPU, *arguments, **options)
        out = arguments[0] if name.endswith("_") else options.pop("out", None)
        wide = compute(*arguments, **options)
        return _rounded(wide) if out is None else out.resize_(wide.shape).copy_(wide)

    return product


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    left, num_columns = left.float(), right.shape[1]
    out = left.new_empty(left.shape[0], num_columns)
    step = max(64, min(WIDENED, WIDENED_A_ROW * left.shape[0]) // max(1, right.shape[0]))
    for start in range(0, num_columns, step):
        columns = slice(start, start + step)
        torch.mm(left, right[:, columns].float(), out=out[:, columns])
    return out


def _addmm(
    added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    out = _mm(left, right)
    if alpha != 1:
        out.mul_(alpha)
    return out.add_(added, alpha=beta) if beta else out


_WIDE: dict[str, Callable[..., torch.Tensor]] = {"mm": _mm, "addmm": _addmm}


def _widened_call(name: str, *arguments: Any, **options: Any) -> Any:
    return getattr(torch.ops.aten, name)(*map(_widened, arguments), **options)


def _is_bf16(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.dtype == torch.bfloat16


def _few_rows(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape[0] <= FEW_ROWS and right.stride(0) == 1


def _widened(argument: Any) -> Any:
    return argument.float() if _is_bf16(argument) else argument


def _rounded(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_rounded, result))
    return result.to(torch.bfloat16)
