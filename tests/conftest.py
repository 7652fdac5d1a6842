"""What every test runs under: no network, no trackers, a cache of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any test module imports the libraries that read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ["WANDB_MODE"] = "offline"

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """A fresh $FINETUNE_CACHE, so that no test sees what an earlier session converted or tokenized."""
    with tempfile.TemporaryDirectory(prefix="finetune-cache-") as folder:
        os.environ["FINETUNE_CACHE"] = folder
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real data sets, where there is one."""
    chosen = os.environ.get("FINETUNE_SHARED_DATA")
    folder = Path(chosen) if chosen else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent; set FINETUNE_SHARED_DATA to a folder of it")
    return folder
