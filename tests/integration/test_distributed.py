"""Several processes give what one gives: real processes and gloo.

Where the launcher itself is not the matter, processes are forked with torchrun's variables: importing takes each of
them longer than its run.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from finetune.errors import EXIT_PREEMPTED
from finetune.models.adapters import WEIGHTS_NAME
from finetune.run_dir import RunDir
from finetune.training.metrics import read_metrics
from tests.fork_server import ForkServer
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe
from tests.training.test_checkpoint import same_ending

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a recipe over a tiny model of an architecture; its run directory is the recipe's folder / runs / name."""
    folder = tmp_path_factory.mktemp("distributed")
    rows = write_jsonl(folder / "rows.jsonl", alpaca_rows(24))
    models: dict[str, Path] = {}

    def write(name: str, architecture: str, quantization: str = "none", **sections: Any) -> Path:
        if architecture not in models:
            models[architecture] = write_model(folder / architecture, architecture)
        model = models[architecture]
        recipe = tiny_recipe(
            folder,
            model,
            rows,
            name=name,
            model={"name": str(model), "quantization": quantization},
            **{"checkpoint": {"every_steps": 1, "keep_last": 9}, **sections},
        )
        return write_recipe(folder / f"{name}.yaml", recipe)

    return write


@pytest.fixture(scope="module")
def launch(server: ForkServer) -> Callable[..., RunDir]:
    """Runs a recipe in several processes."""

    def run(recipe: Path, processes: int, *overrides: str) -> RunDir:
        server.run("run", str(recipe), *overrides, ranks=processes)
        return RunDir(recipe.parent / "runs" / recipe.stem)

    return run


def distance(left: RunDir, right: RunDir) -> float:
    """Relative distance of two final adapters from each other; they hold the same tensors."""
    adapters = [load_file(run.adapter / WEIGHTS_NAME) for run in (left, right)]
    assert adapters[0].keys() == adapters[1].keys()
    flat = [torch.cat([adapter[name].flatten() for name in sorted(adapter)]) for adapter in adapters]
    return ((flat[0] - flat[1]).norm() / flat[0].norm()).item()


def losses(run: RunDir) -> list[float]:
    return [float(row["loss"] or 0.0) for row in read_metrics(run.metrics)]


# Rows long enough for the native kernels, which run a layer as one function.
BF16_ROWS = {
    "data": {"packing": "isolated", "max_tokens": 512},
    "training": {"precision": "bf16-mixed", "global_batch_size": 24},
}
CASES = [
    ("ddp", "llama", "none", 2, {}),
    ("fsdp", "llama", "nf4", 2, {"training": {"gradient_checkpointing": True}}),
    ("fsdp", "falcon", "none", 2, {"data": {"packing": "isolated", "max_tokens": 200}}),
    ("fsdp", "llama", "none", 4, {"adapter": {"modules_to_save": ["lm_head"]}}),
    ("fsdp", "wide_llama", "none", 2, BF16_ROWS),
]


@pytest.mark.parametrize(("strategy", "architecture", "quantization", "processes", "sections"), CASES)
def test_fm01_fm23_fm24_processes_change_nothing(
    tiny: Callable[..., Path],
    launch: Callable[..., RunDir],
    strategy: str,
    architecture: str,
    quantization: str,
    processes: int,
    sections: dict[str, Any],
) -> None:
    # SGD-like steps: with Adam a gradient near zero may turn its sign by rounding and the step with it.
    rounds = quantization != "none" or sections is BF16_ROWS
    sections = {**sections, "training": {"optimizer": {"lr": 1e-3, "eps": 1.0}, **sections.get("training", {})}}
    one = launch(tiny(f"one_{strategy}_{architecture}_{processes}", architecture, quantization, **sections), 1)
    recipe = tiny(f"several_{strategy}_{architecture}_{processes}", architecture, quantization, **sections)
    several = launch(recipe, processes, f"distributed.strategy={strategy}")
    tolerance = 1e-2 if rounds else 1e-5
    assert losses(several) == pytest.approx(losses(one), rel=tolerance)
    assert distance(one, several) < tolerance


def test_fm18_a_run_goes_on_with_another_number_of_processes(
    tiny: Callable[..., Path], launch: Callable[..., RunDir]
) -> None:
    """1 process, then 2, then 4: each sample where the uninterrupted run has it, so the losses agree."""
    sections = {"training": {"max_steps": 6, "optimizer": {"lr": 1e-3, "eps": 1.0}}}
    whole = launch(tiny("elastic_whole", "llama", **sections), 1)
    recipe = tiny("elastic", "llama", **sections)
    run = launch(recipe, 1)
    for processes, step in ((2, 2), (4, 4)):
        for path in run.checkpoints.iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        shutil.rmtree(run.adapter)
        launch(recipe, processes, "distributed.strategy=ddp")
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert distance(whole, run) < 1e-5


