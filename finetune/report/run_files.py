"""What a run's directory holds, read for people.

A run that is unfinished or damaged gives what it has and says what is missing; nothing here raises for a bad file.
Reads small files only, without torch, and can be called while the run is training.
"""

from __future__ import annotations

import csv
import fcntl
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.errors import BadInputError
from finetune.files import MANIFEST, damage_of, read_manifest
from finetune.recipe.lines import YamlError, parse_yaml
from finetune.run_dir import RunDir

State = Literal["finished", "measuring", "running", "stopped", "not started"]
Row = dict[str, float | int | None]

_CHECKPOINT = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint's directory, whole or not."""

    path: Path
    step: int
    size_bytes: int
    loss: float | None
    validation_loss: float | None
    damage: str | None
    """Why it cannot be used; None for a whole one."""


@dataclass
class RunFiles:
    """Everything that a run wrote, as plain values; empty where a file is absent."""

    run_dir: RunDir
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[StoredCheckpoint] = field(default_factory=list)
    is_locked: bool = False
    problems: list[str] = field(default_factory=list)
    """Files that are there but cannot be read."""

    @property
    def name(self) -> str:
        """The recipe's name, else the directory's."""
        return str(self.recipe.get("name") or self.run_dir.root.resolve().name)

    @property
    def shown_path(self) -> Path:
        """The directory as the recipe names it, if it still stands there; else as it was given."""
        named = Path(str(self.recipe.get("output_dir", ""))) / self.name
        root = self.run_dir.root.resolve()
        return named if root.parts[-len(named.parts) :] == named.parts else self.run_dir.root

    def key(self, dotted: str) -> Any:
        """A recipe's value by its dotted key; None where it is absent."""
        value: Any = self.recipe
        for piece in dotted.split("."):
            value = value.get(piece) if isinstance(value, dict) else None
        return value

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        logged = int(self.metrics[-1]["step"] or 0) if self.metrics else 0
        saved = max((checkpoint.step for checkpoint in self.checkpoints if checkpoint.damage is None), default=0)
        return max(logged, saved)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, as the recipe and the data say; None where either is missing."""
        try:
            return planned_steps(self.recipe["training"], self.ledger["train_samples"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None

    @property
    def state(self) -> State:
        """How far the run is."""
        early = self.key("evaluation.early_stopping") is not None
        if early or self.num_steps is None or self.step >= self.num_steps:
            if "training" in self.results and self.run_dir.adapter.is_dir():
                return "finished"
            if self.is_locked and _is_newer(self.run_dir.adapter, self.run_dir.metrics):
                return "measuring"
        if self.is_locked:
            return "running"
        return "stopped" if self.step or self.metrics or self.results else "not started"

    def column(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of every row that has a finite value in this column."""
        points = [(row.get("step"), row.get(name)) for row in self.metrics]
        return [(x, y) for x, y in points if x is not None and y is not None and math.isfinite(y)]

    @property
    def best_validation(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        points = self.column("validation_loss")
        points += [(c.step, c.validation_loss) for c in self.checkpoints if c.validation_loss is not None]
        if not points:
            return None
        step, loss = min(points, key=lambda point: (point[1], point[0]))
        return int(step), loss

    def metric_values(self, when: str) -> dict[str, float]:
        """The metrics measured `before` or `after` training."""
        part = self.results.get(when)
        values = part.get("metrics") if isinstance(part, dict) else None
        return {k: v for k, v in values.items() if isinstance(v, int | float)} if isinstance(values, dict) else {}


def open_run(path: Path, *, hashes: bool = True) -> RunFiles:
    """All that the run at `path` holds. `hashes`: read checkpoints whole to tell whether they are damaged.

    Raises:
        BadInputError: there is no directory, or no run in it.
    """
    if not path.is_dir():
        raise BadInputError(f"{path}: no such directory; give a run's directory, such as runs/my-run")
    if not is_run(path):
        raise BadInputError(
            f"{path}: is not a run: it holds no recipe.yaml, metrics.csv or checkpoints; "
            "`finetune runs DIR` lists the runs in a directory"
        )
    run_dir = RunDir(path)
    run = RunFiles(run_dir, is_locked=_is_locked(run_dir.lock))
    run.recipe_text = _text(run_dir.recipe, run) or ""
    run.recipe = _parse_recipe(run)
    run.metrics = _metrics(run_dir.metrics, run)
    run.ledger = _mapping(run_dir.ledger, run)
    run.results = _mapping(run_dir.results, run)
    run.samples = _json_lines(run_dir.samples, run)
    run.rejected = _json_lines(run_dir.rejected, run)
    run.checkpoints = read_checkpoints(run_dir.checkpoints, hashes=hashes)
    return run


def is_run(path: Path) -> bool:
    """Whether a directory looks like a run's, whatever is missing of it."""
    run_dir = RunDir(path)
    if (path / MANIFEST).is_file() or (path / "adapter_config.json").is_file():
        return False  # a checkpoint or an adapter: they hold a recipe too
    return run_dir.recipe.is_file() or run_dir.metrics.is_file() or run_dir.checkpoints.is_dir()


def planned_steps(training: dict[str, Any], num_samples: int) -> int:
    """Optimizer steps of a run: `training.steps.build_plan` in numbers alone, so that torch is not needed."""
    batch = int(training["global_batch_size"])
    total = math.inf if training.get("epochs") is None else max(1, round(training["epochs"] * num_samples))
    if training.get("max_steps") is not None:
        total = min(total, training["max_steps"] * batch)
    return math.ceil(int(total) / batch)


def read_checkpoints(folder: Path, *, hashes: bool) -> list[StoredCheckpoint]:
    """The checkpoints in `folder`, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    found = [_checkpoint(path, int(match.group(1)), hashes) for match, path in named if path.is_dir()]
    return sorted(found, key=lambda each: each.step)


def _checkpoint(path: Path, step: int, hashes: bool) -> StoredCheckpoint:
    manifest, damage = read_manifest(path)
    progress = manifest.get("progress")
    progress = progress if isinstance(progress, dict) else {}
    validated = progress.get("validated_at") == step
    return StoredCheckpoint(
        path,
        step,
        folder_bytes(path),
        progress.get("loss"),
        progress.get("validation_loss") if validated else None,
        damage or damage_of(path, manifest.get("files", {}), hashes=hashes),
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _is_newer(path: Path, other: Path) -> bool:
    try:
        return path.stat().st_mtime_ns >= other.stat().st_mtime_ns
    except OSError:
        return False


def _is_locked(lock: Path) -> bool:
    """Whether a process holds the run's lock; a shared lock is taken for an instant, the holder is not disturbed."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _text(path: Path, run: RunFiles) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        run.problems.append(f"{path.name} cannot be read")
        return None


def _parse_recipe(run: RunFiles) -> dict[str, Any]:
    if not run.recipe_text:
        return {}
    try:
        value = parse_yaml(run.recipe_text).value
    except YamlError:
        value = None
    if isinstance(value, dict):
        return value
    run.problems.append("recipe.yaml is not a recipe")
    return {}


def _mapping(path: Path, run: RunFiles) -> dict[str, Any]:
    text = _text(path, run)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    run.problems.append(f"{path.name} is damaged: it is not a JSON object")
    return {}


def _json_lines(path: Path, run: RunFiles) -> list[dict[str, Any]]:
    text = _text(path, run)
    rows = []
    for line in (text or "").split("\n"):  # splitlines would end one at U+2028, too, which stands as it is in JSON
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _metrics(path: Path, run: RunFiles) -> list[Row]:
    """The rows of metrics.csv by rising step; half-written lines are left out, of a repeated step the last counts."""
    text = _text(path, run)
    rows: dict[int, Row] = {}
    for record in csv.DictReader((text or "").splitlines()):
        if None in record or None in record.values():
            continue
        try:
            row = {name: _number(value) for name, value in record.items()}
            rows[int(row["step"])] = row  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError):
            continue
    if text and not rows and len(text.splitlines()) > 1:
        run.problems.append("metrics.csv is damaged: no line of it can be read")
    return [rows[step] for step in sorted(rows)]


def _number(text: str) -> float | int | None:
    if text == "":
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
