"""Unsloth's model and kernels under TRL's SFTTrainer, as its documentation shows."""

from __future__ import annotations

import unsloth  # isort: skip - before the libraries that it patches

import measure
import torch
from hf_trainer import train_and_measure
from peer_trl import build_trainer, lora_of


def main() -> None:
    """Train on the task's samples and report."""
    task = measure.read_task()
    settings = task["settings"]
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        task["model"], max_seq_length=settings["max_length"], dtype=torch.bfloat16, load_in_4bit=False
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = unsloth.FastLanguageModel.get_peft_model(model, target_modules=names, **lora_of(settings))
    measure.report(**train_and_measure(build_trainer(task, model), task["held_out"]))


if __name__ == "__main__":
    main()
