"""What a checkpoint holds and how it is written, found and read.

`checkpoints/step-000120/` is a servable adapter in PEFT's format plus a small state:

    adapter_model.safetensors, adapter_config.json
    trainer_state.pt     optimizer, step, counters; read with weights_only=True
    recipe.yaml          the resolved recipe
    fingerprints.json    base model and data
    manifest.json        every file's size and hash; written last

It is written to a temporary directory, synced and renamed. A directory without a manifest, or whose files do not match
it, is not a checkpoint. The base model is named, never saved.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from finetune.console import warn
from finetune.errors import BadInputError, FinetuneError
from finetune.files import new_directory, sha256_file
from finetune.models.adapters import adapter_state, load_adapter, save_adapter

MANIFEST = "manifest.json"
STATE = "trainer_state.pt"
RECIPE = "recipe.yaml"
FINGERPRINTS = "fingerprints.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass
class Snapshot:
    """Everything a checkpoint says, copied off the model: training may go on while it is written."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    progress: dict[str, Any] = field(default_factory=dict)  # counters of callbacks: plain numbers and strings


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int

    @property
    def progress(self) -> dict[str, Any]:
        """Counters as they stood, without loading tensors."""
        manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
        progress: dict[str, Any] = manifest["progress"]
        return progress


def checkpoint_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:06d}"


def take_snapshot(
    step: int,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    scaler_state: dict[str, Any],
    progress: dict[str, Any],
) -> Snapshot:
    """Copy the adapter and the optimizer's state to host memory."""
    adapter = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    return Snapshot(step, adapter, _to_cpu(optimizer.state_dict()), _to_cpu(scaler_state), dict(progress))


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def write_checkpoint(
    folder: Path, snapshot: Snapshot, model: PeftModel, recipe_text: str, fingerprints: dict[str, Any]
) -> Checkpoint:
    """Write `snapshot` to `folder/step-N`, whole or not at all.

    Raises:
        FinetuneError: if it cannot be written (a full disk, no permission); earlier checkpoints are untouched.
    """
    path = folder / checkpoint_name(snapshot.step)
    try:
        if path.exists():
            # Only a damaged one, or one written by a run that was continued from an earlier step.
            shutil.rmtree(path)
        with new_directory(path) as temporary:
            save_adapter(model, temporary, snapshot.adapter)
            state = {
                "step": snapshot.step,
                "optimizer": snapshot.optimizer,
                "scaler": snapshot.scaler,
                "progress": snapshot.progress,
            }
            torch.save(state, temporary / STATE)
            (temporary / RECIPE).write_text(recipe_text)
            (temporary / FINGERPRINTS).write_text(json.dumps(fingerprints, indent=2) + "\n")
            (temporary / MANIFEST).write_text(_manifest(temporary, snapshot))
    # safetensors and torch.save have errors of their own for a write that failed.
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise FinetuneError(
            f"cannot write the checkpoint {path}: {reason}; "
            "free some space or give the run another output_dir, then run the same command again"
        ) from error
    return Checkpoint(path, snapshot.step)


def _manifest(folder: Path, snapshot: Snapshot) -> str:
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    return json.dumps({"step": snapshot.step, "progress": snapshot.progress, "files": files}, indent=2) + "\n"


def damage(path: Path) -> str | None:
    """Why `path` is not a whole checkpoint; None if it is one."""
    manifest_path = path / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text())
        files = manifest["files"]
    except FileNotFoundError:
        return "it has no manifest.json, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest.json cannot be read"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256_file(file) != expected["sha256"]:
            return f"{name} does not match its hash"
    return None


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
    return Checkpoint(path, json.loads((path / MANIFEST).read_text())["step"])


def restore(checkpoint: Checkpoint, model: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the adapter and the optimizer's state in place; the whole trainer state is returned.

    Raises:
        ModelError: if the adapter does not fit the model.
    """
    load_adapter(model, checkpoint.path)
    state: dict[str, Any] = torch.load(checkpoint.path / STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    return state


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
        progress = json.loads((path / MANIFEST).read_text())["progress"]
    except (OSError, ValueError, KeyError):
        return None
    if progress.get("validated_at") != int(path.name.removeprefix("step-")):
        return None
    loss: float | None = progress.get("validation_loss")
    return loss
