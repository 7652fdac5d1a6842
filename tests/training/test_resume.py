"""A run goes on only with what it began with, unless the user says so."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.data import template
from finetune.inference.load import load_run
from finetune.models.adapters import WEIGHTS_NAME
from finetune.recipe.load import load_recipe
from finetune.training import train
from finetune.training.checkpoint import STATE
from finetune.training.metrics import read_metrics
from finetune.training.resume import changed_keys
from tests.tiny import CHATML, alpaca_rows, write_jsonl, write_model
from tests.training.conftest import RunTiny
from tests.training.test_checkpoint import EVERY_STEP, interrupt_after

SERIOUS: dict[str, dict[str, Any]] = {
    "training.seed: 0 -> 1": {"training": {"seed": 1}},
    "training.optimizer.lr: 0.01 -> 0.02": {"training": {"optimizer": {"lr": 0.02}}},
    "training.global_batch_size: 8 -> 4": {"training": {"global_batch_size": 4}},
    "adapter.rank: 4 -> 2": {"adapter": {"rank": 2}},
    "adapter.alpha_pattern.q_proj: added": {"adapter": {"alpha_pattern": {"q_proj": 800}}},
    "data.train_on: all_assistant -> everything": {"data": {"train_on": "everything"}},
}
HARMLESS: dict[str, dict[str, Any]] = {
    "logging": {"logging": {"every_steps": 2}},
    "cadence": {"checkpoint": {"every_steps": 2, "keep_last": 9}},
    "micro-batch": {"training": {"micro_batch_size": 4}},
    "packing": {"data": {"packing": "none"}},
}


@pytest.mark.parametrize("change", SERIOUS)
def test_a_change_that_matters_is_refused(change: str, run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    interrupt_after(run, 2)
    capsys.readouterr()
    run_tiny(expect=2, checkpoint=EVERY_STEP, **SERIOUS[change])
    message = capsys.readouterr().err
    assert change in message and "--accept-changes" in message and "--fresh" in message
    assert not run.adapter.exists()


@pytest.mark.parametrize(("final", "code"), [("last", 0), ("best", 2)])
def test_other_validation_data_are_said_and_refused_where_they_choose(
    final: str, code: int, run_tiny: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", alpaca_rows(4, seed=7))
    sections = {
        "data": {"validation": {"source": {"path": str(held_out)}}},
        "evaluation": {"every_steps": 1},
        "checkpoint": {**EVERY_STEP, "final": final},
    }
    run = run_tiny(**sections)
    interrupt_after(run, 2)
    write_jsonl(held_out, alpaca_rows(4, seed=8))
    capsys.readouterr()
    run_tiny(expect=code, **sections)
    assert "the validation data: its samples are others than at the checkpoint" in capsys.readouterr().err


def test_an_accepted_change_goes_on(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    interrupt_after(run, 2)
    run_tiny(arguments=("--accept-changes",), checkpoint=EVERY_STEP, training={"optimizer": {"lr": 0.02}})
    assert "changed since step 2: training.optimizer.lr: 0.01 -> 0.02" in capsys.readouterr().err
    assert run.adapter.is_dir()


@pytest.mark.parametrize("name", ["adamw", "paged_lion_8bit"])
def test_accepted_settings_of_the_optimizer_are_used(name: str, run_tiny: RunTiny) -> None:
    def sections(**values: Any) -> dict[str, Any]:
        return {"checkpoint": EVERY_STEP, "training": {"optimizer": {"name": name, "lr": 1e-3, **values}}}

    run = run_tiny(**sections())
    interrupt_after(run, 2)
    run_tiny(arguments=("--accept-changes",), **sections(weight_decay=0.5, betas=[0.8, 0.9]))
    state = torch.load(run.checkpoints / "step-000004" / STATE, weights_only=True)["optimizer"]
    assert [(group["weight_decay"], tuple(group["betas"])) for group in state["param_groups"]] == [(0.5, (0.8, 0.9))]
    assert {int(entry["step"]) for entry in state["state"].values()} == {4}  # the moments are those of before


def test_another_optimizer_starts_with_moments_of_its_own(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    interrupt_after(run, 2)
    training = {"optimizer": {"name": "lion", "lr": 1e-3}}
    run_tiny(arguments=("--accept-changes",), checkpoint=EVERY_STEP, training=training)
    assert "lion was adamw at step 2, so its moments start anew" in capsys.readouterr().err
    state = torch.load(run.checkpoints / "step-000004" / STATE, weights_only=True)["optimizer"]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {2}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_change_goes_on(name: str, run_tiny: RunTiny) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    interrupt_after(run, 2)
    run_tiny(**{"checkpoint": EVERY_STEP, **HARMLESS[name]})
    assert run.adapter.is_dir()


def test_changed_data_is_refused(run_tiny: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", alpaca_rows(24))
    data = {"sources": [{"path": str(path)}]}
    run = run_tiny(checkpoint=EVERY_STEP, data=data)
    interrupt_after(run, 2)
    write_jsonl(path, alpaca_rows(24, seed=9))
    run_tiny(expect=2, checkpoint=EVERY_STEP, data=data)
    assert "the training data: its samples are others" in capsys.readouterr().err


def test_a_base_that_changed_under_its_name_is_refused(
    run_tiny: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"name": str(write_model(tmp_path / "own", "llama"))}
    run = run_tiny(checkpoint=EVERY_STEP, model=model)
    interrupt_after(run, 2)
    write_model(tmp_path / "own", "llama", seed=1)
    run_tiny(expect=2, checkpoint=EVERY_STEP, model=model)
    assert "the base model" in capsys.readouterr().err


def test_resume_takes_the_chosen_checkpoint_and_keeps_the_later_ones(run_tiny: RunTiny) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    whole = [row["loss"] for row in read_metrics(run.metrics)]
    chosen = run.checkpoints / "step-000002"
    run_tiny(arguments=("--resume", str(chosen)), checkpoint=EVERY_STEP)
    assert [row["loss"] for row in read_metrics(run.metrics)] == whole
    aside = run.root / "checkpoints-aside"
    assert sorted(path.name for path in aside.iterdir()) == ["step-000003", "step-000004"]


def test_a_run_killed_before_its_adapter_was_written_is_finished(run_tiny: RunTiny) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    want = (run.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.adapter)
    run_tiny(checkpoint=EVERY_STEP)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == want


def test_a_run_without_its_last_measurements_is_not_finished(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while the trained adapter was measured: it is measured by the same command, and trained no further."""
    sections = {"evaluation": {"metrics": ["perplexity"], "before": False}, "data": {"validation": {"size": 4}}}
    run = run_tiny(**sections)
    want = json.loads(run.results.read_text())["after"]
    for missing in (["training"], ["training", "after"]):
        results = json.loads(run.results.read_text())
        run.results.write_text(json.dumps({key: results[key] for key in results if key not in missing}))
        capsys.readouterr()
        run_tiny(**sections)
        assert "this run is finished" not in capsys.readouterr().err
        results = json.loads(run.results.read_text())
        assert results["after"] == want and results["training"]["steps"] == 4
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4]


