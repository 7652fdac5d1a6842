"""Samples of one packed row do not see each other: a whole model, from its token ids to its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from finetune.data.batches import MicroBatch
from finetune.errors import ModelError
from finetune.inference.mode import inference_mode
from finetune.kernels.attention import NAME as SEGMENTS
from finetune.kernels.attention import packed_row
from finetune.kernels.layout import Group, RowLayout, position_ids
from finetune.models.adapters import attach_adapter
from finetune.models.heads import decoder_layers
from finetune.models.isolation import check_isolation
from finetune.models.load import register_attention
from finetune.recipe.schema import LoraSection
from finetune.training.module import LossModel
from tests.tiny import CONFIGS, SWIGLU

# Two samples behind a prefix, then one without; the rest is padding.
ROW = (Group(9, (11, 20)), Group(0, (17,)))
PARTS = {"prefix": slice(0, 9), "first": slice(9, 20), "second": slice(20, 40), "third": slice(40, 57)}
TOKENS = 64
SEEN_BY = {"prefix": {"prefix", "first", "second"}, "first": {"first"}, "second": {"second"}, "third": {"third"}}


def logits_of(model: LossModel, ids: torch.Tensor, layout: RowLayout | None) -> torch.Tensor:
    none = torch.zeros(0, dtype=torch.int64)
    micro = MicroBatch(ids[None], position_ids(layout or (), TOKENS), none, none, layout, TOKENS)
    with packed_row(layout), torch.no_grad():
        logits: torch.Tensor = model(micro)[0]
    return logits


@pytest.mark.parametrize("attention", [SEGMENTS, "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "falcon"])
def test_fm11_other_tokens_of_a_sample_change_no_bit_of_its_neighbours(
    architecture: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(causal_lm: Any, hidden: torch.Tensor, *_: torch.Tensor) -> Any:
        return causal_lm.get_output_embeddings()(hidden)

    monkeypatch.setattr("finetune.training.module.supervised_loss", logits)
    register_attention()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[architecture](), attn_implementation=attention)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = LossModel(attach_adapter(base, LoraSection(rank=4, alpha=8), None, seed=0))
    ids = torch.arange(TOKENS) * 7 % 320
    before, without = logits_of(model, ids, ROW), logits_of(model, ids, None)
    for changed, part in PARTS.items():
        other = ids.clone()
        other[part] = (other[part] + 100) % 320
        after = logits_of(model, other, ROW)
        touched = {name for name, place in PARTS.items() if not torch.equal(before[place], after[place])}
        assert touched == SEEN_BY[changed]
        # In one causal row every later sample would see it.
        last = PARTS["third"]
        assert not torch.equal(without[last], logits_of(model, other, None)[last])


# A convolution along the row; positions that are counted along the row.
LEAKING = {
    "lfm2": lambda: transformers.Lfm2Config(vocab_size=320, **SWIGLU, layer_types=["full_attention", "conv"]),
    "bart": lambda: transformers.BartConfig(
        vocab_size=320, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, is_decoder=True
    ),
}


def built(config: Any, attention: str, dtype: torch.dtype) -> Any:
    register_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("llama", SEGMENTS), ("llama", "sdpa"), ("gemma3", SEGMENTS), ("falcon", SEGMENTS), ("gemma2", "eager")],
)
def test_a_model_that_isolates_samples_passes_whatever_it_rounds(
    architecture: str, attention: str, dtype: torch.dtype
) -> None:
    model = built(CONFIGS[architecture](), attention, dtype)
    before, random = [name for name, _ in model.named_modules()], torch.get_rng_state()
    with inference_mode(model), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        check_isolation(model, "it")
    assert torch.equal(torch.get_rng_state(), random)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", LEAKING)
def test_a_model_that_does_not_is_refused(architecture: str, dtype: torch.dtype) -> None:
    model = built(LEAKING[architecture](), "sdpa", dtype)
    with inference_mode(model), pytest.raises(ModelError, match=r"it lets the samples .* use data\.packing: none"):
        check_isolation(model, "it")
    assert len(decoder_layers(model)) == 2
