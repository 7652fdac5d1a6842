"""How long a training step is held up by a checkpoint of a 40 M-parameter adapter, and by its write alongside.

Trains SmolLM2-135M with LoRA of rank 128 on this machine's CPU for a few steps, a checkpoint at every fourth, and
prints the milliseconds that a save takes of the training thread, those of its write, and of the steps with and without
a write under way. Usage: python benchmarks/checkpoint_hold_up.py FOLDER
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from finetune.cli import main
from finetune.training import checkpoint_writer
from finetune.training.checkpoint_writer import CheckpointWriter
from finetune.training.module import FinetuneModule

NUM_STEPS, EVERY = 20, 4
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2_135m_tickets.yaml"
OVERRIDES = (
    "adapter.rank=128",
    "training.epochs=null",
    f"training.max_steps={NUM_STEPS}",
    "training.global_batch_size=1",
    "training.micro_batch_size=1",
    "evaluation.metrics=[]",
    "evaluation.before=false",
    "evaluation.num_samples=0",
    f"checkpoint.every_steps={EVERY}",
)

Span = tuple[float, float]
steps: list[Span] = []
saves: list[Span] = []
writes: list[Span] = []


def timed(owner: Any, name: str, spans: list[Span]) -> None:
    """Have every call of `owner.name` noted."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        spans.append((start, time.perf_counter()))
        return result

    setattr(owner, name, wrapper)


def milliseconds(spans: list[Span]) -> str:
    """Median and range."""
    values = [1e3 * (end - start) for start, end in spans]
    if not values:
        return "none"
    return f"median {statistics.median(values):,.0f} ms, {min(values):,.0f} to {max(values):,.0f}, of {len(values)}"


def overlaps(one: Span, others: list[Span]) -> bool:
    """Whether `one` and any of `others` have an instant in common."""
    return any(start < one[1] and one[0] < end for start, end in others)


if __name__ == "__main__":
    timed(FinetuneModule, "training_step", steps)
    timed(CheckpointWriter, "save", saves)
    timed(checkpoint_writer, "write_checkpoint", writes)
    folder = Path(sys.argv[1])
    assert main(["run", str(RECIPE), "name=hold-up", f"output_dir={folder}", "--fresh", *OVERRIDES]) == 0
    newest = max((folder / "hold-up" / "checkpoints").iterdir())
    print(f"a checkpoint has {sum(file.stat().st_size for file in newest.iterdir()) / 1e6:,.0f} MB")
    # The first step warms up; the last save waits for its write.
    print("held up by a save  ", milliseconds(saves[:-1]))
    print("a write            ", milliseconds(writes))
    print("steps beside none  ", milliseconds([step for step in steps[1:] if not overlaps(step, writes)]))
    print("steps beside one   ", milliseconds([step for step in steps[1:] if overlaps(step, writes)]))
