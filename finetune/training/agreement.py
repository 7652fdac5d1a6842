"""That all processes of a run train on the same: each reads the recipe, the data and the checkpoints by itself.

On machines whose files differ, gradients of different rows would be summed as if they were one step's, or one process
would wait for another that has no step left.
"""

from __future__ import annotations

import socket
from typing import Any

import torch.distributed as dist

from finetune.errors import BadInputError
from finetune.recipe.load import dump_recipe
from finetune.recipe.schema import Recipe
from finetune.training.resume import changed_fingerprints, changed_keys

# Where things are may differ: what is there is compared. How many layers are recomputed, each machine's memory decides.
PLACES = (
    "model.name",
    "model.tokenizer",
    "adapter.start_from",
    "data.template",
    "output_dir",
    "logging",
    "hub",
    "training.gradient_checkpointing",
)


def check_agreement(recipe: Recipe, fingerprints: dict[str, Any], settled: dict[str, Any]) -> None:
    """Compare what the processes have found. Collective.

    Raises:
        BadInputError: in every process, naming one that has found something else than rank 0, and what.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    own = {"host": socket.gethostname(), "recipe": dump_recipe(recipe), "fingerprints": fingerprints}
    own["settled"] = settled
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    for rank, other in enumerate(ranks):
        if found := differences(ranks[0], other):
            raise BadInputError(
                f"rank {rank} ({other['host']}) does not train on what rank 0 ({ranks[0]['host']}) trains on:\n  "
                + "\n  ".join(found)
                + "\n  Give every machine the same recipe and files, on a disk that they share or by copying them; set "
                "what auto takes otherwise there."
            )


def differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two processes have found otherwise, in words."""
    keys = [line for line in changed_keys(first["recipe"], other["recipe"]) if not _is_place(line.split(":")[0])]
    files = changed_fingerprints(first["fingerprints"], other["fingerprints"], "on rank 0")
    if first["fingerprints"].get("test") != other["fingerprints"].get("test"):
        files.append("the rows that are measured: they are others than on rank 0")
    settled = [(name, value, other["settled"][name]) for name, value in first["settled"].items()]
    return keys + files + [f"{name}: {value} -> {theirs}" for name, value, theirs in settled if value != theirs]


def _is_place(key: str) -> bool:
    return key.endswith(".path") or any(key == place or key.startswith(f"{place}.") for place in PLACES)
