"""Which attention a model can use, and what that allows: isolating packed samples, sharing a prefix."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.errors import ModelError
from finetune.kernels.attention import NAME as SEGMENTS
from finetune.kernels.layout import RowLayout, dense_mask, on_device
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
        name = SEGMENTS if takes_segments(config, data.max_seq_len) else loadable_attention(config, "sdpa")
    elif name == SEGMENTS and not takes_segments(config, data.max_seq_len):
        raise ModelError(f"model.attention: segments does not fit {config.model_type}; use auto")
    elif loadable_attention(config, name) != name:
        raise ModelError(f"model.attention: {name} cannot compute {config.model_type}'s attention; use auto or eager")
    if data.packing in ("isolated", "shared_prefix"):
        reason = why_not_packed(config, name, data.max_seq_len)
        if reason is not None:
            raise ModelError(f"data.packing: {data.packing} is not possible: {reason}; use data.packing: none")
    return name


def packs(config: Any, attention: str, data: DataSection) -> bool:
    """Whether the recipe's samples come in packed rows."""
    return data.packing != "none" and why_not_packed(config, attention, data.max_seq_len) is None


def why_not_packed(config: Any, attention: str, max_seq_len: int) -> str | None:
    """Why samples of one row could see each other with this model; None if they cannot."""
    text = config.get_text_config()
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return f"{text.model_type} with ALiBi derives positions from the row, not from the sample"
    found: Any = _model_class(config)
    if text.model_type in _RECURRENT or getattr(found, "_is_stateful", False):
        return f"{text.model_type} has recurrent layers, whose state would run on into the next sample"
    if others := _layer_kinds(text) - _ATTENTION_KINDS:
        return f"{text.model_type} has layers of kind {min(others)}, which look past the bounds of a sample"
    if found is not None and "position_ids" not in inspect.signature(found.forward).parameters:
        return f"{text.model_type} takes no positions: it counts along the row, not along the sample"
    if (rope := stretched_rope(config, max_seq_len)) is not None:
        return (
            f"{text.model_type}'s {rope.kind} rotary embedding turns a whole row as its longest sample needs, if that "
            f"has more than {rope.limit} tokens (data.max_seq_len: {max_seq_len})"
        )
    if attention not in ISOLATING:
        return f"model.attention: {attention} cannot isolate samples here (auto, segments, sdpa and eager can)"
    return None


@dataclass(frozen=True)
class StretchedRope:
    """A rotary embedding whose frequencies are others for samples of more than `limit` tokens."""

    kind: str
    limit: int


def stretched_rope(config: Any, max_seq_len: int) -> StretchedRope | None:
    """The model's, if its frequencies depend on lengths up to `max_seq_len`.

    transformers chooses them by the largest position of a forward pass (`dynamic_rope_update`).
    """
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    for rope in (found, *found.values()):
        kind = (rope.get("rope_type") or "") if isinstance(rope, dict) else ""
        if kind != "longrope" and "dynamic" not in kind:
            continue
        original = rope.get("original_max_position_embeddings") if kind == "longrope" else None
        limit = original or text.max_position_embeddings
        if max_seq_len > limit:
            return StretchedRope(kind, limit)
    return None


# Of models whose own repository carries their class; transformers marks its own.
_RECURRENT = ("mamba", "mamba2", "rwkv", "recurrent_gemma", "falcon_mamba", "jamba", "falcon_h1", "bamba")

# Kinds of layers, by transformers' names, that a mask over the row isolates. Others convolve along it, carry a state,
# or cut it up and choose keys by their place in it.
_ATTENTION_KINDS = {"full_attention", "sliding_attention"}


def _layer_kinds(text_config: Any) -> set[str]:
    return set(getattr(text_config, "layer_types", None) or ())


# Models whose layers pass a mask of their own making.
_OWN_MASK = ("doge",)

# What configurations call the share of attention weights that is dropped.
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def takes_segments(config: Any, max_seq_len: int) -> bool:
    """Whether block attention computes exactly what the model's own attention would."""
    text = config.get_text_config()
    if not _asks_for_segments(config):
        return False
    # What sdpa cannot compute, blocks cannot either: capped scores, sinks.
    if loadable_attention(config, "sdpa") != "sdpa" or _drops_attention(text) or _value_size_differs(text):
        return False
    if text.model_type in (*_RECURRENT, *_OWN_MASK) or _layer_kinds(text) - _ATTENTION_KINDS:
        return False
    window = sliding_window(text)
    return window is None or max_seq_len <= window


def _asks_for_segments(config: Any) -> bool:
    """Whether the model asks transformers' registry for its attention, or is a Falcon that `models.falcon` answers."""
    found = _model_class(config)
    if found is not None and config.model_type == "falcon":
        return not config.alibi
    return bool(getattr(found, "_supports_attention_backend", False))


def _drops_attention(text_config: Any) -> bool:
    """Whether training drops attention weights; DBRX says so in a section of its own."""
    values = text_config.to_dict()
    sections = (values, values.get("attn_config") or {})
    return any(section.get(name) for section in sections for name in _ATTENTION_DROPOUT)


def _value_size_differs(text_config: Any) -> bool:
    """Whether values are of another size than queries and keys, as in most multi-head latent attention."""
    size = getattr(text_config, "v_head_dim", None)
    # Of latent attention, head_dim is the rotated part alone.
    return size is not None and size != getattr(text_config, "qk_head_dim", getattr(text_config, "head_dim", None))


def loadable_attention(config: Any, name: str, model_class: type | None = None) -> str:
    """`name`, or eager in place of an sdpa that cannot compute the model's (Gemma 2 caps scores, gpt-oss has sinks).

    Without `model_class`, the class that transformers has for `config`.
    """
    # Some releases of transformers 5 let Gemma 2 run sdpa, which leaves the cap out without a word.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    supported = getattr(model_class or _model_class(config), "_supports_sdpa", True) and not capped
    return "eager" if name == "sdpa" and not supported else name


def _model_class(config: Any) -> type | None:
    """The class that transformers loads for `config`; None for one that the model's own repository carries."""
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple) else found


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
    """The `attention_mask` of a model without block attention: [1, 1, T, T], by layer type where it has several.

    Boolean for sdpa. Eager attention adds its mask to the scores, where True would be 1 and hide nothing: there it is
    fp32, 0 for what a query may see.
    """
    text = config.get_text_config()
    full = dense_mask(layout, num_tokens, device)
    form = _added if config._attn_implementation == "eager" else _unchanged
    window = sliding_window(text)
    if window is None:
        return form(full)
    positions = on_device(layout_positions(layout, num_tokens), device)[0]
    local = full & ((positions[:, None] - positions[None, :]) < window)
    if getattr(text, "layer_types", None) is None:
        return form(local)
    return {"full_attention": form(full), "sliding_attention": form(local)}


def _unchanged(mask: torch.Tensor) -> torch.Tensor:
    return mask


def _added(mask: torch.Tensor) -> torch.Tensor:
    # The lowest value of bf16 is finite in fp32 too: no row becomes NaN if a model casts its mask.
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.bfloat16).min)
