"""Every impossible combination is refused, at its key, with what to do; combinations that work are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.recipe import checks
from finetune.recipe.keys import all_keys
from finetune.recipe.load import load_recipe
from tests.recipe.examples import MINIMAL, errors_of, write

# Overrides that bring the combination about -> the key that is blamed and a part of what is said.
REFUSED = [
    (
        ["model.quantization=int8", "distributed.strategy=fsdp"],
        "model.quantization",
        "use nf4, or strategy ddp",
    ),
    (["model.name=a.gguf", "model.gguf_file=b.gguf"], "model.gguf_file", "is a GGUF file itself"),
    (["model.name=./m", "model.revision=main"], "model.revision", "name a hub id"),
    (
        ["model.attention=flash_attention_2", "data.packing=isolated"],
        "model.attention",
        "cannot keep packed samples apart",
    ),
    (["model.attention=flex_attention", "data.packing=shared_prefix"], "model.attention", "packing is shared_prefix"),
    (["data.template_variables={enable-thinking: false}"], "data.template_variables", "letters, digits and _ alone"),
    (["model.attention=flash_attention_2", "distributed.accelerator=cpu"], "model.attention", "needs CUDA"),
    (["adapter.init=pissa", "model.quantization=nf4"], "adapter.init", "pissa rewrites base weights"),
    (
        ["adapter.init=pissa_niter_4", "model.quantization=int8"],
        "adapter.init",
        "quantization int8 cannot hold",
    ),
    (["adapter.init=olora", "model.quantization=fp4"], "adapter.init", "olora rewrites base weights"),
    (["adapter.init=orthogonal", "adapter.rank=3"], "adapter.init", "every rank to be even"),
    (["adapter.init=orthogonal", "adapter.rank_pattern={q: 3}"], "adapter.init", "every rank to be even"),
    (["adapter.init=gaussian", "adapter.start_from=runs/first"], "adapter.init", "adapter.start_from gives others"),
    (["adapter.target_modules=[]"], "adapter.target_modules", "nothing to adapt"),
    (
        ["adapter.target_modules=[q]", "adapter.exclude_modules=[q, v]"],
        "adapter.exclude_modules",
        '["q", "v"] leaves',
    ),
    (
        ["adapter.modules_to_save=[model.embed_tokens]", "adapter.trainable_tokens=[<a>]"],
        "adapter.trainable_tokens",
        "already trains the whole embedding",
    ),
    (
        ["data.template=alpacca"],
        "data.template",
        "alpacca is no template; accepts one of auto, alpaca, chatml, plain, or a path",
    ),
    (
        ["training.on_out_of_memory=halve", "distributed.strategy=fsdp"],
        "training.on_out_of_memory",
        "whose other processes would wait",
    ),
    (["data.packing=none", "data.max_tokens=4096"], "data.max_tokens", "data.packing is none"),
    (["data.max_tokens=512"], "data.max_tokens", "512 is less than data.max_seq_len (1024)"),
    (["data.validation.size=1.5"], "data.validation.size", "neither a share below 1 nor a whole count"),
    (
        ["data.validation.size=10", "data.validation.source={path: a/b}"],
        "data.validation.size",
        "remove one of the two",
    ),
    (["training.epochs=null"], "training.epochs", "so the run has no end"),
    (["training.micro_batch_size=32"], "training.micro_batch_size", "(the effective batch) has 16"),
    (
        ["training.gradient_checkpointing=auto", "training.auto_micro_batch=true"],
        "training.gradient_checkpointing",
        "gradient_checkpointing: true",
    ),
    (["training.precision=16-mixed", "distributed.accelerator=cpu"], "training.precision", "use bf16-mixed"),
    (["training.optimizer.betas=[0.9, 1.0]"], "training.optimizer.betas", "[0.9, 1.0] is out of range"),
    (["training.optimizer.betas=[-0.1, 0.9]"], "training.optimizer.betas", "from 0 and below 1"),
    (
        ["training.optimizer.name=adafactor", "training.optimizer.betas=[0.9, 0.95]"],
        "training.optimizer.betas",
        "no effect on adafactor",
    ),
    (["training.optimizer.name=lion", "training.optimizer.eps=1e-6"], "training.optimizer.eps", "no effect on lion"),
    (
        ["training.schedule.name=constant", "training.schedule.min_lr_share=0.1"],
        "training.schedule.min_lr_share",
        "no effect on schedule constant",
    ),
    (
        ["training.max_steps=10", "training.schedule.warmup_steps=10"],
        "training.schedule.warmup_steps",
        "do not end before training.max_steps (10)",
    ),
    (["training.schedule.warmup_share=1.0"], "training.schedule.warmup_share", "whole run a warm-up"),
    (["distributed.strategy=single", "distributed.devices=2"], "distributed.strategy", "devices is 2"),
    (["distributed.strategy=single", "distributed.num_nodes=2"], "distributed.strategy", "num_nodes is 2"),
    (["distributed.cpu_offload=true"], "distributed.cpu_offload", "it is auto"),
    (
        ["training.activation_offload=true", "distributed.accelerator=cpu"],
        "training.activation_offload",
        "in host memory already",
    ),
    (
        ["adapter.use_dora=true", "model.quantization=int8", "distributed.accelerator=cpu"],
        "adapter.use_dora",
        "does not compute on int8 weights",
    ),
    (["evaluation.every_steps=5"], "evaluation.every_steps", "there are no validation rows"),
    (
        ["evaluation.early_stopping={}", "evaluation.every_steps=5"],
        "evaluation.early_stopping",
        "no validation rows to watch",
    ),
    (
        ["evaluation.early_stopping={}", "data.validation.size=0.1"],
        "evaluation.early_stopping",
        "never measured while training",
    ),
    (["evaluation.metrics=[exact_match]"], "evaluation.metrics", "no rows to measure them on"),
    (
        ["data.validation.source={path: a/b, weight: 0.5}"],
        "data.validation.source.weight",
        "0.5 has no effect: validation rows",
    ),
    (["evaluation.source={path: a/b, weight: 2.0}"], "evaluation.source.weight", "is for rows that are trained on"),
    (["checkpoint.final=best"], "checkpoint.final", "best, but validation loss is never measured"),
    (["logging.log_adapter=true", "logging.trackers=[tensorboard]"], "logging.log_adapter", "add wandb or trackio"),
    (["hub.push=true"], "hub.push", "set hub.repo_id"),
]

ACCEPTED = [
    ["model.quantization=int8", "distributed.strategy=ddp"],
    ["model.quantization=nf4", "distributed.strategy=fsdp", "distributed.cpu_offload=true"],
    ["model.quantization=nf4", "model.double_quant=false"],
    ["model.attention=eager", "data.packing=shared_prefix"],
    ["model.attention=eager"],
    ["model.attention=flash_attention_2", "data.packing=none"],
    ["model.attention=flex_attention"],
    ["adapter.init=pissa", "adapter.use_dora=true"],
    ["adapter.init=olora"],
    ["adapter.init=orthogonal"],
    ["adapter.use_dora=true", "model.quantization=int8"],
    ["adapter.modules_to_save=[lm_head]", "adapter.trainable_tokens=[<a>]"],
    ["data.template=./mine.jinja"],
    ["data.max_tokens=1024"],
    ["data.packing=none"],
    ["data.validation.size=0.1", "evaluation.every_steps=5", "evaluation.early_stopping={}"],
    ["data.validation.source={path: a/b}", "evaluation.every_steps=5"],
    ["data.validation.size=0.1", "evaluation.every_steps=5", "checkpoint.final=best"],
    ["evaluation.metrics=[exact_match]", "data.validation.size=0.1"],
    ["evaluation.metrics=[exact_match]", "evaluation.source={path: a/b, weight: 1.0}"],
    ["evaluation.metrics=[perplexity]"],
    ["training.epochs=null", "training.max_steps=5"],
    ["training.max_steps=10", "training.schedule.warmup_steps=9"],
    ["training.micro_batch_size=16"],
    ["training.optimizer.name=paged_adamw_8bit", "distributed.accelerator=cpu"],
    ["distributed.strategy=single", "distributed.devices=1"],
    ["distributed.strategy=single"],
    ["hub.push=true", "hub.repo_id=org/x"],
]


@pytest.mark.parametrize(("overrides", "key", "part"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(tmp_path: Path, overrides: list[str], key: str, part: str) -> None:
    said = "\n".join(errors_of(write(tmp_path, MINIMAL), *overrides))
    assert part in said
    assert f"override {key}=" in said or f" {key}: " in said


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_accepted(tmp_path: Path, overrides: list[str]) -> None:
    load_recipe(write(tmp_path, MINIMAL), overrides)


def test_every_row_of_the_table_is_tried(tmp_path: Path) -> None:
    recipes = write(tmp_path, MINIMAL)
    said = "\n".join("\n".join(errors_of(recipes, *overrides)) for overrides, _, _ in REFUSED)
    for check in checks.CHECKS:
        fixed = max(check.message.replace("{", "}").split("}")[::2], key=len)
        assert fixed in said, check.key


def test_the_templates_are_those_that_there_are() -> None:
    folder = Path(checks.__file__).parents[1] / "data" / "templates"
    assert set(checks.TEMPLATES) == {"auto", *(path.stem for path in folder.glob("*.jinja"))}


def test_every_key_of_the_table_exists() -> None:
    assert {check.key for check in checks.CHECKS} <= set(all_keys())


def test_the_line_is_that_of_the_key_and_all_conflicts_are_told(tmp_path: Path) -> None:
    text = MINIMAL + "  schedule:\n    warmup_share: 1.0\nmodel_: 1\n"
    assert len(errors_of(write(tmp_path, text))) == 1  # keys first, combinations once keys are right
    text = MINIMAL.replace("  epochs: 1", "  micro_batch_size: 99") + "hub:\n  push: true\n"
    assert [line.split(": ")[:2] for line in errors_of(write(tmp_path, text))] == [
        ["recipe.yaml:7", "training.epochs"],
        ["recipe.yaml:8", "training.micro_batch_size"],
        ["recipe.yaml:10", "hub.push"],
    ]
