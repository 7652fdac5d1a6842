"""What merging does to one weight: LoRA and DoRA updates, replaced rows, 4-bit rounding, added rows.

Updates are added in fp32, a block of rows at a time, and cast once. Weights are [O, I] unless `transposed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from bitsandbytes.nn import Params4bit

from finetune.models.four_bit import dequantize_4bit
from finetune.recipe.schema import ModelSection

# fp32 values of a block of rows: 16 MB.
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class LowRank:
    """An update `scale * up @ down`; with a magnitude, DoRA's: rows of the sum are scaled to that length."""

    down: torch.Tensor  # [r, I]
    up: torch.Tensor  # [O, r]
    scale: float
    magnitude: torch.Tensor | None = None  # [O]


def add_low_rank(
    weight: torch.Tensor, update: LowRank, dtype: torch.dtype, *, transposed: bool = False
) -> torch.Tensor:
    """`weight` plus the update, in `dtype`; a `transposed` weight is [I, O], as embeddings and Conv1D store it.

    Source: Hu et al. 2021, section 4.1; Liu et al. 2024 (DoRA), equation 5.
    """
    rows_OI = weight.T if transposed else weight
    out = torch.empty_like(weight, dtype=dtype)
    out_OI = out.T if transposed else out
    up, down = update.up.float(), update.down.float()
    block = max(1, _BLOCK_VALUES // max(1, rows_OI.shape[1]))
    for start in range(0, rows_OI.shape[0], block):
        rows = slice(start, start + block)
        total = torch.addmm(rows_OI[rows].float(), up[rows], down, alpha=update.scale)
        if update.magnitude is not None:
            total *= (update.magnitude[rows].float() / torch.linalg.norm(total, dim=1))[:, None]
        out_OI[rows] = total.to(dtype)
    return out


def add_rows(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`weight` [V, ...] with rows appended up to `num_rows`, each the mean of the rows that were there.

    transformers resizes embeddings to the same values, plus noise of 3e-5 standard deviations.
    """
    mean = torch.zeros(weight.shape[1:], dtype=torch.float64)
    for rows in weight.split(1 << 14):
        mean += rows.double().sum(0)
    mean /= weight.shape[0]
    added = mean.to(weight.dtype).expand(num_rows - weight.shape[0], *weight.shape[1:])
    return torch.cat([weight, added])


class Rounding:
    """The rounding that a weight went through when the recipe's base was quantized for training."""

    def __init__(self, model: ModelSection, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """`dtype` is that of the base before quantization; `device` is where training quantized it."""
        self._model, self._dtype, self._device = model, dtype, device

    @torch.no_grad()
    def __call__(self, weight: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
        """The weight [O, I] that the quantized layer stands for, in the dtype the layer dequantizes to."""
        plain = weight.to(self._device, self._dtype)
        plain = plain.T.contiguous() if transposed else plain.contiguous()
        rounded = self._int8(plain) if self._model.quantization == "int8" else self._four_bits(plain)
        return (rounded.T if transposed else rounded).cpu()

    def _four_bits(self, weight: torch.Tensor) -> torch.Tensor:
        # Params4bit, not quantize_4bit alone: block size and nested statistics stay the library's own.
        packed = Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=self._model.double_quant,
            quant_type=self._model.quantization,
            quant_storage=torch.uint8,
        )._quantize(weight.device)
        return dequantize_4bit(packed.data, packed.quant_state)

    def _int8(self, weight: torch.Tensor) -> torch.Tensor:
        values, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return int8_vectorwise_dequant(values, scales)
