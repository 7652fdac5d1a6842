"""`finetune run` on tiny models: modes, schedules, stopping, locks, trackers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.cli import main
from finetune.commands import run as run_command
from finetune.files import sole_owner
from finetune.models.adapters import WEIGHTS_NAME
from finetune.report.run_files import open_run
from finetune.training.metrics import read_metrics
from finetune.training.module import FinetuneModule
from tests.tiny import tiny_recipe, write_jsonl, write_recipe
from tests.training.conftest import RunTiny
from tests.training.test_checkpoint import interrupt_after


def test_fm03_everything_trained_is_in_training_mode(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    step = FinetuneModule.training_step

    def spy(self: FinetuneModule, batch: Any, index: int) -> None:
        trained = [m for m in self.loss_model.modules() if any(p.requires_grad for p in m.parameters())]
        seen.append((self.step, all(module.training for module in trained)))
        step(self, batch, index)

    monkeypatch.setattr(FinetuneModule, "training_step", spy)
    sections: dict[str, Any] = {
        "data": {"validation": {"size": 4}},
        "evaluation": {"every_steps": 1, "num_samples": 1, "max_new_tokens": 4},
        "checkpoint": {"every_steps": 1, "keep_last": 9},
    }
    run = run_tiny(**sections)
    import shutil

    shutil.rmtree(run.checkpoints / "step-000004")
    run_tiny(**sections)
    assert seen == [(0, True), (1, True), (2, True), (3, True), (3, True)]


def test_fm14_a_remainder_is_normalised_by_its_own_tokens(run_tiny: RunTiny) -> None:
    """20 samples, 8 a step: 3 updates, the schedule at its end, the last loss a mean over 4 samples."""
    training = {"epochs": 1.0, "max_steps": None, "schedule": {"name": "linear", "warmup_steps": 0}}
    run = run_tiny(training=training, data={"validation": {"size": 4}})
    rows = list(read_metrics(run.metrics))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    assert all(4.0 < (row["loss"] or 0) < 8.0 for row in rows), "about ln 320, not a fraction of it"


def test_fm13_two_processes_agree(model_dir: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    hashes = []
    for name, hash_seed in (("a", "1"), ("b", "2")):
        recipe = tiny_recipe(tmp_path, model_dir("llama"), rows, name=name, adapter={"dropout": 0.1})
        path = write_recipe(tmp_path / f"{name}.yaml", recipe)
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "finetune", "run", str(path)], env=environment, check=True, timeout=200)
        run = tmp_path / "runs" / name
        hashes.append((run / "adapter" / WEIGHTS_NAME).read_bytes())
        hashes.append([row["loss"] for row in read_metrics(run / "metrics.csv")])
    assert hashes[:2] == hashes[2:]


def test_fm02_a_model_taught_four_answers_stops_by_itself(
    run_tiny: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pad is EOS in the tiny tokenizer, and no pad token is ever a label."""
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word} {word}"}]}
        for word in ("red", "green", "seven", "boats")
    ]
    path = tmp_path / "four.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_tiny(
        data={"sources": [{"path": str(path)}], "validation": {"source": {"path": str(path)}}},
        adapter={"rank": 16, "alpha": 32},
        training={"max_steps": 60, "global_batch_size": 4, "optimizer": {"lr": 2e-2}},
        evaluation={"metrics": ["exact_match"], "num_samples": 4, "max_new_tokens": 24},
    )
    after = json.loads(run.results.read_text())["after"]
    assert after["metrics"]["exact_match"] == 1.0
    assert all(sample["stopped"] for sample in after["samples"])
    assert (after["num_rows"], after["num_cut"]) == (4, 0)


