"""How much memory `finetune merge` takes, its check included: a layer and some tensors, not the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from finetune.export.merge_files import TensorInfo, write_shards
from tests.conftest import REPOSITORY
from tests.tiny import chat_rows, tiny_recipe, write_jsonl, write_recipe, write_tokenizer

# 24 layers of 4 x 768^2 and 3 x 768 x 4096 values: 570 MB in bf16.
WIDTH, INNER, LAYERS, VOCAB = 768, 4096, 24, 320

MERGE = """
import json, re, sys, threading
from pathlib import Path
import torch, transformers, peft, bitsandbytes, finetune.commands.merge, finetune.inference.load, datasets
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from finetune.cli import main

# Pages of mapped files are left out: the system takes them back when it needs them, at times between two readings.
def own_memory():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

before, readings, done = own_memory(), [], threading.Event()

def watch():
    while not done.wait(0.001):
        readings.append(own_memory())

watcher = threading.Thread(target=watch)
watcher.start()
code = main(["merge", *sys.argv[1:]])
done.set()
watcher.join()
top = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)
growth = max(readings) - before
print(json.dumps({"code": code, "growth": growth, "readings": len(readings), "process": 1024 * int(top)}))
"""


def write_base(folder: Path) -> int:
    """A Llama of random weights in bf16; returns its bytes."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (INNER, WIDTH)
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (WIDTH,)
    infos = [TensorInfo(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    folder.mkdir()
    torch.manual_seed(0)

    def make(name: str) -> torch.Tensor:
        shape = shapes[name]
        return torch.ones(shape).bfloat16() if len(shape) == 1 else (torch.randn(shape) * 0.03).bfloat16()

    write_shards(folder, infos, make)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        vocab_size=VOCAB,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    write_tokenizer(folder)
    return sum(info.num_bytes for info in infos)


def write_adapter(folder: Path) -> None:
    """LoRA of rank 2 on every linear layer."""
    adapter: dict[str, torch.Tensor] = {}
    for number in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            key = f"base_model.model.model.layers.{number}.{block}.{name}"
            wide, deep = (INNER if name in ("gate_proj", "up_proj") else WIDTH), INNER if name == "down_proj" else WIDTH
            adapter[f"{key}.lora_A.weight"] = torch.randn(2, deep) * 0.05
            adapter[f"{key}.lora_B.weight"] = torch.randn(wide, 2) * 0.05
    folder.mkdir()
    write_shards(
        folder, [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in adapter.items()], adapter.__getitem__
    )
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "quantization"), [("original", "none"), ("dequantized", "nf4")])
def test_memory_is_bounded_by_a_layer_and_not_by_the_model(tmp_path: Path, base: str, quantization: str) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc")
    size = write_base(tmp_path / "base")
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    write_adapter(run / "adapter")
    recipe = tiny_recipe(
        tmp_path,
        tmp_path / "base",
        write_jsonl(tmp_path / "data.jsonl", chat_rows(48)),
        model={"quantization": quantization},
        adapter={"rank": 2, "alpha": 4},
        data={"validation": {"size": 8}},
        training={"precision": "bf16-mixed"},
        # Random weights, so no bound holds on what the other base gives.
        merge={"max_kl": 10.0, "max_kl_original": 10.0, "min_agreement": 0.0},
    )
    write_recipe(run / "recipe.yaml", recipe)
    command = [sys.executable, "-c", MERGE, str(run), "--base", base]
    # malloc keeps freed blocks of up to 32 MB, which are large here and small beside the tensors of a 7B model.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0 and "loaded whole" not in done.stderr, done.stderr
    assert size > 5e8 and found["readings"] > 50
    growth, whole = found["growth"] / 1e6, found["process"] / 1e6
    print(f"merged {size / 1e6:.0f} MB with {growth:.0f} MB of memory; {whole:.0f} MB with the libraries")
    assert found["growth"] < 0.25 * size, found
