"""What the loader hands out can be copied to a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.batches import MicroBatch, empty_batch, packed_batch, padded_batch
from finetune.data.packing import PackedGroup, PackedRow

DATASET: Any = [(np.arange(length, dtype=np.int32), np.arange(length) > 2) for length in (5, 9, 12)]
ROW = PackedRow((PackedGroup(3, (1, 2)), PackedGroup(0, (0,))), 23)
BATCHES = {
    "padded": padded_batch(DATASET, [0, 1, 2], 0),
    "no samples": padded_batch(DATASET, [], 0),
    "packed": packed_batch(DATASET, ROW, 0),
    "empty": empty_batch(0),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_tensor_can_be_pinned(batch: MicroBatch) -> None:
    """As torch does it (`_pin_memory` in aten/src/ATen/native/Memory.cpp): by a copy of the same strides."""
    for tensor in batch.tensors():
        torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)
