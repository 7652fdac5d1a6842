"""TRL's SFTTrainer, as it comes or packed; with Unsloth's model, where that is asked for."""

from __future__ import annotations

import time
from typing import Any

import measure

TASK = measure.read_task()
if TASK["variant"] == "unsloth":
    import unsloth  # before the libraries that it patches

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """When each optimizer step was done."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        measure.synchronize()
        self.ends.append(time.perf_counter())


class CountingCollator:
    """A collator that notes the real tokens, and those computed, of every batch."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.real: list[int] = []
        self.computed: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        self.real.append(sum(len(example["input_ids"]) for example in examples))
        self.computed.append(batch["input_ids"].numel())
        return batch


def build_trainer(settings: dict[str, Any], variant: str) -> SFTTrainer:
    """SFTTrainer with the shared settings; everything else is TRL's default."""
    packed = variant == "packed"
    samples = measure.read_samples(TASK["train"])
    rows_per_step = settings["packed_rows_per_step"]
    config = SFTConfig(
        output_dir=TASK["folder"],
        per_device_train_batch_size=1 if packed else settings["samples_per_step"],
        gradient_accumulation_steps=rows_per_step if packed else 1,
        packing=packed,
        max_length=settings["max_length"],
        num_train_epochs=1,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs=None if variant == "unsloth" else {"dtype": "bfloat16"},
    )
    lora = {"r": settings["rank"], "lora_alpha": settings["alpha"], "lora_dropout": 0.0}
    model: Any = TASK["model"]
    peft_config: LoraConfig | None = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
    if variant == "unsloth":
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model, max_seq_length=settings["max_length"], dtype=torch.bfloat16, load_in_4bit=False
        )
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = unsloth.FastLanguageModel.get_peft_model(model, target_modules=names, **lora)
        peft_config = None
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(samples),
        processing_class=AutoTokenizer.from_pretrained(TASK["model"]),
        peft_config=peft_config,
    )


def main() -> None:
    """Train on the task's samples and report."""
    trainer = build_trainer(TASK["settings"], TASK["variant"])
    collator = trainer.data_collator = CountingCollator(trainer.data_collator)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    memory = measure.peak_memory_bytes()
    model = trainer.model.eval()
    with torch.autocast(measure.device().type, torch.bfloat16):
        loss = measure.mean_loss(lambda ids: model(input_ids=ids).logits, measure.read_samples(TASK["held_out"]))
    skipped = measure.WARMUP_STEPS * trainer.args.gradient_accumulation_steps
    measure.report(
        steps=len(clock.ends) - measure.WARMUP_STEPS,
        seconds=clock.ends[-1] - clock.ends[measure.WARMUP_STEPS - 1],
        real_tokens=sum(collator.real[skipped:]),
        computed_tokens=sum(collator.computed[skipped:]),
        peak_memory_bytes=memory,
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        held_out_loss=loss,
    )


if __name__ == "__main__":
    main()