def test_a_run_that_has_stopped_early_is_finished(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    def sections(patience: int) -> dict[str, Any]:
        # No validation is ever that much better than the first.
        stopping = {"patience": patience, "min_delta": 100.0}
        return {
            "training": {"max_steps": 6},
            "data": {"validation": {"size": 4}},
            "evaluation": {"every_steps": 1, "early_stopping": stopping},
        }

    run = run_tiny(**sections(2))
    steps = [row["step"] for row in read_metrics(run.metrics)]
    assert steps == [1, 2, 3]
    adapter = (run.adapter / WEIGHTS_NAME).read_bytes()
    run_tiny(**sections(2))
    assert "this run is finished" in capsys.readouterr().err
    # Killed before its adapter was written: it is written, and nothing trained.
    shutil.rmtree(run.adapter)
    run_tiny(**sections(2))
    assert (run.adapter / WEIGHTS_NAME).read_bytes() == adapter
    assert [row["step"] for row in read_metrics(run.metrics)] == steps
    run_tiny(**sections(9))
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4, 5, 6]


def test_keys_of_another_version_are_no_change() -> None:
    make: Callable[[str], str] = "a:\n  b: 1\n{}".format
    assert changed_keys(make(""), make("c: 5\n")) == []
    assert changed_keys("a: [1, 2]\n", "a: [1]\n") == ["a.1: removed"]


def test_a_run_keeps_the_date_that_its_template_prints(
    run_tiny: RunTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Day(datetime.date):
        day_of_month = 1

        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return datetime.date(2026, 1, cls.day_of_month)

    for module in (template, train):
        monkeypatch.setattr(module, "datetime", SimpleNamespace(**{**vars(datetime), "date": Day}))
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    sections = {
        "checkpoint": EVERY_STEP,
        "model": {"name": str(write_model(tmp_path / "own", "llama", template=dated))},
    }
    run = run_tiny(**sections)
    want = (run.adapter / WEIGHTS_NAME).read_bytes()
    interrupt_after(run, 2)
    Day.day_of_month = 2
    run_tiny(**sections)
    assert (run.adapter / WEIGHTS_NAME).read_bytes() == want
    assert load_recipe(run.recipe).data.date == datetime.date(2026, 1, 1)
    assert '"2026-01-01"' in load_run(run.root).template.source
    capsys.readouterr()
    run_tiny(expect=2, data={"date": "2026-01-03"}, **sections)
    assert "data.date: 2026-01-01 -> 2026-01-03" in capsys.readouterr().err
    run_tiny(arguments=("--fresh",), **sections)
    assert load_recipe(run.recipe).data.date == datetime.date(2026, 1, 2)
    assert load_recipe(run_tiny(name="undated").recipe).data.date is None
    capsys.readouterr()
    run_tiny(name="unprinted", data={"date": "2026-01-03"})
    assert "data.date: 2026-01-03 has no effect" in " ".join(capsys.readouterr().err.split())
