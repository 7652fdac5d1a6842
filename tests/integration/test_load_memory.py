"""Under FSDP the processes of a machine share one copy of the base: what each holds of its own is its shard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe, write_tokenizer

WORKER = Path(__file__).with_name("load_peak.py")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def write_large_model(folder: Path) -> Path:
    """196 M parameters, bf16: 393 MB on disk, about 110 MB in NF4."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=17,
        num_attention_heads=16,
        num_key_value_heads=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)  # values do not matter, and drawing them takes seconds
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_processes_of_a_machine_share_one_copy_of_the_base(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(8))
    models = {"warm": write_model(tmp_path / "small", "llama"), "large": write_large_model(tmp_path / "large")}
    recipes = []
    for name, quantization in [("warm", "nf4"), ("first-nf4", "nf4"), ("nf4", "nf4"), ("bf16", "none")]:
        model = models["warm" if name == "warm" else "large"]
        recipe = tiny_recipe(
            tmp_path,
            model,
            rows,
            name=name,
            model={"name": str(model), "quantization": quantization},
            training={"max_steps": 1, "global_batch_size": 2, "precision": "bf16-mixed"},
            distributed={"accelerator": "cpu", "strategy": "fsdp"},
        )
        recipes.append(str(write_recipe(tmp_path / f"{name}.yaml", recipe)))
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(WORKER), str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    environment["FINETUNE_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run([*command, *recipes], env=environment, timeout=250, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    (converted,) = (tmp_path / "cache" / "models").glob("large-nf4-*/model.safetensors")
    base = {"nf4": converted.stat().st_size, "bf16": (models["large"] / "model.safetensors").stat().st_size}
    print("bytes:", base, *lines, sep="\n")  # with -s, for docs/reliability.md
    # Besides the shard there are adapters, and while the head is checked one weight that is not quantized: much beside
    # an NF4 base as small as this one.
    most = {"nf4": 1.0, "bf16": 0.75}
    for name, size in base.items():
        held = [line for line in lines if line["recipe"] == name]
        assert len(held) == 2
        for line in held:
            assert line["converting"] < 0.1 * size and line["loading"] < 0.1 * size, line
            assert line["sharding"] < most[name] * size and line["after"] < most[name] * size, line
    # Only the first of the processes that come first quantizes.
    assert sum(line["converting"] > 0.1 * base["nf4"] for line in lines if line["recipe"] == "first-nf4") == 1
