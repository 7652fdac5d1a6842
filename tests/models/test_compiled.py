"""Compiled decoder layers: the code of one serves all of them and every row, and computes what they compute without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.kernels.attention import NAME, packed_row
from finetune.kernels.layout import Group, RowLayout, position_ids
from finetune.models.adapters import attach_adapter, trainable_parameters
from finetune.models.compiled import compile_layers, make_traceable
from finetune.models.fused import fuse
from finetune.models.heads import checkpoint_layers, decoder_layers, decoder_of
from finetune.models.load import register_attention
from finetune.recipe.schema import LoraSection
from tests.tiny import CONFIGS

ROWS: list[tuple[RowLayout, int]] = [
    ((Group(9, (11, 20)), Group(0, (24,))), 64),
    ((Group(0, (30,)), Group(5, (7, 8, 9)), Group(0, (3,))), 96),
]


def adapted(architecture: str, *, checkpointed: bool = False) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[architecture]()
    config.num_hidden_layers = 4
    base = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).requires_grad_(False)
    checkpoint_layers(base, checkpointed)
    model = attach_adapter(base, LoraSection(rank=4), None, seed=0)
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn_like(parameter) * 0.1
    return model.train()


def loss_and_gradients(model: Any, layout: RowLayout, num_tokens: int) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(num_tokens)[None] * 5 % 320
    positions = position_ids(layout, num_tokens)
    with packed_row(layout):
        hidden = decoder_of(model.get_base_model())(input_ids=ids, position_ids=positions, use_cache=False)
        loss = hidden.last_hidden_state.sin().sum()
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in trainable_parameters(model) if p.grad is not None)]


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _own_registrations() -> Any:
    register_attention()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    register_attention()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "falcon"])
def test_the_code_of_one_layer_serves_all_of_them_and_every_row(architecture: str) -> None:
    model = adapted(architecture)
    reference = copy.deepcopy(model)
    fuse(reference)
    backend = Counting()
    assert make_traceable(model).lora > 0
    assert compile_layers(model, backend) == 0
    # The first layer's input needs no gradient, so its code is another than that of all others.
    layers = decoder_layers(model)
    deeper = list(layers[2:])
    del layers[2:]
    loss_and_gradients(model, *ROWS[0])
    layers.extend(deeper)
    needed = backend.graphs
    assert needed > 0
    for row in ROWS:
        for left, right in zip(loss_and_gradients(model, *row), loss_and_gradients(reference, *row), strict=True):
            assert (left - right).norm() <= 1e-4 * right.norm()
    assert backend.graphs == needed


def test_checkpointed_layers_stay_uncompiled() -> None:
    model = adapted("llama", checkpointed=True)
    reference = copy.deepcopy(model)
    fuse(reference)
    make_traceable(model)
    backend = Counting()
    assert compile_layers(model, backend) == 4
    for left, right in zip(loss_and_gradients(model, *ROWS[0]), loss_and_gradients(reference, *ROWS[0]), strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm()
    assert backend.graphs == 0
