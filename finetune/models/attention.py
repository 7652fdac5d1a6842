"""Which attention a model can use, and what that allows: isolating packed samples, sharing a prefix."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.errors import ModelError
from finetune.kernels.attention import NAME as SEGMENTS
from finetune.kernels.layout import RowLayout, dense_mask
from finetune.kernels.layout import position_ids as layout_positions
from finetune.recipe.schema import DataSection, ModelSection

# Implementations that can keep packed samples apart, by a row layout or a dense mask.
ISOLATING = (SEGMENTS, "sdpa", "eager")


def choose_attention(config: Any, model: ModelSection, data: DataSection) -> str:
    """The implementation to load the model with.

    Raises:
        ModelError: if the recipe asks for packing and the implementation or the model cannot isolate samples.
    """
    name: str = model.attention
    if name == "auto":
        name = SEGMENTS if takes_segments(config, data.max_seq_len) else "sdpa"
    elif name == SEGMENTS and not takes_segments(config, data.max_seq_len):
        raise ModelError(f"model.attention: segments does not fit {config.model_type}; use auto or sdpa")
    if data.packing in ("isolated", "shared_prefix"):
        reason = why_not_packed(config, name)
        if reason is not None:
            raise ModelError(f"data.packing: {data.packing} is not possible: {reason}; use data.packing: none")
    return name


def why_not_packed(config: Any, attention: str) -> str | None:
    """Why samples of one row could see each other with this model; None if they cannot."""
    text = config.get_text_config()
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return f"{text.model_type} with ALiBi derives positions from the row, not from the sample"
    if getattr(text, "model_type", "") in _RECURRENT or "linear_attention" in (
        getattr(text, "layer_types", None) or ()
    ):
        return f"{text.model_type} has recurrent layers, whose state would run on into the next sample"
    if attention not in ISOLATING:
        return f"model.attention: {attention} cannot isolate samples"
    return None


_RECURRENT = ("mamba", "mamba2", "rwkv", "recurrent_gemma", "falcon_mamba", "jamba", "falcon_h1", "bamba")


def takes_segments(config: Any, max_seq_len: int) -> bool:
    """Whether block attention computes exactly what the model's own attention would."""
    text = config.get_text_config()
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return False
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if not getattr(model_class, "_supports_attention_backend", False):
        return False
    if getattr(text, "attn_logit_softcapping", None) is not None or text.to_dict().get("attention_dropout"):
        return False
    if text.model_type in _RECURRENT or text.model_type == "gpt_oss":
        return False
    window = sliding_window(text)
    return window is None or max_seq_len <= window


def sliding_window(text_config: Any) -> int | None:
    """The window of the model's local layers, if it has any."""
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    if getattr(text_config, "use_sliding_window", True) is False:
        return None
    window: int | None = getattr(text_config, "sliding_window", None)
    return window


def dense_masks(
    config: Any, layout: RowLayout, num_tokens: int, device: torch.device
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The `attention_mask` of a model without block attention: [1, 1, T, T], by layer type where it has several."""
    text = config.get_text_config()
    full = dense_mask(layout, num_tokens, device)
    window = sliding_window(text)
    if window is None:
        return full
    positions = layout_positions(layout, num_tokens).to(device)[0]
    local = full & ((positions[:, None] - positions[None, :]) < window)
    if getattr(text, "layer_types", None) is None:
        return local
    return {"full_attention": full, "sliding_attention": local}
