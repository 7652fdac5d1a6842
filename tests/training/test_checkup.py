"""What `finetune check` says of the devices, for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.findings import Finding, run_checks
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.training.checkup import CHECKS, Checkup
from tests.tiny import tiny_recipe, write_recipe

ModelDir = Callable[[str], Path]


def recipe(model: Path, rows: Path, folder: Path, **training: Any) -> Recipe:
    return load_recipe(write_recipe(folder / "tiny.yaml", tiny_recipe(folder, model, rows, training=training)))


def devices(checkup: Checkup) -> list[Finding]:
    return list(run_checks({"devices": CHECKS["devices"]}, checkup))


def test_halving_is_refused_where_auto_becomes_fsdp(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    made = recipe(model_dir("llama"), rows, tmp_path, on_out_of_memory="halve")
    (found,) = devices(Checkup(made, gpu_bytes=1_000_000, devices=2))
    assert found.level == "error" and "halve does not go with fsdp" in found.text
    assert not devices(Checkup(made, gpu_bytes=10**12, devices=2))


def test_a_gpu_without_units_for_bf16_is_named(
    model_dir: ModelDir, rows: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    made = recipe(model_dir("llama"), rows, tmp_path)
    monkeypatch.setattr("finetune.training.checkup.why_bf16_is_slow", lambda recipe, placement: "slow")
    (found,) = devices(Checkup(made))
    assert (found.level, found.text) == ("warning", "slow")
    assert not devices(Checkup(made, gpu_bytes=10**12))


def test_a_warm_up_that_outlasts_the_steps_is_an_error(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    made = recipe(model_dir("llama"), rows, tmp_path, max_steps=None, epochs=1, schedule={"warmup_steps": 3})
    (found,) = run_checks({"steps": CHECKS["steps"]}, Checkup(made))
    assert found.level == "error"
    assert found.text.startswith("training.schedule.warmup_steps: 3 steps of warm-up do not end before the run does")


def test_habits_and_steps_tell_the_same_forward_passes(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    checkup = Checkup(recipe(model_dir("llama"), rows, tmp_path))
    steps = [finding.text for finding in CHECKS["steps"](checkup)]
    habits = [finding.text for finding in CHECKS["habits"](checkup)]
    # Padded, 8 samples by 2 would be 4.
    assert any("2.0 forward passes a step over all processes" in text for text in steps)
    assert any("gradient accumulation: yes; about 2.0 forward passes a step" in text for text in habits)
    assert not any("is eager" in text for text in habits)


def test_habits_know_what_auto_attention_is(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    checkup = Checkup(recipe(model_dir("gemma2"), rows, tmp_path))
    found = {finding.values["name"]: finding.text for finding in CHECKS["habits"](checkup)}
    assert "auto is eager here" in found["fused attention"]
