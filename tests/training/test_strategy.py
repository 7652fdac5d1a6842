"""What Lightning's strategies and launcher would do, and ours do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator

from finetune.errors import BadInputError, FinetuneError
from finetune.recipe.schema import DistributedSection, Recipe, TrainingSection
from finetune.training import strategy
from finetune.training.module import FinetuneModule
from finetune.training.strategy import (
    Placement,
    build_strategy,
    build_trainer,
    check_dora,
    check_launch,
    ending_others,
    keep_fp32_exact,
    leave_together,
    resolve_placement,
)


def test_the_first_adapter_is_drawn_on_the_cpu_whatever_trains_it() -> None:
    """As under DDP and FSDP, so that one seed gives one adapter: PEFT draws on the default device."""
    with build_strategy(Placement("cuda", 1, 1, "single")).tensor_init_context():
        assert torch.nn.Linear(2, 2).weight.device == torch.device("cpu")


def test_the_model_stays_where_it_is_when_training_ends() -> None:
    """A run that was stopped during its last measurement is measured only then; a meta tensor stands for a GPU's."""
    one_device, module = build_strategy(Placement("cpu", 1, 1, "single")), L.LightningModule()
    module.weight = torch.nn.Parameter(torch.empty(1, device="meta"))
    one_device.connect(module)
    one_device.accelerator = CPUAccelerator()
    one_device.teardown()
    assert module.weight.is_meta


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "single"])
def test_the_module_computes_on_its_ranks_own_device(kind: str) -> None:
    """Votes, validation and trial batches go where it says: to the rank's GPU, for which a meta device stands."""
    recipe = Recipe.model_validate(
        {"name": "x", "model": {"name": "a/b"}, "data": {"sources": [{"path": "a/c"}]}, "training": {"max_steps": 1}}
    )
    of_rank = build_strategy(Placement("cpu", 1, 1, kind))
    of_rank.parallel_devices = [torch.device("meta")]  # type: ignore[attr-defined]
    of_rank._root_device = torch.device("meta")  # type: ignore[attr-defined]
    of_rank.cluster_environment = SimpleNamespace(local_rank=lambda: 0)  # type: ignore[attr-defined]
    module = FinetuneModule(recipe, SimpleNamespace(), None, Placement("cpu", 1, 1, kind), "sdpa", 1)  # type: ignore[arg-type]
    module.trainer = SimpleNamespace(strategy=of_rank)  # type: ignore[assignment]
    of_rank.connect(module)
    of_rank.model_to_device()  # type: ignore[attr-defined]
    assert module.device == torch.device("meta")


def test_dora_on_int8_weights_needs_a_gpu() -> None:
    sections = {"model": {"name": "a/b", "quantization": "int8"}, "adapter": {"use_dora": True}}
    data = {"data": {"sources": [{"path": "a/c"}]}, "training": {"max_steps": 1}}
    recipe = Recipe.model_validate({"name": "x", **sections, **data})
    check_dora(recipe, Placement("cuda", 1, 1, "single"))
    with pytest.raises(BadInputError, match=r"adapter\.use_dora: true does not compute on int8 weights on a CPU"):
        check_dora(recipe, Placement("cpu", 1, 1, "single"))


def test_several_machines_need_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = Placement("cpu", 2, 2, "ddp")
    with pytest.raises(BadInputError, match="num_nodes: 2, but neither torchrun nor srun"):
        check_launch(placement)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    check_launch(placement)


