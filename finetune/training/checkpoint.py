"""What a checkpoint holds and how it is written, found and read.

`checkpoints/step-000120/` is a servable adapter in PEFT's format plus a small state:

    adapter_model.safetensors, adapter_config.json
    trainer_state.pt     optimizer, loss scaler, step; read with weights_only=True
    recipe.yaml          the resolved recipe
    fingerprints.json    base model and data
    manifest.json        step, counters, every file's size and hash; written last

It is written to a temporary directory, synced and renamed. A directory without a manifest, or whose files do not match
it, is not a checkpoint. The base model is named, never saved.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from finetune.console import say, warn
from finetune.errors import BadInputError, FinetuneError, ModelError
from finetune.files import (
    MANIFEST,
    damage_of,
    manifest_text,
    new_directory,
    read_manifest,
    sha256_file,
    write_atomic,
    write_failure,
)
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME, load_adapter, save_weights
from finetune.run_dir import FINGERPRINTS, RECIPE
from finetune.training.snapshot import Snapshot

STATE = "trainer_state.pt"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int

    @property
    def progress(self) -> dict[str, Any]:
        """Counters as they stood, without loading tensors."""
        manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        progress: dict[str, Any] = manifest["progress"]
        return progress


def checkpoint_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:06d}"


def write_checkpoint(
    folder: Path, snapshot: Snapshot, adapter_config: str, recipe_text: str, fingerprints: dict[str, Any]
) -> Checkpoint:
    """Write `snapshot` to `folder/step-N`, whole or not at all.

    Raises:
        FinetuneError: if it cannot be written (a full disk, no permission); earlier checkpoints are untouched.
    """
    path = folder / checkpoint_name(snapshot.step)
    state = {"step": snapshot.step, "optimizer": snapshot.optimizer, "scaler": snapshot.scaler}
    parts: dict[str, Callable[[Path], Any]] = {
        WEIGHTS_NAME: lambda file: save_weights(snapshot.adapter, file),
        CONFIG_NAME: lambda file: file.write_text(adapter_config, encoding="utf-8"),
        STATE: lambda file: _save_state(state, file),
        RECIPE: lambda file: file.write_text(recipe_text, encoding="utf-8"),
        FINGERPRINTS: lambda file: file.write_text(json.dumps(fingerprints, indent=2) + "\n", encoding="utf-8"),
        MANIFEST: lambda file: file.write_text(
            _manifest(file.parent, snapshot.step, snapshot.progress), encoding="utf-8"
        ),
    }
    try:
        if path.exists():
            # Only a damaged one, or one written by a run that was continued from an earlier step.
            shutil.rmtree(path)
        write_parts(path, parts)
    except OSError as error:
        raise FinetuneError(
            f"cannot write the checkpoint {path}: {error}; "
            "free some space or give the run another output_dir, then run the same command again"
        ) from error
    return Checkpoint(path, snapshot.step)


def _save_state(state: dict[str, Any], path: Path) -> None:
    # To a path, torch would write by C++ streams, which do not say why a write failed.
    with path.open("wb") as file:
        torch.save(state, file)


def write_parts(path: Path, parts: dict[str, Callable[[Path], Any]]) -> None:
    """Make the directory `path` of `parts`, each a function that writes one file or several; whole or not at all.

    Raises:
        OSError: naming the part that could not be written, and why, whatever its library raises.
    """
    name = "the directory"
    try:
        with new_directory(path) as temporary:
            for name, write in parts.items():
                write(temporary / name)
    # safetensors, tokenizers and torch.save have errors of their own for a write that failed.
    except Exception as error:
        raise OSError(f"{name}: {write_failure(error)}") from error


def _manifest(folder: Path, step: int, progress: dict[str, Any]) -> str:
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    return manifest_text({"step": step, "progress": progress, "files": files})


def update_progress(checkpoint: Checkpoint, progress: dict[str, Any]) -> None:
    """Replace the counters of a checkpoint on disk, its manifest being whole at any instant."""
    content = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
    write_atomic(checkpoint.path / MANIFEST, manifest_text({**content, "progress": progress}))


def damage(path: Path) -> str | None:
    """Why `path` is not a whole checkpoint; None if it is one."""
    manifest, why_not = read_manifest(path)
    return why_not or damage_of(path, manifest["files"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Directories that are named like checkpoints, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(named, key=lambda pair: int(pair[0].group(1)))]


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are named and passed over."""
    for path in reversed(list_checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return open_checkpoint(path)
        warn(f"{path} is not a whole checkpoint: {reason}; taking the one before")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Raises:
        BadInputError: if it is not whole.
    """
    reason = damage(path) if path.is_dir() else "no such directory"
    if reason is not None:
        raise BadInputError(f"{path} is not a whole checkpoint: {reason}")
    return Checkpoint(path, json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"])


def restore(checkpoint: Checkpoint, model: PeftModel, optimizer: torch.optim.Optimizer, name: str) -> dict[str, Any]:
    """Load the adapter and the state of the optimizer, which is `name`, in place; the whole trainer state is returned.

    The state of another optimizer is not taken, and settings stay those of `optimizer`.

    Raises:
        ModelError: if the adapter does not fit the model, or the state holds what only running code could restore.
    """
    load_adapter(model, checkpoint.path)
    path = checkpoint.path / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused: it holds more than tensors and plain values, and nothing in it is run; "
            "take a checkpoint from where you trust it, or remove this one"
        ) from error
    before = yaml.safe_load((checkpoint.path / RECIPE).read_text(encoding="utf-8"))["training"]["optimizer"]["name"]
    if before == name:
        optimizer.load_state_dict(_with_settings_of(optimizer, state["optimizer"]))
    else:
        say(f"training.optimizer.name: {name} was {before} at step {checkpoint.step}, so its moments start anew")
    return state


def _with_settings_of(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """`saved` with what the recipe now says: an optimizer that loads a state takes its groups' settings too."""
    groups = [
        {**old, **{key: value for key, value in new.items() if key != "params"}}
        for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**saved, "param_groups": groups}


def prune(folder: Path, *, keep_last: int, keep_best: int) -> None:
    """Delete checkpoints that are neither among the newest nor among the best by validation loss."""
    paths = list_checkpoints(folder)
    kept = set(paths[-keep_last:])
    scored = [(loss, path) for path in paths if (loss := _validation_loss(path)) is not None]
    kept.update(path for _, path in sorted(scored, key=lambda pair: pair[0])[:keep_best])
    for path in paths:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _validation_loss(path: Path) -> float | None:
    try:
        progress = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["progress"]
    except (OSError, ValueError, KeyError):
        return None
    if progress.get("validated_at") != int(path.name.removeprefix("step-")):
        return None
    loss: float | None = progress.get("validation_loss")
    return loss
