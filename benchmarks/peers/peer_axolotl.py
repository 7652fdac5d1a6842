"""axolotl with sample packing: its own loading, kernels and trainer, on samples that are tokenized already."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import measure


def config_of(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The task as axolotl's configuration; what is not named stays its default, its LoRA kernels among it.

    Source: axolotl/utils/schemas in its 0.19.0.
    """
    settings = task["settings"]
    return {
        "base_model": task["model"],
        "adapter": "lora",
        "lora_r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        # No `type`: the rows are tokenized.
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0.0,
        "output_dir": str(folder / "out"),
        "sequence_len": settings["max_length"],
        "sample_packing": True,
        # Its varlen kernel is torch's own; flash-attn has no wheels.
        "attn_implementation": "sdpa",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": settings["packed_rows_per_step"],
        "num_epochs": 1,
        "learning_rate": settings["lr"],
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "bf16": True,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        # Batches are counted in this process; two small rows a step need no worker.
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": True,
    }


def write_rows(samples: list[dict[str, list[int]]], path: Path) -> None:
    """The samples with the three columns by which axolotl knows tokenized rows."""
    path.write_text(
        "".join(json.dumps({**sample, "attention_mask": [1] * len(sample["input_ids"])}) + "\n" for sample in samples)
    )


def main() -> None:
    """Train on the task's samples and report."""
    task = measure.read_task()
    # It sends what is trained to its makers otherwise; read when it is imported.
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import execute_training, setup_model_and_trainer
    from axolotl.utils.dict import DictDefault
    from hf_trainer import train_and_measure

    folder = Path(task["folder"]) / "axolotl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_rows(measure.read_samples(task["train"]), folder / "rows.jsonl")
    config = load_cfg(DictDefault(config_of(task, folder)))
    # As `axolotl train`, without what it saves.
    trainer = setup_model_and_trainer(config, load_datasets(cfg=config))[0]
    figures = train_and_measure(trainer, task["held_out"], lambda: execute_training(config, trainer, None))
    measure.report(**figures)


if __name__ == "__main__":
    main()
