"""A row as variable-length sequences gives what the dense mask gives; the kernel's place is taken by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.kernels.layout import Group, dense_mask
from finetune.kernels.varlen import (
    FLASH,
    Kernel,
    Sequences,
    row_sequences,
    takes,
    varlen_attention,
)

ROWS = {
    "one": (Group(0, (9,)),),
    "isolated": (Group(0, (4, 7, 1)),),
    "prefix": (Group(5, (3, 1, 6)),),
    "mixed": (Group(0, (2, 3)), Group(4, (2, 2)), Group(1, (5,))),
    "prefix alone": (Group(3, ()),),
}


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Sequences, scale: float) -> torch.Tensor:
    """Causal attention of each sequence, aligned to the end of queries and keys, as flash attention's documentation."""
    assert rows.max_q == int(rows.starts_q.diff().max()) and rows.max_k == int(rows.starts_k.diff().max())
    assert rows.starts_q.dtype == rows.starts_k.dtype == torch.int32
    parts = []
    for index in range(len(rows.starts_q) - 1):
        own = slice(int(rows.starts_q[index]), int(rows.starts_q[index + 1]))
        seen = slice(int(rows.starts_k[index]), int(rows.starts_k[index + 1]))
        num_rows, columns = own.stop - own.start, seen.stop - seen.start
        mask = torch.ones(num_rows, columns, dtype=torch.bool).tril(columns - num_rows)
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (q[own], k[seen], v[seen]))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def forward(q, k, v, rows, scale) -> Any:  # type: ignore[no-untyped-def]
    return definition(q, k, v, rows, scale), (q[0, 0], k[0, 0], v[0, 0])


def backward(grad, q, k, v, out, needed, rows, scale) -> Any:  # type: ignore[no-untyped-def]
    assert len(needed) == 3 and out.shape == grad.shape == q.shape
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    with torch.enable_grad():
        return torch.autograd.grad(definition(*inputs, rows, scale), inputs, grad)


DEFINITION = Kernel(forward, backward)


@pytest.mark.parametrize("layout", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("padding", [0, 3])
def test_sequences_are_the_dense_mask(layout: tuple[Group, ...], padding: int) -> None:
    torch.manual_seed(0)
    num_tokens = sum(group.num_tokens for group in layout) + padding
    query = torch.randn(1, 4, num_tokens, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, num_tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(1, 4, num_tokens, 8, dtype=torch.float64)
    got = varlen_attention(query, key, value, layout, 0.3, DEFINITION)
    mask = dense_mask(layout, num_tokens)
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got, (query, key, value), grad),
        torch.autograd.grad(want, (query, key, value), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_what_samples_give_to_their_prefix_is_summed_in_fp32() -> None:
    """On CUDA torch adds one value after the other, and in bf16 would round at each; on a CPU it does not."""
    summed: list[torch.dtype] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.index_add, torch.ops.aten.index_add_):
                summed.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    inputs = [torch.randn(1, 1, 15, 8).bfloat16().requires_grad_() for _ in range(3)]
    with Watching():
        varlen_attention(*inputs, ROWS["prefix"], 0.3, DEFINITION).sum().backward()
    assert summed == [torch.float32]
    assert all(tensor.grad.dtype == torch.bfloat16 for tensor in inputs)


def test_keys_are_gathered_only_for_a_prefix() -> None:
    cpu = torch.device("cpu")
    assert row_sequences(ROWS["isolated"], 12, cpu).keys is None
    keys = row_sequences(ROWS["prefix"], 15, cpu).keys
    assert keys is not None and len(keys) == 5 + (5 + 3) + (5 + 1) + (5 + 6)


def test_a_gpu_gets_the_sequences_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory a copy waits until the GPU has nothing left to do."""
    pinned: list[torch.Tensor] = []
    copied: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    def copy(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        assert device.type == "cuda" and non_blocking
        copied.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    got = row_sequences.__wrapped__(ROWS["prefix"], 15, torch.device("cuda"))
    assert [id(tensor) for tensor in copied] == [id(tensor) for tensor in pinned]
    assert [id(tensor) for tensor in pinned] == [id(tensor) for tensor in got[:3]]


def test_torch_has_the_kernel_and_its_arguments() -> None:
    """On tensors that stand for a GPU's: shapes and arguments are those of torch's operators."""
    with FakeTensorMode():
        q, k, v = (torch.empty(15, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        starts = torch.empty(3, dtype=torch.int32, device="cuda")
        rows = Sequences(starts, starts, None, 6, 11)
        out, needed = FLASH.forward(q, k, v, rows, 0.3)
        grads = FLASH.backward(out, q, k, v, out, needed, rows, 0.3)
    assert [tensor.shape for tensor in (out, *grads)] == [tensor.shape for tensor in (q, q, k, v)]
    assert all(tensor.dtype == torch.bfloat16 for tensor in (out, *grads))


def test_a_cpu_keeps_its_own_kernel() -> None:
    x = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    assert not takes(x, x)


@pytest.mark.parametrize(
    ("size", "value_size", "fits"),
    [(64, 64, True), (256, 256, True), (264, 264, False), (60, 60, False), (192, 128, False)],
)
def test_only_head_sizes_of_the_flash_kernel_reach_it(
    size: int, value_size: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with FakeTensorMode():
        query, value = (torch.empty(1, 2, 4, n, dtype=torch.bfloat16, device="cuda") for n in (size, value_size))
        assert takes(query, value) == fits
