"""LoRA linear layers as one autograd function, for layers that share their input: y_i = x W_iᵀ + b_i + s_i x A_iᵀ B_iᵀ.

PEFT's layer takes several graph nodes, casts x to fp32 and back, and makes the update a tensor of its own. Here q, k
and v (or gate and up) are one node in the compute dtype: their A products are one, x is kept once, and its gradient is
summed in place. A frozen 4-bit weight is expanded when it is needed and dropped again. The adapter's parameters stay
PEFT's own. On many CPUs each pass is one native kernel (`cpp/lora.cpp` for AMX, `cpp/lora_fma.cpp`), which reads 4 bits
as they are stored.

Shapes: T tokens, D inputs, O outputs, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from finetune.kernels import native

# Gives the frozen weight [O, D] in the compute dtype. Called in forward and again in backward: under FSDP the weight is
# whole only then, and a 4-bit weight is expanded each time.
Weight = Callable[[torch.dtype], torch.Tensor]


class FourBit(NamedTuple):
    """A weight [O, D] in bitsandbytes' 4 bits, for the native kernel: `cpp/weight.h` has the form."""

    codes: torch.Tensor  # uint8 [O * D / 2]
    levels: torch.Tensor  # fp32 [16]
    absmax: torch.Tensor | None  # fp32 [blocks]; None if they are quantized themselves
    absmax_codes: torch.Tensor | None = None  # uint8 [blocks]
    absmax_levels: torch.Tensor | None = None  # fp32 [256]
    absmax_absmax: torch.Tensor | None = None  # fp32
    absmax_offset: torch.Tensor | None = None  # fp32, one
    block: int = 64
    absmax_block: int = 256


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer and its LoRA update, of rank 0 where it has none."""

    weight: Weight
    bias: torch.Tensor | None
    a_RD: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    # The weight as it is stored, if the native kernel can read that.
    four_bit: Callable[[], FourBit | None] = lambda: None


def lora_linears(x: torch.Tensor, layers: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """Each layer's output [..., O] in the compute dtype: autocast's where it is on, else x's."""
    x = x.to(compute_dtype(x))  # once: `native_linears` then has nothing to cast
    out = native_linears(x, layers)
    if out is None:
        out = _LoraLinears.apply(x, layers, *matrices_of(layers))
    return out


def native_linears(x: torch.Tensor, layers: Sequence[Projection]) -> tuple[torch.Tensor, ...] | None:
    """As `lora_linears` by the native kernel; None if that does not compute these."""
    if x.device.type != "cpu":
        return None
    x, matrices = x.to(compute_dtype(x)), matrices_of(layers)
    return _NativeLoraLinears.apply(x, layers, *matrices) if native_takes(x, matrices) else None


