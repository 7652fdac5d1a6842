"""The cache folder: whole or absent."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data import cache
from finetune.data.prepare import PreparedData
from finetune.errors import FinetuneError
from tests.data.conftest import chat, prepare

Tokenizers = Callable[[str], Any]
Sections = Callable[..., Any]
ROWS = [chat("hello", "hi"), chat("one", "two three", "four", "five")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def make(tokenizer_of: Tokenizers, section: Sections) -> PreparedData:
    return prepare(tokenizer_of("llama3"), section(ROWS))[0]


def test_the_folder_is_whole(folder: Path, tokenizer_of: Tokenizers, section: Sections) -> None:
    make(tokenizer_of, section)
    (only,) = folder.iterdir()
    meta = json.loads((only / "meta.json").read_text())
    assert meta["dtype"] == "uint16" and meta["num_samples"] == 2
    assert {file.name for file in only.iterdir()} == {*meta["files"], "meta.json"}


@pytest.mark.parametrize("damage", ["tokens.bin", "mask.bin", "meta.json", "offsets.npy"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_folder_is_made_anew(
    damage: str, how: str, folder: Path, tokenizer_of: Tokenizers, section: Sections
) -> None:
    first = make(tokenizer_of, section)
    (only,) = folder.iterdir()
    file = only / damage
    if how == "gone":
        file.unlink()
    else:
        content = file.read_bytes()
        file.unlink()  # the first data set still maps the old file
        file.write_bytes(content[: len(content) // 2])
    second = make(tokenizer_of, section)
    assert second.ledger.sources[0].cache == "made"
    assert second.train.fingerprint == first.train.fingerprint
    assert [path.name for path in folder.iterdir()] == [only.name]


def test_a_kill_leaves_nothing_that_is_taken_for_whole(
    folder: Path, tokenizer_of: Tokenizers, section: Sections, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_replace", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tokenizer_of, section)
    assert list(folder.iterdir()) == []
    stale = folder / "abc.tmp-1"
    stale.mkdir()
    os.utime(stale, (0, 0))
    assert make(tokenizer_of, section).ledger.sources[0].cache == "made"
    assert not stale.exists()


def test_a_folder_that_cannot_be_written(
    tokenizer_of: Tokenizers, section: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FinetuneError, match="FINETUNE_CACHE"):
        make(tokenizer_of, section)


def test_large_vocabularies_take_four_bytes(folder: Path) -> None:
    chunk_arrays: dict[str, Any] = {
        "ids": np.array([70_000, 1], np.int32),
        "supervised": np.array([True, True]),
        "lengths": np.array([2], np.int32),
        "row_of_sample": np.zeros(1, np.int32),
        "origins": np.zeros((1, 2), np.int32),
        "hashes": np.ones(1, np.uint64),
        "fates": np.zeros(1, np.uint8),
        "full_lengths": np.array([2], np.int32),
        "rejected": [],
        "counts": {},
    }
    store = cache.write_store("k", [cache.Chunk(**chunk_arrays)], vocab_size=70_001, extra={})
    assert store.tokens.dtype == np.int32 and store.tokens.tolist() == [70_000, 1]
    assert store.num_supervised.tolist() == [1]


def test_a_data_set_survives_pickling(folder: Path, tokenizer_of: Tokenizers, section: Sections) -> None:
    dataset = make(tokenizer_of, section).train
    dataset[0]
    content = pickle.dumps(dataset)
    assert len(content) < 10_000
    copy = pickle.loads(content)
    assert copy.fingerprint == dataset.fingerprint and copy.origin(1) == dataset.origin(1)
    for index in range(2):
        for ours, theirs in zip(dataset[index], copy[index], strict=True):
            assert np.array_equal(ours, theirs)
