"""What a GPU has no units for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.training.habits import why_bf16_is_slow
from finetune.training.strategy import Placement
from tests.models.test_memory import recipe
from tests.training.conftest import RunTiny

NF4 = {"quantization": "nf4"}
BF16 = {"quantization": "nf4", "compute_dtype": "bf16"}
FP16 = {"quantization": "nf4", "compute_dtype": "fp16"}
CASES = [
    ("cuda", (7, 5), {}, "bf16-mixed", "training.precision: bf16-mixed"),
    ("cuda", (7, 5), FP16, "bf16-true", "training.precision: bf16-true"),
    ("cuda", (7, 0), BF16, "16-mixed", "model.compute_dtype: bf16"),
    ("cuda", (7, 0), NF4, "16-mixed", None),
    ("cuda", (7, 0), NF4, "32-true", "model.compute_dtype: auto"),
    ("cuda", (7, 5), FP16, "16-mixed", None),
    ("cuda", (8, 0), NF4, "bf16-mixed", None),
    ("cpu", (7, 5), NF4, "bf16-mixed", None),
]


@pytest.mark.parametrize(("accelerator", "capability", "model", "precision", "asked"), CASES)
def test_bf16_on_an_old_gpu(
    accelerator: str,
    capability: tuple[int, int],
    model: dict[str, Any],
    precision: str,
    asked: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), capability][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["new", "old"][index])
    made = recipe(model=model, training={"precision": precision})
    why = why_bf16_is_slow(made, Placement(accelerator, 2, 1, "ddp"))
    if asked is None:
        assert why is None
    else:
        assert why is not None and why.startswith("old") and f"({asked})" in why
        assert f"capability {capability[0]}.{capability[1]}" in why and "16-mixed" in why


def test_a_run_says_so(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("finetune.training.habits.why_bf16_is_slow", lambda recipe, placement: "bf16 is slow here")
    run_tiny(training={"max_steps": 1})
    assert "warning: bf16 is slow here" in capsys.readouterr().err
