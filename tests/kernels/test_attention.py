"""Block attention against a dense mask in fp64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.kernels import attention
from finetune.kernels.attention import (
    _masked_block_attention,
    _row_mask,
    block_attention,
    packed_row,
    segment_attention,
)
from finetune.kernels.layout import Group, RowLayout, attention_blocks, dense_mask, position_ids

LAYOUTS: dict[str, RowLayout] = {
    "one sample": (Group(0, (48,)),),
    "isolated": (Group(0, (20, 7, 1, 20)),),
    "shared prefix": (Group(12, (9, 1, 26)),),
    "groups": (Group(0, (10, 3)), Group(8, (4, 9)), Group(5, (6,))),
    "longer than a tile": (Group(40, (300, 17, 30, 2, 9, 64)), Group(0, (270, 5))),
}


def tensors(num_tokens: int, dtype: torch.dtype, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, num_tokens, 16), (1, kv_heads, num_tokens, 16), (1, kv_heads, num_tokens, 16)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_blocks_equal_a_dense_mask(name: str, dtype: torch.dtype, tolerance: float, kv_heads: int) -> None:
    layout = LAYOUTS[name]
    num_tokens = sum(group.num_tokens for group in layout) + 3  # padding at the end
    inputs = tensors(num_tokens, dtype, kv_heads)
    out = block_attention(*inputs, attention_blocks(layout, num_tokens), None)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = [out, *torch.autograd.grad(out, inputs, weight.to(dtype))]

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    reference = F.scaled_dot_product_attention(*exact, attn_mask=dense_mask(layout, num_tokens), enable_gqa=True)
    want = [reference, *torch.autograd.grad(reference, exact, weight.double())]
    for left, right in zip(got, want, strict=True):
        assert (left.double() - right).norm() / right.norm() < tolerance


def test_without_a_layout_attention_is_causal() -> None:
    query, key, value = tensors(16, torch.float32)
    out, _ = segment_attention(torch.nn.Module(), query, key, value, None)
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2))


@pytest.mark.parametrize(
    ("dtype", "layout", "kv_heads", "given"),
    [
        (torch.bfloat16, None, 2, (2, True)),
        (torch.float32, None, 2, (6, False)),
        (torch.float32, LAYOUTS["groups"], 2, (6, False)),
        (torch.float32, LAYOUTS["groups"], 6, (6, False)),
    ],
)
def test_a_gpu_writes_no_scores_out_for_shared_key_heads(
    dtype: torch.dtype,
    layout: RowLayout | None,
    kv_heads: int,
    given: tuple[int, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There only torch's flash kernel takes fewer key heads than query heads: in half precision, without a mask."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    seen: list[tuple[int, bool]] = []

    def noted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append((value.shape[1], settings["enable_gqa"]))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(attention, "_row_mask", lambda *_: torch.empty(45, 45, dtype=torch.bool, device="cuda"))
    with FakeTensorMode(), packed_row(layout):
        inputs = [torch.empty(1, heads, 45, 16, dtype=dtype, device="cuda") for heads in (6, kv_heads, kv_heads)]
        segment_attention(torch.nn.Module(), *inputs, None)
    assert seen == [given]


def test_repeated_key_heads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, blocks = tensors(48, torch.float32), attention_blocks(LAYOUTS["shared prefix"], 48)
    want = _masked_block_attention(*inputs, blocks, None)
    monkeypatch.setattr(attention, "_needs_all_heads", lambda *_, **masked: True)
    torch.testing.assert_close(_masked_block_attention(*inputs, blocks, None), want)


def test_a_mask_is_made_once_for_all_layers() -> None:
    _row_mask.cache_clear()
    inputs, blocks = tensors(48, torch.float32), attention_blocks(LAYOUTS["shared prefix"], 48)
    with torch.inference_mode():
        _masked_block_attention(*inputs, blocks, None)
    _masked_block_attention(*inputs, blocks, None).sum().backward()
    assert _row_mask.cache_info()[:2] == (1, 1)


def test_fm11_a_sample_does_not_see_its_neighbours() -> None:
    layout = (Group(4, (6, 8)), Group(0, (5,)))
    query, key, value = (tensor.detach() for tensor in tensors(23, torch.float32))
    with packed_row(layout):
        before, _ = segment_attention(torch.nn.Module(), query, key, value, None)
    for tensor in (query, key, value):
        tensor[:, :, 4:10] += 1.0  # the first sample's own tokens
    with packed_row(layout):
        after, _ = segment_attention(torch.nn.Module(), query, key, value, None)
    assert not torch.equal(before[:, 4:10], after[:, 4:10])
    assert torch.equal(before[:, :4], after[:, :4])
    assert torch.equal(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("arguments", [{"softcap": 30.0}, {"s_aux": torch.zeros(6)}, {"sliding_window": 8}])
def test_what_would_be_computed_wrongly_is_refused(arguments: dict[str, object]) -> None:
    query, key, value = tensors(16, torch.float32)
    with pytest.raises(NotImplementedError):
        segment_attention(torch.nn.Module(), query, key, value, None, **arguments)  # type: ignore[arg-type]


def test_positions_run_on_from_the_prefix() -> None:
    layout = (Group(2, (2, 3)), Group(0, (2,)))
    assert position_ids(layout, 11).tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 0, 1]]
