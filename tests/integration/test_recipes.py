"""Every shipped recipe runs: on a tiny model of its architecture, two steps, a checkpoint, a continuation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune.cli import main
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import shipped_recipes
from tests.fork_server import ForkServer
from tests.tiny import CHATML, alpaca_rows, chat_rows, write_jsonl, write_model

RECIPES = shipped_recipes()
# What a recipe's base model is, by a part of its name.
ARCHITECTURES = {
    "falcon": "falcon",
    "llama": "llama",
    "qwen3": "qwen3",
    "mistral": "mistral",
    "gemma3": "gemma3_images",
    "smollm2": "tied_llama",
}


def slice_of(name: str, folder: Path) -> tuple[Path, list[str]]:
    """A few rows of the shape that the recipe's source has, and the overrides that name them."""
    if "tickets" in name:
        path = write_jsonl(folder / "rows.jsonl", chat_rows(24))
        test = write_jsonl(folder / "test.jsonl", chat_rows(4, seed=1))
    elif "gsm8k" in name:
        rows = [{"question": row["instruction"], "answer": f"{row['output']}\n#### 7"} for row in alpaca_rows(24)]
        path, test = write_jsonl(folder / "rows.jsonl", rows), write_jsonl(folder / "test.jsonl", rows[:4])
    else:
        path = test = write_jsonl(folder / "rows.jsonl", alpaca_rows(24))
    return path, [f"data.sources.0.path={path}", f"evaluation.source.path={test}"]


def overrides_for(name: str, folder: Path) -> list[str]:
    recipe = load_recipe(RECIPES[name])
    architecture = next(value for key, value in ARCHITECTURES.items() if name.startswith(key))
    asked = "".join(f"{{{{- '' if {variable} is defined }}}}" for variable in recipe.data.template_variables)
    template = asked + CHATML if recipe.data.template == "auto" else None
    model = write_model(folder / "model", architecture, template=template)
    _, sources = slice_of(name, folder)
    if recipe.evaluation.source is None:
        sources = sources[:1]
    overrides = [
        *sources,
        f"model.name={model}",
        f"output_dir={folder / 'runs'}",
        "training.max_steps=2",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
        "data.max_seq_len=256",
        "evaluation.max_new_tokens=4",
        "evaluation.max_rows=2",
        "checkpoint.every_steps=1",
        "distributed.accelerator=cpu",
    ]
    if recipe.data.max_tokens is not None:
        overrides.append("data.max_tokens=256")
    if recipe.evaluation.every_steps is not None:
        overrides += ["evaluation.every_steps=1", "data.validation.size=4"]
    if recipe.training.schedule.warmup_steps is not None:
        overrides.append("training.schedule.warmup_steps=1")
    if recipe.distributed.strategy == "fsdp":
        overrides.append("distributed.devices=2")
    return overrides


@pytest.mark.parametrize("name", RECIPES)
def test_fm31_every_recipe_trains_saves_continues_and_is_merged(name: str, tmp_path: Path, server: ForkServer) -> None:
    overrides = overrides_for(name, tmp_path)
    recipe = load_recipe(RECIPES[name], overrides)

    def run() -> int:
        if recipe.distributed.strategy == "fsdp":
            return server.start("run", str(RECIPES[name]), *overrides, ranks=2).wait()
        return main(["run", str(RECIPES[name]), *overrides])

    assert run() == 0
    folder = tmp_path / "runs" / recipe.name
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    finished = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    if recipe.evaluation.metrics:
        assert set(json.loads((folder / "results.json").read_text())) >= {"before", "after"}

    shutil.rmtree(folder / "checkpoints" / "step-000002")
    shutil.rmtree(folder / "adapter")
    assert run() == 0
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == finished
    assert main(["merge", str(folder)]) == 0
    assert list((folder / "merged").glob("*.safetensors"))


def test_a_model_that_reads_images_is_trained_on_text_and_exported(tmp_path: Path) -> None:
    overrides = overrides_for("gemma3_4b_gsm8k", tmp_path)
    assert main(["run", str(RECIPES["gemma3_4b_gsm8k"]), *overrides]) == 0
    folder = tmp_path / "runs" / "gemma3_4b_gsm8k"
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter and all(".language_model." in name for name in adapter)
    assert main(["merge", str(folder)]) == 0
    for target in ("vllm", "tgi", "gguf", "gguf-lora", "ollama"):
        assert main(["export", str(folder), "--to", target]) == 0
    assert main(["generate", str(folder), "--prompt", "tell", "--max-new-tokens", "2"]) == 0
