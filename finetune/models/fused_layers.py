"""Decoder layers whose parts are all fused, run as one autograd function on a CPU (`kernels.decoder_layer`)."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.kernels.attention import NAME, longest_sample, packed_row, row_layout
from finetune.kernels.decoder_layer import DecoderLayer, Norm, native_decoder_layer
from finetune.kernels.layout import Group
from finetune.models.projections import is_active, projection

# Classes of this form: their attention scales, windows and rotates as Llama's does, Qwen 3's with norms of q and k.
OF_LLAMAS_FORM = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
HEAD_NORMS = ("q_norm", "k_norm")

# What transformers passes to a layer that changes nothing in training.
IGNORED = {"position_ids", "use_cache", "cache_position"}


# Where a layer is to be recomputed, transformers does it around its call, or (5.23) within its class's `forward`.
RECOMPUTES_IN_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)


def run_whole(layers: Iterable[Any], fused: Collection[torch.nn.Module]) -> int:
    """Let each decoder layer whose parts are all `fused` run as one function, if that gives what its class gives."""
    whole = [layer for layer in layers if type(layer).__name__ in OF_LLAMAS_FORM and _modules(layer).issubset(fused)]
    if not whole or not _computes_the_same(whole[0]):
        return 0
    for layer in whole:
        layer.forward = MethodType(layer_forward, layer)
    return len(whole)


def layer_forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's forward as one function, or part by part where that does not compute these."""
    if RECOMPUTES_IN_FORWARD and layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(_forward, layer, **kwargs), hidden_states, *args)
    return _forward(layer, hidden_states, *args, **kwargs)


def _forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    out = None if args else _natively(layer, hidden_states, **kwargs)
    by_parts = inspect.unwrap(type(layer).forward)  # without a second recomputation
    return by_parts(layer, hidden_states, *args, **kwargs) if out is None else out


def norm_of(module: Any) -> Norm:
    """An RMSNorm module's weight and epsilon, which has two names."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or 1e-6
    return Norm(module.weight, eps)


def _natively(
    layer: Any,
    x: torch.Tensor,
    *,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **others: Any,
) -> torch.Tensor | None:
    layout, attention = row_layout(), layer.self_attn
    if x.device.type != "cpu" or not layout or position_embeddings is None or not others.keys() <= IGNORED:
        return None
    if attention_mask is not None or past_key_values is not None or not all(map(is_active, _linears(layer))):
        return None
    window = getattr(attention.config, "sliding_window", None)
    if attention.config._attn_implementation != NAME or (window and longest_sample(layout, x.shape[1]) > window):
        return None
    return native_decoder_layer(x, *position_embeddings, _parts(layer), layout)


def _parts(layer: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        norm_of(layer.input_layernorm),
        [projection(getattr(attention, name)) for name in QKV],
        [projection(attention.o_proj)],
        norm_of(layer.post_attention_layernorm),
        [projection(getattr(mlp, name)) for name in GATE_UP],
        [projection(mlp.down_proj)],
        attention.head_dim,
        attention.scaling,
        *map(norm_of, _head_norms(attention)),
    )


def _modules(layer: Any) -> set[torch.nn.Module]:
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)]
    return {attention, layer.mlp, *norms, *_linears(layer)}


def _linears(layer: Any) -> list[torch.nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    inputs = [getattr(attention, name) for name in QKV]
    return [*inputs, attention.o_proj, *(getattr(mlp, name) for name in GATE_UP), mlp.down_proj]


def _head_norms(attention: Any) -> list[torch.nn.Module]:
    return [getattr(attention, name) for name in HEAD_NORMS if hasattr(attention, name)]


def _computes_the_same(layer: Any) -> bool:
    """Whether both ways give one output on made-up tokens: what a class computes may change with a release.

    The kernels are the same, so outputs differ by no more than a rounding. Yes where there is nothing to compare:
    weights elsewhere than in memory, no kernels.
    """
    weight = layer.input_layernorm.weight
    if any(p.device.type != "cpu" for p in layer.parameters()) or weight.dtype != torch.bfloat16:
        return True
    tokens, head_size = 32, layer.self_attn.head_dim
    x = torch.sin(torch.arange(tokens * len(weight), device="cpu") * 0.37).view(1, tokens, -1).to(weight.dtype)
    angle = torch.arange(tokens, device="cpu")[:, None] * 0.1 ** torch.arange(head_size // 2, device="cpu").float()
    rotary = tuple(f(torch.cat((angle, angle), -1))[None].to(weight.dtype) for f in (torch.cos, torch.sin))
    with torch.no_grad(), packed_row((Group(0, (tokens - 9, 9)),)):
        got = _natively(layer, x, position_embeddings=rotary)  # type: ignore[arg-type]
        if got is None:
            return True
        want = type(layer).forward(layer, x, position_embeddings=rotary)
    return bool((got.float() - want.float()).norm() <= 2e-3 * want.float().norm())
