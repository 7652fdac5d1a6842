"""Which architectures can be written as GGUF, and what each one needs: llama.cpp's name, keys, and row orders.

Adding one is a function for its keys and a row of `ARCHITECTURES`; the test compares every row with llama.cpp's
own converter. Source: the loaders of llama.cpp (src/models/*.cpp) and its conversion scripts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

from finetune.errors import ModelError

Rows = Callable[[str, Any], "np.ndarray | None"]

_REMEDY = "serve the merged model (finetune merge RUN) with vLLM or transformers instead"
_GEMMA3_PERIOD = 6  # llama.cpp takes every sixth layer of Gemma 3 for a global one


@dataclass(frozen=True)
class Architecture:
    """How one family of models is written."""

    arch: MODEL_ARCH
    add_keys: Callable[[GGUFWriter, Any], None]
    rows: Rows  # (module name, config) -> for every row written, which row of the weight it is; None: as they are
    norm_shift: float = 0.0  # added to the weights of norms
    add_rope_factors: bool = False


def find_architecture(config: Any) -> Architecture:
    """The row for a model's configuration.

    Raises:
        ModelError: the architecture, or one of its settings, is not known to llama.cpp or not to this table.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"GGUF: model_type {config.model_type} is not supported; supported are {known}; {_REMEDY}")
    return found


def tensor_rows(architecture: Architecture, module: str, config: Any, num_rows: int) -> np.ndarray | None:
    """The order in which the rows of a module's weight (or of its LoRA B) are written; None: as they are."""
    order = architecture.rows(module, config)
    assert order is None or len(order) == num_rows, (module, num_rows)
    return order


def rope_factors(config: Any) -> np.ndarray | None:
    """Llama 3.1's divisors of the rotary frequencies [head_dim / 2], or None for another kind of rope.

    Source: transformers, modeling_rope_utils.py, `_compute_llama3_parameters`.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    dim, old = _head_dim(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    share = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)  # 1: left as it is, 0: divided by factor
    return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention", rope))


def _require(condition: bool, config: Any, what: str) -> None:
    if not condition:
        raise ModelError(f"GGUF: llama.cpp cannot run this {config.model_type}: {what}; {_REMEDY}")


def _add_common(writer: GGUFWriter, config: Any) -> None:
    """What all decoders of the Llama family have."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    _add_rope(writer, config)


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    rope = _rope(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", "default")
    supported = ("default", "linear", "yarn", "llama3")
    _require(kind in supported, config, f"rope_type {kind} (it knows {', '.join(supported)})")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def _add_llama(writer: GGUFWriter, config: Any) -> None:
    _require(config.hidden_act == "silu", config, f"hidden_act {config.hidden_act}")
    _add_common(writer, config)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_vocab_size(config.vocab_size)


def _add_qwen(writer: GGUFWriter, config: Any) -> None:
    _require(not getattr(config, "use_sliding_window", False), config, "use_sliding_window is on")
    _require(config.hidden_act == "silu", config, f"hidden_act {config.hidden_act}")
    _add_common(writer, config)


def _add_gemma3(writer: GGUFWriter, config: Any) -> None:
    scale_of = config.query_pre_attn_scalar
    expected = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    _require(scale_of == expected, config, f"query_pre_attn_scalar {scale_of} (it takes {expected})")
    _require(config.attn_logit_softcapping is None, config, "attn_logit_softcapping is set")
    _require(not getattr(config, "use_bidirectional_attention", False), config, "attention is bidirectional")
    for number, kind in enumerate(config.layer_types, 1):
        want = "sliding_attention" if number % _GEMMA3_PERIOD else "full_attention"
        _require(kind == want, config, f"layer {number} has {kind} (it takes {want})")
    _add_common(writer, config)
    writer.add_sliding_window(config.sliding_window)
    local = config.rope_parameters.get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_falcon(writer: GGUFWriter, config: Any) -> None:
    _require(not config.alibi, config, "alibi is on")
    _require(not config.bias, config, "linear layers have biases")
    _require(config.parallel_attn or config.new_decoder_architecture, config, "parallel_attn is off")
    kind = _rope(config).get("rope_type", "default")
    _require(kind == "default", config, f"rope_type {kind}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_tensor_data_layout("jploski")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_falcon_groups(config))
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_rope_freq_base(_rope(config).get("rope_theta", 10000.0))


def _falcon_groups(config: Any) -> int:
    """Key-value heads; `num_kv_heads` counts only in the new decoder."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _no_rows(module: str, config: Any) -> None:
    return None


def _llama_rows(module: str, config: Any) -> np.ndarray | None:
    """llama.cpp rotates neighbours (0, 1), transformers rotates halves (0, d/2): interleave the halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.rpartition(".")[2])
    if heads is None:
        return None
    dim = _head_dim(config)
    return np.arange(heads * dim).reshape(heads, 2, dim // 2).swapaxes(1, 2).reshape(-1)


def _falcon_rows(module: str, config: Any) -> np.ndarray | None:
    """From groups of (queries, one key, one value) to all queries, all keys, all values."""
    if not module.endswith("query_key_value"):
        return None
    groups, heads = _falcon_groups(config), config.num_attention_heads
    per_group, dim = heads // groups, config.hidden_size // heads
    grouped = np.arange(groups * (per_group + 2) * dim).reshape(groups, per_group + 2, dim)
    parts = (grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1])
    return np.concatenate([part.reshape(-1) for part in parts])


_LLAMA = Architecture(MODEL_ARCH.LLAMA, _add_llama, _llama_rows, add_rope_factors=True)

# transformers' model_type (SmolLM2 is a llama) to its row.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(MODEL_ARCH.QWEN2, _add_qwen, _no_rows),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, _add_qwen, _no_rows),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, _add_gemma3, _no_rows, norm_shift=1.0),
    "falcon": Architecture(MODEL_ARCH.FALCON, _add_falcon, _falcon_rows),
}
