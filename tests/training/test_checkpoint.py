"""What a checkpoint holds, and that only whole ones count."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from finetune.files import recover_directory
from finetune.models.adapters import WEIGHTS_NAME
from finetune.run_dir import RunDir
from finetune.training.checkpoint import (
    MANIFEST,
    STATE,
    damage,
    newest_checkpoint,
    prune,
    update_progress,
    write_checkpoint,
)
from finetune.training.metrics import read_metrics
from finetune.training.module import FinetuneModule
from finetune.training.snapshot import Snapshot
from finetune.training.steps import StepBatch
from tests.tiny import CONFIGS, SIZES, _config
from tests.training.conftest import RunTiny

EVERY_STEP = {"every_steps": 1, "keep_last": 99}
FILES = {WEIGHTS_NAME, "adapter_config.json", STATE, "recipe.yaml", "fingerprints.json", MANIFEST}
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}


def same_ending(left: RunDir, right: RunDir, step: str = "step-000006") -> None:
    """Bit-identical adapter, moments and learning rate; the same losses."""
    for run in (left, right):
        assert damage(run.checkpoints / step) is None
    tensors = [load_file(run.checkpoints / step / WEIGHTS_NAME) for run in (left, right)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])
    states = [torch.load(run.checkpoints / step / STATE, weights_only=True) for run in (left, right)]
    groups = [state["optimizer"]["param_groups"] for state in states]
    assert groups[0] == groups[1]
    for index, entry in states[0]["optimizer"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, states[1]["optimizer"]["state"][index][name]), name
    kept = ("step", "epoch", "loss", "grad_norm", "lr", "supervised_tokens", "tokens", "validation_loss")
    metrics = [[{key: row[key] for key in kept} for row in read_metrics(run.metrics)] for run in (left, right)]
    assert metrics[0] == metrics[1]


def interrupt_after(run: RunDir, step: int) -> None:
    """Leave the run as a kill right after the checkpoint of `step` leaves it."""
    for path in run.checkpoints.iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(run.adapter)


def spy_on_samples(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Filled by every training step: its number (0-based) and the samples that it trains on, sorted."""
    seen: list[tuple[int, list[int]]] = []
    training_step = FinetuneModule.training_step

    def spy(self: FinetuneModule, batch: StepBatch, index: int) -> None:
        seen.append((self.step, sorted(sample for micro in batch.micro_batches for sample in micro.samples)))
        training_step(self, batch, index)

    monkeypatch.setattr(FinetuneModule, "training_step", spy)
    return seen


# 20 rows train, 8 a step: one epoch ends within step 3, the next with step 5.
@pytest.mark.parametrize(("step", "workers"), [(1, 0), (3, 0), (5, 0), (3, 2), (5, 2)])
def test_fm17_fm18_a_resumed_run_ends_in_the_same_bytes(
    step: int, workers: int, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        "training": {"max_steps": 6, "num_workers": workers},
        "adapter": {"dropout": 0.1},
        "checkpoint": EVERY_STEP,
        "data": {"validation": {"size": 4}, "packing": "isolated"},
        "evaluation": {"every_steps": 2},
    }
    seen = spy_on_samples(monkeypatch)
    whole = run_tiny(name="whole", **sections)
    samples = seen.copy()
    assert [(done, len(ids)) for done, ids in samples] == [(done, 8) for done in range(6)]
    cut = run_tiny(name="cut", **sections)
    interrupt_after(cut, step)
    seen.clear()
    run_tiny(name="cut", **sections)
    assert seen == samples[step:]
    same_ending(whole, cut)


# With the dropout of the library's defaults.
DROPPING = {
    "gpt2": lambda: _config("GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "opt": lambda: _config("OPTConfig", **SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=256),
}


@pytest.mark.parametrize("architecture", DROPPING)
def test_fm17_a_base_with_dropout_of_its_own_resumes_in_the_same_bytes(
    architecture: str, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, architecture, DROPPING[architecture])
    sections = {"training": {"max_steps": 2}, "checkpoint": EVERY_STEP, "data": {"packing": "isolated"}}
    whole = run_tiny(architecture, "whole", **sections)
    cut = run_tiny(architecture, "cut", **sections)
    interrupt_after(cut, 1)
    run_tiny(architecture, "cut", **sections)
    same_ending(whole, cut, "step-000002")


def test_fm21_a_checkpoint_holds_the_adapter_and_no_base(run_tiny: RunTiny) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    folder = run.checkpoints / "step-000004"
    assert {path.name for path in folder.iterdir()} == FILES
    adapter = load_file(folder / WEIGHTS_NAME)
    assert all("lora_" in name for name in adapter)
    trained = sum(tensor.numel() * 4 for tensor in adapter.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * trained + 100_000


def test_fm07_a_renamed_tensor_is_refused(run_tiny: RunTiny, model_dir: Callable[[str], Path]) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from finetune.errors import ModelError
    from finetune.models.adapters import adapter_state, attach_adapter, load_adapter
    from finetune.recipe.schema import LoraSection

    run = run_tiny()
    base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    model = attach_adapter(base, LoraSection(rank=4, alpha=8), None, seed=1)
    load_adapter(model, run.adapter)
    saved = load_file(run.adapter / WEIGHTS_NAME)
    assert adapter_state(model).keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter_state(model).items())
    name = next(iter(saved))
    saved[name.replace("lora_A", "lora_X")] = saved.pop(name)
    save_file(saved, run.adapter / WEIGHTS_NAME)
    with pytest.raises(ModelError, match=r"1 tensors missing .* 1 unknown"):
        load_adapter(model, run.adapter)


DAMAGES = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "torn manifest": lambda folder: (folder / MANIFEST).write_text("{"),
    "short file": lambda folder: (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-9]),
    "flipped bit": lambda folder: flip(folder / WEIGHTS_NAME),
    "lost file": lambda folder: (folder / "adapter_config.json").unlink(),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGES)
