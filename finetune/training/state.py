"""What the callbacks of a run share and a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.recipe.schema import EvaluationSection


@dataclass
class RunState:
    """Counters and the last values: plain numbers."""

    step: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    validated_at: int | None = None
    put_off_at: int | None = None  # the step whose validation a stop signal has left for the continued run
    best_validation_loss: float | None = None  # of early stopping: better by min_delta than the one before
    bad_validations: int = 0
    lowest_loss: float | None = None  # of all validations
    best_step: int | None = None  # where that was
    num_skipped_steps: int = 0
    tokens: int = 0
    unlogged_supervised: int = 0  # supervised tokens since the last row of metrics.csv
    seconds: float = 0.0
    stop_reason: str | None = field(default=None)  # early_stopping or the name of a signal; not kept
    adapter_step: int | None = None  # whose weights the final adapter has; not kept

    def to_progress(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {key: value for key, value in vars(self).items() if key not in ("stop_reason", "adapter_step")}

    def load(self, progress: dict[str, Any]) -> None:
        """Take the values of a checkpoint."""
        for key, value in progress.items():
            setattr(self, key, value)

    @property
    def is_preempted(self) -> bool:
        """Whether a signal ended the run before its last step or validation was done."""
        return self.stop_reason not in (None, "early_stopping")


def is_stopped_early(progress: dict[str, Any], evaluation: EvaluationSection) -> bool:
    """Whether a run with this progress has stopped for want of improvement, by the recipe as it is now."""
    stopping = evaluation.early_stopping
    return stopping is not None and int(progress.get("bad_validations", 0)) >= stopping.patience
