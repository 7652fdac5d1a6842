"""Where a run computes: one device, DDP, or FSDP, through Lightning.

DDP and FSDP share one strategy class: the adapter is a plain parameter on every rank, and its gradients are summed
once per optimizer step by the training step itself. FSDP shards the frozen base layer by layer besides.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities import distributed as lightning_distributed
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch.distributed import DistError
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from finetune.distributed import is_rank_zero
from finetune.errors import BadInputError, FinetuneError, first_line
from finetune.recipe.schema import DistributedSection, Recipe, TrainingSection

# How long a rank waits for another: loading and measuring may take one of them longer. One that dies is noticed sooner.
PROCESS_GROUP_TIMEOUT = timedelta(hours=2)
# Which our own launcher sets anew.
LAUNCHERS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_RANK")
# Where one rank fails others often do: how long they have to say why.
LAST_WORDS_SECONDS = 2.0
# By which Lightning tells all ranks of a SIGTERM; since 2.6.
BROADCAST_OF_SIGTERM = "_broadcast_sigterm_tensor"


@dataclass(frozen=True)
class Placement:
    """What the recipe's `distributed` section means on this machine."""

    accelerator: str  # cpu or cuda
    devices: int  # processes on this machine
    num_nodes: int
    strategy: str  # single, ddp or fsdp
    cpu_offload: bool = False

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.devices * self.num_nodes

    @property
    def sharded(self) -> bool:
        """Whether the frozen base is split over the processes."""
        return self.strategy == "fsdp"


def resolve_placement(section: DistributedSection) -> Placement:
    """Devices and strategy, from the recipe and from what torchrun or SLURM say.

    Raises:
        BadInputError: if the recipe asks for what is not there.
    """
    accelerator = section.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    available = torch.cuda.device_count() if accelerator == "cuda" else (os.cpu_count() or 1)
    if accelerator == "cuda" and available == 0:
        raise BadInputError("distributed.accelerator: cuda, but torch sees no GPU; use cpu or auto")
    devices, num_nodes = _launched_size() or (section.devices, section.num_nodes)
    if devices == "auto":
        devices = available if accelerator == "cuda" and section.strategy != "single" else 1
    assert isinstance(devices, int)
    if accelerator == "cuda" and devices > available:
        if _launched_size() is not None:
            raise BadInputError(
                f"{devices} processes were started on this machine, and this one sees {available} GPUs; start one a "
                "GPU, and let each see all of them: with SLURM --gpus-per-node, not --gpus-per-task or --gpu-bind"
            )
        raise BadInputError(f"distributed.devices: {devices}, but this machine has {available} GPUs")
    strategy = strategy_of(section, devices * num_nodes)
    return Placement(accelerator, devices, num_nodes, strategy, section.cpu_offload)


def strategy_of(section: DistributedSection, world_size: int) -> str:
    """The recipe's strategy; for auto `single`, or `ddp` for several processes.

    Raises:
        BadInputError: for `single` on several.
    """
    if section.strategy == "auto":
        return "single" if world_size == 1 else "ddp"
    if section.strategy == "single" and world_size > 1:
        raise BadInputError(f"distributed.strategy: single, but {world_size} processes were started; use ddp or fsdp")
    return section.strategy


