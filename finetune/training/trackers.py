"""Trackers besides metrics.csv. A tracker that fails is reported once and never stops training."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from finetune.console import warn
from finetune.files import write_atomic
from finetune.recipe.schema import Recipe
from finetune.run_dir import RunDir


class Tracker(Protocol):
    """What a tracker does."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers of one step."""

    def finish(self) -> None:
        """Flush and close."""


class _Wandb:
    def __init__(self, recipe: Recipe, run: RunDir, run_id: str) -> None:
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        run.logs.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=recipe.logging.project,
            name=recipe.name,
            id=run_id,
            resume="allow",
            tags=list(recipe.logging.tags),
            dir=str(run.logs),
            mode=os.environ.get("WANDB_MODE") or ("online" if has_key else "offline"),  # type: ignore[arg-type]
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def finish(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Recipe, RunDir, str], Tracker]] = {"wandb": _Wandb}


class TrackerGroup:
    """The recipe's trackers behind one guard."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in recipe.logging.trackers:
            self._guard(name, lambda name=name: self._start(name, recipe, run))  # type: ignore[misc]

    def log(self, metrics: dict[str, float | None], step: int) -> None:
        """Hand the numbers to every tracker."""
        numbers = {key: value for key, value in metrics.items() if value is not None}
        for name, tracker in list(self._trackers.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(numbers, step))  # type: ignore[misc]

    def finish(self) -> None:
        """Close every tracker."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, tracker.finish)

    def _start(self, name: str, recipe: Recipe, run: RunDir) -> None:
        self._trackers[name] = TRACKERS[name](recipe, run, _run_id(run))

    def _guard(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            # Whatever a service does, the run goes on without it.
            self._trackers.pop(name, None)
            warn(f"the tracker {name} failed and is left out from here on: {error}; metrics.csv has every number")


def _run_id(run: RunDir) -> str:
    """The id that the trackers of this run share; it survives a resume."""
    path = run.logs / "tracker_id"
    if not path.is_file():
        write_atomic(path, secrets.token_hex(4))
    return path.read_text().strip()
