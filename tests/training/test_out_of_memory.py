"""Out of memory: the system's allocator really fails, in a process whose address space is limited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.data.batches import empty_batch
from finetune.errors import BadInputError
from finetune.models.adapters import WEIGHTS_NAME
from finetune.recipe.load import load_recipe
from finetune.run_dir import RunDir
from finetune.training.metrics import read_metrics
from finetune.training.out_of_memory import out_of_memory_message
from finetune.training.train import prepare_job
from tests.fork_server import ForkedRun, ForkServer
from tests.tiny import CONFIGS, alpaca_rows, tiny_recipe, write_jsonl, write_recipe, write_tokenizer
from tests.training.conftest import RunTiny


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("memory"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activations are wide, and eight long rows: one step is one pass of thousands of tokens."""
    folder = tmp_path_factory.mktemp("long")
    write_wide(folder / "model", intermediate_size=2048)
    write_jsonl(folder / "rows.jsonl", alpaca_rows(8, longest=400))
    return folder


def write_wide(folder: Path, **sizes: int) -> None:
    config = CONFIGS["llama"]()
    config.update(sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_a_step_that_does_not_fit_is_computed_in_halves(packing: str, folder: Path, server: ForkServer) -> None:
    def start(name: str, micro_batch_size: int, headroom: int | None = None, **training: Any) -> ForkedRun:
        # SGD-like steps: with Adam a gradient near zero may turn its sign by rounding and the step with it.
        training = {"max_steps": 1, **training}
        training |= {"micro_batch_size": micro_batch_size, "optimizer": {"lr": 1e-3, "eps": 1.0}}
        data: dict[str, Any] = {"packing": packing, "max_seq_len": 2048}
        if packing == "isolated":
            # All eight samples in a row, or in two or three.
            data["max_tokens"] = 8192 if micro_batch_size == 8 else 3000
        recipe = tiny_recipe(
            folder, folder / "model", folder / "rows.jsonl", name=f"{packing}-{name}", data=data, training=training
        )
        path = write_recipe(folder / f"{packing}-{name}.yaml", recipe)
        return server.start("run", str(path), headroom_bytes=headroom)

    whole = start("whole", 8, max_steps=2)
    assert whole.wait() == 0, whole.output
    half = start("half", 4)
    assert half.wait() == 0, half.output
    needs = whole.largest_pass_bytes, half.largest_pass_bytes
    assert needs[0] > 1.3 * needs[1], needs
    between = sum(needs) // 2

    halved = start("halved", 8, between, on_out_of_memory="halve", max_steps=2)
    assert halved.wait() == 0, halved.output
    assert halved.output.count("out of memory at a forward pass") == 1
    assert "step 1: out of memory" in halved.output and "with the same result" in halved.output
    runs = [RunDir(folder / "runs" / f"{packing}-{name}") for name in ("whole", "halved")]
    losses = [[row["loss"] for row in read_metrics(run.metrics)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    adapters = [load_file(run.adapter / WEIGHTS_NAME) for run in runs]
    flat = [torch.cat([adapter[name].flatten() for name in sorted(adapter)]) for adapter in adapters]
    assert (flat[0] - flat[1]).norm() / flat[0].norm() < 1e-5

    stopped = start("stopped", 8, between)
    assert stopped.wait() == 1
    assert "step 1: out of memory after" in stopped.output and "training.micro_batch_size" in stopped.output
    assert "Traceback" not in stopped.output

    # One sample a pass at last, and still no room.
    hopeless = start("hopeless", 8, 1 << 18, on_out_of_memory="halve")
    assert hopeless.wait() == 1
    assert hopeless.output.count("out of memory at a forward pass") >= 3
    assert "Cheapest first" in hopeless.output and "Traceback" not in hopeless.output


def test_halving_is_refused_under_fsdp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where strategy auto takes it: the other ranks would wait for the one that computes again. Nor is it advised."""
    sections: dict[str, Any] = {
        "distributed": {"accelerator": "cpu", "devices": 2},
        "training": {"on_out_of_memory": "halve"},
        "data": {"max_seq_len": 2048},
    }
    made = tiny_recipe(folder, folder / "model", folder / "rows.jsonl", name="sharded", **sections)
    recipe = load_recipe(write_recipe(folder / "sharded.yaml", made))
    assert prepare_job(recipe).placement.strategy == "ddp"
    monkeypatch.setattr("finetune.training.fitting.memory_of", lambda placement: 1_000_000)
    with pytest.raises(BadInputError, match="on_out_of_memory: halve does not go with fsdp"):
        prepare_job(recipe)
    messages = {sharded: out_of_memory_message(1, empty_batch(0), sharded=sharded) for sharded in (False, True)}
    assert "halve" in messages[False] and "halve" not in messages[True]


def test_fm22_a_validation_keeps_no_logits(folder: Path, server: ForkServer) -> None:
    """Over 200 batches of a large vocabulary as flat as over 10: kept logits would be 2 GB."""
    write_wide(folder / "large", vocab_size=32_000)
    peaks = {}
    for batches in (10, 200):
        rows = write_jsonl(folder / f"held-out-{batches}.jsonl", alpaca_rows(batches, longest=40))
        sections = {
            "training": {"max_steps": 2, "micro_batch_size": 1, "global_batch_size": 1},
            "data": {"packing": "none", "validation": {"source": {"path": str(rows)}}, "max_seq_len": 512},
            "evaluation": {"every_steps": 1},
        }
        recipe = tiny_recipe(folder, folder / "large", rows, name=f"flat-{batches}", **sections)
        run = server.start("run", str(write_recipe(folder / f"flat-{batches}.yaml", recipe)))
        assert run.wait() == 0, run.output
        peaks[batches] = run.validation_bytes[1]  # the first one warms up
    assert peaks[200] < peaks[10] + 50_000_000, peaks


def cuda(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def host(*_: Any, **__: Any) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 2 bytes.")


def python(*_: Any, **__: Any) -> Any:
    raise MemoryError


PHASES = [
    ("transformers.AutoModelForCausalLM.from_pretrained", cuda, "while the base was loaded", "model.quantization"),
    ("transformers.AutoModelForCausalLM.from_pretrained", python, "while the base was loaded", "fsdp"),
    ("finetune.training.module.attach_adapter", host, "while the model was loaded", "model.quantization"),
    ("torch.optim.AdamW.step", cuda, "in the optimizer's step 1", "paged_adamw_8bit"),
    ("finetune.training.validation.mean_loss", host, "in a validation", "training.micro_batch_size"),
    ("finetune.training.validation.write_samples", cuda, "in a validation", "evaluation.max_new_tokens"),
    ("finetune.evaluation.task.evaluate_task", cuda, "while the trained adapter was measured", "evaluation.batch_size"),
]


@pytest.mark.parametrize(("place", "failure", "phase", "key"), PHASES)
def test_every_phase_that_runs_out_of_memory_is_named_with_its_keys(
    place: str,
    failure: Any,
    phase: str,
    key: str,
    run_tiny: RunTiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(place, failure)
    evaluation = {"every_steps": 1, "metrics": ["exact_match"], "max_new_tokens": 2}
    run_tiny(expect=1, training={"max_steps": 1}, data={"validation": {"size": 4}}, evaluation=evaluation)
    said = capsys.readouterr().err
    assert f"error: out of memory {phase}, after " in said and key in said
    assert "Traceback" not in said and "bug in finetune" not in said


def test_what_a_loader_only_notes_is_out_of_memory_too(
    run_tiny: RunTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers keeps the error of a weight that it quantizes, and raises another at the end."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.integrations.bitsandbytes.Bnb4bitQuantize.convert", cuda)
    run_tiny(expect=1, model={"quantization": "nf4"})
    said = capsys.readouterr().err
    assert "error: out of memory while the base was loaded" in said and "bug in finetune" not in said
