"""The chunked loss against plain cross-entropy in fp64: value, gradients, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.kernels import cross_entropy
from finetune.kernels.cross_entropy import chunk_tokens, chunked_cross_entropy
from finetune.kernels.traced import traced

D, V, N = 12, 50, 37


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 16 * V * 4)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("trained", [False, True])
def test_value_and_gradients_are_exact(cap: float | None, trained: bool) -> None:
    hidden, weight, targets = problem()

    def head(part: torch.Tensor, matrix: torch.Tensor = weight) -> torch.Tensor:
        logits = part @ matrix.t()
        return logits if cap is None else torch.tanh(logits / cap) * cap

    assert chunk_tokens(V, "cpu") < N, "the test must cross a chunk's border"
    loss = chunked_cross_entropy(hidden, targets, head, [weight] if trained else [], V)
    grads = torch.autograd.grad(loss * 0.5, [hidden, weight] if trained else [hidden])

    hidden_64, weight_64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    exact = F.cross_entropy(head(hidden_64, weight_64), targets, reduction="sum")
    want = torch.autograd.grad(exact * 0.5, [hidden_64, weight_64])
    assert abs(loss.item() - exact.item()) < 1e-5 * exact.item()
    for got, reference in zip(grads, want, strict=False):
        torch.testing.assert_close(got.double(), reference, rtol=1e-5, atol=1e-5)


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, targets = problem()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, targets, lambda part: part @ weight.t(), [], V)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), targets, reduction="sum").detach())


def test_no_labels_give_a_zero_that_can_be_differentiated() -> None:
    hidden = torch.randn(0, D).requires_grad_()
    loss = chunked_cross_entropy(hidden, torch.zeros(0, dtype=torch.int64), lambda part: part, [], V)
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None


def test_a_chunk_is_bounded_for_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 32 * 2**20)
    assert chunk_tokens(256_000, "cpu") * 256_000 * 4 <= 32 * 2**20
    seen: list[int] = []
    hidden, weight = torch.randn(100, 4).requires_grad_(), torch.randn(256_000, 4)

    def head(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[0])
        return part @ weight.t()

    chunked_cross_entropy(hidden, torch.arange(100), head, [], 256_000).backward()
    assert 100 <= sum(seen) < 132 and max(seen) <= chunk_tokens(256_000, "cpu")


def test_a_gpu_gets_chunks_that_fill_it() -> None:
    """In an estimate for one too."""
    hidden, weight = torch.randn(64, 4).requires_grad_(), torch.randn(1_000_000, 4)
    given: list[int] = []

    def head(part: torch.Tensor) -> torch.Tensor:
        given.append(part.shape[0])
        return part @ weight.t()

    with FakeTensorMode(allow_non_fake_inputs=True), traced("cuda"):
        chunked_cross_entropy(hidden, torch.zeros(64, dtype=torch.int64), head, [], 1_000_000)
    assert max(given) == chunk_tokens(1_000_000, "cuda") == 64
    assert chunk_tokens(1_000_000, "cpu") == 16
