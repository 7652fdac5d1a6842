"""From samples to the tensors of one forward pass: packed rows, or right-padded batches.

Positions are flat over [B, T]: `loss_positions[i]` is the hidden state from which `targets[i]` is predicted. The last
token of a shared prefix can stand there several times, once for each sample that goes on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from finetune.data.dataset import TokenDataset
from finetune.data.packing import PackedRow
from finetune.kernels.layout import Group, RowLayout, position_ids

# Matrix units work on tiles: lengths are padded to a multiple of this.
PAD_MULTIPLE = 8
# Packed rows come in few lengths, since a kernel is compiled and kept for each: see kernels.attention. Under 2 % of a
# 1,024-token row is padding with this default of `data.row_multiple`. Rows of up to SHORT_ROW take PAD_MULTIPLE.
ROW_MULTIPLE = 32
SHORT_ROW = 256


@dataclass
class MicroBatch:
    """One forward pass. B rows of T tokens, M supervised positions.

    `layout` is None for a right-padded batch. `samples` are dataset indices, for messages.
    """

    input_ids: torch.Tensor  # int64 [B, T]
    position_ids: torch.Tensor  # int64 [B, T]
    loss_positions: torch.Tensor  # int64 [M], into B*T
    targets: torch.Tensor  # int64 [M]
    layout: RowLayout | None
    num_real_tokens: int  # tokens of the samples, a shared prefix counted for each of them
    samples: list[int] = field(default_factory=list)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that the forward pass computes, padding included."""
        return self.input_ids.numel()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What moves to the device."""
        return self.input_ids, self.position_ids, self.loss_positions, self.targets

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory, from which copies to a GPU run alongside its work."""
        return self._with(*(tensor.pin_memory() for tensor in self.tensors()))

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; the copy does not wait where memory is pinned."""
        return self._with(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def _with(self, input_ids, positions, loss_positions, targets) -> MicroBatch:  # type: ignore[no-untyped-def]
        return MicroBatch(
            input_ids, positions, loss_positions, targets, self.layout, self.num_real_tokens, self.samples
        )


def round_up(length: int, multiple: int = PAD_MULTIPLE) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def row_length(num_tokens: int, multiple: int = ROW_MULTIPLE) -> int:
    """Tokens that are computed for a packed row of `num_tokens`: rows end where their tokens end."""
    return round_up(max(num_tokens, 1), multiple if num_tokens > SHORT_ROW else PAD_MULTIPLE)


def packed_batch(dataset: TokenDataset, row: PackedRow, pad_id: int, multiple: int = ROW_MULTIPLE) -> MicroBatch:
    """One packed row [1, T] with its layout, padded to a multiple of `multiple`."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    layout: list[Group] = []
    offset = real = 0
    for group in row.groups:
        prefix = group.prefix_len
        prefix_end = offset + prefix
        if prefix:
            ids.append(dataset[group.samples[0]][0][:prefix])
        start, suffix_lens = prefix_end, []
        for sample in group.samples:
            input_ids, supervised = dataset[sample]
            own = len(input_ids) - prefix
            predicted = np.flatnonzero(supervised[1:]) + 1
            # A token's predecessor: within the sample's own tokens, or the prefix's last.
            before = np.where(predicted == prefix, prefix_end - 1, start + predicted - prefix - 1)
            positions.append(before)
            targets.append(input_ids[predicted])
            ids.append(input_ids[prefix:])
            suffix_lens.append(own)
            start += own
            real += len(input_ids)
        layout.append(Group(prefix, tuple(suffix_lens)))
        offset = start
    num_tokens = row_length(offset, multiple)
    ids.append(np.full(num_tokens - offset, pad_id))
    return MicroBatch(
        input_ids=_int64(ids)[None],
        position_ids=position_ids(tuple(layout), num_tokens),
        loss_positions=_int64(positions),
        targets=_int64(targets),
        layout=tuple(layout),
        num_real_tokens=real,
        samples=row.samples,
    )


def padded_batch(dataset: TokenDataset, samples: Sequence[int], pad_id: int) -> MicroBatch:
    """A batch [B, T] padded on the right to the longest sample."""
    rows = [dataset[sample] for sample in samples]
    width = round_up(max((len(ids) for ids, _ in rows), default=1))
    input_ids = np.full((max(len(rows), 1), width), pad_id, dtype=np.int64)
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for index, (ids, supervised) in enumerate(rows):
        input_ids[index, : len(ids)] = ids
        predicted = np.flatnonzero(supervised[1:]) + 1
        positions.append(index * width + predicted - 1)
        targets.append(ids[predicted])
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        # Not expanded: pinning a tensor copies its strides, and what lies in itself cannot be written.
        position_ids=torch.arange(width).repeat(len(input_ids), 1),
        loss_positions=_int64(positions),
        targets=_int64(targets),
        layout=None,
        num_real_tokens=sum(len(ids) for ids, _ in rows),
        samples=list(samples),
    )


def empty_batch(pad_id: int) -> MicroBatch:
    """One row of padding: runs through a model and supervises nothing."""
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.full((1, PAD_MULTIPLE), pad_id)
    return MicroBatch(ids, torch.arange(PAD_MULTIPLE)[None], none, none, None, 0)


def _int64(parts: list[np.ndarray]) -> torch.Tensor:
    if not parts:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