def traced_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a_RD: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As `lora_linears` for one layer with a dense weight [O, D], in plain operations, which torch.compile fuses."""
    dtype = compute_dtype(x)
    x = x.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        return y + F.linear(F.linear(x, a_RD.to(dtype)), b_OR.to(dtype)) * scale


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def matrices_of(layers: Sequence[Projection]) -> list[torch.Tensor]:
    """A and B of each layer, in turns."""
    return [matrix for layer in layers for matrix in (layer.a_RD, layer.b_OR)]


class _LoraLinears(torch.autograd.Function):
    """Every operand has the compute dtype, so autocast has nothing to do in here."""

    @staticmethod
    def forward(ctx: Any, x, layers: Sequence[Projection], *matrices):  # type: ignore[no-untyped-def]
        x_TD = x.reshape(-1, x.shape[-1])
        outputs = []
        xa_all = x_TD @ _cast([layer.a_RD for layer in layers], x.dtype).t()
        for layer, xa_TR in zip(layers, _by_layer(xa_all, layers), strict=True):
            y_TO = F.linear(x_TD, layer.weight(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
            if layer.b_OR.numel():
                y_TO.addmm_(xa_TR, _cast([layer.b_OR], x.dtype).t(), alpha=layer.scale)
            # No view to autograd: Falcon adds to its layers' outputs in place.
            outputs.append(torch.ops.aten._unsafe_view(y_TO, (*x.shape[:-1], y_TO.shape[-1])))
        ctx.save_for_backward(x, xa_all)
        ctx.layers = layers
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        x, xa_all = ctx.saved_tensors
        layers: Sequence[Projection] = ctx.layers
        x_TD = x.reshape(-1, x.shape[-1])
        db = []
        dx_TD = None
        dxa_all = torch.empty_like(xa_all)
        parts = zip(layers, grads, _by_layer(xa_all, layers), _by_layer(dxa_all, layers), strict=True)
        for layer, dy, xa_TR, dxa_TR in parts:
            dy_TO = dy.reshape(-1, dy.shape[-1]).to(x.dtype)
            db_OR = dy_TO.new_empty(layer.b_OR.shape)
            if layer.b_OR.numel():
                # beta 0: what they hold before is not read.
                dxa_TR.addmm_(dy_TO, _cast([layer.b_OR], x.dtype), beta=0, alpha=layer.scale)
                db_OR.addmm_(dy_TO.t(), xa_TR, beta=0, alpha=layer.scale)
            db.append(db_OR.to(layer.b_OR.dtype))
            if ctx.needs_input_grad[0]:
                weight = layer.weight(x.dtype)
                dx_TD = dy_TO @ weight if dx_TD is None else dx_TD.addmm_(dy_TO, weight)
        da = _by_layer((dxa_all.t() @ x_TD).to(layers[0].a_RD.dtype), layers, dim=0)
        if dx_TD is not None:
            dx_TD = dx_TD.addmm_(dxa_all, _cast([layer.a_RD for layer in layers], x.dtype)).view_as(x)
        return dx_TD, None, *(grad for pair in zip(da, db, strict=True) for grad in pair)


def _by_layer(tensor: torch.Tensor, layers: Sequence[Projection], dim: int = 1) -> Sequence[torch.Tensor]:
    """Each layer's part of what is stacked along the rank."""
    return [tensor] if len(layers) == 1 else tensor.split_with_sizes(_ranks(layers), dim)


def _ranks(layers: Sequence[Projection]) -> list[int]:
    return [layer.a_RD.shape[0] for layer in layers]


# Casts by their dtype and the tensors that they were made of, which an entry keeps, so that no other takes their ids.
_casts: dict[tuple[Any, ...], tuple[Sequence[torch.Tensor], torch.Tensor]] | None = None


@contextmanager
def unchanged_adapters() -> Iterator[None]:
    """Within this no adapter changes, so each is cast to the compute dtype once, not in every pass over its layer.

    Of a GPU's launches for a row of Falcon-7B every eighth was such a cast.
    """
    global _casts
    outer, _casts = _casts, {} if _casts is None else _casts
    try:
        yield
    finally:
        _casts = outer


