"""bf16 products in fp32, against fp64; what replaces torch's operations is called directly, so any CPU can run this."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune.kernels import products
from finetune.kernels.products import FEW_ROWS, OPERATIONS, _in_fp32, has_bf16_units, widened_bytes
from finetune.models.footprint import _LiveBytes

# One rounding to bf16 is on average a third of 2^-8.
BF16 = 2.5e-3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


C, A, B = draw(40, 24, seed=1), draw(40, 300, seed=2), draw(300, 24, seed=3)
C3, A3, B3 = (tensor[None].repeat(2, 1, 1) for tensor in (C, A, B))

# Operation, its arguments, and what is wanted of them in fp64.
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], Callable[..., torch.Tensor]]] = {
    "mm": ((A, B), {}, torch.mm),
    "mm.out": ((A, B), {"out": torch.empty(40, 24, dtype=torch.bfloat16)}, torch.mm),
    "bmm": ((A3, B3), {}, torch.bmm),
    "bmm.out": ((A3, B3), {"out": torch.empty(0, dtype=torch.bfloat16)}, torch.bmm),
    "addmm": ((C, A, B), {"beta": 0.5, "alpha": 2.0}, torch.addmm),
    "addmm.out": ((C, A, B), {"out": torch.empty(40, 24, dtype=torch.bfloat16)}, torch.addmm),
    "addmm_": ((C.clone(), A, B), {"alpha": 2.0}, torch.addmm),
    "baddbmm": ((C3, A3, B3), {}, torch.baddbmm),
    "baddbmm.out": ((C3, A3, B3), {"out": torch.empty(0, dtype=torch.bfloat16)}, torch.baddbmm),
    "baddbmm_": ((C3.clone(), A3, B3), {}, torch.baddbmm),
}


def test_every_replaced_operation_has_a_case() -> None:
    assert set(CASES) == {name for name in OPERATIONS if "mm" in name}


def test_a_right_operand_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WIDENED", 64 * 48)
    x, weight = draw(40, 48), draw(150, 48)
    for right in (weight.t(), weight.t().contiguous()):
        got = _in_fp32("mm")(x, right)
        assert (got.double() - x.double() @ weight.double().t()).norm() <= BF16 * got.double().norm()


@pytest.mark.parametrize("name", [name for name in CASES if "out" not in name])
def test_copies_are_counted_as_they_are_made(name: str) -> None:
    arguments, _, _ = CASES[name]
    compute = _in_fp32(name)
    with _LiveBytes(iter(arguments), on_cpu=False) as live:
        result = compute(*arguments)
    assert live.peak == widened_bytes(f"aten::{name}", arguments, result) > 0
    assert widened_bytes("aten::add", arguments, result) == 0


@pytest.mark.parametrize("name", CASES)
def test_a_product_is_rounded_once(name: str) -> None:
    arguments, options, reference = CASES[name]
    plain = {key: value for key, value in options.items() if key != "out"}
    want = reference(*(argument.double() for argument in arguments), **plain)
    got = _in_fp32(name)(*arguments, **options)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() <= BF16 * want.norm()
    if "out" in options or name.endswith("_"):
        assert got is (options["out"] if "out" in options else arguments[0])


@pytest.mark.parametrize("rows", [1, FEW_ROWS])
def test_few_rows_and_other_dtypes_stay_torch_s(rows: int) -> None:
    x, weight = draw(rows, 300), draw(24, 300)
    assert torch.equal(_in_fp32("mm")(x, weight.t()), x @ weight.t())
    x, weight = x.double(), weight.double()
    assert torch.equal(_in_fp32("mm")(x, weight.t()), x @ weight.t())


def test_attention_has_the_gradient_of_fp64() -> None:
    q, k, v = (draw(1, 2, 40, 32, seed=seed) for seed in range(3))
    grad = draw(1, 2, 40, 32, seed=9)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    ours = _in_fp32("_scaled_dot_product_flash_attention_for_cpu_backward")
    got = ours(grad, q, k, v, out, lse, 0.0, True)
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True)
    for left, right in zip(got, torch.autograd.grad(want, exact, grad.double()), strict=True):
        assert left.dtype == torch.bfloat16
        # The output, of which its sums are taken, is rounded too.
        assert (left.double() - right).norm() <= 2 * BF16 * right.norm()


@pytest.mark.skipif(has_bf16_units(), reason="the processor has units for bf16")
def test_a_loaded_model_multiplies_in_fp32() -> None:
    # torch's own loop takes 0.4 s for the gradient of such a product, one in fp32 a few milliseconds.
    code = (
        "import time, torch; from finetune.kernels.products import multiply_in_fp32; assert multiply_in_fp32()\n"
        "a = torch.randn(512, 512).bfloat16()\n"
        "def took(x, y): start = time.perf_counter(); x @ y; return time.perf_counter() - start\n"
        "assert min(took(a, a) for _ in range(5)) < 0.1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
