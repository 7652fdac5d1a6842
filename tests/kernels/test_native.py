"""The native CPU kernels against fp64, and where they cannot be had."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from finetune.kernels import native, native_attention
from finetune.kernels.cross_entropy import chunked_cross_entropy
from finetune.kernels.layout import Group, RowLayout, attention_blocks, block_mask
from finetune.kernels.lora import Projection, lora_linears, native_takes
from finetune.kernels.pointwise import rms_norm, rotate, silu_mul, takes_rotation
from finetune.kernels.products import has_bf16_units
from finetune.kernels.traced import traced
from finetune.machine import KERNEL_SWITCH

# Where there is a compiler they must compile.
pytestmark = pytest.mark.skipif(
    native.library() is None and (shutil.which("g++") is None or sys.platform != "linux"),
    reason=f"no native kernels: {native.why_missing()}",
)
needs_products = pytest.mark.skipif(not native.computes_products(), reason="no kernels for products here")

BF16 = 4e-3  # relative: one rounding to bf16 is at most 2^-8, on average a third of it

LAYOUTS: dict[str, tuple[RowLayout, int]] = {
    "one sample": ((Group(0, (64,)),), 64),
    "samples across tiles": ((Group(0, (5, 40, 33, 1)),), 96),
    "prefixes and padding": ((Group(10, (3, 5)), Group(40, (7, 50))), 160),
    "a short sample behind a long one": ((Group(0, (150, 42)), Group(0, (160, 32))), 384),
    "a long prefix": ((Group(150, (33, 20, 64, 21)),), 288),
    "one long sample": ((Group(0, (400, 10)),), 416),
}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def heads(number: int, tokens: int, dim: int, seed: int) -> torch.Tensor:
    """[1, H, T, D] as transformers lays them out: a view of [1, T, H, D]."""
    values = torch.randn(1, tokens, number, dim, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().transpose(1, 2).requires_grad_()


@needs_products
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 32), (2, 2, 96), (6, 2, 128), (2, 1, 256), (5, 1, 256)]
)
def test_attention(layout: str, num_heads: int, kv_heads: int, dim: int) -> None:
    row, tokens = LAYOUTS[layout]
    inputs = [heads(n, tokens, dim, seed) for seed, n in enumerate((num_heads, kv_heads, kv_heads))]
    assert native_attention.takes(*inputs)
    assert not native_attention.takes(*inputs[:2], inputs[2][..., : dim // 2])
    grad = heads(num_heads, tokens, dim, 9).detach()
    out = native_attention.packed_attention(*inputs, row, None)
    got = torch.autograd.grad(out, inputs, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = block_mask(attention_blocks(row, tokens), tokens)
    want = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    assert relative(out, want) < BF16
    for left, right in zip(got, torch.autograd.grad(want, exact, grad.double()), strict=True):
        assert relative(left, right) < BF16


@needs_products
@pytest.mark.parametrize("layout", ["samples across tiles", "a long prefix", "one long sample"])
@pytest.mark.parametrize(("num_heads", "kv_heads", "dim"), [(9, 3, 64), (4, 1, 256), (2, 2, 32)])
def test_attention_is_the_same_by_any_number_of_threads(layout: str, num_heads: int, kv_heads: int, dim: int) -> None:
    row, tokens = LAYOUTS[layout]
    inputs = [heads(n, tokens, dim, seed) for seed, n in enumerate((num_heads, kv_heads, kv_heads))]
    grad = heads(num_heads, tokens, dim, 9).detach()
    results = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            out = native_attention.packed_attention(*inputs, row, None)
            results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


@needs_products
def test_attention_between_rows_of_other_shapes() -> None:
    # The backward pass keeps its memory from call to call.
    def gradients(layout: str, num_heads: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
        row, tokens = LAYOUTS[layout]
        inputs = [heads(n, tokens, dim, seed) for seed, n in enumerate((num_heads, kv_heads, kv_heads))]
        out = native_attention.packed_attention(*inputs, row, None)
        return torch.autograd.grad(out, inputs, heads(num_heads, tokens, dim, 9).detach())

    first = gradients("a long prefix", 4, 2, 64)
    gradients("one long sample", 5, 1, 256)
    gradients("one sample", 2, 2, 32)
    assert all(torch.equal(*pair) for pair in zip(first, gradients("a long prefix", 4, 2, 64), strict=True))


@needs_products
def test_attention_keeps_samples_apart_to_the_bit() -> None:
    row, tokens = (Group(0, (50, 46)),), 96
    q, k, v = (heads(2, tokens, 32, seed) for seed in range(3))
    want = native_attention.packed_attention(q, k, v, row, 0.5)[:, :, 50:]
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[:, :, :50] = 1e4
    assert torch.equal(native_attention.packed_attention(q, k, v, row, 0.5)[:, :, 50:], want)


def lora_group(ranks: tuple[int, ...]) -> tuple[torch.Tensor, list[Projection], list[torch.Tensor]]:
    """x [2, 48, 64] and layers with 32, 96, ... outputs, the second with a bias."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layers, weights = [], []
    for index, rank in enumerate(ranks):
        outputs = 32 + 64 * index
        weights.append(draw(outputs, 64).bfloat16())
        bias = draw(outputs).bfloat16() if index == 1 else None
        a, b = draw(rank, 64).requires_grad_(), draw(outputs, rank).requires_grad_()
        layers.append(Projection(lambda dtype, weight=weights[-1]: weight, bias, a, b, 0.3 * (index + 1)))
    return draw(2, 48, 64).bfloat16(), layers, weights


