"""How samples lie in a packed row: which tokens may attend to which.

A row is a sequence of groups. A group is a prefix that all its samples share (possibly empty), computed once,
followed by the samples' own tokens. A sample attends to its group's prefix and, causally, to itself; never
to another sample. Exact: a sample's logits equal those it has alone in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Group:
    """Samples with one common prefix: tokens of the prefix, then each sample's tokens after it."""

    prefix_len: int
    suffix_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the group takes in its row."""
        return self.prefix_len + sum(self.suffix_lens)


RowLayout = tuple[Group, ...]


class Block(NamedTuple):
    """Queries [q_start, q_end) attend to keys [k_start, k_end): causally (a square) or fully."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    causal: bool

    def num_scores(self) -> int:
        """Queries times keys."""
        return (self.q_end - self.q_start) * (self.k_end - self.k_start)


def attention_blocks(layout: RowLayout, num_tokens: int) -> list[Block]:
    """The blocks that cover a row of `num_tokens`: every query in one causal block, then prefixes in full blocks.

    Tokens after the last group are padding; they form a causal block of their own so that no query is empty.
    """
    causal: list[Block] = []
    full: list[Block] = []
    start = 0
    for group in layout:
        prefix_start, start = start, start + group.prefix_len
        if group.prefix_len:
            causal.append(Block(prefix_start, start, prefix_start, start, True))
        own_start = start
        for length in group.suffix_lens:
            causal.append(Block(start, start + length, start, start + length, True))
            start += length
        if group.prefix_len and start > own_start:
            full.append(Block(own_start, start, prefix_start, own_start, False))
    if start < num_tokens:
        causal.append(Block(start, num_tokens, start, num_tokens, True))
    return causal + full


def dense_mask(layout: RowLayout, num_tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """The same as one boolean mask [1, 1, T, T], True where a query may attend: for models without block attention."""
    return block_mask(attention_blocks(layout, num_tokens), num_tokens, device)[None, None]


def block_mask(blocks: list[Block], num_tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """The union of `blocks` as one boolean mask [T, T]."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool, device=device)
    for block in blocks:
        part = mask[block.q_start : block.q_end, block.k_start : block.k_end]
        part.fill_(True)
        if block.causal:
            part.tril_()
    return mask


def position_ids(layout: RowLayout, num_tokens: int) -> torch.Tensor:
    """Positions [1, T]: each sample counts on from its prefix, as if it were alone."""
    parts = [torch.arange(start, start + length) for start, length in _spans(layout)]
    used = sum(len(part) for part in parts)
    parts.append(torch.arange(num_tokens - used))
    return torch.cat(parts)[None]


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`; a copy from memory that is not page-locked would wait for all work of a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _spans(layout: RowLayout) -> Iterator[tuple[int, int]]:
    for group in layout:
        if group.prefix_len:
            yield 0, group.prefix_len
        for length in group.suffix_lens:
            yield group.prefix_len, length
