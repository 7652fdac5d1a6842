"""16-mixed: an overflow of the scaled gradients is the loss scaler's business. On a CPU, whose scaler is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from finetune.models.adapters import WEIGHTS_NAME
from finetune.recipe import checks
from finetune.training import strategy
from finetune.training.metrics import read_metrics
from finetune.training.module import LossModel
from tests.training.conftest import RunTiny
from tests.training.test_checkpoint import EVERY_STEP, interrupt_after

FP16 = {"precision": "16-mixed", "max_steps": 12}
Scale = Callable[[float], None]


@pytest.fixture
def start_at(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """Allow 16-mixed on a CPU, and set the scale that it starts with."""
    rows = tuple(check for check in checks.CHECKS if check.key != "training.precision")
    monkeypatch.setattr(checks, "CHECKS", rows)

    def start(scale: float) -> None:
        def make(precision: str, accelerator: str) -> MixedPrecision:
            scaler = torch.amp.GradScaler(accelerator, init_scale=scale) if precision == "16-mixed" else None
            return MixedPrecision(precision, accelerator, scaler)  # type: ignore[arg-type]

        monkeypatch.setattr(strategy, "_precision_plugin", make)

    return start


@pytest.mark.parametrize("on_non_finite", ["stop", "skip"])
def test_fm25_an_overflow_is_left_out_counted_and_trained_past(
    on_non_finite: str, run_tiny: RunTiny, start_at: Scale, capsys: pytest.CaptureFixture[str]
) -> None:
    start_at(2.0**22)
    sections = {"training": {**FP16, "on_non_finite": on_non_finite}, "checkpoint": EVERY_STEP}
    run = run_tiny(name="whole", **sections)
    output = capsys.readouterr()
    said = " ".join(output.err.split())
    assert said.count("its gradients overflowed fp16; the loss scale is 2.09715e+06 now") == 1
    rows = list(read_metrics(run.metrics))
    skipped = [int(row["skipped_steps"] or 0) for row in rows]
    assert skipped[0] == 1 and skipped[-1] < 6
    assert f"12 steps ({skipped[-1]} of them left out: not finite)" in output.out
    assert (rows[-1]["loss"] or 9.0) < (rows[0]["loss"] or 0.0)
    cut = run_tiny(name="cut", **sections)
    interrupt_after(cut, 2)
    run_tiny(name="cut", **sections)
    again = list(read_metrics(cut.metrics))
    assert [(row["loss"], row["skipped_steps"]) for row in again] == [
        (row["loss"], row["skipped_steps"]) for row in rows
    ]
    assert (cut.adapter / WEIGHTS_NAME).read_bytes() == (run.adapter / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("on_non_finite", ["stop", "skip"])
def test_fm25_gradients_that_fit_at_no_scale_stop_the_run(
    on_non_finite: str,
    run_tiny: RunTiny,
    start_at: Scale,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = LossModel.forward

    def finite_loss_infinite_gradient(self: LossModel, micro: object) -> torch.Tensor:
        loss = forward(self, micro)  # type: ignore[arg-type]
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(LossModel, "forward", finite_loss_infinite_gradient)
    start_at(16.0)
    run_tiny(expect=1, training={**FP16, "on_non_finite": on_non_finite})
    message = capsys.readouterr().err
    assert "step 5: the gradients do not fit fp16 at any scale" in message and "bf16-mixed" in message


def test_fm25_a_loss_that_is_nan_still_stops_the_run(
    run_tiny: RunTiny, start_at: Scale, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = LossModel.forward
    monkeypatch.setattr(LossModel, "forward", lambda self, micro: forward(self, micro) * float("nan"))
    start_at(1.0)
    run_tiny(expect=1, training=FP16)
    assert "step 1: the loss is nan" in capsys.readouterr().err


@pytest.mark.parametrize("precisions", [("bf16-mixed", "16-mixed"), ("16-mixed", "bf16-mixed")])
def test_an_accepted_change_of_precision_goes_on(
    precisions: tuple[str, str], run_tiny: RunTiny, start_at: Scale
) -> None:
    start_at(1024.0)
    run = run_tiny(checkpoint=EVERY_STEP, training={"precision": precisions[0]})
    interrupt_after(run, 2)
    run_tiny(arguments=("--accept-changes",), checkpoint=EVERY_STEP, training={"precision": precisions[1]})
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4]
