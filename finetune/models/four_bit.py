"""bitsandbytes' 4-bit weights, right on a CPU for every width.

Weights are quantized in blocks of 64 consecutive elements. bitsandbytes 0.50 expands them on a CPU as if every row
began a block (`backends/cpu/ops.py`): for layers whose inputs are not a multiple of 64 the values are then wrong, by
twice the error of quantization and without a message. Whoever needs the expansion, a layer's own forward included, gets
the corrected one once this module is imported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from bitsandbytes.functional import dequantize_4bit

__all__ = ["dequantize_4bit"]

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_theirs = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")
_library = torch.library.Library("bitsandbytes", "IMPL")


def _expanded(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    row = list(shape) if shape[-1] % blocksize == 0 else [1, math.prod(shape)]
    out: torch.Tensor = _theirs.call_boxed(_CPU, codes, absmax, blocksize, quant_type, row, dtype)
    return out.view(list(shape))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
    _library.impl("dequantize_4bit", _expanded, "CPU", allow_override=True)