def test_every_process_ends_with_the_best_weights(tiny: Callable[..., Path], launch: Callable[..., RunDir]) -> None:
    """A learning rate at which validation loss soon rises; the sharded base and the measurement are of all ranks."""
    sections: dict[str, Any] = {
        "training": {"max_steps": 2, "optimizer": {"lr": 1.0}, "schedule": {"name": "constant", "warmup_steps": 0}},
        "data": {"validation": {"size": 4}},
        "evaluation": {"every_steps": 1, "metrics": ["perplexity"]},
        "checkpoint": {"every_steps": None, "keep_last": 1, "final": "best"},
    }
    run = launch(tiny("best", "llama", **sections), 2, "distributed.strategy=fsdp")
    scored = {int(row["step"] or 0): float(row["validation_loss"] or 0.0) for row in read_metrics(run.metrics)}
    best = min(scored, key=lambda step: scored[step])
    assert best == 1
    saved = run.checkpoints / f"step-{best:06d}" / WEIGHTS_NAME
    assert (run.adapter / WEIGHTS_NAME).read_bytes() == saved.read_bytes()
    after = json.loads(run.results.read_text())["after"]["metrics"]["perplexity"]
    assert after == pytest.approx(math.exp(min(scored[best], 80.0)), rel=1e-4)


def test_a_loss_that_is_not_finite_is_traced_to_its_row_whichever_process_has_it(
    tmp_path: Path, server: ForkServer
) -> None:
    """The embedding of a token that one row has is not a number; the other process computes none of its samples."""
    model = write_model(tmp_path / "model", "llama")
    rows = alpaca_rows(8)
    rows[2]["output"] = "river " * 40
    rows[5]["output"] = "Ω " + "river " * 25  # the second longest: of rank 1
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    bad = AutoTokenizer.from_pretrained(model)("Ω", add_special_tokens=False).input_ids
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][bad] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    alone = {"data": {"packing": "none"}, "training": {"micro_batch_size": 1}}
    path = write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path, model, data, **alone))
    said = server.run("run", str(path), "distributed.strategy=ddp", ranks=2, expect=1)
    assert "step 1: the loss is nan" in said
    assert set(re.findall(r"The samples computed: (.*)\.", said)) == {f"{data}:6"}


