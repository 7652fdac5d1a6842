"""LoRA projections, norms and SwiGLU against their definitions in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.kernels import lora
from finetune.kernels.lora import Projection, lora_linears, unchanged_adapters
from finetune.kernels.pointwise import rms_norm, rotate, silu_mul, takes_rotation
from finetune.kernels.traced import traced

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((got.double() - want).norm() / want.norm().clamp(min=1e-12) < TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_projections_equal_their_definition(dtype: torch.dtype, count: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator).to(dtype).requires_grad_()
    weights = [torch.randn(8 + i, 16, generator=generator).to(dtype) for i in range(count)]
    biases = [torch.randn(8 + i, generator=generator).to(dtype) if biased else None for i in range(count)]
    a = [torch.randn(4 - i, 16, generator=generator).requires_grad_() for i in range(count)]
    b = [torch.randn(8 + i, 4 - i, generator=generator).requires_grad_() for i in range(count)]
    layers = [
        Projection(lambda t, w=weights[i]: w.to(t), biases[i], a[i], b[i], 0.5 + i)  # type: ignore[misc]
        for i in range(count)
    ]
    outputs = lora_linears(x, layers)
    upstream = [torch.randn(out.shape, generator=generator) for out in outputs]
    got = torch.autograd.grad(outputs, [x, *a, *b], [grad.to(dtype) for grad in upstream])

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *a, *b)]
    x_64, a_64, b_64 = exact[0], exact[1 : 1 + count], exact[1 + count :]
    want = [
        F.linear(x_64, weights[i].double(), None if biases[i] is None else biases[i].double())  # type: ignore[union-attr]
        + (0.5 + i) * x_64 @ a_64[i].t() @ b_64[i].t()
        for i in range(count)
    ]
    assert all(close(left, right, dtype) for left, right in zip(outputs, want, strict=True))
    want_grads = torch.autograd.grad(want, exact, [grad.double() for grad in upstream])
    assert all(close(left, right, dtype) for left, right in zip(got, want_grads, strict=True))
    assert all(grad.dtype == torch.float32 for grad in got[1:])


@pytest.mark.parametrize("biased", [False, True])
def test_an_output_may_be_added_to_in_place(biased: bool) -> None:
    """As Falcon adds its attention's output to its MLP's."""
    weight, bias = torch.randn(8, 16), torch.randn(8) if biased else None
    a, b, x = (torch.randn(*shape, requires_grad=True) for shape in ((4, 16), (8, 4), (2, 5, 16)))
    (out,) = lora_linears(x, [Projection(lambda _: weight, bias, a, b, 0.5)])
    want = torch.autograd.grad(out.sum(), (x, a, b), retain_graph=True)
    out += x.sum()
    got = torch.autograd.grad(out.sum(), (x, a, b))
    assert torch.allclose(got[0], want[0] + out.numel()) and all(map(torch.equal, got[1:], want[1:]))


class CountingCasts(TorchDispatchMode):
    """Counts copies into another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_an_adapter_is_cast_once_while_it_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "native_linears", lambda *_: None)
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    weights = [torch.randn(8, 16).bfloat16() for _ in range(3)]
    a, b = [torch.randn(4, 16, requires_grad=True)] * 2, [torch.randn(8, 4, requires_grad=True) for _ in range(2)]

    def passes() -> tuple[torch.Tensor, ...]:
        # The last has no adapter: its empty matrices are others in every call.
        pairs = [*zip(a, b, strict=True), (torch.empty(0, 16), torch.empty(8, 0))]
        layers = [Projection(lambda _, w=w: w, None, *pair, 0.5) for w, pair in zip(weights, pairs, strict=True)]
        for _ in range(2):
            outputs = lora_linears(x, layers)
            grads = torch.autograd.grad(outputs, (x, *a, *b), [torch.ones_like(out) for out in outputs])
        return (*outputs, *grads)

    want = passes()
    with unchanged_adapters(), CountingCasts() as casts:
        got = passes()
        before = casts.count
        with unchanged_adapters():
            passes()
    gradients = 2 * (1 + len(weights))  # A's, stacked, and each B's: back to fp32
    assert casts.count - before == gradients < before
    assert all(map(torch.equal, got, want))
    with torch.no_grad():
        b[0] += 1
    with unchanged_adapters():
        assert not torch.equal(passes()[0], want[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("positions", [1, 2])
def test_rotation_equals_its_definition(dtype: torch.dtype, positions: int) -> None:
    """As a GPU computes it, for heads that lie apart in memory as those of a projection."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 9, generator=generator).to(dtype)[..., :8].transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, positions, 5, 8, generator=generator).to(dtype)
    assert not takes_rotation(x, cos, sin)
    with traced("cuda"):
        assert takes_rotation(x, cos, sin) and not takes_rotation(x, cos.double(), sin.double())
        assert not takes_rotation(x, cos[..., :4], sin[..., :4])
    out = rotate(x, cos, sin)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    exact = x.detach().double().requires_grad_()
    halves = torch.cat((-exact[..., 4:], exact[..., :4]), -1)
    want = exact * cos.double().unsqueeze(1) + halves * sin.double().unsqueeze(1)
    assert close(out, want, dtype) and out.transpose(1, 2).is_contiguous()
    got = torch.autograd.grad(out, x, grad)[0]
    assert close(got, torch.autograd.grad(want, exact, grad.double())[0], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_equals_its_definition(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(32, generator=generator).to(dtype)
    out = rms_norm(x, weight, 1e-5)
    upstream = torch.randn(out.shape, generator=generator)
    (got,) = torch.autograd.grad(out, x, upstream.to(dtype))
    exact = x.detach().double().requires_grad_()
    want = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert close(out, want, dtype)
    assert close(got, torch.autograd.grad(want, exact, upstream.double())[0], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_equals_its_definition(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 7, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    out = silu_mul(*inputs)
    upstream = torch.randn(out.shape, generator=generator)
    got = torch.autograd.grad(out, inputs, upstream.to(dtype))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = F.silu(exact[0]) * exact[1]
    assert close(out, want, dtype)
    grads = torch.autograd.grad(want, exact, upstream.double())
    assert all(close(left, right, dtype) for left, right in zip(got, grads, strict=True))
