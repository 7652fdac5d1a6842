"""Which models get attention by blocks."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from finetune.models.attention import stretched_rope, takes_segments, why_not_packed


def config_of(kind: str, values: dict[str, Any]) -> Any:
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    return getattr(transformers, kind)(**values)


@pytest.mark.parametrize(
    ("kind", "values", "takes"),
    [
        ("LlamaConfig", {}, True),
        ("LlamaConfig", {"attention_dropout": 0.1}, False),
        ("GPT2Config", {}, False),
        ("GPT2Config", {"attn_pdrop": 0.0}, True),
        ("DbrxConfig", {"attn_config": {"attn_pdrop": 0.1}}, False),
        ("OPTConfig", {}, True),
        ("DeepseekV2Config", {}, False),
        ("DeepseekV3Config", {}, False),
        ("DeepseekV3Config", {"v_head_dim": 192}, True),
        ("MiniCPM3Config", {}, False),
        ("Gemma2Config", {}, False),
        ("GraniteSWAConfig", {}, False),
        ("GraniteMoeSWAConfig", {}, False),
        ("FlintConfig", {}, False),
        ("DogeConfig", {}, False),
        ("ZayaConfig", {}, False),
    ],
)
def test_block_attention_is_for_models_that_it_computes_exactly(kind: str, values: dict[str, Any], takes: bool) -> None:
    assert takes_segments(config_of(kind, values), 128) == takes


@pytest.mark.parametrize(
    ("kind", "values", "why_not"),
    [
        ("LlamaConfig", {}, None),
        ("Gemma3TextConfig", {}, None),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "layers of kind conv"),
        ("Lfm3Config", {}, "layers of kind conv"),
        ("Inkling2TextConfig", {}, "layers of kind hybrid"),
        ("ZayaConfig", {}, "recurrent layers"),
        ("xLSTMConfig", {}, "recurrent layers"),
        ("Qwen3NextConfig", {}, "recurrent layers"),
        ("BartConfig", {}, "takes no positions"),
        ("TrOCRConfig", {}, "takes no positions"),
        ("BloomConfig", {}, "ALiBi"),
    ],
)
def test_models_that_look_along_the_row_are_not_packed(kind: str, values: dict[str, Any], why_not: str | None) -> None:
    reason = why_not_packed(config_of(kind, values), "sdpa", 128)
    assert reason is None if why_not is None else reason is not None and why_not in reason


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({}, None),
        ({**LONGROPE, "original_max_position_embeddings": 100}, 100),
        ({**LONGROPE, "original_max_position_embeddings": 128}, None),
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
        ({"rope_type": "linear", "factor": 4.0}, None),
    ],
)
def test_a_rotation_that_follows_the_longest_sample_is_not_packed(values: dict[str, Any], limit: int | None) -> None:
    longest = 64 if values.get("rope_type") == "dynamic" else 256
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": 10000.0, **values},
    )
    rope = stretched_rope(config, 128)
    assert (None if rope is None else rope.limit) == limit
    assert (why_not_packed(config, "segments", 128) is None) == (limit is None)