def test_the_one_time_conversion_of_a_base_is_named_and_not_taken_for_a_second_load(
    run_tiny: RunTiny,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    sections: dict[str, Any] = {"model": {"quantization": "nf4"}, "training": {"max_steps": 1}}
    model = model_dir("llama")

    def said(name: str) -> list[str]:
        run_tiny(name=name, **sections)
        return [line for line in capsys.readouterr().err.splitlines() if re.match("converting|loading", line)]

    first, second = said("first"), said("second")
    (kept,) = (path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir())
    loading = f"loading {model} (nf4)"
    assert first == [f"converting {model} to nf4, once; later starts load it from {kept}", loading]
    assert second == [loading]


def test_test_rows_that_are_trained_on_are_counted(
    run_tiny: RunTiny, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_tiny(
        training={"max_steps": 1},
        data={"validation": {"size": 4}},
        evaluation={"source": {"path": str(rows)}, "metrics": ["perplexity"]},
    )
    assert "20 test rows are also in the training data" in capsys.readouterr().err
    assert json.loads(run.ledger.read_text())["test_rows_in_train"] == 20
    assert json.loads(run.results.read_text())["after"]["test_rows_in_train"] == 20
    assert "test rows that are also trained on" in run.report.read_text()


def test_a_max_seq_len_past_the_context_is_said(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    run_tiny(training={"max_steps": 1}, data={"max_seq_len": 4096})
    assert "data.max_seq_len: 4096, but the model was made for 2048" in capsys.readouterr().err


def test_validation_stops_early_and_keeps_the_best(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    sections: dict[str, Any] = {
        "training": {"max_steps": 12, "optimizer": {"lr": 1e-30}},
        "data": {"validation": {"size": 4}},
        "evaluation": {"every_steps": 1, "early_stopping": {"patience": 2}, "num_samples": 0},
        "checkpoint": {"every_steps": 1, "keep_last": 1},
    }
    run = run_tiny(**sections)
    steps = [row["step"] for row in read_metrics(run.metrics)]
    assert steps == [1, 2, 3]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000001", "step-000003"]
    assert run.adapter.is_dir()
    training = json.loads(run.results.read_text())["training"]
    assert (training["steps"], training["planned_steps"]) == (3, 12)
    # The same command again: it is finished. With more patience it goes on.
    run_tiny(**sections)
    assert "this run is finished" in capsys.readouterr().err
    sections["evaluation"]["early_stopping"] = {"patience": 4}
    run_tiny(**sections)
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4, 5]


def test_a_validated_step_is_a_logged_one(run_tiny: RunTiny) -> None:
    run = run_tiny(
        data={"validation": {"size": 4}}, evaluation={"every_steps": 2}, logging={"every_steps": 3}, name="cadence"
    )
    rows = {row["step"]: row["validation_loss"] for row in read_metrics(run.metrics)}
    assert list(rows) == [2, 3, 4]
    assert rows[3] is None and 4.0 < (rows[2] or 0) < 8.0 and 4.0 < (rows[4] or 0) < 8.0


def test_samples_of_a_continued_run_stand_once(run_tiny: RunTiny) -> None:
    sections: dict[str, Any] = {
        "data": {"validation": {"size": 4}},
        "evaluation": {"every_steps": 1, "num_samples": 2, "max_new_tokens": 4},
        "checkpoint": {"every_steps": 1, "keep_last": 9},
    }
    run = run_tiny(**sections)
    whole = run.samples.read_text()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [1, 1, 2, 2, 3, 3, 4, 4]
    interrupt_after(run, 2)
    with run.samples.open("a") as file:
        file.write('{"step": 4, "prom')  # a line that a kill cut short
    run_tiny(**sections)
    assert run.samples.read_text() == whole


def test_a_run_that_measures_says_so(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []
    measure = run_command._Measure._measure

    def look(self: Any, module: FinetuneModule, when: str) -> None:
        states.append(open_run(self._run_dir.root).state)
        measure(self, module, when)

    monkeypatch.setattr(run_command._Measure, "_measure", look)
    run = run_tiny(evaluation={"before": True, "metrics": ["perplexity"]}, data={"validation": {"size": 4}})
    # The same run for longer: what the shorter one measured no longer stands.
    run_tiny(
        evaluation={"metrics": ["perplexity"]},
        data={"validation": {"size": 4}},
        training={"max_steps": 6},
        arguments=("--accept-changes",),
    )
    assert states == ["running", "measuring", "measuring"]
    assert open_run(run.root).state == "finished"
    assert json.loads(run.results.read_text())["training"]["steps"] == 6


def test_a_second_run_in_the_same_place_is_refused(
    run_tiny: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sole_owner(tmp_path / "runs" / "tiny" / ".lock"):
        run_tiny(expect=2)
    assert f"in use by process {os.getpid()} on " in capsys.readouterr().err


def test_a_refused_run_leaves_no_directory(run_tiny: RunTiny, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "unanswered.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    run = run_tiny(expect=2, data={"sources": [{"path": str(rows)}]})
    assert not run.root.parent.exists()
    run.root.mkdir(parents=True)
    run_tiny(expect=2, data={"sources": [{"path": str(rows)}]})
    assert list(run.root.iterdir()) == []


def test_printed_commands_can_be_pasted(run_tiny: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_tiny(output_dir=str(tmp_path / "my runs"), training={"max_steps": 1})
    root = tmp_path / "my runs" / "tiny"
    assert f"finetune generate '{root}' --prompt 'your text'\n" in capsys.readouterr().out
    assert main(["merge", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"finetune evaluate '{root}' --merged '{root}/merged'\n" in out
    assert f"finetune push '{root}/merged' ORG/NAME\n" in out


def test_fresh_puts_earlier_work_aside(run_tiny: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_tiny()
    before = (run.adapter / WEIGHTS_NAME).read_bytes()
    own = str(run.checkpoints / "step-000004")
    run_tiny(arguments=("--fresh", "--resume", own), expect=2)
    assert "--fresh puts it aside with the rest" in " ".join(capsys.readouterr().err.split())
    run_tiny(arguments=("--fresh",), training={"max_steps": 2})
    aside = [path for path in (tmp_path / "runs").iterdir() if path.name.startswith("tiny.")]
    assert len(aside) == 1 and (aside[0] / "adapter" / WEIGHTS_NAME).read_bytes() == before
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]


def test_a_finished_run_is_left_alone(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_tiny()
    before = (run.adapter / WEIGHTS_NAME).stat().st_mtime_ns
    run_tiny()
    assert "this run is finished" in capsys.readouterr().err
    assert (run.adapter / WEIGHTS_NAME).stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]"])
def test_a_damaged_record_is_named_and_left_as_it_is(
    content: bytes, run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_tiny()
    run.results.write_bytes(content)
    run_tiny(expect=2)
    assert "results.json: is damaged; put it aside" in capsys.readouterr().err
    assert run.results.read_bytes() == content


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
def test_every_precision_and_quantization_trains(
    precision: str, quantization: str, run_tiny: RunTiny, model_dir: Callable[[str], Path]
) -> None:
    model = {"name": str(model_dir("llama")), "quantization": quantization}
    run = run_tiny(model=model, training={"max_steps": 8, "precision": precision})
    losses = [row["loss"] or 0.0 for row in read_metrics(run.metrics)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init": "gaussian"},
        {"init": "orthogonal"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_tokens": ["<new>", 5]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"exclude_modules": ["down_proj"]},
    ],
    ids=str,
)
def test_every_adapter_setting_trains_and_resumes(adapter: dict[str, Any], run_tiny: RunTiny) -> None:
    import shutil

    sections = {"adapter": adapter, "training": {"max_steps": 4}, "checkpoint": {"every_steps": 1, "keep_last": 9}}
    run = run_tiny(**sections)
    want = load_file(run.adapter / WEIGHTS_NAME)
    losses = [row["loss"] or 0.0 for row in read_metrics(run.metrics)]
    assert losses[-1] < losses[0]
    for step in (3, 4):
        shutil.rmtree(run.checkpoints / f"step-00000{step}")
    shutil.rmtree(run.adapter)
    run_tiny(**sections)
    got = load_file(run.adapter / WEIGHTS_NAME)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("architecture", "name"), [("gpt_neox", "embed_in"), ("falcon", "word_embeddings")])
def test_an_embedding_trained_whole_trains_under_autocast_with_layer_norms(
    architecture: str, name: str, run_tiny: RunTiny
) -> None:
    """A CPU's layer norm takes no fp32 values, as an embedding in fp32 gives them, beside its weights in bf16."""
    run = run_tiny(architecture, adapter={"modules_to_save": [name]}, training={"precision": "bf16-mixed"})
    losses = [row["loss"] or 0.0 for row in read_metrics(run.metrics)]
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("same_dtypes")
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"], ["input_layernorm"], ["mlp"]], ids=str)
def test_modules_trained_whole_train_on_a_bf16_base(
    names: list[str], run_tiny: RunTiny, model_dir: Callable[[str], Path]
) -> None:
    """They are fp32, and bf16-true has no autocast that would cast between them and the base."""
    precision = {"precision": "bf16-true", "max_steps": 8, "optimizer": {"lr": 1e-2}}
    run = run_tiny(adapter={"modules_to_save": names}, training=precision)
    losses = [row["loss"] or 0.0 for row in read_metrics(run.metrics)]
    assert losses[-1] < losses[0]
    saved = load_file(run.adapter / WEIGHTS_NAME)
    whole = [tensor for name, tensor in saved.items() if "lora_" not in name]
    assert whole and all(tensor.dtype == torch.float32 for tensor in whole)
