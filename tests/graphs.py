"""Looking at autograd's graphs."""

from __future__ import annotations

import weakref
from typing import Any

import torch


def function_below(tensor: torch.Tensor) -> weakref.ref[Any]:
    """The nearest autograd function of Python's that `tensor` comes from: nodes of torch's own take no references."""
    node = tensor.grad_fn
    while not isinstance(node, torch.autograd.function.BackwardCFunction):
        assert node is not None
        node = node.next_functions[0][0]
    return weakref.ref(node)
