"""What a run will write and whether there is room for it, asked of each file system that something goes to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from finetune.files import cache_dir
from finetune.findings import Finding, error, fact
from finetune.models.memory import format_bytes
from finetune.models.shared import shared_folder
from finetune.models.sources import INDEX_SUFFIX, WEIGHT_FILES, ModelSource, holds_weights
from finetune.models.weights import WeightBytes, optimizer_bytes
from finetune.recipe.schema import QUANTIZED_4BIT, Recipe
from finetune.training.strategy import Placement

# A published weight, and one that was converted from a GGUF file.
_BYTES_A_WEIGHT = 2


def find_room(recipe: Recipe, source: ModelSource, weights: WeightBytes, placement: Placement) -> Iterator[Finding]:
    """One finding for each file system: what goes to it, in bytes, and what is free."""
    needs = {
        Path(recipe.output_dir): {"checkpoints": _checkpoint_bytes(recipe, weights)},
        Path(constants.HF_HUB_CACHE): {"weights to download": _download_bytes(source, weights)},
        cache_dir(): _cached_bytes(recipe, source, weights, placement),
    }
    placed: dict[int, tuple[Path, dict[str, int]]] = {}
    for path, parts in needs.items():
        parent = existing_parent(path)
        placed.setdefault(file_system(parent), (parent, {}))[1].update({k: v for k, v in parts.items() if v})
    for parent, parts in placed.values():
        if not parts:
            continue
        needed, free = sum(parts.values()), shutil.disk_usage(parent).free
        text = ", ".join(f"{format_bytes(size)} of {what}" for what, size in parts.items())
        values = {"needed_bytes": needed, "free_bytes": free, "folder": str(parent)}
        if needed > free:
            yield error("disk", f"{text}, but only {format_bytes(free)} are free in {parent}", **values)
        else:
            yield fact("disk", f"{text}; {format_bytes(free)} are free in {parent}", **values)


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path`, or itself, that is there."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def file_system(folder: Path) -> int:
    """What tells the file system of `folder` from others."""
    return folder.stat().st_dev


def _checkpoint_bytes(recipe: Recipe, weights: WeightBytes) -> int:
    """All checkpoints that are kept, one that is being written, and the adapter."""
    state = 4 * weights.num_trainable + optimizer_bytes(weights.trainable, recipe.training.optimizer)
    return (recipe.checkpoint.keep_last + recipe.num_best_kept + 1) * state + 4 * weights.num_trainable


def _download_bytes(source: ModelSource, weights: WeightBytes) -> int:
    """What the Hub's cache lacks of a hub model, from the share of its weight files that is not there."""
    if source.is_local:
        return 0
    missing = 1.0
    for name in WEIGHT_FILES:
        path = try_to_load_from_cache(source.location, name, revision=source.revision)
        if not isinstance(path, str):
            continue
        shards = [name]
        if name.endswith(INDEX_SUFFIX):
            shards = sorted(set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()))
        here = sum((Path(path).parent / shard).is_file() for shard in shards)
        missing = min(missing, 1 - here / len(shards))
    return int(missing * _BYTES_A_WEIGHT * weights.num_parameters)


def _cached_bytes(recipe: Recipe, source: ModelSource, weights: WeightBytes, placement: Placement) -> dict[str, int]:
    """Copies of the base that `models.sources` and `models.shared` will make."""
    model, parts = recipe.model, {}
    if source.is_local and not holds_weights(Path(source.location)):
        parts["converted weights"] = _BYTES_A_WEIGHT * weights.num_parameters
    if placement.sharded or (placement.accelerator == "cpu" and model.quantization in QUANTIZED_4BIT):
        folder = shared_folder(model, source, precision=recipe.training.precision)
        if folder is not None and not folder.is_dir():
            parts[f"weights as {placement.strategy} maps them" if placement.sharded else "quantized weights"] = (
                weights.base + weights.constants
            )
    return parts
