"""Continuing a run: which checkpoint, and whether the recipe, data and base are still those it was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from finetune.console import say, warn
from finetune.errors import BadInputError
from finetune.recipe.keys import Place, flatten, root
from finetune.run_dir import FINGERPRINTS, RECIPE, RunDir
from finetune.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    newest_checkpoint,
    open_checkpoint,
)

_VALIDATION = "the validation data"
# Keys (or sections) that change speed, cadence or place, never what is learned.
HARMLESS = (
    "name",
    "output_dir",
    "adapter.start_from",  # its weights are compared by their hash
    "logging",
    "checkpoint",
    "distributed",
    "evaluation",
    "merge",
    "hub",
    "model.attention",
    "data.packing",
    "data.max_tokens",
    "data.row_multiple",
    "data.num_workers",
    "data.max_rejected_share",
    "data.max_over_length_share",
    "training.micro_batch_size",
    "training.auto_micro_batch",
    "training.gradient_checkpointing",
    "training.activation_offload",
    "training.compile",
    "training.num_workers",
    "training.on_non_finite",
    "training.on_out_of_memory",
)


def find_checkpoint(
    run: RunDir, chosen: Path | None, recipe_text: str, fingerprints: dict[str, Any], *, accept_changes: bool
) -> Checkpoint | None:
    """The checkpoint to continue from: `chosen`, else the newest whole one; None for a fresh run.

    Raises:
        BadInputError: if `chosen` is not whole, or what shapes the result has changed and that is not accepted.
    """
    checkpoint = newest_checkpoint(run.checkpoints) if chosen is None else open_checkpoint(chosen)
    if checkpoint is None:
        if list_checkpoints(run.checkpoints):
            warn(f"{run.checkpoints} holds no whole checkpoint, so training starts anew")
        return None
    changes = changed_keys((checkpoint.path / RECIPE).read_text(encoding="utf-8"), recipe_text)
    changes += changed_fingerprints(
        json.loads((checkpoint.path / FINGERPRINTS).read_text(encoding="utf-8")), fingerprints, "at the checkpoint"
    )
    by_validation = _chooses_by_validation(yaml.safe_load(recipe_text))
    serious = [change for change in changes if not _is_harmless(change.split(":")[0], by_validation)]
    if serious and not accept_changes:
        raise BadInputError(
            f"{checkpoint.path} was made with other settings, which change the result:\n  "
            + "\n  ".join(serious)
            + "\n  Put them back, go on with them by --accept-changes, or start anew by --fresh."
        )
    for change in changes:
        (warn if change in serious else say)(f"changed since step {checkpoint.step}: {change}")
    return checkpoint


def keep_outside(run: RunDir, chosen: Path | None) -> None:
    """Refuse to start anew from a checkpoint of the run itself, which is put aside with all that it has.

    Raises:
        BadInputError: naming the two options.
    """
    if chosen is not None and chosen.resolve().is_relative_to(run.root):
        raise BadInputError(f"--resume {chosen}: --fresh puts it aside with the rest of {run.root}; leave one out")


def recorded_start(run: RunDir) -> str | None:
    """The hash of the adapter that the run's newest checkpoint started from."""
    for path in reversed(list_checkpoints(run.checkpoints)):
        try:
            found: str | None = json.loads((path / FINGERPRINTS).read_text(encoding="utf-8")).get("start")
            return found
        except (OSError, ValueError):
            continue
    return None


def put_later_aside(run: RunDir, step: int) -> None:
    """Move checkpoints behind `step` to `checkpoints-aside/`: the run goes another way from there, or they are damaged.

    Among those that are kept, a damaged one would take a whole one's place.
    """
    for path in list_checkpoints(run.checkpoints):
        if int(path.name.removeprefix("step-")) > step:
            aside = run.root / "checkpoints-aside"
            aside.mkdir(exist_ok=True)
            target = aside / path.name
            number = 1
            while target.exists():
                number += 1
                target = aside / f"{path.name}.{number}"
            path.rename(target)
            say(f"{path.name} put aside in {aside}")


def changed_keys(old: str, new: str) -> list[str]:
    """`key: old value -> new value` of two resolved recipes; keys that only one of them knows are left out."""
    before, after = (flatten(yaml.safe_load(text), split_lists=True) for text in (old, new))
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if key in after and before[key] != after[key]] + [
        f"{key}: {'added' if key in after else 'removed'}" for key in before.keys() ^ after.keys() if _is_item(key)
    ]


def _is_item(key: str) -> bool:
    """Whether a key that only one recipe has is of a list or of a mapping of names, not a key of another version."""
    place: Place | None = root()
    for part in key.split("."):
        if part.isdigit() or (place is not None and place.takes_any_key):
            return True
        place = place.below(part) if place is not None else None
    return False


def changed_fingerprints(old: dict[str, Any], new: dict[str, Any], place: str) -> list[str]:
    """In words, what of base and data is otherwise; `place` says where `old` was found."""
    changes = []
    if old["base"]["sha256"] != new["base"]["sha256"]:
        changes.append(f"the base model {new['base']['name']}: its files are others than {place}")
    if old["data"]["train"] != new["data"]["train"]:
        changes.append(f"the training data: its samples are others than {place}")
    if old.get("start") != new.get("start"):
        changes.append(f"the adapter that it starts from: its weights are others than {place}")
    if old["data"].get("validation") != new["data"].get("validation"):
        changes.append(f"{_VALIDATION}: its samples are others than {place}")
    return changes


def _chooses_by_validation(recipe: dict[str, Any]) -> bool:
    return recipe["evaluation"]["early_stopping"] is not None or recipe["checkpoint"]["final"] == "best"


def _is_harmless(key: str, by_validation: bool) -> bool:
    if key == _VALIDATION:
        return not by_validation
    return any(key == name or key.startswith(f"{name}.") for name in HARMLESS)
