"""Writes a commented recipe: a few choices in, YAML out that says why each key is what it is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

_SCHEMA = Path(__file__).with_name("schema.json")
_PLAIN = re.compile(r"(?:\.{0,2}/)?[A-Za-z][\w./:@+-]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off"}
_COMMENT_AT = 30


@dataclass(frozen=True)
class Choices:
    """What `compose_recipe` writes; `why` holds a comment for a dotted key."""

    name: str
    file: str
    hardware: str
    model: str
    quantization: str
    data: str
    format: str
    columns: dict[str, str]
    template: str
    max_seq_len: int
    validation_size: float
    epochs: float | None
    steps: int | None
    global_batch_size: int
    micro_batch_size: int
    gradient_checkpointing: bool
    lr: float
    accelerator: str
    strategy: str
    devices: int | None
    every_steps: int
    max_rejected_share: float = 0.0
    max_over_length_share: float = 0.0
    over_length: str = "drop"
    why: dict[str, str] = field(default_factory=dict)


def compose_recipe(choices: Choices) -> str:
    """The recipe's text; keys that would only repeat a default are left out where no comment speaks of them."""
    lines = [
        f"# yaml-language-server: $schema={_SCHEMA}",
        f"# Purpose:  fine-tune {choices.model} on {choices.data}.",
        f"# Hardware: {choices.hardware}.",
        f"# Command:  finetune run {choices.file}",
        "# Measured: not measured yet.",
        f"name: {scalar(choices.name)}",
    ]
    for key, value in _keys(choices):
        depth, name = key.count("."), key.rpartition(".")[2]
        text = f"{'  ' * depth}{name}:" + ("" if value is None else f" {value}")
        comment = choices.why.get(key)
        lines.append(f"{text:<{_COMMENT_AT}} # {comment}" if comment else text)
        if key == "data.sources":
            lines += _source(choices)
    lines.append("# logging: {trackers: [tensorboard]}   # or wandb, trackio; metrics.csv is always written")
    return "\n".join(lines) + "\n"


def scalar(value: object) -> str:
    """A value as YAML reads it back; text is quoted where it could be taken for something else."""
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not value.endswith(":")
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")
    return json.dumps(value)


def _source(choices: Choices) -> list[str]:
    lines = [f"    - path: {scalar(choices.data)}"]
    comment = choices.why.get("data.sources.format", "")
    lines.append(f"      format: {choices.format}".ljust(_COMMENT_AT) + (f" # {comment}" if comment else ""))
    if choices.columns:
        pairs = ", ".join(f"{name}: {scalar(column)}" for name, column in choices.columns.items())
        lines.append(f"      columns: {{{pairs}}}")
    return lines


def _keys(choices: Choices) -> list[tuple[str, str | None]]:
    """(dotted key, value as YAML) in the schema's order; a section has no value."""
    keys: list[tuple[str, object]] = [
        ("model", None),
        ("model.name", choices.model),
        ("model.quantization", choices.quantization),
        ("adapter", None),
        ("adapter.rank", 16),
        ("adapter.alpha", 32),
        ("data", None),
        ("data.sources", None),
        ("data.template", choices.template),
        ("data.max_seq_len", choices.max_seq_len),
    ]
    if choices.over_length != "drop":
        keys.append(("data.over_length", choices.over_length))
    if choices.validation_size:
        keys += [("data.validation", None), ("data.validation.size", choices.validation_size)]
    if choices.max_rejected_share:
        keys.append(("data.max_rejected_share", choices.max_rejected_share))
    if choices.max_over_length_share:
        keys.append(("data.max_over_length_share", choices.max_over_length_share))
    length = ("training.max_steps", choices.steps) if choices.epochs is None else ("training.epochs", choices.epochs)
    keys += [("training", None), length]
    keys += [
        ("training.global_batch_size", choices.global_batch_size),
        ("training.micro_batch_size", choices.micro_batch_size),
    ]
    if choices.gradient_checkpointing:
        keys.append(("training.gradient_checkpointing", True))
    keys += [("training.optimizer", None), ("training.optimizer.lr", choices.lr)]
    if choices.accelerator != "auto" or choices.devices is not None:
        keys.append(("distributed", None))
        keys += [("distributed.strategy", choices.strategy)] if choices.strategy != "auto" else []
        keys += [("distributed.accelerator", choices.accelerator)] if choices.accelerator != "auto" else []
        keys += [("distributed.devices", choices.devices)] if choices.devices is not None else []
    keys += [("checkpoint", None), ("checkpoint.every_steps", choices.every_steps)]
    if choices.validation_size:
        keys += [("evaluation", None), ("evaluation.every_steps", choices.every_steps)]
    return [(key, None if value is None else scalar(value)) for key, value in keys]
