"""Modules that an adapter trains whole, in fp32, on a base in bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.inference.generate import Sampling, generate
from finetune.inference.load import load_run
from finetune.inference.mode import inference_mode
from tests.inference.test_generate import PROMPTS, STOP, look, same

IDS = torch.tensor([[256, *range(30)]])


@pytest.mark.usefixtures("same_dtypes")
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"], ["norm"], ["mlp"], ["self_attn"]])
def test_modules_trained_whole_infer_on_a_bf16_base(
    make_run: Callable[..., tuple[Path, Any]], names: list[str]
) -> None:
    adapter = {"rank": 4, "modules_to_save": names}
    run, trained = make_run("adapter", adapter=adapter, training={"epochs": 1.0, "precision": "bf16-mixed"})
    loaded = load_run(run)
    before = look(loaded.model)
    for prompts in (PROMPTS[:1], PROMPTS):
        assert all(one.token_ids for one in generate(loaded.model, loaded.tokenizer, prompts, STOP, Sampling(4)))
    with inference_mode(loaded.model), inference_mode(trained):
        got, want = loaded.model(input_ids=IDS).logits, trained(input_ids=IDS).logits
        with loaded.model.disable_adapter(), trained.disable_adapter():
            bare, exact = loaded.model(input_ids=IDS).logits, trained(input_ids=IDS).logits
    assert got.dtype == bare.dtype == torch.bfloat16
    assert (got.float() - want).norm() <= 2 * (bare.float() - exact).norm() * want.norm() / exact.norm()
    same(before, look(loaded.model))
