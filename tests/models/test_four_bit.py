"""4-bit weights on a CPU, for widths that are no multiple of bitsandbytes' block of 64."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

from finetune.models.four_bit import dequantize_4bit
from finetune.models.load import quantization_config
from finetune.recipe.schema import ModelSection


def reference(codes: torch.Tensor, state: object) -> torch.Tensor:
    """Levels times the maxima of consecutive blocks, as quantize_4bit is documented."""
    flat = codes.view(-1).long()
    levels = state.code[torch.stack([flat >> 4, flat & 15], 1).view(-1)]
    return (levels * state.absmax.repeat_interleave(state.blocksize)[: len(levels)]).view(state.shape)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [32, 64, 96, 128, 160])
def test_every_width_is_expanded_right(width: int, dtype: torch.dtype, quant_type: str) -> None:
    weight = torch.randn(63, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    assert torch.equal(dequantize_4bit(codes, state), reference(codes, state).to(dtype))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_computes_with_these_values(tokens: int) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = Linear4bit(96, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
    layer.to("cpu")
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
    want = x @ reference(layer.weight.data, layer.weight.quant_state).t()
    assert (layer(x) - want).norm() < 1e-2 * want.norm()


@pytest.mark.parametrize(
    ("chosen", "precision", "dtype"),
    [
        ("auto", "16-mixed", torch.float16),
        ("auto", "bf16-mixed", torch.bfloat16),
        ("auto", "32-true", torch.bfloat16),
        ("bf16", "16-mixed", torch.bfloat16),
    ],
)
def test_products_are_computed_in_what_the_precision_computes_in(
    chosen: str, precision: str, dtype: torch.dtype
) -> None:
    section = ModelSection(name="any", quantization="nf4", compute_dtype=chosen)
    settings = quantization_config(section, precision, shardable=False)
    assert settings is not None and settings.bnb_4bit_compute_dtype == dtype