def launcher() -> ClusterEnvironment | None:
    """What torchrun or srun say about this process; None where neither started it."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        # Lightning asks for this one even where srun does not set it (--ntasks instead of --ntasks-per-node).
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(_slurm_size()[0]))
        # Preemption is ours: Lightning would requeue the job from within a signal.
        return SLURMEnvironment(auto_requeue=False)
    return None


def _launched_size() -> tuple[int, int] | None:
    """(processes per machine, machines) where torchrun or srun started this process."""
    if TorchElasticEnvironment.detect():
        local, nodes = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if local * nodes != int(os.environ["WORLD_SIZE"]):
            raise BadInputError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes on {nodes} machines, {local} of them on this "
                "one: every machine needs the same number; give all the same --nproc-per-node"
            )
        return local, nodes
    return _slurm_size() if SLURMEnvironment.detect() else None


def _slurm_size() -> tuple[int, int]:
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    spread = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # 2(x2), or 3,1
    if tasks % nodes or "," in spread:
        raise BadInputError(
            f"SLURM_NTASKS is {tasks} on {nodes} nodes{f' ({spread})' * bool(spread)}: every node needs the same "
            "number; use --ntasks-per-node"
        )
    return tasks // nodes, nodes


def check_dora(recipe: Recipe, placement: Placement) -> None:
    """Refuse it on int8 weights where accelerator auto has become the CPU; an explicit one is refused with the recipe.

    PEFT's DoRA moves weights that it has read back to the CPU, and bitsandbytes 0.50 loses their scales by that.

    Raises:
        BadInputError: naming the keys.
    """
    if placement.accelerator == "cpu" and recipe.adapter.use_dora and recipe.model.quantization == "int8":
        raise BadInputError(
            "adapter.use_dora: true does not compute on int8 weights on a CPU, and there is no GPU here; use "
            "model.quantization nf4 or none, or leave DoRA out"
        )


def check_launch(placement: Placement) -> None:
    """Refuse several machines without torchrun or srun: the first process of each would take itself for rank 0.

    Raises:
        BadInputError: naming what starts them.
    """
    if placement.num_nodes > 1 and launcher() is None:
        raise BadInputError(
            f"distributed.num_nodes: {placement.num_nodes}, but neither torchrun nor srun started this process; "
            "start it with one of them on every machine (docs/many-gpus.md)"
        )


class AdapterStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy without its gathers: a checkpoint holds the replicated adapter alone."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trainable tensors of this rank; they are the same on every rank."""
        assert self.lightning_module is not None
        return {n: p.detach() for n, p in self.lightning_module.named_parameters() if p.requires_grad}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's own state; it is the same on every rank."""
        return optimizer.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Checkpoints are read by `training.checkpoint`, not by Lightning."""

    def model_to_device(self) -> None:
        """`FinetuneModule.configure_model` has put everything where it belongs."""


class OneDeviceStrategy(SingleDeviceStrategy):
    """Lightning's strategy for one device, where the module is made as it is for several."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """No default device: within Lightning's, a GPU's own generator would draw the adapter's first values."""
        with self.precision_plugin.tensor_init_context():
            yield

    def teardown(self) -> None:
        """Nothing moves, as for several processes: Lightning would move the model to the host when `fit` ends.

        A run whose steps are all done is measured only then (`train._finish_trained`).
        """
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def build_strategy(placement: Placement) -> Strategy:
    """The Lightning strategy of a placement."""
    if placement.strategy == "single":
        return OneDeviceStrategy(device="cuda:0" if placement.accelerator == "cuda" else "cpu")
    return AdapterStrategy(
        data_parallel_size=placement.world_size,
        tensor_parallel_size=1,
        process_group_backend="nccl" if placement.accelerator == "cuda" else "gloo",
        timeout=PROCESS_GROUP_TIMEOUT,
    )


def build_trainer(placement: Placement, training: TrainingSection, callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's trainer: devices, processes, autocast and hooks; accumulation, clipping and checkpoints are ours."""
    if placement.accelerator == "cuda":
        keep_fp32_exact()
    plugins: list[Any] = [_precision_plugin(training.precision, placement.accelerator)]
    environment = launcher()
    if environment is None and is_rank_zero():
        # Left by another job, or set by a cluster for its own launcher, they would be taken for ours.
        for name in LAUNCHERS_VARIABLES:
            os.environ.pop(name, None)
    if environment is not None and placement.strategy != "single":
        plugins.append(environment)
    trainer = L.Trainer(
        accelerator=placement.accelerator,
        devices=placement.devices,
        num_nodes=placement.num_nodes,
        strategy=build_strategy(placement),
        plugins=plugins,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    loop: Any = trainer.fit_loop.epoch_loop
    if hasattr(loop, BROADCAST_OF_SIGTERM):
        # It waits for the GPU before every batch. `Preemption` counts votes, of every signal, without waiting.
        setattr(loop, BROADCAST_OF_SIGTERM, lambda: None)
    return trainer


def keep_fp32_exact() -> None:
    """Have CUDA compute this process's fp32 products and convolutions in fp32, not in TF32 with factors of 11 bits.

    Autocast leaves none that take time. But some models compute rotary angles by such a product (transformers 5.17 for
    most, 5.23 for few; models with code of their own), whose positions beyond 2,048 TF32 rounds: on a B200, by a report
    to transformers. And 32-true is asked for as exact.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def ending_others(trainer: L.Trainer) -> Iterator[None]:
    """Where the block fails, end the ranks that this process has started: they would wait for it in a collective.

    Raises:
        FinetuneError: where it fails because another rank is gone.
    """
    try:
        yield
    except BaseException as error:
        started: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        others = list(started)
        # Lightning watches this very list, and kills this process, its message unsaid, where one of them has failed.
        started.clear()
        _leave_group_at_exit()
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        for process in others:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        if _is_of_others(error):
            raise FinetuneError(
                f"this rank has lost the others: {first_line(error)}\n"
                "  One of them has failed, which its own message says, or was killed, as by a system without memory,\n"
                f"  or has not answered for {PROCESS_GROUP_TIMEOUT.total_seconds() / 3600:g} hours.\n"
                "  The last checkpoint is untouched, and the same command continues from it."
            ) from error
        raise


def leave_together(trainer: L.Trainer) -> None:
    """Before all ranks end with a code that is not 0: Lightning kills this process where another has ended so earlier.

    Rank 0 may take longer than others, which have no trackers to close and no job to queue again.
    """
    getattr(trainer.strategy.launcher, "procs", []).clear()
    trainer.strategy.barrier()


def _is_of_others(error: BaseException) -> bool:
    """Whether a collective has failed; gloo's errors have no class of their own."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _leave_group_at_exit() -> None:
    """Take back what Lightning does when a process with NCCL exits.

    It destroys the process group, which waits for the other ranks: in a collective that this one never joins.
    """
    atexit.unregister(getattr(lightning_distributed, "_destroy_dist_connection", None))  # type: ignore[arg-type]


def _precision_plugin(precision: str, accelerator: str) -> Precision:
    # In "true" precisions the base has its dtype already and trainables stay fp32, so there is nothing to convert.
    if precision.endswith("-mixed"):
        return MixedPrecision(precision, accelerator)  # type: ignore[arg-type]
    return Precision()


def shard_base(model: torch.nn.Module, layers: list[torch.nn.Module], mesh: DeviceMesh, *, cpu_offload: bool) -> None:
    """Split the frozen parameters of `model` over `mesh`, one layer at a time; trainable ones stay whole.

    `model` is the module whose forward starts the computation; what is in no layer (embeddings, head) goes with it.
    """
    replicated = {parameter for parameter in model.parameters() if parameter.requires_grad}
    policy: OffloadPolicy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=replicated, offload_policy=policy)
    fully_shard(model, mesh=mesh, ignored_params=replicated, offload_policy=policy)


def move_replicated(model: torch.nn.Module, device: torch.device) -> None:
    """Move what `shard_base` left whole, and buffers, to `device`; shards stay where they are, on the host or not."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