@needs_products
@pytest.mark.parametrize("ranks", [(8,), (0,), (20,), (4, 12), (8, 0, 8), (30, 7, 40)], ids=str)
@pytest.mark.parametrize("first_layer", [False, True])
def test_lora(ranks: tuple[int, ...], first_layer: bool) -> None:
    x, layers, weights = lora_group(ranks)
    x.requires_grad_(not first_layer)
    matrices = [matrix for layer in layers for matrix in (layer.a_RD, layer.b_OR)]
    assert native_takes(x, matrices)
    wanted = matrices if first_layer else [x, *matrices]
    exact = [tensor.detach().double().requires_grad_() for tensor in wanted]
    x_64, pairs = (x.double(), exact) if first_layer else (exact[0], exact[1:])
    want = [
        x_64 @ weight.double().t() + layer.scale * x_64 @ a.t() @ b.t() + (0 if layer.bias is None else layer.bias)
        for weight, layer, a, b in zip(weights, layers, pairs[::2], pairs[1::2], strict=True)
    ]
    got = lora_linears(x, layers)
    grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).bfloat16() for i, y in enumerate(got)]
    for left, right in zip(got, want, strict=True):
        assert relative(left, right) < BF16
    references = torch.autograd.grad(want, exact, [grad.double() for grad in grads])
    for left, right in zip(torch.autograd.grad(got, wanted, grads), references, strict=True):
        assert left.shape == right.shape and (left.numel() == 0 or relative(left, right) < BF16)


