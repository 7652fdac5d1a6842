"""The final adapter is that of the lowest validation loss, where a recipe asks for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.models.adapters import WEIGHTS_NAME, adapter_state
from finetune.run_dir import RunDir
from finetune.training import validation
from finetune.training.metrics import read_metrics
from finetune.training.module import FinetuneModule
from tests.training.conftest import RunTiny
from tests.training.test_checkpoint import flip, interrupt_after, same_ending

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.6, 6: 2.7, 7: 2.8, 8: 2.9, 9: 2.8}


def sections(**checkpoint: Any) -> dict[str, Any]:
    """Stops after step 5, three steps behind its best; saves nothing on the way but the best."""
    return {
        "training": {"max_steps": 9},
        "data": {"validation": {"size": 4}},
        "evaluation": {"every_steps": 1, "early_stopping": {"patience": 3}, "metrics": ["perplexity"]},
        "checkpoint": {"every_steps": None, "keep_last": 1, "keep_best": 0, **checkpoint},
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Validation losses are those of LOSSES; every adapter that was measured."""
    seen: list[dict[str, torch.Tensor]] = []

    def mean_loss(module: FinetuneModule, *_: Any, **__: Any) -> float:
        seen.append({name: tensor.clone() for name, tensor in adapter_state(module.model).items()})
        return LOSSES[module.step]

    monkeypatch.setattr(validation, "mean_loss", mean_loss)
    return seen


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS_NAME).read_bytes()


def trained(run: RunDir) -> dict[str, Any]:
    training: dict[str, Any] = json.loads(run.results.read_text())["training"]
    return training


def test_the_best_weights_are_measured_and_saved(
    run_tiny: RunTiny, measured: list[dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_tiny(**sections())
    best, last = run.checkpoints / "step-000002", run.checkpoints / "step-000005"
    assert sorted(run.checkpoints.iterdir()) == [best, last]
    assert weights(run.adapter) == weights(best) != weights(last)
    saved = load_file(best / WEIGHTS_NAME)
    assert all(torch.equal(saved[name], tensor) for name, tensor in measured[-1].items())
    assert (trained(run)["steps"], trained(run)["adapter_step"]) == (5, 2)
    output = capsys.readouterr()
    assert "has the weights of step 2, where validation loss was lowest: 1.0000" in output.err
    assert "(of step 2, where validation loss was lowest)" in output.out
    assert "at step 2, which the adapter is from" in run.report.read_text()
    run_tiny(**sections())
    assert "this run is finished" in capsys.readouterr().err and weights(run.adapter) == weights(best)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("step", [1, 3])
def test_fm17_a_run_that_goes_on_ends_with_the_same_best(step: int, run_tiny: RunTiny) -> None:
    every = sections(every_steps=1, keep_last=9)
    whole, cut = run_tiny(name="whole", **every), run_tiny(name="cut", **every)
    interrupt_after(cut, step)
    run_tiny(name="cut", **every)
    assert weights(cut.adapter) == weights(whole.adapter) == weights(cut.checkpoints / "step-000002")
    same_ending(whole, cut, "step-000005")


@pytest.mark.usefixtures("measured")
def test_fm17_training_goes_on_from_the_last_weights(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, 8, 0.5)
    longer = sections()
    longer["evaluation"]["early_stopping"] = {"patience": 9}
    whole = run_tiny(name="whole", **longer)
    cut = run_tiny(name="cut", **sections())
    assert trained(cut)["adapter_step"] == 2
    run_tiny(name="cut", **longer)
    same_ending(whole, cut, "step-000009")
    assert trained(cut)["adapter_step"] == 8
    assert weights(cut.adapter) == weights(whole.adapter) == weights(cut.checkpoints / "step-000008")


@pytest.mark.usefixtures("measured")
def test_fm19_a_damaged_best_is_named_and_the_last_taken(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_tiny(**sections())
    shutil.rmtree(run.adapter)
    flip(run.checkpoints / "step-000002" / WEIGHTS_NAME)
    run_tiny(**sections())
    said = capsys.readouterr().err
    assert "has the weights of step 5, the last: those of step 2" in said and "step-000002 is not a whole" in said
    assert weights(run.adapter) == weights(run.checkpoints / "step-000005")
    assert trained(run)["adapter_step"] == 5


@pytest.mark.usefixtures("measured")
def test_another_final_is_written_without_training(run_tiny: RunTiny) -> None:
    run = run_tiny(**sections())
    run_tiny(**sections(final="last", keep_best=1))
    assert weights(run.adapter) == weights(run.checkpoints / "step-000005")
    run_tiny(**sections(final="best"))
    assert weights(run.adapter) == weights(run.checkpoints / "step-000002")
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("measured")
def test_the_best_is_saved_where_it_is_kept_although_the_last_is_final(run_tiny: RunTiny) -> None:
    plain = sections(keep_best=1)
    plain["evaluation"] = {"every_steps": 1}
    plain["training"] = {"max_steps": 4}
    run = run_tiny(**plain)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000002", "step-000004"]
    assert weights(run.adapter) == weights(run.checkpoints / "step-000004")
    assert trained(run)["adapter_step"] == 4
