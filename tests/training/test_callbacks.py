"""What the screen says of a run's progress, under a clock that the test sets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune.recipe.schema import Recipe
from finetune.run_dir import RunDir
from finetune.training import callbacks
from finetune.training.callbacks import Meter
from finetune.training.metrics import COLUMNS, MetricsFile, read_metrics
from finetune.training.state import RunState
from finetune.training.steps import StepPlan
from tests.tiny import tiny_recipe

TOKENS = (100, 900, 400, 600)  # of each step, whose speeds differ as well: 50, 300, 40 and 120 tokens a second
SECONDS = (2.0, 3.0, 10.0, 5.0)
# Steps done before, steps from line to line, and the lines. What is left is in tokens, at the speed since the start.
PROGRESS = {
    "fresh": (
        (0, 1),
        "step 1/4  loss 1.0000  lr 2.00e-04  50 tok/s  1.50 GB  left 0:38",
        "step 2/4  loss 0.5000  lr 1.00e-04  300 tok/s  1.50 GB  left 0:05",
        "step 3/4  loss 0.3333  lr 6.67e-05  40 tok/s  1.50 GB  left 0:06",
        "step 4/4  loss 0.2500  lr 5.00e-05  120 tok/s  1.50 GB  left 0:00",
    ),
    "resumed": (
        (2, 1),
        "step 3/4  loss 0.3333  lr 6.67e-05  40 tok/s  1.50 GB  left 0:15",
        "step 4/4  loss 0.2500  lr 5.00e-05  120 tok/s  1.50 GB  left 0:00",
    ),
    "every other step": (
        (0, 2),
        "step 2/4  loss 0.5000  lr 1.00e-04  200 tok/s  1.50 GB  left 0:05",
        "step 4/4  loss 0.2500  lr 5.00e-05  67 tok/s  1.50 GB  left 0:00",
    ),
}


@pytest.mark.parametrize("case", PROGRESS)
def test_a_line_has_loss_rate_speed_memory_and_the_time_left(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (done, every), *expected = PROGRESS[case]
    now, said = [1000.0], list[str]()
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(callbacks, "peak_memory_bytes", lambda: 1_500_000_000)
    monkeypatch.setattr(callbacks, "say", said.append)
    plan = StepPlan(num_samples=4, global_batch_size=1, num_steps=4, total_samples=4, seed=0)
    lengths = np.zeros(4, dtype=np.int32)
    for step, tokens in enumerate(TOKENS):
        lengths[plan.samples(step)] = tokens
    recipe = Recipe.model_validate(tiny_recipe(tmp_path, tmp_path, tmp_path, logging={"every_steps": every}))
    run = RunDir(tmp_path / "run")
    state = RunState(step=done, tokens=sum(TOKENS[:done]), seconds=sum(SECONDS[:done]))
    module, trainer = SimpleNamespace(step=done, num_skipped_steps=0), SimpleNamespace(is_global_zero=True)
    meter = Meter(recipe, run, state, plan, lengths)
    meter.on_train_start(trainer, module)  # type: ignore[arg-type]
    for step in range(done, len(TOKENS)):
        now[0] += SECONDS[step]
        module.step = step + 1
        module.last_batch = SimpleNamespace(num_real_tokens=TOKENS[step], num_supervised=1)
        module.last = SimpleNamespace(
            loss=torch.tensor(1 / module.step), grad_norm=torch.tensor(1.0), lr=2e-4 / module.step
        )
        meter.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
    meter.close()
    assert said == expected
    last = list(read_metrics(run.metrics))[-1]
    assert (last["step"], last["tokens"], last["seconds"]) == (4, sum(TOKENS), sum(SECONDS))


def test_metrics_of_a_machine_that_lost_its_power_are_read(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.start(0)
    file.append({**dict.fromkeys(COLUMNS), "step": 1, "loss": 2.5})
    with file.path.open("ab") as stream:
        stream.write(b"\0" * 600 + b"\xff\n")
    assert [(row["step"], row["loss"]) for row in read_metrics(file.path)] == [(1, 2.5)]
    file.path.write_bytes(b"\xff\0\n1,2\n")
    assert list(read_metrics(file.path)) == []
