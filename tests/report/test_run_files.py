"""Reading a run's directory: whole, unfinished, damaged, and while another process holds it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finetune.errors import BadInputError
from finetune.files import sole_owner
from finetune.recipe.schema import TrainingSection
from finetune.report.overview import missing_of
from finetune.report.run_files import is_run, open_run, planned_steps
from finetune.training import checkpoint as training_checkpoint
from finetune.training import metrics as training_metrics
from finetune.training.steps import build_plan
from finetune.training.validation import keep_samples, read_samples
from tests.report.example_runs import write_checkpoint, write_run


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path).root)
    assert (run.name, run.state, run.step, run.num_steps) == ("tickets", "finished", 100, 100)
    assert run.key("training.optimizer.lr") == 2e-3 and run.key("no.such.key") is None
    assert len(run.column("loss")) == 100 and [step for step, _ in run.column("validation_loss")] == [
        20,
        40,
        60,
        80,
        100,
    ]
    assert run.best_validation is not None and run.best_validation[0] == 100
    assert run.metric_values("after") == {"exact_match": 0.91, "perplexity": 1.27}
    assert [(each.step, each.damage) for each in run.checkpoints] == [(50, None), (80, None), (100, None)]
    assert [each.validation_loss for each in run.checkpoints] == [None, 0.41, None]
    assert not run.problems


@pytest.mark.parametrize(
    "training", [{"epochs": 2.0}, {"max_steps": 7}, {"epochs": 0.5, "max_steps": 900}, {"epochs": 0.001}]
)
@pytest.mark.parametrize("num_samples", [1, 16, 803])
def test_planned_steps_are_those_of_the_plan(training: dict[str, float], num_samples: int) -> None:
    section = TrainingSection.model_validate({"global_batch_size": 16, **training})
    assert planned_steps(section.model_dump(), num_samples) == build_plan(num_samples, section).num_steps


def test_metrics_and_damage_are_what_training_says_they_are(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    with run_dir.metrics.open("a") as file:
        file.write("101,2.02,0.3")  # a line that a kill cut short
    weights = run_dir.checkpoints / "step-000080" / "adapter_model.safetensors"
    weights.write_bytes(b"WEIGHTS" + weights.read_bytes()[7:])
    (run_dir.checkpoints / "step-000100" / "trainer_state.pt").write_bytes(b"")
    (run_dir.checkpoints / "step-000050" / "manifest.json").unlink()
    write_checkpoint(run_dir.checkpoints, 90, None)
    (run_dir.checkpoints / "step-000090" / "manifest.json").write_text('{"files"')
    run = open_run(run_dir.root)
    assert run.metrics == list(training_metrics.read_metrics(run_dir.metrics))
    reasons = {each.path.name: each.damage for each in run.checkpoints}
    assert all(reasons.values()) and len(reasons) == 4
    paths = training_checkpoint.list_checkpoints(run_dir.checkpoints)
    # Thousands are separated here.
    assert {path.name: (training_checkpoint.damage(path) or "").replace(",", "") for path in paths} == {
        name: (reason or "").replace(",", "") for name, reason in reasons.items()
    }


def test_an_unfinished_run_says_where_it_stands(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, until=57)
    run = open_run(run_dir.root)
    assert (run.state, run.step, run.num_steps) == ("stopped", 57, 100)
    with sole_owner(run_dir.lock):
        assert open_run(run_dir.root).state == "running"
    assert open_run(run_dir.root).state == "stopped"


def test_looking_at_a_run_does_not_take_its_lock(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, until=57)
    open_run(run_dir.root)
    with sole_owner(run_dir.lock):
        open_run(run_dir.root)
        assert run_dir.lock.read_text().startswith("process ")


def test_a_run_whose_adapter_is_newer_than_its_metrics_is_measuring(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    results = json.loads(run_dir.results.read_text())
    run_dir.results.write_text(json.dumps({"before": results["before"]}))
    with sole_owner(run_dir.lock):
        os.utime(run_dir.metrics, (1_700_000_000, 1_700_000_000))
        run = open_run(run_dir.root)
        assert run.state == "measuring"
        assert "measuring" in " ".join(missing_of(run))
        os.utime(run_dir.adapter, (1_600_000_000, 1_600_000_000))
        assert open_run(run_dir.root).state == "running"


def test_early_stopping_finishes_a_run(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, until=57, evaluation={"early_stopping": {"patience": 2}})
    assert open_run(run_dir.root).state == "stopped"
    results = json.loads(run_dir.results.read_text())
    run_dir.results.write_text(json.dumps({**results, "training": {"steps": 57}}))
    run_dir.adapter.mkdir()
    assert open_run(run_dir.root).state == "finished"


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    row = {"step": 20, "completion": "a\u2028b\x85c", "prompt": "d", "expected": "e"}
    run_dir.samples.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert open_run(run_dir.root).samples == [row] == read_samples(run_dir.samples, 20)
    keep_samples(run_dir.samples, 20)
    assert read_samples(run_dir.samples, 20) == [row]
    keep_samples(run_dir.samples, 19)
    assert run_dir.samples.read_text() == ""


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    run_dir.ledger.write_text('{"sources": [')
    run_dir.results.write_text("[]")
    run_dir.recipe.write_bytes(b"name: \xff")
    run_dir.samples.write_text('{"step": 1}\n{"step": ')
    run = open_run(run_dir.root)
    assert len(run.problems) == 3 and all(
        any(name in problem for problem in run.problems) for name in ("ledger.json", "results.json", "recipe.yaml")
    )
    assert run.name == "tickets" and run.num_steps is None and len(run.samples) == 1 and len(run.metrics) == 100
    run_dir.metrics.write_text("step,loss\nno,numbers\n")
    assert "metrics.csv is damaged: no line of it can be read" in open_run(run_dir.root).problems


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such directory"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="is not a run"):
        open_run(tmp_path)
    run_dir = write_run(tmp_path)
    assert is_run(run_dir.root) and not is_run(run_dir.adapter) and not is_run(run_dir.checkpoints / "step-000050")
