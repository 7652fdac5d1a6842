"""Falcon's attention by blocks is transformers' own with a dense mask, in every layout of its heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig

from finetune.kernels.attention import NAME as SEGMENTS
from finetune.kernels.attention import packed_row
from finetune.kernels.layout import Group, RowLayout, position_ids
from finetune.models.attention import dense_masks, takes_segments
from finetune.models.load import register_attention

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "one key head": {"multi_query": True},
    "grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "a key head each": {"multi_query": False, "parallel_attn": False, "bias": True},
}
ROW = (Group(9, (11, 20)), Group(0, (17,)))
TOKENS = 60


def values_and_gradients(kind: str, attention: str, row: RowLayout) -> list[torch.Tensor]:
    torch.manual_seed(0)
    config = FalconConfig(**{**SIZES, "alibi": False, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mask = None if attention == SEGMENTS else dense_masks(model.config, row, TOKENS, torch.device("cpu"))
    ids = torch.arange(TOKENS)[None] * 7 % 320
    with packed_row(row):
        out = model(input_ids=ids, position_ids=position_ids(row, TOKENS), attention_mask=mask, use_cache=False)
        out.logits.square().mean().backward()
    return [out.logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [(), ROW], ids=["padded", "packed"])
def test_blocks_are_the_eager_attention(kind: str, row: RowLayout) -> None:
    register_attention()
    got, want = (values_and_gradients(kind, attention, row) for attention in (SEGMENTS, "eager"))
    assert len(got) == len(want) > 10
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_only_alibi_keeps_falcon_from_it(kind: str) -> None:
    assert takes_segments(FalconConfig(**{**SIZES, "alibi": False, **KINDS[kind]}), 4096)
    assert not takes_segments(FalconConfig(**{**SIZES, "alibi": True, **KINDS[kind]}), 4096)