@needs_products
def test_a_deep_product_is_the_same_in_parts_and_by_threads() -> None:
    # Depth in parts of several blocks, more tokens than one pass takes, strips of unequal width.
    generator = torch.Generator().manual_seed(0)
    tokens, dim, outputs = 1184, 2720, 672
    x = torch.randn(tokens, dim, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(outputs, dim, generator=generator).bfloat16()
    a, b = (torch.randn(*size, generator=generator).requires_grad_() for size in ((8, dim), (outputs, 8)))
    grad = torch.randn(tokens, outputs, generator=generator).bfloat16()
    got = []
    for threads in (1, 3):
        with torch_threads(threads):
            (y,) = lora_linears(x, [Projection(lambda dtype: weight, None, a, b, 0.5)])
            got.append((y.detach(), *torch.autograd.grad(y, (x, a, b), grad)))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    want = exact[0] @ weight.double().t() + 0.5 * exact[0] @ exact[1].t() @ exact[2].t()
    references = (want, *torch.autograd.grad(want, exact, grad.double()))
    for one, three, reference in zip(*got, references, strict=True):
        assert torch.equal(one, three)
        assert relative(one, reference) < BF16


def results(threads: int) -> list[torch.Tensor]:
    with torch_threads(threads):
        row, tokens = LAYOUTS["a long prefix"]
        inputs = [heads(n, tokens, 64, n) for n in (4, 2, 2)]
        out = native_attention.packed_attention(*inputs, row, None)
        hidden = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        weight = torch.randn(1000, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
        loss = chunked_cross_entropy(hidden, torch.arange(100), lambda h: h, [], 1000, weight)
        x, layers, _ = lora_group((8, 8))
        y = lora_linears(x, layers)
        matrices = [matrix for layer in layers for matrix in (layer.a_RD, layer.b_OR)]
        outputs = [(out, inputs), (loss, [hidden]), (torch.cat(y, -1), matrices)]
        return [
            tensor
            for value, leaves in outputs
            for tensor in (value, *torch.autograd.grad(value.float().square().sum(), leaves))
        ]


@needs_products
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    for one, three in zip(results(1), results(3), strict=True):
        assert torch.equal(one, three)


def no_head(part: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the native kernel was not taken")


@needs_products
@pytest.mark.parametrize(
    ("tokens", "vocab", "dim"), [(1, 7, 96), (32, 256, 32), (75, 1000, 96), (40, 513, 96), (33, 1300, 2080)], ids=str
)
def test_cross_entropy(tokens: int, vocab: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).bfloat16()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    loss = chunked_cross_entropy(hidden, targets, no_head, [], vocab, weight)
    (got,) = torch.autograd.grad(loss * 0.5, hidden)
    exact = hidden.detach().double().requires_grad_()
    want = F.cross_entropy(exact @ weight.double().t(), targets, reduction="sum")
    assert abs(loss.item() - want.item()) <= 1e-5 * want.item()
    assert relative(got, torch.autograd.grad(want * 0.5, exact)[0]) < BF16


@needs_products
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_cross_entropy_of_tokens_that_are_almost_sure(order: str) -> None:
    # Logits from -40 to 40 over the vocabulary: the reference moves from block to block, or never. The first token's
    # target has 60: softmax minus one-hot would be 0 in fp32 too.
    vocab, dim = 1024, 64
    ramp = torch.linspace(-40, 40, vocab)
    weight = torch.randn(vocab, dim, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[:, 0] = ramp if order == "rising" else ramp.flip(0)
    sure = 300
    weight[sure, 1] = (60.0 - weight[sure, 0]) / 0.8
    hidden = torch.randn(3, dim, generator=torch.Generator().manual_seed(1)) * 0.1
    hidden[:, 0], hidden[0, 1] = 1.0, 0.8
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    targets = torch.tensor([sure, 5, 1000])
    loss = chunked_cross_entropy(hidden, targets, no_head, [], vocab, weight)
    (got,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    losses = F.cross_entropy(exact @ weight.double().t(), targets, reduction="none")
    (want,) = torch.autograd.grad(losses.sum(), exact)
    assert 1e-9 < losses[0].item() < 1e-7
    assert abs(loss.item() - losses.sum().item()) <= 1e-5 * losses.sum().item()
    assert relative(got[0], want[0]) < BF16
    # The others' first column is a difference of numbers up to 80, of bf16's precision.
    assert (got[1:, 0] - want[1:, 0]).abs().max() < 80 * 2**-8
    assert all(relative(got[row, 1:], want[row, 1:]) < BF16 for row in (1, 2))
    with torch.no_grad():
        assert chunked_cross_entropy(hidden, targets, no_head, [], vocab, weight).item() == loss.item()


@needs_products
@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_cross_entropy_of_logits_far_from_zero(level: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 64, generator=generator), torch.randn(700, 64, generator=generator) * 0.3
    hidden[:, 0], weight[:, 0] = 1.0, level
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    loss = chunked_cross_entropy(hidden, torch.arange(40), no_head, [], 700, weight)
    (got,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    want = F.cross_entropy(exact @ weight.double().t(), torch.arange(40), reduction="sum")
    assert abs(loss.item() - want.item()) <= 1e-5 * want.item()
    assert relative(got[:, 1:], torch.autograd.grad(want, exact)[0][:, 1:]) < BF16


@needs_products
def test_cross_entropy_of_one_word() -> None:
    hidden = torch.ones(2, 32, dtype=torch.bfloat16).requires_grad_()
    loss = chunked_cross_entropy(
        hidden, torch.zeros(2, dtype=torch.int64), no_head, [], 1, torch.ones(1, 32).bfloat16()
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0.0 and torch.equal(grad, torch.zeros_like(grad))


@needs_products
def test_a_broken_hidden_state_gives_a_broken_loss() -> None:
    hidden = torch.ones(3, 32, dtype=torch.bfloat16)
    hidden[1, 5] = float("nan")
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, torch.arange(3), lambda h: h, [], 300, torch.ones(300, 32).bfloat16())
    assert torch.isnan(loss)


@pytest.mark.parametrize("rows", [1, 33])
def test_norm(rows: int) -> None:
    x = torch.randn(1, rows, 50, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weight = torch.linspace(0.5, 2, 50).bfloat16()
    y = rms_norm(x, weight, 1e-5)
    exact = x.detach().double().requires_grad_()
    want = F.rms_norm(exact, (50,), weight.double(), 1e-5)
    assert y.dtype == torch.bfloat16 and relative(y, want) < BF16
    grad = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16()
    got, reference = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(want, exact, grad.double())[0]
    assert relative(got, reference) < BF16


def test_swiglu() -> None:
    # From where the sigmoid is 0 to where it is 1, and what is not finite.
    gate = torch.linspace(-120, 120, 5001).bfloat16().requires_grad_()
    up = torch.linspace(3, -2, 5001).bfloat16().requires_grad_()
    y = silu_mul(gate, up)
    exact = [tensor.detach().double().requires_grad_() for tensor in (gate, up)]
    want = F.silu(exact[0]) * exact[1]
    grads = zip(torch.autograd.grad(y.float().sum(), (gate, up)), torch.autograd.grad(want.sum(), exact), strict=True)
    for left, right in [(y, want), *grads]:
        torch.testing.assert_close(left.double(), right, rtol=1e-2, atol=1e-5)
    for count in (1, 32):  # less than a vector, and several
        broken = torch.tensor([float("nan"), float("inf")] * count).bfloat16()
        assert torch.isnan(silu_mul(broken, torch.ones_like(broken))).tolist() == [True, False] * count


@pytest.mark.parametrize("dim", [16, 64])
def test_rotation(dim: int) -> None:
    x = heads(3, 40, dim, 0)
    cos, sin = torch.randn(2, 1, 40, dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert takes_rotation(x, cos, sin)
    exact = x.detach().double().requires_grad_()
    halves = torch.cat((-exact[..., dim // 2 :], exact[..., : dim // 2]), -1)
    want = exact * cos.double() + halves * sin.double()
    y = rotate(x, cos, sin)
    grad = heads(3, 40, dim, 2).detach()
    assert relative(y, want) < BF16
    got, reference = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(want, exact, grad.double())[0]
    assert relative(got, reference) < BF16


def test_a_tensor_without_memory_stays_with_torch() -> None:
    with FakeTensorMode():
        x = torch.empty(1, 32, 64, dtype=torch.bfloat16)
        assert silu_mul(x, x).shape == rms_norm(x, x[0, 0], 1e-5).shape == x.shape
        assert not native_attention.takes(x[None], x[None], x[None]) and not native_takes(x, [])
        with traced("cpu"):
            assert silu_mul(x, x).shape == rms_norm(x, x[0, 0], 1e-5).shape == x.shape


@needs_products
def test_what_stays_allocated_is_noted_and_bounded() -> None:
    with FakeTensorMode(), traced("cpu") as trace:
        for tokens, dim in ((4096, 8192), (64, 128), (64, 64)):
            x = torch.empty(tokens, dim, dtype=torch.bfloat16, requires_grad=True)
            layers = [Projection(lambda _, w=x[:64]: w, None, torch.empty(8, dim), torch.empty(64, 8), 1.0)]
            lora_linears(x, layers)[0].sum().backward()
            chunked_cross_entropy(x[:64], torch.zeros(64, dtype=torch.int64), lambda h: h, [], 64, x[:64].detach())
    if hasattr(native.library(), "lora_scratch"):  # those for processors without units for bf16
        assert 2**24 < trace.kept["lora"] <= 2**25 and trace.kept["cross_entropy"] > 4 * 64 * 8192
    else:
        assert trace.kept == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({KERNEL_SWITCH: "0"}, f"{KERNEL_SWITCH} is 0"), ({"PATH": "/nowhere"}, "compiled with g++ on Linux")],
    ids=["switched off", "no compiler"],
)
def test_without_the_kernels_torch_computes_the_same(changes: dict[str, str], reason: str) -> None:
    script = (
        "import torch; from finetune.kernels import native; from finetune.kernels.pointwise import silu_mul\n"
        "x = torch.linspace(-4, 4, 64).bfloat16(); print(native.why_missing()); print(silu_mul(x, x).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **changes}, capture_output=True, text=True, check=True
    )
    said, values = done.stdout.splitlines()
    assert reason in said
    x = torch.linspace(-4, 4, 64).bfloat16()
    got = torch.tensor([float(value) for value in values.strip("[]").split(",")])
    torch.testing.assert_close(got, silu_mul(x, x).float(), rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(has_bf16_units() is False, reason="the kernels in fp32 are what runs here anyway")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="they need AVX2")
def test_the_kernels_for_processors_without_bf16_units_hold_here_too() -> None:
    environment = {**os.environ, KERNEL_SWITCH: native.FP32}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "attention or lora or deep or cross_entropy or norm or swiglu or rotation"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]


def test_an_error_of_the_compiler_is_said(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.cpp").write_text("int main( {")
    monkeypatch.setattr(native, "SOURCES", folder)
    monkeypatch.setenv("FINETUNE_CACHE", str(folder / "cache"))
    with pytest.raises(native.NativeKernelsMissingError, match=r"could not compile them: .*error"):
        native._built()
    assert [path.suffix for path in (folder / "cache" / "kernels").iterdir()] == [".lock"]


def test_of_processes_that_start_together_one_compiles(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_slowly(compiler: list[str], sources: list[Path], path: Path) -> None:
        compiled.append(path)
        time.sleep(0.2)
        path.write_bytes(b"a library")

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(native, "_compile", compile_slowly)
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: native._built(), range(4)))
    assert len(compiled) == 1 and len(set(built)) == 1 and built[0].read_bytes() == b"a library"
