"""LoRA projections, norms and SwiGLU against their definitions in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finetune.kernels.lora import Projection, lora_linears
from finetune.kernels.pointwise import rms_norm, silu_mul

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
