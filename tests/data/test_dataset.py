"""TokenDataset: types, lengths, and what carries loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import chat, prepare


def test_samples(tokenizer_of: Callable[[str], Any], section: Callable[..., Any]) -> None:
    rows = [chat("hello", "hi"), chat("one", "two three", "four", "five")]
    dataset = prepare(tokenizer_of("llama3"), section(rows))[0].train
    assert len(dataset) == 2 and dataset.lengths.dtype == dataset.num_supervised.dtype == np.int32
    for index in range(2):
        ids, mask = dataset[index]
        assert ids.dtype == np.int32 and mask.dtype == bool
        assert len(ids) == len(mask) == dataset.lengths[index]
        assert mask[1:].sum() == dataset.num_supervised[index]
        ids[0] = mask[0] = 1  # copies: the cache stays as it is
        assert dataset[index][0][0] != 1
    assert np.array_equal(dataset[-1][0], dataset[1][0])
    assert dataset.origin(1).endswith("rows.jsonl:2")
    with pytest.raises(IndexError):
        dataset[2]


def test_the_first_rows_bring_all_of_their_samples(
    tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    rows = [chat("a", "b"), chat("c", "<think>\nk\n</think>\n\nd", "e", "f"), chat("g", "h")]
    dataset = prepare(tokenizer_of("qwen3"), section(rows))[0].train
    assert len(dataset) == 4  # the template rewrites the second row's first turn
    for count, samples in ((1, 1), (2, 3), (3, 4), (9, 4)):
        first = dataset.first_rows(count)
        assert len(first) == samples and len(first.row_hashes()) == min(count, 3)
        assert all(first.origin(index) == dataset.origin(index) for index in range(samples))