def test_machines_with_other_numbers_of_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInputError, match="3 processes on 2 machines, 2 of them on this one"):
        resolve_placement(DistributedSection(accelerator="cpu"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve_placement(DistributedSection(accelerator="cpu")).world_size == 4
    for name in variables:
        monkeypatch.delenv(name)
    step = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_JOB_NAME": "tune"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInputError, match=r"SLURM_NTASKS is 4 on 2 nodes \(3,1\): every node needs the same"):
        resolve_placement(DistributedSection(accelerator="cpu"))


def test_a_gpu_for_each_process_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1: every process sees its own GPU as the first and only one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "tune", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInputError, match=r"8 processes were started .* sees 1 GPUs; .*--gpus-per-node"):
        resolve_placement(DistributedSection(accelerator="cuda"))


def test_our_launcher_takes_nothing_from_another_ones_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in strategy.LAUNCHERS_VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(L, "Trainer", lambda **_: MagicMock())
    build_trainer(Placement("cpu", 2, 1, "ddp"), TrainingSection(), [])
    assert not os.environ.keys() & set(strategy.LAUNCHERS_VARIABLES)
    monkeypatch.setenv("LOCAL_RANK", "1")
    build_trainer(Placement("cpu", 2, 1, "ddp"), TrainingSection(), [])
    assert os.environ["LOCAL_RANK"] == "1", "a process that our launcher has started"


def test_a_rank_that_has_lost_another_says_so() -> None:
    """Gloo's words when a process at the other end was killed."""
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=None))
    words = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:40117"
    with pytest.raises(FinetuneError, match="this rank has lost the others") as caught, ending_others(trainer):
        raise RuntimeError(words)
    assert "Connection closed by peer" in str(caught.value) and "the same command continues" in str(caught.value)
    with pytest.raises(FinetuneError, match="this rank has lost the others"), ending_others(trainer):
        raise torch.distributed.DistBackendError("NCCL error")
    with pytest.raises(RuntimeError, match="shapes differ"), ending_others(trainer):
        raise RuntimeError("shapes differ")


def test_fp32_products_are_exact_whatever_was_set_before() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        keep_fp32_exact()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_a_trainer_on_a_gpu_keeps_fp32_exact(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("finetune.training.strategy.keep_fp32_exact", lambda: kept.append(True))
    monkeypatch.setattr(L, "Trainer", lambda **_: MagicMock())
    build_trainer(Placement(accelerator, 1, 1, "single"), TrainingSection(), [])
    assert kept == [True] * (accelerator == "cuda")


def test_a_rank_that_fails_ends_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them has its last words to say, the other never returns."""
    monkeypatch.setattr(strategy, "LAST_WORDS_SECONDS", 0.2)
    waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    failed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    failed.wait()
    launcher = SimpleNamespace(procs=[waiting, failed])
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    with ending_others(trainer):
        pass
    assert waiting.poll() is None and len(launcher.procs) == 2
    with pytest.raises(OSError, match="No space left"), ending_others(trainer):
        raise OSError("No space left on device")
    assert (waiting.wait(), failed.returncode) == (-signal.SIGKILL, 3)
    assert not launcher.procs, "Lightning's observer would kill the rank that failed first"


def test_ranks_that_stop_leave_together() -> None:
    """Lightning kills rank 0 when another has ended with 75, however long its trackers take to close."""
    procs, calls = [object()], []
    of_ranks = SimpleNamespace(launcher=SimpleNamespace(procs=procs), barrier=lambda: calls.append(len(procs)))
    leave_together(SimpleNamespace(strategy=of_ranks))  # type: ignore[arg-type]
    assert calls == [0]


def test_no_batch_waits_to_hear_of_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning asks before every batch of several ranks; votes are counted after each step anyway."""
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: asked.append(tensor))
    trainer: Any = build_trainer(Placement("cpu", 1, 1, "single"), TrainingSection(max_steps=1), [])
    loop = trainer.fit_loop.epoch_loop
    getattr(loop, strategy.BROADCAST_OF_SIGTERM, lambda: None)()
    assert not asked
    if own := getattr(type(loop), strategy.BROADCAST_OF_SIGTERM, None):
        own(loop)
        assert len(asked) == 1


@pytest.mark.parametrize(("fails", "destroyed"), [(False, True), (True, False)])
def test_a_rank_that_fails_does_not_wait_for_the_others_at_its_exit(fails: bool, destroyed: bool) -> None:
    """For NCCL Lightning destroys the process group at exit, which waits for ranks that sit in a collective."""
    code = f"""
import atexit
from types import SimpleNamespace
from lightning.fabric.utilities import distributed
from finetune.training.strategy import ending_others
distributed._distributed_is_initialized = lambda: print("destroyed")
atexit.register(distributed._destroy_dist_connection)
with ending_others(SimpleNamespace(strategy=SimpleNamespace(launcher=None))):
    assert not {fails}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (int(fails), "destroyed\n" if destroyed else ""), done.stderr
