"""Prompts that begin alike: what that computes, and when it is not done."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig

from finetune.inference.generate import Sampling, generate
from finetune.inference.prefix import MIN_SHARED, SharedPrefix, _common_length
from tests.tiny import CONFIGS

STOP = [299]
LENGTHS = (1, 30, 7, 12, 3)
SHARED = 40


def prompts(shared: int = SHARED) -> list[list[int]]:
    rng = random.Random(0)
    prefix = [rng.randrange(200) for _ in range(shared)]
    # Another first token of each, so that they have no more in common.
    return [[*prefix, 200 + number, *rng.choices(range(200), k=n)] for number, n in enumerate(LENGTHS)]


def model_of(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)  # how much is drawn before depends on what other tests have made of Falcon's layers
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gpt_neox", "falcon"])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_completions_are_those_of_each_prompt_alone(architecture: str, batch_size: int, tokenizer: Any) -> None:
    model, sampling = model_of(CONFIGS[architecture]()), Sampling(max_new_tokens=12)
    alone = [generate(model, tokenizer, [prompt], STOP, sampling)[0] for prompt in prompts()]
    assert len({tuple(completion.token_ids) for completion in alone}) == len(LENGTHS)
    assert SharedPrefix(model, prompts(), 100).length == SHARED
    assert generate(model, tokenizer, prompts(), STOP, sampling, batch_size=batch_size) == alone


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["gemma3"](),  # a window of 64 columns
        FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["window", "falcon with ALiBi", "bloom"],
)
def test_nothing_is_shared_where_columns_count(config: Any, tokenizer: Any) -> None:
    model, sampling = model_of(config), Sampling(max_new_tokens=40)
    assert SharedPrefix(model, prompts(), SHARED + max(LENGTHS) + 40).length == 0
    alone = [generate(model, tokenizer, [prompt], STOP, sampling)[0] for prompt in prompts()]
    assert generate(model, tokenizer, prompts(), STOP, sampling) == alone


def test_the_beginning_is_computed_once(tokenizer: Any) -> None:
    model, seen = model_of(CONFIGS["llama"]()), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    generate(model, tokenizer, prompts(), STOP, Sampling(max_new_tokens=2), batch_size=3)
    assert seen == [(1, SHARED), (3, 31), (3, 1), (2, 4), (2, 1)]
    seen.clear()
    generate(model, tokenizer, prompts(MIN_SHARED - 1), STOP, Sampling(max_new_tokens=1))
    assert seen == [(5, MIN_SHARED - 1 + 31)]


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([], 0),
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2]], 1),
        ([[1, 2], [1, 2]], 1),
        ([[5], [1, 2, 3]], 0),
        ([[1, 2, 9], [1, 3], [1, 2, 9, 9]], 1),
    ],
)
def test_every_prompt_keeps_a_token_of_its_own(rows: list[list[int]], length: int) -> None:
    assert _common_length(rows) == length
