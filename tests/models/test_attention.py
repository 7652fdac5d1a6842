"""Which models get attention by blocks."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from finetune.models.attention import takes_segments, why_not_packed


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
    config = getattr(transformers, kind)(**values)
    assert takes_segments(config, 128) == takes


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
    reason = why_not_packed(getattr(transformers, kind)(**values), "sdpa")
    assert reason is None if why_not is None else reason is not None and why_not in reason
