"""The loss through a model's own head, whatever becomes of its logits and whichever part of it is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from finetune.errors import ModelError
from finetune.kernels import cross_entropy
from finetune.models.adapters import attach_adapter, trainable_parameters
from finetune.models.heads import check_head, decoder_layers, decoder_of, plain_head_weight, supervised_loss
from finetune.models.load import register_attention
from finetune.recipe.schema import LoraSection
from tests.tiny import CONFIGS, SIZES, SWIGLU, write_tokenizer

TOKENS = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
# What each does to its logits.
HEADS: dict[str, Callable[[], Any]] = {
    "plain": CONFIGS["llama"],
    "tied": CONFIGS["tied_llama"],
    "soft-capped": lambda: transformers.Gemma2Config(
        **TOKENS, **SWIGLU, query_pre_attn_scalar=8, final_logit_softcapping=2.0, attn_implementation="eager"
    ),
    "divided": lambda: transformers.GraniteConfig(**TOKENS, **SWIGLU, logits_scaling=8.0, embedding_multiplier=2.0),
    "multiplied": lambda: transformers.CohereConfig(**TOKENS, **SWIGLU, logit_scale=0.125),
}
TRAINED: dict[str, dict[str, Any]] = {
    "frozen": {"target_modules": ["q_proj", "down_proj"]},
    "trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "adapted": {"target_modules": ["q_proj", "lm_head"]},
    "new rows": {"target_modules": ["q_proj"], "trainable_tokens": [5, 7, 9]},
}


def build(head: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(HEADS[head]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_the_models_own_logits(
    head: str, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 16 * 320 * 4)  # two chunks
    model = attach_adapter(build(head), LoraSection(rank=4, **TRAINED[trained]), write_tokenizer(tmp_path), seed=0)
    for parameter in trainable_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    exact = copy.deepcopy(model).double()

    ids = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(1))
    ids[:, ::3] = torch.tensor([5, 7, 9, 5, 7, 9])
    positions, targets = torch.arange(1, 31), torch.randint(0, 320, (30,))
    causal_lm = model.get_base_model()
    hidden = decoder_of(causal_lm)(input_ids=ids, use_cache=False).last_hidden_state
    loss = supervised_loss(causal_lm, hidden, positions, targets)
    loss.backward()

    logits = exact(input_ids=ids, use_cache=False).logits
    want = F.cross_entropy(logits.flatten(0, 1)[positions].double(), targets, reduction="sum")
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0.0)
    references = dict(exact.named_parameters())
    checked = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(checked) == len(trainable_parameters(model))
    for name, parameter in checked:
        reference = references[name].grad
        assert parameter.grad is not None and reference is not None and reference.norm() > 1e-6, name
        assert ((parameter.grad.double() - reference).norm() / reference.norm()).item() < 1e-4, name


@pytest.mark.parametrize("head", HEADS)
def test_check_passes_and_leaves_the_model_whole(head: str) -> None:
    model = build(head)
    before = [name for name, _ in model.named_modules()]
    calls = [0, 0]
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    check_head(model, "it")
    assert [name for name, _ in model.named_modules()] == before
    assert calls == [2, 0], "the first block is enough"
    # A kernel for plain products must not be given a head that does more.
    assert (plain_head_weight(model) is None) == (head not in ("plain", "tied"))


@pytest.mark.parametrize(
    "change", [lambda logits: logits * 1.1, lambda logits: torch.tanh(logits), lambda logits: logits + 1]
)
def test_a_head_that_is_not_known_is_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = build("plain")
    plain = model.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = plain(*arguments, **keywords)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    with pytest.raises(ModelError, match="it changes its logits after the head in a way that is not known"):
        check_head(model, "it")
    assert len(decoder_layers(model)) == 2


def test_attention_that_blocks_cannot_compute_is_named() -> None:
    register_attention()
    config = transformers.DogeConfig(**TOKENS, **SWIGLU)  # its layers pass a mask
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="segments")
    with pytest.raises(ModelError, match=r"segments cannot compute doge's attention .*; use model\.attention: eager"):
        check_head(model, "it")
    assert len(decoder_layers(model)) == 2


def test_a_head_that_is_named_decoder_is_not_taken_for_it() -> None:
    config = transformers.ModernBertDecoderConfig(**TOKENS, **SIZES, intermediate_size=64)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert len(decoder_layers(model)) == 2
    with pytest.raises(ModelError, match="changes its logits after the head"):
        check_head(model, "it")
    with pytest.raises(ModelError, match="Linear holds no list of transformer blocks"):
        decoder_layers(nn.Linear(2, 2))


def test_blocks_are_found_beside_longer_lists_of_experts() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    decoder = nn.Module()
    decoder.norms = nn.ModuleList([nn.LayerNorm(2)])
    decoder.inner = nn.Module()
    decoder.inner.layers = nn.ModuleList([Block(), Block()])
    assert decoder_layers(decoder) is decoder.inner.layers
