"""Settings that do nothing beside the others of a recipe, where the run means something all the same: one row each."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from finetune.recipe.schema import QUANTIZED_4BIT, Recipe


class Idle(NamedTuple):
    """A key whose value is not the default, when it does nothing, and why; `{recipe.a.b}` is another's value."""

    key: str
    is_idle: Callable[[Recipe], bool]
    why: str


def _has_other_dtype(recipe: Recipe) -> bool:
    dtype = recipe.model.dtype
    own = {"32-true": "fp32", "bf16-true": "bf16"}.get(recipe.training.precision, dtype)
    return dtype not in ("auto", own)


def _measures_nothing(recipe: Recipe) -> bool:
    evaluation = recipe.evaluation
    return evaluation.source is not None and not evaluation.metrics and not evaluation.num_samples


_NOT_4BIT = "has no effect on model.quantization {recipe.model.quantization}, which has no 4-bit weights"

IDLE: tuple[Idle, ...] = (
    Idle("model.double_quant", lambda r: r.model.quantization not in QUANTIZED_4BIT, _NOT_4BIT),
    Idle("model.compute_dtype", lambda r: r.model.quantization not in QUANTIZED_4BIT, _NOT_4BIT),
    Idle(
        "model.dtype",
        _has_other_dtype,
        "is what the base computes in, for training.precision {recipe.training.precision} converts nothing; "
        "auto follows it",
    ),
    Idle(
        "data.row_multiple",
        lambda r: r.data.packing == "none",
        "has no effect: it is of packed rows, and data.packing is none",
    ),
    Idle(
        "checkpoint.keep_best",
        lambda r: r.checkpoint.keep_best > 0 and r.evaluation.every_steps is None,
        "keeps none: validation loss is not measured while training (evaluation.every_steps)",
    ),
    Idle("evaluation.source", _measures_nothing, "is not read: evaluation.metrics is empty and num_samples 0"),
    Idle(
        "logging.project",
        lambda r: set(r.logging.trackers).isdisjoint(("wandb", "trackio")),
        "has no effect: logging.trackers has neither wandb nor trackio",
    ),
    Idle(
        "logging.tags",
        lambda r: "wandb" not in r.logging.trackers,
        "have no effect: they are wandb's, which logging.trackers does not have",
    ),
    Idle(
        "hub.private",
        lambda r: not r.hub.push,
        "has no effect without hub.push: `finetune push` makes a repository private but for --public",
    ),
)


def find_idle(recipe: Recipe) -> list[str]:
    """A line for every setting of `recipe` that does nothing, or not what its name says."""
    found = []
    for row in IDLE:
        section_name, _, name = row.key.partition(".")
        section = getattr(recipe, section_name)
        if section.differs(name) and row.is_idle(recipe):
            found.append(f"{row.key}: {_show(getattr(section, name))} {row.why.format(recipe=recipe)}")
    return found


def _show(value: Any) -> str:
    if hasattr(value, "path"):
        return str(value.path)
    return value if isinstance(value, str) else json.dumps(value)
