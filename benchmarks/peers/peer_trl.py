"""TRL's SFTTrainer, as it comes or packed."""

from __future__ import annotations

from typing import Any

import measure
import torch
from datasets import Dataset
from hf_trainer import train_and_measure
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def lora_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The adapter's settings by PEFT's names."""
    return {"r": settings["rank"], "lora_alpha": settings["alpha"], "lora_dropout": 0.0}


def build_trainer(task: dict[str, Any], model: Any, *, packed: bool = False, **arguments: Any) -> SFTTrainer:
    """SFTTrainer on the task's samples with the shared settings; everything else is TRL's default."""
    settings = task["settings"]
    config: dict[str, Any] = {
        "output_dir": task["folder"],
        "per_device_train_batch_size": 1 if packed else settings["samples_per_step"],
        "gradient_accumulation_steps": settings["packed_rows_per_step"] if packed else 1,
        "packing": packed,
        "max_length": settings["max_length"],
        "num_train_epochs": 1,
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": settings["precision"] == "bf16",
        "model_init_kwargs": {"dtype": measure.dtype(settings)} if isinstance(model, str) else None,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**config),
        train_dataset=Dataset.from_list(measure.read_samples(task["train"])),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        **arguments,
    )


def main() -> None:
    """Train on the task's samples and report."""
    task = measure.read_task()
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora_of(task["settings"]))
    trainer = build_trainer(task, task["model"], packed=task["variant"] == "packed", peft_config=adapter)
    measure.report(**train_and_measure(trainer, task["held_out"]))


if __name__ == "__main__":
    main()
