"""How much memory a merge takes: a few tensors, not the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from finetune.export.merge_files import TensorInfo, write_shards
from tests.conftest import REPOSITORY

# 8 layers of 4 x 768^2 and 3 x 768 x 4096 values: 190 MB in bf16 and twice that merged in fp32.
WIDTH, INNER, LAYERS, VOCAB = 768, 4096, 8, 512

MERGE = """
import json, re, sys, threading
from pathlib import Path
from transformers import AutoConfig, PreTrainedTokenizerFast
from finetune.export.merge import Merge
from finetune.models.sources import find_model
from finetune.recipe.schema import Recipe

folder, base = Path(sys.argv[1]), sys.argv[2]
recipe = Recipe.model_validate(json.loads((folder / "recipe.json").read_text()))

class Tokens:
    bos_token_id = pad_token_id = 0
    chat_template = None
    def __len__(self):
        return 512
    def save_pretrained(self, out):
        (Path(out) / "tokenizer_config.json").write_text("{}")

merge = Merge(recipe, find_model(recipe.model), folder / "adapter", Tokens(), (1,), base, "fp32")
size = merge.plan.num_bytes
(folder / "out").mkdir()

# Pages of mapped files are left out: the system takes them back when it needs them, at times between two readings.
def own_memory():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

before, readings, done = own_memory(), [], threading.Event()

def watch():
    while not done.wait(0.001):
        readings.append(own_memory())

watcher = threading.Thread(target=watch)
watcher.start()
merge.write(folder / "out")
done.set()
watcher.join()
print(json.dumps({"size": size, "growth": max(readings) - before, "readings": len(readings)}))
"""


def write_base(folder: Path) -> None:
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
    (folder / "base").mkdir()
    write_shards(folder / "base", infos, lambda name: torch.full(shapes[name], 0.01).bfloat16().clone())
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        vocab_size=VOCAB,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder / "base")
    adapter: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{key}.lora_A.weight"] = torch.full((2, shape[1]), 0.1)
            adapter[f"{key}.lora_B.weight"] = torch.full((shape[0], 2), 0.1)
    (folder / "adapter").mkdir()
    infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in adapter.items()]
    write_shards(folder / "adapter", infos, adapter.__getitem__)
    (folder / "adapter" / "model.safetensors").rename(folder / "adapter" / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "quantization"), [("original", "none"), ("dequantized", "nf4")])
def test_memory_is_bounded_by_tensors_and_not_by_the_model(tmp_path: Path, base: str, quantization: str) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc")
    write_base(tmp_path)
    recipe = {
        "name": "large",
        "model": {"name": str(tmp_path / "base"), "quantization": quantization},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "training": {"max_steps": 1, "precision": "bf16-mixed"},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(tmp_path), base], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] > 350e6 and found["readings"] > 50
    # Some copies of the largest tensor, 3 M values, in fp32; the model has 94 M.
    assert found["growth"] < 0.4 * found["size"], found
    print(f"merged {found['size'] / 1e6:.0f} MB with {found['growth'] / 1e6:.0f} MB of memory")
