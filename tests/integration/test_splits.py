"""However a run is split (processes, sharding, packing, recomputation) its losses and gradients are the same.

Six settings hold every pair of {DDP, FSDP}, {Llama, Falcon}, {no quantization, NF4}, {checkpointing off, on} and
{none, isolated, shared_prefix}; each runs with 1, 2 and 4 processes, against a plain run of one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.cli import main
from finetune.models.adapters import WEIGHTS_NAME
from finetune.run_dir import RunDir
from finetune.training.metrics import read_metrics
from tests.tiny import chat_rows, tiny_recipe, write_jsonl, write_model, write_recipe

WORKER = Path(__file__).with_name("many_runs.py")
SETTINGS = [
    ("ddp", "llama", "none", False, "none"),
    ("fsdp", "falcon", "nf4", True, "none"),
    ("ddp", "llama", "nf4", True, "isolated"),
    ("fsdp", "falcon", "none", False, "isolated"),
    ("ddp", "falcon", "none", True, "shared_prefix"),
    ("fsdp", "llama", "nf4", False, "shared_prefix"),
]
PLAIN = [
    ("single", model, quantization, False, "none") for model in ("llama", "falcon") for quantization in ("none", "nf4")
]
RESUMED = [SETTINGS[1], SETTINGS[5]]  # sharded and quantized
Setting = tuple[str, str, str, bool, str]
# With NF4, products are rounded to bf16 and their order depends on the split.
TOLERANCE = {"none": 1e-5, "nf4": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data, and a recipe for each setting and number of processes."""
    folder = tmp_path_factory.mktemp("splits")
    rows = write_jsonl(folder / "rows.jsonl", chat_rows(27))
    for model in ("llama", "falcon"):
        write_model(folder / model, model)
    for processes in (1, 2, 4):
        for setting in [*SETTINGS, *(PLAIN if processes == 1 else [])]:
            strategy, model, quantization, checkpointing, packing = setting
            recipe = tiny_recipe(
                folder,
                folder / model,
                rows,
                name=name_of(setting, processes),
                model={"name": str(folder / model), "quantization": quantization},
                data={
                    "sources": [{"path": str(rows)}],
                    "packing": packing,
                    "validation": {"size": 3},
                    **({} if packing == "none" else {"max_tokens": 160}),
                },
                # 24 samples: the third step has four, one for each of four ranks.
                training={
                    "max_steps": None,
                    "epochs": 1,
                    "global_batch_size": 10,
                    "gradient_checkpointing": checkpointing,
                    "max_grad_norm": None,
                    # Steps like SGD's: with Adam, rounding may turn the sign of a gradient near zero, and the step.
                    "optimizer": {"lr": 0.5, "eps": 1.0},
                },
                # Offloading is tried once, with recomputation.
                distributed={
                    "accelerator": "cpu",
                    "strategy": strategy,
                    "cpu_offload": strategy == "fsdp" and checkpointing,
                },
                evaluation={"metrics": [], "num_samples": 0, "before": False, "every_steps": 2},
                checkpoint={"every_steps": 1, "keep_last": 9},
            )
            write_recipe(folder / f"{name_of(setting, processes)}.yaml", recipe)
    return folder


@pytest.fixture(scope="module")
def run_of(folder: Path) -> Callable[[Setting, int], RunDir]:
    """The finished run of a setting; all runs of one number of processes are made together."""
    ended: dict[int, subprocess.CompletedProcess[str]] = {}

    def get(setting: Setting, processes: int) -> RunDir:
        if processes not in ended:
            chosen = [*SETTINGS, *PLAIN] if processes == 1 else [*SETTINGS, *RESUMED]
            recipes = [f"{name_of(each, processes)}.yaml" for each in chosen]
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            ended[processes] = subprocess.run(
                [*command, str(WORKER), *(str(folder / recipe) for recipe in recipes)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])},
                timeout=280,
                capture_output=True,
                text=True,
            )
        assert ended[processes].returncode == 0, ended[processes].stderr[-4000:]
        return RunDir(folder / "runs" / name_of(setting, processes))

    return get


def name_of(setting: Setting, processes: int) -> str:
    strategy, model, quantization, checkpointing, packing = setting
    return f"{strategy}-{model}-{quantization}-{'recomputed' if checkpointing else 'kept'}-{packing}-{processes}"


def first_gradient(run: RunDir) -> torch.Tensor:
    """AdamW's first moment after one step is 0.1 x the gradient; in parameter order."""
    state = torch.load(run.checkpoints / "step-000001" / "trainer_state.pt", weights_only=True)
    return torch.cat([entry["exp_avg"].flatten() / 0.1 for entry in state["optimizer"]["state"].values()])


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: name_of(setting, 0)[:-2])
def test_fm01_fm14_any_split_gives_the_same_gradient_and_losses(
    setting: Setting, processes: int, run_of: Callable[[Setting, int], RunDir]
) -> None:
    plain = run_of(("single", setting[1], setting[2], False, "none"), 1)
    run = run_of(setting, processes)
    tolerance = TOLERANCE[setting[2]]
    got, want = first_gradient(run), first_gradient(plain)
    assert (got - want).norm() / want.norm() < tolerance
    rows, expected = list(read_metrics(run.metrics)), list(read_metrics(plain.metrics))
    assert len(rows) == len(expected) == 3
    for row, other in zip(rows, expected, strict=True):
        assert row["lr"] == other["lr"] and row["supervised_tokens"] == other["supervised_tokens"]
        assert row["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
        assert (row["validation_loss"] or 0.0) == pytest.approx(other["validation_loss"] or 0.0, rel=tolerance)
    assert rows[-1]["validation_loss"] is not None


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: name_of(setting, 0)[:-2])
def test_fm04_fm23_fm24_several_processes_save_what_one_saves_and_resume_from_it(
    setting: Setting, processes: int, run_of: Callable[[Setting, int], RunDir]
) -> None:
    run, one = run_of(setting, processes), run_of(setting, 1)
    saved, expected = (load_file(each.adapter / WEIGHTS_NAME) for each in (run, one))
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in expected.items()}
    for name, tensor in saved.items():
        assert (tensor - expected[name]).norm() < TOLERANCE[setting[2]] * expected[name].norm() + 1e-6, name
        assert tensor.abs().max() > 0, name
    if setting in RESUMED:
        whole = (run.root / "adapter-uninterrupted" / WEIGHTS_NAME).read_bytes()
        assert whole == (run.adapter / WEIGHTS_NAME).read_bytes(), "continued from its first checkpoint"


def test_fm23_a_sharded_quantized_run_is_merged(run_of: Callable[[Setting, int], RunDir]) -> None:
    run = run_of(SETTINGS[1], 4)
    assert main(["merge", str(run.root)]) == 0
    assert list(run.merged.glob("*.safetensors"))
