"""A run's directory as training leaves it, without training: tiny base, adapter, numbers, and canaries in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.models.adapters import attach_adapter, save_adapter
from finetune.recipe.load import dump_recipe
from finetune.recipe.schema import Recipe
from tests.hub_double import HubDouble, User

TOKEN = "hf_CanaryAbCdEfGhIjKlMnOpQrSt0123456789"
WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"
HOST = "canary-host-17"
HOME = "/home/canary-user"
CANARIES = (TOKEN, WANDB_KEY, HOST, "canary-user")
BASE_COMMIT = "0" * 40
SHA256 = "ab" * 32


def build_run(folder: Path, base: Path, *, name: str = "acme/base", **sections: Any) -> tuple[Path, Any]:
    """The directory of a finished run on `base`, which its recipe calls `name`; and the model as trained."""
    recipe = Recipe.model_validate(
        {
            "name": "canary-run",
            "output_dir": f"{HOME}/runs",
            "model": {"name": name, "quantization": "none"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"sources": [{"path": f"{HOME}/secret/train.jsonl"}, {"path": "acme/rows"}], "max_seq_len": 128},
            "training": {"max_steps": 4, "precision": "32-true"},
        }
        | sections
    )
    run = folder / "run"
    adapter = run / "adapter"
    adapter.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = attach_adapter(AutoModelForCausalLM.from_pretrained(base), recipe.adapter, tokenizer, seed=0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, adapter)
    tokenizer.save_pretrained(adapter)
    fingerprints = {
        "base": {"name": name, "revision": None if name.startswith("/") else BASE_COMMIT, "sha256": SHA256},
        "data": {"train": "cd" * 32, "validation": None},
    }
    (adapter / "fingerprints.json").write_text(json.dumps(fingerprints))
    for place in (run, adapter):
        (place / "recipe.yaml").write_text(dump_recipe(recipe))
    _write_numbers(run)
    return run, model.eval()


def _write_numbers(run: Path) -> None:
    sample = {
        "prompt": f"read | {HOME}/x.txt",
        "expected": "a\nb",
        "completion": f"my token is {TOKEN}",
        "stopped": True,
    }
    machine = {"platform": "Linux x86_64", "python": "3.11", "cpu_cores": 2, "memory_bytes": 8 << 30, "gpus": []}
    training = {"steps": 4, "tokens": 1234, "seconds": 75.0, "tokens_per_second": 16.5, "peak_memory_bytes": 10**9}
    results = {
        "before": {"metrics": {"exact_match": 0.0, "perplexity": 3.5}, "samples": [sample]},
        "after": {"metrics": {"exact_match": 0.5, "perplexity": 1.25}, "samples": [sample]},
        "training": {**training, "machine": machine},
    }
    (run / "results.json").write_text(json.dumps(results))
    source = {"where": "data.sources[0]", "path": f"{HOME}/secret/train.jsonl", "format": "alpaca", "rows_read": 1500}
    source |= {"rows_kept": 1490, "dropped": {"over length": 10}, "supervised_tokens": 9000}
    totals = {"train_samples": 1490, "train_tokens": 20000, "train_supervised_tokens": 9000, "test_rows_in_train": 7}
    (run / "ledger.json").write_text(json.dumps({"sources": [source], **totals}))
    rows = "".join(f"{step},{4 / step},{3 / step if step == 4 else ''}\n" for step in (1, 2, 3, 4))
    (run / "metrics.csv").write_text(f"step,loss,validation_loss\n{rows}5,")


def write_empty_gguf(path: Path, kind: str) -> Path:
    """A GGUF file that says what it is and holds nothing."""
    writer = GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A double that this process takes for the Hub, logged in as ada; waits between attempts take no time."""
    for name, value in {"HF_TOKEN": TOKEN, "WANDB_API_KEY": WANDB_KEY, "HOSTNAME": HOST}.items():
        monkeypatch.setenv(name, value)
    with HubDouble() as double:
        double.users[TOKEN] = User("ada", orgs={"acme": "write", "library": "read"})
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", double.url)
        template = f"{double.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield double