def test_fm19_a_damaged_checkpoint_is_named_and_passed_over(
    name: str, run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    DAMAGES[name](run.checkpoints / "step-000004")
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None and newest.step == 3
    assert "step-000004 is not a whole checkpoint" in capsys.readouterr().err
    run_tiny(checkpoint=EVERY_STEP)
    assert damage(run.checkpoints / "step-000004") is None


def test_fm19_damaged_checkpoints_take_no_whole_ones_place(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_tiny(checkpoint=EVERY_STEP)
    shutil.rmtree(run.adapter)
    for step in (3, 4):
        flip(run.checkpoints / f"step-{step:06d}" / WEIGHTS_NAME)
    # Otherwise the two would be the newest, and what is written at step 3 would be deleted at once.
    run_tiny(checkpoint={"every_steps": 1, "keep_last": 1, "keep_best": 0})
    aside = run.root / "checkpoints-aside"
    assert sorted(path.name for path in aside.iterdir()) == ["step-000003", "step-000004"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000004"]
    assert damage(run.checkpoints / "step-000004") is None

    shutil.rmtree(run.adapter)
    flip(run.checkpoints / "step-000004" / WEIGHTS_NAME)
    capsys.readouterr()
    run_tiny(checkpoint={"every_steps": 1, "keep_last": 1})
    assert "holds no whole checkpoint, so training starts anew" in capsys.readouterr().err
    assert damage(run.checkpoints / "step-000004") is None and (aside / "step-000004.2").is_dir()


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        progress = {"validation_loss": loss, "validated_at": step}
        (folder / MANIFEST).write_text(json.dumps({"step": step, "progress": progress, "files": {}}))
    prune(tmp_path, keep_last=1, keep_best=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004"]


def test_a_checkpoint_every_so_many_minutes(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute a step by the clock; the last step is saved whatever the clock says."""
    seen = spy_on_samples(monkeypatch)
    clock = SimpleNamespace(monotonic=lambda: 60.0 * len(seen))
    monkeypatch.setattr("finetune.training.checkpoint_writer.time", clock)
    run = run_tiny(training={"max_steps": 5}, checkpoint={"every_steps": None, "every_minutes": 2, "keep_last": 9})
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000002", "step-000004", "step-000005"]


def small_snapshot(step: int) -> Snapshot:
    tensors = {"base_model.model.lora_A.weight": torch.full((2, 3), float(step))}
    moments = {"state": {0: {"exp_avg": torch.full((2, 3), step / 2)}}, "param_groups": []}
    return Snapshot(step, tensors, moments, {}, {"tokens": 10 * step})


def write_and_prune(folder: Path, step: int) -> None:
    checkpoint = write_checkpoint(folder, small_snapshot(step), "{}", "name: x\n", {})
    update_progress(checkpoint, {"tokens": 10 * step, "validation_loss": 1.0})
    prune(folder, keep_last=1, keep_best=0)


def killed_at(event: int, folder: Path, step: int) -> bool:
    """Whether a process that writes a checkpoint was killed at its `event`th touch of the file system, or got by."""
    child = os.fork()
    if child == 0:
        left = iter(range(event, -1, -1))

        def die(name: str, _: object) -> None:
            if name in TOUCHES and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        write_and_prune(folder, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_fm19_killed_at_any_touch_of_a_file_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    """One kill for each file opened, renamed or removed, the step's damaged checkpoint of before among them."""
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        write_and_prune(folder, 1)
        shutil.copytree(folder / "step-000001", folder / "step-000002")
        (folder / "step-000002" / STATE).write_bytes(b"")
        killed = killed_at(kills, folder, 2)
        recover_directory(folder)
        found = newest_checkpoint(folder)
        assert found is not None and not [path for path in folder.iterdir() if path.name.startswith(".")]
        assert load_file(found.path / WEIGHTS_NAME)["base_model.model.lora_A.weight"].unique().item() == found.step
        assert found.progress["tokens"] == 10 * found.step
        write_and_prune(folder, 2)
        assert [path.name for path in folder.iterdir()] == ["step-000002"]
        if not killed:
            break
        kills += 1
    assert kills > 40 and found.step == 2