def _cast(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The matrices, one below the other, in the compute dtype. Those of rank 0 are made anew for every call."""
    held = [matrix for matrix in matrices if matrix.numel()]
    if len(held) == 1 and held[0].dtype == dtype:
        return held[0]
    key = (dtype, *map(id, held))
    if _casts is not None and key in _casts:
        return _casts[key][1]
    cast = held[0].to(dtype) if len(held) == 1 else torch.cat([matrix.to(dtype) for matrix in held])
    if _casts is not None:
        _casts[key] = (held, cast)
    return cast


class _FourBit(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in FourBit._fields[:7]),
        *((name, ctypes.c_int64) for name in FourBit._fields[7:]),
    )


class _NativeLayer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "bias")),
        ("four_bit", _FourBit),
        *((name, ctypes.c_void_p) for name in ("a", "b", "y", "da", "db")),
        *((name, ctypes.c_int64) for name in ("rank", "outputs")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class _Frozen:
    """A layer's frozen tensors as the kernel reads them; held until it returns."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    four_bit: FourBit | None = None


def _frozen(layer: Projection, dtype: torch.dtype) -> _Frozen:
    four_bit = layer.four_bit()
    bias = None if layer.bias is None else layer.bias.to(dtype).contiguous()
    return _Frozen(None if four_bit is not None else layer.weight(dtype).contiguous(), bias, four_bit)


def native_takes(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> bool:
    """Whether the native kernel computes these: bf16 on fp32 adapters, tokens and widths multiples of 32."""
    widths = [x.numel() // x.shape[-1], x.shape[-1], *(b.shape[0] for b in matrices[1::2])]
    return (
        native.takes(x)
        and all(native.is_plain(m) and m.dtype == torch.float32 and m.is_contiguous() for m in matrices)
        and all(width > 0 and width % native.TILE == 0 for width in widths)
        and native.computes_products()
    )


class _NativeLoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, layers: Sequence[Projection], *matrices):  # type: ignore[no-untyped-def]
        outputs, xa_TR = native_forward(x, layers)
        ctx.save_for_backward(x, xa_TR)
        ctx.layers = layers
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        x, xa_TR = ctx.saved_tensors
        dys = [grad.to(x.dtype).contiguous() for grad in grads]
        dx, d_matrices = native_backward(x, xa_TR, ctx.layers, dys, needs_dx=ctx.needs_input_grad[0])
        return dx, None, *d_matrices


def native_forward(x: torch.Tensor, layers: Sequence[Projection]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Each layer's output of x [..., D], and x Aᵀ of all of them, which the gradient needs."""
    tokens, dim, ranks = x.numel() // x.shape[-1], x.shape[-1], sum(_ranks(layers))
    outputs = tuple(x.new_empty(*x.shape[:-1], layer.b_OR.shape[0]) for layer in layers)
    xa_TR = x.new_empty(tokens, -(-ranks // native.TILE) * native.TILE)
    group = partial(_native_layers, layers, [_frozen(layer, x.dtype) for layer in layers], outputs)
    native.keeps("lora", tokens, dim + ranks)
    native.call("lora_forward", group, x, xa_TR, len(layers), tokens, dim)
    return outputs, xa_TR


def native_backward(
    x: torch.Tensor, xa_TR: torch.Tensor, layers: Sequence[Projection], dys: Sequence[torch.Tensor], *, needs_dx: bool
) -> tuple[Any, list[torch.Tensor]]:
    """The gradient of x, or None if it is not needed, and of each layer's A and B, for its output's dense gradient."""
    tokens, dim = x.numel() // x.shape[-1], x.shape[-1]
    dx = torch.empty_like(x) if needs_dx else None
    frozen = [_Frozen() if dx is None else _frozen(layer, x.dtype) for layer in layers]
    # In the order of the arguments: a and b of each layer.
    d_matrices = [torch.empty_like(matrix) for matrix in matrices_of(layers)]
    group = partial(_native_layers, layers, frozen, dys, d_matrices)
    native.keeps("lora", tokens, sum(dy.shape[-1] for dy in dys) + sum(_ranks(layers)))
    native.call("lora_backward", group, x, xa_TR, dx, len(layers), tokens, dim)
    return dx, d_matrices


def _native_layers(
    layers: Sequence[Projection],
    frozen: Sequence[_Frozen],
    ys: Sequence[torch.Tensor],
    d_matrices: Sequence[torch.Tensor] | None = None,
) -> ctypes.Array[_NativeLayer]:
    array = (_NativeLayer * len(layers))()
    for index, (layer, held, y) in enumerate(zip(layers, frozen, ys, strict=True)):
        four_bit = _FourBit() if held.four_bit is None else _FourBit(*map(_value, held.four_bit))
        da, db = (None, None) if d_matrices is None else d_matrices[2 * index : 2 * index + 2]
        matrices = map(_value, (layer.a_RD, layer.b_OR, y, da, db))
        rank, outputs = layer.a_RD.shape[0], layer.b_OR.shape[0]
        array[index] = _NativeLayer(
            _value(held.weight), _value(held.bias), four_bit, *matrices, rank, outputs, layer.scale
        )
    return array


def _value(argument: torch.Tensor | int | None) -> int | None:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
