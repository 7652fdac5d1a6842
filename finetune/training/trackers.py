"""Trackers besides metrics.csv. A tracker that fails is reported once and never stops training."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from finetune.console import warn
from finetune.errors import BadInputError
from finetune.files import write_atomic
from finetune.recipe.load import dump_recipe
from finetune.recipe.preflight import wandb_mode
from finetune.recipe.schema import LoggingSection, Recipe
from finetune.run_dir import RunDir

SAMPLE_COLUMNS = ("prompt", "expected", "completion")


class Tracker(Protocol):
    """What a tracker does."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers of one step."""

    def log_samples(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Record completions of one step as a table; a row has SAMPLE_COLUMNS."""

    def log_adapter(self, folder: Path) -> None:
        """Keep the final adapter as an artifact, where the tracker has such."""

    def finish(self) -> None:
        """Flush and close."""


class _Wandb:
    def __init__(self, recipe: Recipe, run: RunDir, run_id: str, first_step: int) -> None:
        import wandb

        run.logs.mkdir(parents=True, exist_ok=True)
        self._name = f"{recipe.name}-adapter"
        self._run = wandb.init(
            project=recipe.logging.project,
            name=recipe.name,
            id=run_id,
            resume="allow",
            tags=list(recipe.logging.tags),
            dir=str(run.logs),
            mode=wandb_mode(),  # type: ignore[arg-type]
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_samples(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=[[row[key] for key in SAMPLE_COLUMNS] for row in rows])
        self._run.log({"samples": table}, step=step)

    def log_adapter(self, folder: Path) -> None:
        import wandb

        artifact = wandb.Artifact(self._name, type="model")
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files in `logs/tensorboard`; of steps that a continued run writes again, the later ones count."""

    def __init__(self, recipe: Recipe, run: RunDir, run_id: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.logs / "tensorboard"), purge_step=first_step + 1)
        self._text("recipe", f"```yaml\n{dump_recipe(recipe)}```", 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_samples(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        self._text("samples", markdown_table(rows), step)

    def log_adapter(self, folder: Path) -> None:
        """TensorBoard keeps no files; the adapter's place is noted."""
        self._text("adapter", str(folder), 0)

    def _text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, text, step)

    def finish(self) -> None:
        self._writer.close()


class _Trackio:
    """A local database where trackio keeps all projects (`TRACKIO_DIR`); `trackio show` reads it."""

    def __init__(self, recipe: Recipe, run: RunDir, run_id: str, first_step: int) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        project, name = recipe.logging.project, f"{recipe.name}-{run_id}"
        # It has no way to take steps back: those that a continued run repeats are the same and are left out.
        self._last_step = SQLiteStorage.get_max_step_for_run(project, name)
        # It announces itself on stdout, which is for results.
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=project,
                name=name,
                resume="allow",
                config=recipe.model_dump(mode="json"),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._last_step is None or step > self._last_step:
            self._run.log(metrics, step=step)

    def log_samples(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        import trackio

        data = [[row[key] for key in SAMPLE_COLUMNS] for row in rows]
        if self._last_step is None or step > self._last_step:
            self._run.log({"samples": trackio.Table(columns=list(SAMPLE_COLUMNS), data=data)}, step=step)

    def log_adapter(self, folder: Path) -> None:
        self._run.log_artifact(str(folder), name="adapter", type="model")

    def finish(self) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


# What a recipe may name; the package that must be installed has the same name.
TRACKERS: dict[str, Callable[[Recipe, RunDir, str, int], Tracker]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
}


def check_trackers(section: LoggingSection) -> None:
    """Refuse a tracker whose package is absent, before anything is computed.

    Raises:
        BadInputError: naming the package and the command that installs it.
    """
    absent = [name for name in section.trackers if importlib.util.find_spec(name) is None]
    if absent:
        raise BadInputError(
            f"logging.trackers: {', '.join(absent)} is not installed; run: pip install {' '.join(absent)}, "
            "or leave it out: metrics.csv has every number"
        )


class TrackerGroup:
    """The recipe's trackers behind one guard. `first_step` is the step that a continued run goes on from."""

    def __init__(self, recipe: Recipe, run: RunDir, first_step: int) -> None:
        self._trackers: dict[str, Tracker] = {}
        self._section = recipe.logging
        for name in recipe.logging.trackers:
            with self._guarded(name):
                self._trackers[name] = TRACKERS[name](recipe, run, _run_id(run), first_step)

    def log(self, metrics: dict[str, float | int | None], step: int) -> None:
        """Hand the numbers to every tracker."""
        numbers = {key: value for key, value in metrics.items() if value is not None and key != "step"}
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.log(numbers, step)

    def log_samples(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Hand completions to every tracker."""
        for name, tracker in list(self._trackers.items()) if rows else ():
            with self._guarded(name):
                tracker.log_samples(rows, step)

    def log_adapter(self, folder: Path) -> None:
        """Hand the final adapter to every tracker, if the recipe asks for it."""
        for name, tracker in list(self._trackers.items()) if self._section.log_adapter else ():
            with self._guarded(name):
                tracker.log_adapter(folder)

    def finish(self) -> None:
        """Close every tracker."""
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.finish()
        self._trackers.clear()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Whatever a service does, the run goes on without it.
            self._trackers.pop(name, None)
            warn(f"the tracker {name} failed and is left out from here on: {error}; metrics.csv has every number")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Samples as a Markdown table."""
    lines = [SAMPLE_COLUMNS, ("---",) * len(SAMPLE_COLUMNS)]
    lines += [tuple(_cell(row[key]) for key in SAMPLE_COLUMNS) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _run_id(run: RunDir) -> str:
    """The id that the trackers of this run share; it survives a resume."""
    path = run.logs / "tracker_id"
    if not path.is_file():
        write_atomic(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
