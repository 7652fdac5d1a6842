"""Decoder layers that run as one function give what their parts give, and step aside where they do not apply."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from finetune.kernels import decoder_layer, native
from finetune.kernels.attention import NAME, packed_row
from finetune.kernels.layout import Group, position_ids
from finetune.models.adapters import attach_adapter, trainable_parameters
from finetune.models.fused import fuse, unfuse
from finetune.models.fused_layers import _computes_the_same, layer_forward
from finetune.models.heads import checkpoint_layers, decoder_layers, decoder_of
from finetune.models.load import register_attention
from finetune.recipe.schema import LoraSection

pytestmark = pytest.mark.skipif(not native.computes_products(), reason="no native kernels for whole layers here")

ROW = (Group(9, (11, 20)), Group(0, (40,)))
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def adapted(architecture: str, **adapter: Any) -> Any:
    """A model of two layers whose heads are 32 wide, its adapter not zero."""
    register_attention()
    torch.manual_seed(0)
    settings = {**SIZES, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 320, "sliding_window": None}
    config = getattr(transformers, f"{architecture}Config")(**settings)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).to(torch.bfloat16)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name or "bias" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        elif "embed" in name:
            torch.nn.init.normal_(parameter)
    model = attach_adapter(base, LoraSection(rank=4, **adapter), None, seed=0)
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def hidden_and_gradients(model: Any, dtype: torch.dtype = torch.bfloat16, tokens: int = 96) -> list[torch.Tensor]:
    ids = torch.arange(tokens)[None] * 5 % 320
    embeddings = decoder_of(model).get_input_embeddings()(ids).detach().to(dtype).requires_grad_()
    with packed_row(ROW), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        positions = position_ids(ROW, tokens)
        out = decoder_of(model)(inputs_embeds=embeddings, position_ids=positions, use_cache=False)[0]
        weights = torch.sin(torch.arange(out.numel()) * 0.7).view_as(out)
        parameters = [embeddings, *trainable_parameters(model)]
        return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), parameters)]


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    flat = [torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (got, want)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def by_parts(model: Any) -> Any:
    for layer in decoder_layers(model):
        assert layer.forward.__func__ is layer_forward
        del layer.forward
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_layers_are_as_near_to_fp32_as_their_parts(architecture: str) -> None:
    model = adapted(architecture)
    exact = hidden_and_gradients(copy.deepcopy(model).float(), torch.float32)
    assert fuse(model).layers == 2
    whole = hidden_and_gradients(model)
    parts = hidden_and_gradients(by_parts(model))
    for index in range(len(exact)):
        close = error(whole[index : index + 1], exact[index : index + 1])
        assert close <= 1.2 * error(parts[index : index + 1], exact[index : index + 1]) + 1e-3, index
    assert error(whole, exact) <= 1.05 * error(parts, exact) < 0.06


@pytest.mark.parametrize(
    "change",
    [
        lambda model: checkpoint_layers(model.base_model.model, True),
        lambda model: decoder_layers(model)[1].mlp.down_proj.lora_A.default.weight.requires_grad_(False),
    ],
    ids=["gradient checkpointing", "a matrix that is not trained"],
)
def test_settings_of_training_change_nothing(change: Callable[[Any], Any]) -> None:
    model = adapted("Llama")
    change(model)
    fuse(model)
    model.train()
    whole = hidden_and_gradients(model)
    assert error(whole, hidden_and_gradients(by_parts(model))) < 0.01


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]], ids=str)
def test_layers_without_an_adapter_take_part(targets: list[str]) -> None:
    model = adapted("Llama", target_modules=targets)
    assert fuse(model).layers == 2
    whole = hidden_and_gradients(model)
    assert error(whole, hidden_and_gradients(by_parts(model))) < 0.01


def test_the_first_layer_needs_no_gradient_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("Llama")
    fuse(model)
    asked = []
    backward = decoder_layer.native_backward

    def spy(*args: Any, needs_dx: bool) -> Any:
        asked.append(needs_dx)
        return backward(*args, needs_dx=needs_dx)

    monkeypatch.setattr(decoder_layer, "native_backward", spy)
    ids = torch.arange(96)[None]
    with packed_row(ROW), torch.autocast("cpu", torch.bfloat16):
        decoder_of(model)(input_ids=ids, position_ids=position_ids(ROW, 96), use_cache=False)[0].sum().backward()
    assert asked == [True] * 7 + [False]


def whole_calls(model: Any, monkeypatch: pytest.MonkeyPatch, tokens: int = 96) -> int:
    calls = []
    apply = decoder_layer._DecoderLayer.apply
    monkeypatch.setattr(decoder_layer._DecoderLayer, "apply", lambda *args: calls.append(1) or apply(*args))
    hidden_and_gradients(model, next(decoder_of(model).parameters()).dtype, tokens)
    return len(calls)


def test_every_layer_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("Qwen3")
    fuse(model)
    assert whole_calls(model, monkeypatch) == 2


def test_a_recomputed_layer_is_computed_again_as_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("Llama")
    checkpoint_layers(model.base_model.model, 1)
    fuse(model)
    model.train()
    assert whole_calls(model, monkeypatch) == 2 + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.float(),
        lambda model: setattr(model.config, "_attn_implementation", "sdpa"),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: setattr(model.config, "sliding_window", 31),
        lambda model: unfuse(model),
    ],
    ids=["fp32", "sdpa", "adapter disabled", "adapter merged", "window shorter than a sample", "unfused"],
)
def test_other_cases_run_by_parts(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("Llama")
    fuse(model)
    change(model)
    for parameter in trainable_parameters(model):
        parameter.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda out, inputs: [torch.zeros(1)])
        assert whole_calls(model, patch) == 0


def test_a_length_that_kernels_do_not_take_runs_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("Llama")
    fuse(model)
    assert whole_calls(model, monkeypatch, tokens=88) == 0


@pytest.mark.parametrize("adapter", [{"dropout": 0.1}, {"use_dora": True}], ids=str)
def test_layers_with_a_part_of_pefts_run_by_parts(adapter: dict[str, Any]) -> None:
    assert fuse(adapted("Llama", **adapter)).layers == 0


def test_a_class_that_computes_something_else_runs_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may with another release: here the residual is scaled, by little."""
    model = adapted("Llama")
    fuse(model)
    (layer, _) = decoder_layers(by_parts(model))
    assert _computes_the_same(layer)
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x, **rest: forward(self, x, **rest) + 0.01 * x)
    assert not _computes_the_same(layer)
