from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.inference.dense import dense_weights
from finetune.inference.generate import Sampling, generate
from finetune.inference.mode import inference_mode
from finetune.kernels.products import has_bf16_units
from finetune.models.adapters import attach_adapter
from finetune.recipe.schema import LoraSection
from tests.inference.conftest import build_llama
from tests.inference.test_generate import quantized

IDS = torch.tensor([[256, *range(30)]])


@pytest.mark.parametrize("rslora", [False, True])
def test_dense_copies_compute_what_the_quantized_layers_do(base_folder: Path, tokenizer: Any, rslora: bool) -> None:
    model = quantized(base_folder, tokenizer, alpha=12, use_rslora=rslora)
    with inference_mode(model):
        want = model(input_ids=IDS).logits
        with dense_weights(model) as size:
            got = model(input_ids=IDS).logits
            names = [name for name, _ in model.named_modules()]
            kinds = {type(module).__name__ for module in model.modules()}
    assert size == 4 * sum(
        layer.in_features * layer.out_features
        for layer in build_llama().model.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    assert "Linear4bit" not in kinds and not any("lora" in name for name in names)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_unquantized_base_is_not_changed(tokenizer: Any) -> None:
    base = build_llama()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = attach_adapter(base, LoraSection(rank=4), tokenizer, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with inference_mode(model):
        want = model(input_ids=IDS).logits
        with dense_weights(model) as size:
            assert size > 0
            torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
        with model.disable_adapter(), dense_weights(model):
            bare = model(input_ids=IDS).logits
    torch.testing.assert_close(bare, build_llama()(IDS).logits.detach())
    with model.disable_adapter():
        for name, tensor in model.get_base_model().state_dict().items():
            if "lora" not in name:
                assert torch.equal(tensor, weights[name.replace(".base_layer", "")])


def test_of_dora_only_the_base_is_expanded(base_folder: Path, tokenizer: Any) -> None:
    model = quantized(base_folder, tokenizer, use_dora=True)
    with inference_mode(model):
        want = model(input_ids=IDS).logits
        with dense_weights(model) as size:
            assert size > 0
            assert any("lora_A" in name for name, _ in model.named_modules())
            torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_copies_that_do_not_fit_are_not_made(base_folder: Path, tokenizer: Any) -> None:
    model = quantized(base_folder, tokenizer)
    with dense_weights(model, max_bytes=1000) as size:
        assert size == 0


@pytest.mark.usefixtures("same_dtypes")
@pytest.mark.parametrize("has_units", [False, True])
def test_a_tied_head_with_trained_tokens_decodes_one_prompt(
    tokenizer: Any, has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.inference.dense.has_bf16_units", lambda: has_units)
    base = build_llama(tie_word_embeddings=True).bfloat16()
    model = attach_adapter(base, LoraSection(rank=4, trainable_tokens=[5, 7]), tokenizer, seed=0)
    with inference_mode(model):
        want = model(input_ids=IDS[:, :2]).logits
        with dense_weights(model) as size:
            got = model(input_ids=IDS[:, :2]).logits
    assert size > 0 and got.dtype == torch.bfloat16
    assert (got - want).norm() < 0.1 * want.norm()
    (completion,) = generate(model, tokenizer, [[256, 5, 9]], [257], Sampling(max_new_tokens=3))
    assert completion.token_ids


@pytest.mark.skipif(has_bf16_units(), reason="the processor has units for bf16")
def test_without_bf16_units_copies_are_fp32(base_folder: Path, tokenizer: Any) -> None:
    model = quantized(base_folder, tokenizer)
    with inference_mode(model):
        exact = model(input_ids=IDS).logits
        model = model.bfloat16()
        want = model(input_ids=IDS).logits
        with dense_weights(model) as size:
            got = model(input_ids=IDS).logits
            assert model.get_base_model().get_output_embeddings().weight.dtype == torch.float32
        with dense_weights(model, max_bytes=size - 1) as narrow:
            again = model(input_ids=IDS).logits
    assert 0 < narrow < size  # the head stays as it is
    assert got.dtype == again.dtype == torch.bfloat16
    for logits in (got, again):
        assert (logits.float() - exact).norm() <= 1.5 * (want.float() - exact).norm() < 0.1 * exact.norm()
