"""Activations in host memory: the same gradients, and parameters left where they are."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finetune.kernels.offload import offloaded
from finetune.kernels.pointwise import rms_norm
from tests.graphs import function_below


def test_gradients_are_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.SiLU(), torch.nn.Linear(64, 4))
    other, x = copy.deepcopy(model), torch.randn(32, 8)
    model(x).square().sum().backward()
    with offloaded(min_bytes=4096):
        loss = other(x).square().sum()
    loss.backward()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)


def test_activations_are_copied_and_parameters_are_not() -> None:
    weight, x = torch.nn.Parameter(torch.ones(64, 64)), torch.full((64, 64), 3.0)
    with offloaded(min_bytes=1):
        y = (weight * x).sum()
    # A copy does not see this.
    x.data.zero_()
    y.backward()
    assert torch.equal(weight.grad, torch.full((64, 64), 3.0))
    with offloaded(min_bytes=1):
        y = (weight * torch.ones(64, 64, requires_grad=True)).sum()
    assert y.grad_fn.next_functions[0][0]._saved_other is not None
    assert y.grad_fn.next_functions[0][0]._saved_self.data_ptr() == weight.data_ptr()


def test_a_pass_that_fails_leaves_no_graph_behind() -> None:
    """Without waiting for a collection: a node that saves its own output must not hold itself."""
    gc.disable()
    try:
        x = rms_norm(torch.ones(1, 8, requires_grad=True), torch.ones(8), 1e-6)
        with offloaded(min_bytes=4096):
            y = torch.sigmoid(x)
        node = function_below(x)
        del x, y
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (2, 32, 64)])
def test_a_linear_layers_weight_stays_where_it_is(trained: bool, shape: tuple[int, ...]) -> None:
    """It is saved transposed, which is no parameter."""
    weight = torch.nn.Parameter(torch.ones(128, 64), requires_grad=trained)
    x = torch.ones(shape, requires_grad=True)
    kept: list[torch.Tensor] = []
    to_host = torch.empty_like

    def copied(tensor: torch.Tensor, **settings: Any) -> torch.Tensor:
        kept.append(tensor)
        return to_host(tensor, **settings)

    with pytest.MonkeyPatch.context() as patch, offloaded(min_bytes=1):
        patch.setattr(torch, "empty_like", copied)
        y = F.linear(x, weight)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert weight.untyped_storage().data_ptr() not in pointers
    assert (x.untyped_storage().data_ptr() in pointers) == trained
    y.sum().backward()
    assert torch.equal(x.grad, torch.full(shape, 128.0))