def test_processes_that_find_other_rows_are_refused(
    tiny: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    """Each has a home of its own, as on machines without a shared disk, and other rows there; as many of them."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_jsonl(tmp_path / str(rank) / "rows.jsonl", alpaca_rows(24, seed=rank))
    recipe = tiny("homes", "llama", data={"sources": [{"path": "~/rows.jsonl"}]})
    home = str(tmp_path / "{rank}")
    said = server.run("run", str(recipe), "distributed.strategy=ddp", ranks=2, expect=2, HOME=home)
    assert "rank 1 (" in said and "does not train on what rank 0" in said and "step 1/" not in said
    assert "the training data: its samples are others than on rank 0\n  Give every machine" in said


def test_two_nodes_are_two_agents(tiny: Callable[..., Path], launch: Callable[..., RunDir]) -> None:
    sections = {"training": {"optimizer": {"lr": 1e-3, "eps": 1.0}}}
    one, recipe = launch(tiny("one_node", "llama", **sections), 1), tiny("nodes", "llama", **sections)
    command = [
        *[sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"],
        *["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29611", "--rdzv-id=nodes"],
        *["-m", "finetune", "run", str(recipe), "distributed.strategy=fsdp"],
    ]
    agents = [
        subprocess.Popen([*command[:3], f"--node-rank={rank}", *command[3:]], env=ENVIRONMENT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    endings = [(agent.wait(timeout=280), agent.communicate()[1]) for agent in agents]
    assert [code for code, _ in endings] == [0, 0], endings
    several = RunDir(recipe.parent / "runs" / "nodes")
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, several) < 1e-5


def test_a_rank_that_dies_ends_the_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Rank 1 of three raises in its second step: within a minute every process is gone; its traceback is shown."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import finetune.training.module as module\n"
        "    step = module.FinetuneModule.training_step\n"
        "    def broken(self, batch, index):\n"
        "        if self.step == 1:\n"
        "            open(os.environ['DIED'], 'w').close()\n"
        "            raise RuntimeError('rank one broke')\n"
        "        return step(self, batch, index)\n"
        "    module.FinetuneModule.training_step = broken\n"
    )
    recipe = tiny("dies", "llama")
    died = tmp_path / "died"
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "DIED": str(died)}
    command = [*TORCHRUN, "3", "-m", "finetune", "run", str(recipe), "distributed.strategy=fsdp"]
    done = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert time.time() - died.stat().st_mtime < 60
    assert done.returncode != 0
    assert "rank one broke" in done.stderr and "in broken" in done.stderr
    assert processes_with(f"DIED={died}") == []


def processes_with(variable: str) -> list[int]:
    """Processes whose environment holds `variable`: a run's own, wherever they were started from."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


FAILING = """
import os, signal, time
if 'FAILS' in os.environ:
    import finetune.training.module as module
    from finetune.distributed import global_rank
    step = module.FinetuneModule.training_step
    rank, way = os.environ['FAILS'].split()
    def failing(self, batch, index):
        if self.step == 0:
            return step(self, batch, index)
        if global_rank() != int(rank):
            time.sleep(600)
        if way == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f'rank {rank} broke')
    module.FinetuneModule.training_step = failing
"""
# Rank 0, whose child has died, is killed by Lightning; one that fails itself ends with a code and a message.
FAILURES = {"0 raised": 1, "0 killed": -signal.SIGKILL, "1 raised": -signal.SIGKILL}


@pytest.mark.parametrize(("fails", "code"), FAILURES.items(), ids=FAILURES)
def test_a_rank_that_dies_ends_the_processes_of_our_own_launcher(
    fails: str, code: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The other rank sleeps, as in a collective that never returns."""
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    recipe = tiny(f"fails_{fails.replace(' ', '_')}", "llama")
    variables = {"FAILS": fails, "TEST": str(tmp_path)}
    environment = {**ENVIRONMENT, **variables, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "finetune", "run", str(recipe), "distributed.devices=2"]
    # Returns when the last of them has closed its stderr.
    done = subprocess.run(command, env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    assert (f"rank {fails[0]} broke" in done.stderr) == fails.endswith("raised")
    deadline = time.monotonic() + 10
    while left := processes_with(f"TEST={tmp_path}"):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


GATED_VALIDATION = """
import os, time
if 'GATE' in os.environ:
    from finetune.training.validation import Validation
    validate = Validation._validate
    def gated(self, *given):
        open(os.environ['GATE'] + '.reached', 'w').close()
        while not os.path.exists(os.environ['GATE']):
            time.sleep(0.001)
        validate(self, *given)
    Validation._validate = gated
"""


def test_fm17_fm20_two_sharding_processes_stopped_in_a_validation_end_in_the_same_bytes(
    tiny: Callable[..., Path], launch: Callable[..., RunDir], tmp_path: Path
) -> None:
    """One of the two gets the signal; both leave the validation, and the next run begins with it.

    Only the run that is stopped has loader processes: their start takes each rank longer than all the rest.
    """
    sections: dict[str, Any] = {
        "training": {"max_steps": 4},
        "adapter": {"dropout": 0.1},
        "data": {"packing": "isolated", "max_tokens": 200, "validation": {"size": 4}},
        "evaluation": {"every_steps": 2},
    }
    sections |= {"distributed": {"accelerator": "cpu", "strategy": "fsdp", "devices": 2}}
    whole = launch(tiny("sharded_whole", "llama", **sections), 2)
    recipe, gate = tiny("sharded_cut", "llama", **sections), tmp_path / "gate"
    (tmp_path / "sitecustomize.py").write_text(GATED_VALIDATION)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "GATE": str(gate)}
    command = [sys.executable, "-m", "finetune", "run", str(recipe), "training.num_workers=2"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not Path(f"{gate}.reached").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    gate.touch()
    _, error = process.communicate(timeout=100)
    assert process.returncode == EXIT_PREEMPTED, error[-3000:]
    assert "stopped by SIGTERM at step 2 of 4; step 2 is saved" in error
    run = launch(recipe, 2)
    same_ending(whole, run, "step-000004")


# What unlike GPUs may round to: one rank's completions end earlier.
ENDS_EARLIER = """
import os
if 'EARLIER' in os.environ:
    from transformers import GenerationMixin
    generate = GenerationMixin.generate
    def shorter(self, *given, **named):
        from finetune.distributed import global_rank
        named['generation_config'].max_new_tokens -= 2 * global_rank()
        return generate(self, *given, **named)
    GenerationMixin.generate = shorter
"""


def test_completions_that_end_elsewhere_on_another_rank_leave_nobody_waiting(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Every token gathers the sharded layers, by all ranks together; rank 0's completions are kept."""
    (tmp_path / "sitecustomize.py").write_text(ENDS_EARLIER)
    sections: dict[str, Any] = {
        "training": {"max_steps": 1},
        "data": {"validation": {"size": 3}},
        "evaluation": {"metrics": ["exact_match"], "num_samples": 1, "max_new_tokens": 6},
        "distributed": {"accelerator": "cpu", "strategy": "fsdp", "devices": 2},
    }
    recipe = tiny("earlier", "llama", **sections)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "EARLIER": "1"}
    command = [sys.executable, "-m", "finetune", "run", str(recipe)]
    done = subprocess.run(command, env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = json.loads((recipe.parent / "runs" / "earlier" / "results.json").read_text())["after"]
    assert (after["num_rows"], len(after["samples"])) == (3, 1)
