"""The key that an unknown one meant: a slip, a right key in the wrong section, another framework's name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

from finetune.recipe.keys import all_keys, place_at
from finetune.recipe.lines import KeyPath

_AUTO_ATTENTION = "auto: on a GPU packed rows run torch's variable-length flash kernel"

# What other frameworks call it -> (our key, what to write there or know about it).
SYNONYMS: dict[str, tuple[str, str]] = {
    "base_model": ("model.name", ""),
    "model_name_or_path": ("model.name", ""),
    "model_id": ("model.name", ""),
    "pretrained_model_name_or_path": ("model.name", ""),
    "tokenizer_name_or_path": ("model.tokenizer", ""),
    "load_in_4bit": ("model.quantization", "nf4"),
    "load_in_8bit": ("model.quantization", "int8"),
    "bnb_4bit_quant_type": ("model.quantization", "nf4 or fp4"),
    "bnb_4bit_compute_dtype": ("model.compute_dtype", ""),
    "bnb_4bit_use_double_quant": ("model.double_quant", ""),
    "attn_implementation": ("model.attention", ""),
    "flash_attention": ("model.attention", _AUTO_ATTENTION),
    "flash_attn": ("model.attention", _AUTO_ATTENTION),
    "sdp_attention": ("model.attention", "sdpa"),
    "torch_dtype": ("model.dtype", ""),
    "r": ("adapter.rank", ""),
    "lora_r": ("adapter.rank", ""),
    "lora_rank": ("adapter.rank", ""),
    "lora_alpha": ("adapter.alpha", ""),
    "lora_dropout": ("adapter.dropout", ""),
    "lora_target": ("adapter.target_modules", ""),
    "lora_target_modules": ("adapter.target_modules", ""),
    "lora_target_linear": ("adapter.target_modules", "all-linear"),
    "lora_modules_to_save": ("adapter.modules_to_save", ""),
    "init_lora_weights": ("adapter.init", ""),
    "peft_use_dora": ("adapter.use_dora", ""),
    "datasets": ("data.sources", ""),
    "dataset": ("data.sources", ""),
    "dataset_name": ("data.sources.0.path", ""),
    "train_file": ("data.sources.0.path", ""),
    "val_set_size": ("data.validation.size", ""),
    "test_size": ("data.validation.size", ""),
    "chat_template": ("data.template", ""),
    "prompt_template": ("data.template", ""),
    "chat_template_kwargs": ("data.template_variables", ""),
    "enable_thinking": ("data.template_variables", "{enable_thinking: false}"),
    "system_prompt": ("data.system", ""),
    "train_on_inputs": ("data.train_on", "everything"),
    "train_on_input": ("data.train_on", "everything"),
    "assistant_only_loss": ("data.train_on", "all_assistant"),
    "max_seq_length": ("data.max_seq_len", ""),
    "max_length": ("data.max_seq_len", ""),
    "sequence_len": ("data.max_seq_len", ""),
    "sequence_length": ("data.max_seq_len", ""),
    "cutoff_len": ("data.max_seq_len", ""),
    "sample_packing": ("data.packing", "isolated"),
    "learning_rate": ("training.optimizer.lr", ""),
    "lr_scheduler": ("training.schedule.name", ""),
    "lr_scheduler_type": ("training.schedule.name", ""),
    "warmup_ratio": ("training.schedule.warmup_share", ""),
    "optim": ("training.optimizer.name", ""),
    "adam_epsilon": ("training.optimizer.eps", ""),
    "adam_beta1": ("training.optimizer.betas", "[beta1, beta2]"),
    "adam_beta2": ("training.optimizer.betas", "[beta1, beta2]"),
    "num_train_epochs": ("training.epochs", ""),
    "num_epochs": ("training.epochs", ""),
    "max_epochs": ("training.epochs", ""),
    "batch_size": ("training.global_batch_size", "samples per optimizer step over all devices"),
    "train_batch_size": ("training.global_batch_size", "samples per optimizer step over all devices"),
    "per_device_train_batch_size": ("training.micro_batch_size", ""),
    "gradient_accumulation_steps": (
        "training.global_batch_size",
        "accumulation follows from it: global_batch_size / (micro_batch_size x devices)",
    ),
    "accumulate_grad_batches": (
        "training.global_batch_size",
        "accumulation follows from it: global_batch_size / (micro_batch_size x devices)",
    ),
    "per_device_eval_batch_size": ("evaluation.batch_size", ""),
    "bf16": ("training.precision", "bf16-mixed"),
    "fp16": ("training.precision", "16-mixed"),
    "gradient_clip_val": ("training.max_grad_norm", ""),
    "clip_grad_norm": ("training.max_grad_norm", ""),
    "torch_compile": ("training.compile", ""),
    "random_seed": ("training.seed", ""),
    "run_name": ("name", ""),
    "save_steps": ("checkpoint.every_steps", ""),
    "save_total_limit": ("checkpoint.keep_last", ""),
    "eval_steps": ("evaluation.every_steps", ""),
    "load_best_model_at_end": ("checkpoint.final", "best"),
    "early_stopping_patience": ("evaluation.early_stopping.patience", ""),
    "logging_steps": ("logging.every_steps", ""),
    "report_to": ("logging.trackers", ""),
    "wandb_project": ("logging.project", ""),
    "hub_model_id": ("hub.repo_id", ""),
    "push_to_hub": ("hub.push", ""),
}

# What to write for their `false`, where `true` means something else than `true`.
SWITCHED_OFF = {
    "load_in_4bit": "none",
    "load_in_8bit": "none",
    "train_on_inputs": "all_assistant",
    "train_on_input": "all_assistant",
    "assistant_only_loss": "everything",
    "sample_packing": "none",
    "flash_attention": "auto",
    "flash_attn": "auto",
    "sdp_attention": "auto",
    "bf16": "32-true",
    "fp16": "bf16-mixed",
    "lora_target_linear": "a list of names",
}

_CLOSE = 0.62  # `lr` for `l` scores 0.67, unrelated words of a section stay below 0.6
_CLOSE_ELSEWHERE = 0.8


def similarity(given: str, known: str) -> float:
    """How alike two names are, from 0 to 1; names of the same letters, as after a swap, are nearly equal."""
    given, known = given.lower().replace("-", "_"), known.lower().replace("-", "_")
    if given == known:
        return 1.0
    if sorted(given) == sorted(known):
        return 0.95
    return SequenceMatcher(None, given, known).ratio()


def nearest(given: str, known: Iterable[str], close: float = _CLOSE) -> str | None:
    """The most similar of `known`; None where nothing is `close`."""
    best = max(known, key=lambda name: similarity(given, name), default=None)
    return best if best is not None and similarity(given, best) >= close else None


def meant_keys(path: KeyPath, value: object = None) -> tuple[list[str], str]:
    """The dotted keys that the unknown key at `path` may have meant, best first, and what to write for `value`."""
    *above, given = path
    section = ".".join(above)
    place = place_at(tuple(above))
    siblings = {f"{section}.{key}" if section else key: key for key in place.keys} if place else {}
    near = nearest(given, siblings.values(), 0.85)
    if near:
        return [full for full, key in siblings.items() if key == near], ""
    name = given.lower().replace("-", "_")
    if name in SYNONYMS:
        key, hint = SYNONYMS[name]
        return [key], SWITCHED_OFF.get(name, hint) if value is False else hint
    elsewhere = [key for key in all_keys() if key.rsplit(".", 1)[-1] == given]
    if elsewhere:
        return elsewhere[:3], ""
    near = nearest(given, siblings.values())
    if near:
        return [full for full, key in siblings.items() if key == near], ""
    leaf = nearest(given, {key.rsplit(".", 1)[-1] for key in all_keys()}, _CLOSE_ELSEWHERE)
    return [key for key in all_keys() if key.rsplit(".", 1)[-1] == leaf][:3], ""
