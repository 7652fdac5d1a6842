"""A row as variable-length sequences gives what the dense mask gives; the kernel's place is taken by its definition."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.kernels import varlen
from finetune.kernels.layout import Group, dense_mask
from finetune.kernels.varlen import row_sequences, takes, varlen_attention

ROWS = {
    "one": (Group(0, (9,)),),
    "isolated": (Group(0, (4, 7, 1)),),
    "prefix": (Group(5, (3, 1, 6)),),
    "mixed": (Group(0, (2, 3)), Group(4, (2, 2)), Group(1, (5,))),
    "prefix alone": (Group(3, ()),),
}


def definition(q, k, v, starts_q, starts_k, max_q, max_k, *, scale, window_size) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """torch's `varlen_attn` as its documentation and flash attention's say: causal, aligned to the end of both."""
    assert window_size == (-1, 0)
    assert max_q == int(starts_q.diff().max()) and max_k == int(starts_k.diff().max())
    assert starts_q.dtype == starts_k.dtype == torch.int32
    parts = []
    for index in range(len(starts_q) - 1):
        own = slice(int(starts_q[index]), int(starts_q[index + 1]))
        seen = slice(int(starts_k[index]), int(starts_k[index + 1]))
        rows, columns = own.stop - own.start, seen.stop - seen.start
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (q[own], k[seen], v[seen]))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def told_of_groups(q, k, *others, enable_gqa=False, **settings) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The same as torch 2.13 has it, which refuses fewer key heads where nothing says so."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return definition(q, k, *others, **settings)


@pytest.mark.parametrize("layout", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("kernel", "grouped"), [(definition, {}), (told_of_groups, {"enable_gqa": True})])
def test_sequences_are_the_dense_mask(
    layout: tuple[Group, ...], padding: int, kernel: Any, grouped: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "GROUPED", grouped)
    torch.manual_seed(0)
    num_tokens = sum(group.num_tokens for group in layout) + padding
    query = torch.randn(1, 4, num_tokens, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, num_tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(1, 4, num_tokens, 8, dtype=torch.float64)
    got = varlen_attention(query, key, value, layout, 0.3, kernel)
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
        varlen_attention(*inputs, ROWS["prefix"], None, definition).sum().backward()
    assert summed == [torch.float32] * 2
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
    from torch.nn.attention.varlen import varlen_attn

    names: dict[str, Any] = dict(inspect.signature(varlen_attn).parameters)
    assert list(names)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", *varlen.GROUPED} <= set(names)
    assert set(varlen.GROUPED) == {"enable_gqa"} & set(names)


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
