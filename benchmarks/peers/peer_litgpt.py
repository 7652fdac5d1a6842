"""LitGPT's `finetune_lora`: its own setup, on samples that are tokenized already."""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.utils.data import DataLoader

NAME = "SmolLM2-135M-Instruct"


@dataclass
class Samples(DataModule):
    """Tokenized samples as LitGPT's collator wants them."""

    train: list[dict[str, list[int]]]
    prompt_style: Any = None
    batch_size: int = 1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        self.batch_size = batch_size

    def _loader(self, samples: list[dict[str, list[int]]]) -> DataLoader:
        items = []
        for sample in samples:
            count = len(sample["input_ids"])
            tensors = {key: torch.tensor(value) for key, value in sample.items()}
            items.append({**tensors, "token_counts": {"raw": count, "raw_plus_prompt_template": count}})
        order = torch.Generator().manual_seed(0)
        collate = get_sft_collate_fn()
        return DataLoader(items, self.batch_size, shuffle=True, generator=order, collate_fn=collate)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.train[:1])


def checkpoint_of(task: dict[str, Any]) -> Path:
    """LitGPT's own copy of the model, converted once."""
    folder = Path(task["folder"]) / NAME
    if not (folder / "lit_model.pth").is_file():
        shutil.copytree(task["model"], folder, dirs_exist_ok=True)
        convert_hf_checkpoint(folder)
    return folder


def main() -> None:
    """Train on the task's samples and report."""
    task = measure.read_task()
    settings, out = task["settings"], Path(task["folder"]) / "litgpt"
    shutil.rmtree(out, ignore_errors=True)
    seen: dict[str, Any] = {}

    def validate(fabric: Any, model: Any, *_: Any, **__: Any) -> torch.Tensor:
        seen["model"] = model
        return torch.tensor(0.0)

    # Only training is compared: no validation, no merge; the learning rate is constant for every peer.
    lora.validate = validate
    lora.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    lora.save_hyperparameters = lora.save_prompt_style = lora.merge_lora = lambda *_, **__: None
    per_step = settings["samples_per_step"]
    samples = measure.read_samples(task["train"])
    lora.setup(
        checkpoint_of(task),
        out_dir=out,
        precision={"bf16": "bf16-true", "fp32": "32-true"}[settings["precision"]],
        lora_r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        lora_key=True,
        lora_projection=True,
        lora_mlp=True,
        data=Samples(samples),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=per_step,
            micro_batch_size=settings["litgpt_micro_batch_size"],
            lr_warmup_steps=0,
            epochs=1,
            max_steps=len(samples) // per_step,
            max_seq_length=settings["max_length"],
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": settings["lr"], "weight_decay": 0.0}},
        seed=0,
    )
    memory = measure.peak_memory_bytes()
    with next(out.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["iter_time"]]
    skipped = measure.WARMUP_STEPS * per_step // settings["litgpt_micro_batch_size"]
    tokens = [int(float(row["tokens"])) for row in rows]
    model = seen["model"].eval()
    # It was cut to the longest training sample.
    model.max_seq_length = settings["max_length"]
    measure.report(
        steps=len(samples) // per_step - measure.WARMUP_STEPS,
        seconds=sum(float(row["iter_time"]) for row in rows[skipped:]),
        real_tokens=tokens[-1] - tokens[skipped - 1],
        computed_tokens=None,
        peak_memory_bytes=memory,
        losses=[float(row["loss"]) for row in rows],
        held_out_loss=measure.mean_loss(model, measure.read_samples(task["held_out"])),
    )


if __name__ == "__main__":
    main()
