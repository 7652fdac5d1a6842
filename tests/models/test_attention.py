"""Which models get attention by blocks."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from finetune.models.attention import takes_segments


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
    ],
)
def test_block_attention_is_for_models_that_it_computes_exactly(kind: str, values: dict[str, Any], takes: bool) -> None:
    config = getattr(transformers, kind)(**values)
    assert takes_segments(config, 128) == takes
