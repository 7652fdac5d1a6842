"""What loading leaves as a run needs it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    RwkvConfig,
    XLNetConfig,
)

from finetune.models.load import context_length, fit_vocabulary
from tests.tiny import CONFIGS, write_tokenizer

YARN: dict[str, Any] = {"rope_type": "yarn", "original_max_position_embeddings": 512, "rope_theta": 10000.0}


class Part:
    """An embedding of four rows on another device, as far as resizing looks at it."""

    def __init__(self) -> None:
        self.weight = SimpleNamespace(shape=(4, 8), device=torch.device("cuda", 1))

    def to(self, device: torch.device) -> None:
        self.weight.device = device


def test_new_rows_are_drawn_on_the_cpu_whatever_device_the_model_is_on() -> None:
    embedding, head, drawn = Part(), Part(), []

    def resize(rows: int) -> None:
        drawn.append((rows, embedding.weight.device.type, head.weight.device.type, torch.initial_seed()))

    base = SimpleNamespace(
        get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head, resize_token_embeddings=resize
    )
    before = torch.get_rng_state()
    fit_vocabulary(base, range(4), seed=7)
    assert drawn == []
    fit_vocabulary(base, range(6), seed=7)
    assert drawn == [(6, "cpu", "cpu", 7)]
    assert embedding.weight.device == head.weight.device == torch.device("cuda", 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", ["llama", "tied_llama"])
def test_fm27_a_base_with_more_rows_than_tokens_keeps_them(architecture: str, tmp_path: Path) -> None:
    """Vocabularies are padded for speed: without its last rows an adapter's base is no longer the published one."""
    config = CONFIGS[architecture]()
    config.vocab_size = 336
    base = AutoModelForCausalLM.from_config(config)
    parts = base.get_input_embeddings(), base.get_output_embeddings()
    before = [part.weight.detach().clone() for part in parts]
    tokenizer = write_tokenizer(tmp_path)
    assert len(tokenizer) == 320
    fit_vocabulary(base, tokenizer, seed=0)
    assert base.config.vocab_size == 336
    for part, weight in zip((base.get_input_embeddings(), base.get_output_embeddings()), before, strict=True):
        assert part.weight.shape[0] == 336 and torch.equal(part.weight, weight)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (GPT2Config(n_positions=64), 64),
        (BloomConfig(), None),
        (FalconConfig(alibi=True), None),
        (FalconConfig(max_position_embeddings=512), 512),
        (RwkvConfig(), None),
        (XLNetConfig(), None),
        (LlamaConfig(max_position_embeddings=512), 512),
        (LlamaConfig(max_position_embeddings=512, rope_parameters=YARN | {"factor": 4.0}), 2048),
        (LlamaConfig(max_position_embeddings=2048, rope_parameters=YARN | {"factor": 4.0}), 2048),
    ],
)
def test_the_context_that_a_model_was_made_for(config: Any, length: int | None) -> None:
    assert context_length(config) == length
