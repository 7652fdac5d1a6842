"""Activations in host memory: the same gradients, and parameters left where they are."""

from __future__ import annotations

import copy

import torch

from finetune.kernels.offload import offloaded


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
