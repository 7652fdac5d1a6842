"""Combinations of keys that cannot work, one row each; what needs data, model or machine is checked later."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import NamedTuple

from finetune.recipe.lines import KeyPath
from finetune.recipe.overrides import Problem
from finetune.recipe.schema import Recipe

TEMPLATES = ("auto", "alpaca", "chatml", "plain")  # the files of finetune/data/templates, and auto
# Source: PEFT, peft.utils.constants.EMBEDDING_LAYER_NAMES, and the names of the common architectures.
EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in", "tok_embeddings")


class Check(NamedTuple):
    """A combination that cannot work: the key to blame, when, and why with what to do.

    `{value}` in the message is the key's value; `{recipe.a.b}` is another's.
    """

    key: str
    broken: Callable[[Recipe], bool]
    message: str


def _is_quantized(recipe: Recipe) -> bool:
    return recipe.model.quantization != "none"


def _is_packed(recipe: Recipe) -> bool:
    return recipe.data.packing in ("isolated", "shared_prefix")


def _names_local_model(recipe: Recipe) -> bool:
    return os.path.isabs(recipe.model.name) or recipe.model.name.startswith("package://")


def _has_odd_rank(recipe: Recipe) -> bool:
    return any(rank % 2 for rank in (recipe.adapter.rank, *recipe.adapter.rank_pattern.values()))


def _excludes_every_target(recipe: Recipe) -> bool:
    targets = recipe.adapter.target_modules
    return isinstance(targets, list) and bool(targets) and set(targets) <= set(recipe.adapter.exclude_modules)


def _trains_embeddings_twice(recipe: Recipe) -> bool:
    whole = {name.rsplit(".", 1)[-1] for name in recipe.adapter.modules_to_save}
    return bool(recipe.adapter.trainable_tokens) and not whole.isdisjoint(EMBEDDINGS)


def _warms_up_forever(recipe: Recipe) -> bool:
    steps, warmup = recipe.training.max_steps, recipe.training.schedule.warmup_steps
    return steps is not None and warmup is not None and warmup >= steps


def _has_row_shorter_than_sample(recipe: Recipe) -> bool:
    data = recipe.data
    return data.packing != "none" and data.max_tokens is not None and data.max_tokens < data.max_seq_len


def _is_unknown_template(recipe: Recipe) -> bool:
    template = recipe.data.template
    return template not in TEMPLATES and not template.endswith((".jinja", ".jinja2"))


CHECKS: tuple[Check, ...] = (
    Check(
        "model.quantization",
        lambda r: r.model.quantization == "int8" and r.distributed.strategy == "fsdp",
        "{value} weights cannot be sharded by distributed.strategy fsdp; use nf4, or strategy ddp",
    ),
    Check(
        "model.gguf_file",
        lambda r: r.model.gguf_file is not None and r.model.name.lower().endswith(".gguf"),
        "{value} is looked for inside model.name, which is a GGUF file itself; remove one of the two",
    ),
    Check(
        "model.revision",
        lambda r: r.model.revision is not None and _names_local_model(r),
        "{value} is a hub model's, but model.name is {recipe.model.name}; remove it, or name a hub id",
    ),
    Check(
        "model.attention",
        lambda r: _is_packed(r) and r.model.attention in ("flash_attention_2", "flex_attention"),
        "{value} cannot keep packed samples apart here (data.packing is {recipe.data.packing}); use auto, which runs "
        "torch's variable-length flash kernel on a GPU, or packing none",
    ),
    Check(
        "model.attention",
        lambda r: r.model.attention == "flash_attention_2" and r.distributed.accelerator == "cpu",
        "flash_attention_2 needs CUDA and distributed.accelerator is cpu; use auto or sdpa",
    ),
    Check(
        "adapter.init",
        lambda r: r.adapter.rewrites_base and _is_quantized(r),
        "{value} rewrites base weights, which model.quantization {recipe.model.quantization} cannot hold "
        "exactly; use init default, or quantization none",
    ),
    Check(
        "adapter.init",
        lambda r: r.adapter.init == "orthogonal" and _has_odd_rank(r),
        "orthogonal needs every rank to be even; change adapter.rank or rank_pattern, or use init default",
    ),
    Check(
        "adapter.init",
        lambda r: r.adapter.start_from is not None and r.adapter.init != "default",
        "{value} gives initial values, and adapter.start_from gives others; remove one",
    ),
    Check(
        "adapter.use_dora",
        lambda r: r.adapter.use_dora and r.model.quantization == "int8" and r.distributed.accelerator == "cpu",
        "{value} does not compute on int8 weights on a CPU; use model.quantization nf4 or none, or leave DoRA out",
    ),
    Check(
        "adapter.target_modules",
        lambda r: r.adapter.target_modules == [],
        "the list is empty, so there is nothing to adapt; name linear layers, or use all-linear",
    ),
    Check(
        "adapter.exclude_modules",
        _excludes_every_target,
        "{value} leaves none of adapter.target_modules; exclude fewer",
    ),
    Check(
        "adapter.trainable_tokens",
        _trains_embeddings_twice,
        "adapter.modules_to_save already trains the whole embedding; remove it there, or remove trainable_tokens",
    ),
    Check(
        "data.template_variables",
        lambda r: not all(name.isidentifier() for name in r.data.template_variables),
        "{value}: a name of a Jinja variable has letters, digits and _ alone",
    ),
    Check(
        "data.template",
        _is_unknown_template,
        "{value} is no template; accepts one of " + ", ".join(TEMPLATES) + ", or a path that ends in .jinja",
    ),
    Check(
        "data.max_tokens",
        lambda r: r.data.max_tokens is not None and r.data.packing == "none",
        "{value} is the length of a packed row, and data.packing is none; remove it, or set packing isolated",
    ),
    Check(
        "data.max_tokens",
        _has_row_shorter_than_sample,
        "{value} is less than data.max_seq_len ({recipe.data.max_seq_len}), so the longest sample fits in no "
        "row; raise it to at least max_seq_len",
    ),
    Check(
        "data.validation.size",
        lambda r: r.data.validation.size > 1 and r.data.validation.size % 1 != 0,
        "{value} is neither a share below 1 nor a whole count of rows",
    ),
    Check(
        "data.validation.size",
        lambda r: r.data.validation.source is not None and r.data.validation.size > 0,
        "{value} splits rows off the training data, but data.validation.source gives them; remove one of the two",
    ),
    Check(
        "training.epochs",
        lambda r: r.training.epochs is None and r.training.max_steps is None,
        "neither it nor training.max_steps is set, so the run has no end; set one, e.g. epochs: 3",
    ),
    Check(
        "training.micro_batch_size",
        lambda r: r.training.micro_batch_size > r.training.global_batch_size,
        "{value} samples cannot go through at once when an optimizer step (the effective batch) has "
        "{recipe.training.global_batch_size}; lower it, or raise training.global_batch_size",
    ),
    Check(
        "training.gradient_checkpointing",
        lambda r: r.training.gradient_checkpointing == "auto" and r.training.auto_micro_batch,
        "auto and training.auto_micro_batch would each fill the memory for itself; set one of them, e.g. "
        "gradient_checkpointing: true",
    ),
    Check(
        "training.precision",
        lambda r: r.training.precision == "16-mixed" and r.distributed.accelerator == "cpu",
        "16-mixed needs CUDA and distributed.accelerator is cpu; use bf16-mixed",
    ),
    Check(
        "training.on_out_of_memory",
        lambda r: r.training.on_out_of_memory == "halve" and r.distributed.strategy == "fsdp",
        "{value} does not go with distributed.strategy fsdp, whose other processes would wait for the one that "
        "computes again; use stop, and a smaller training.micro_batch_size",
    ),
    Check(
        "training.optimizer.betas",
        lambda r: not all(0 <= beta < 1 for beta in r.training.optimizer.betas),
        "{value} is out of range; each is a number from 0 and below 1, e.g. [0.9, 0.999]",
    ),
    Check(
        "training.optimizer.betas",
        lambda r: r.training.optimizer.name == "adafactor" and r.training.optimizer.differs("betas"),
        "{value} has no effect on {recipe.training.optimizer.name}; remove it, or use adamw",
    ),
    Check(
        "training.optimizer.eps",
        lambda r: (
            r.training.optimizer.name in ("lion", "paged_lion_8bit", "adafactor")
            and r.training.optimizer.differs("eps")
        ),
        "{value} has no effect on {recipe.training.optimizer.name}; remove it, or use adamw",
    ),
    Check(
        "training.schedule.min_lr_share",
        lambda r: r.training.schedule.min_lr_share > 0 and r.training.schedule.name == "constant",
        "{value} has no effect on schedule {recipe.training.schedule.name}, which never falls; remove it, or use "
        "cosine or linear",
    ),
    Check(
        "training.schedule.warmup_steps",
        _warms_up_forever,
        "{value} steps of warm-up do not end before training.max_steps ({recipe.training.max_steps}); lower it",
    ),
    Check(
        "training.schedule.warmup_share",
        lambda r: r.training.schedule.warmup_share == 1 and r.training.schedule.warmup_steps is None,
        "{value} makes the whole run a warm-up; use a share such as 0.03",
    ),
    Check(
        "distributed.strategy",
        lambda r: (
            r.distributed.strategy == "single"
            and (r.distributed.devices not in ("auto", 1) or r.distributed.num_nodes > 1)
        ),
        "single is one process, but distributed.devices is {recipe.distributed.devices} and num_nodes is "
        "{recipe.distributed.num_nodes}; use auto, ddp or fsdp, or set both to 1",
    ),
    Check(
        "distributed.cpu_offload",
        lambda r: r.distributed.cpu_offload and r.distributed.strategy != "fsdp",
        "{value} needs distributed.strategy fsdp (it is {recipe.distributed.strategy}); set that, or "
        "remove cpu_offload",
    ),
    Check(
        "training.activation_offload",
        lambda r: r.training.activation_offload and r.distributed.accelerator == "cpu",
        "{value}, but on a CPU activations are in host memory already; remove it",
    ),
    Check(
        "evaluation.every_steps",
        lambda r: r.evaluation.every_steps is not None and not r.data.validation.has_rows,
        "{value}, but there are no validation rows; set data.validation.size, e.g. 0.05, or data.validation.source",
    ),
    Check(
        "evaluation.early_stopping",
        lambda r: r.evaluation.early_stopping is not None and not r.data.validation.has_rows,
        "there are no validation rows to watch; set data.validation.size, e.g. 0.05, or data.validation.source",
    ),
    Check(
        "evaluation.early_stopping",
        lambda r: r.evaluation.early_stopping is not None and r.evaluation.every_steps is None,
        "validation loss is never measured while training; set evaluation.every_steps, e.g. 50",
    ),
    Check(
        "evaluation.metrics",
        lambda r: not r.data.validation.has_rows and r.evaluation.source is None and bool(r.evaluation.task_metrics),
        "{value}, but there are no rows to measure them on; set evaluation.source, or data.validation.size, e.g. 0.05",
    ),
    Check(
        "data.validation.source.weight",
        lambda r: r.data.validation.source is not None and r.data.validation.source.weight != 1,
        "{value} has no effect: validation rows are measured once each; remove it, or set max_rows for fewer",
    ),
    Check(
        "evaluation.source.weight",
        lambda r: r.evaluation.source is not None and r.evaluation.source.weight != 1,
        "{value} is for rows that are trained on, and test rows are measured once each; remove it, or set "
        "evaluation.max_rows for fewer",
    ),
    Check(
        "checkpoint.final",
        lambda r: r.checkpoint.final == "best" and r.evaluation.every_steps is None,
        "{value}, but validation loss is never measured while training; set evaluation.every_steps, e.g. 50",
    ),
    Check(
        "logging.log_adapter",
        lambda r: r.logging.log_adapter and set(r.logging.trackers).isdisjoint(("wandb", "trackio")),
        "{value}, but logging.trackers names none that keeps files; add wandb or trackio, or remove log_adapter",
    ),
    Check(
        "hub.push",
        lambda r: r.hub.push and r.hub.repo_id is None,
        "{value}, but there is nowhere to push to; set hub.repo_id: org/name",
    ),
)


def find_conflicts(recipe: Recipe) -> list[Problem]:
    """Every combination in `recipe` that cannot work."""
    return [
        Problem(tuple(check.key.split(".")), check.message.format(value=_show(recipe, check.key), recipe=recipe))
        for check in CHECKS
        if check.broken(recipe)
    ]


def _show(recipe: Recipe, key: str) -> str:
    path: KeyPath = tuple(key.split("."))
    value: object = recipe
    for piece in path:
        value = getattr(value, piece)
    return value if isinstance(value, str) else json.dumps(value, default=str)
