"""On CUDA: the same runs as on the CPU, and the same losses up to the device's rounding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from finetune.cli import main
from finetune.commands.run import _Measure
from finetune.kernels import offload
from finetune.kernels.attention import packed_row, segment_attention
from finetune.kernels.layout import Group, dense_mask
from finetune.kernels.pointwise import rms_norm, rotate, takes_rotation
from finetune.kernels.varlen import takes, varlen_attention
from finetune.models.adapters import WEIGHTS_NAME
from finetune.training.metrics import read_metrics
from finetune.training.module import FinetuneModule
from tests.integration.test_load_memory import WORKER, write_large_model
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe

LAYOUTS = {
    "isolated": (Group(0, (130, 7, 300)),),
    "shared_prefix": (Group(77, (40, 128, 1)), Group(0, (33,)), Group(20, (64, 5))),
}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def run(folder: Path, architecture: str, name: str, accelerator: str, **sections: Any) -> list[float]:
    model = folder / architecture
    if not model.is_dir():
        write_model(model, architecture)
    rows = folder / "rows.jsonl"
    if not rows.is_file():
        write_jsonl(rows, alpaca_rows(24))
    model_section = {"name": str(model), **sections.pop("model", {})}
    recipe = tiny_recipe(
        folder,
        model,
        rows,
        name=name,
        model=model_section,
        **{"checkpoint": {"every_steps": 1, "keep_last": 9}, **sections},
        distributed={"accelerator": accelerator},
    )
    assert main(["run", str(write_recipe(folder / f"{name}.yaml", recipe))]) == 0
    return [float(row["loss"] or 0.0) for row in read_metrics(folder / "runs" / name / "metrics.csv")]


@pytest.mark.parametrize("architecture", ["llama", "falcon", "gpt_neox", "qwen3", "gemma3"])
@pytest.mark.parametrize("packing", ["none", "isolated", "shared_prefix"])
def test_fm01_cuda_gives_the_losses_of_the_cpu(architecture: str, packing: str, tmp_path: Path) -> None:
    data = {"packing": packing}
    want = run(tmp_path, architecture, "cpu", "cpu", data=data)
    assert run(tmp_path, architecture, "cuda", "cuda", data=data) == pytest.approx(want, rel=1e-3)


def test_one_seed_gives_one_first_adapter_on_every_device(tmp_path: Path) -> None:
    first = {}
    for device in ("cpu", "cuda"):
        run(tmp_path, "llama", device, device, training={"max_steps": 1, "optimizer": {"lr": 1e-30}})
        first[device] = load_file(tmp_path / "runs" / device / "adapter" / WEIGHTS_NAME)
    names = [name for name in first["cpu"] if "lora_A" in name]
    assert names and all(torch.equal(first["cpu"][name], first["cuda"][name]) for name in names)


def test_a_run_stopped_in_its_last_measurement_is_measured_on_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"evaluation": {"metrics": ["perplexity"]}, "data": {"validation": {"size": 4}}}
    run(tmp_path, "llama", "run", "cuda", **sections)
    results = tmp_path / "runs" / "run" / "results.json"
    want = json.loads(results.read_text())["after"]["metrics"]["perplexity"]
    results.write_text("{}")
    seen = []
    after = _Measure.after

    def noted(self: _Measure, module: FinetuneModule) -> None:
        seen.append({parameter.device.type for parameter in module.parameters()})
        after(self, module)

    monkeypatch.setattr(_Measure, "after", noted)
    run(tmp_path, "llama", "run", "cuda", **sections)
    assert seen == [{"cuda"}]
    assert json.loads(results.read_text())["after"]["metrics"]["perplexity"] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_every_precision_trains(quantization: str, precision: str, tmp_path: Path) -> None:
    training = {"max_steps": 8, "precision": precision, "gradient_checkpointing": True}
    losses = run(tmp_path, "llama", "run", "cuda", model={"quantization": quantization}, training=training)
    assert losses[-1] < losses[0]


def test_offloaded_activations_give_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 0)  # the tiny model has none that are worth it
    training = {"max_steps": 4, "precision": "bf16-mixed"}
    want = run(tmp_path, "llama", "kept", "cuda", training=training)
    got = run(tmp_path, "llama", "moved", "cuda", training={**training, "activation_offload": True})
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("packing", ["none", "isolated", "shared_prefix"])
def test_a_step_never_waits_for_the_gpu(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, watched = FinetuneModule.training_step, []

    def strict(self: FinetuneModule, batch: Any, batch_idx: int) -> None:
        if self.step == 0:  # what is done once may wait
            return step(self, batch, batch_idx)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched.append(batch.step)

    monkeypatch.setattr(FinetuneModule, "training_step", strict)
    run(tmp_path, "llama", "run", "cuda", data={"packing": packing}, training={"precision": "bf16-mixed"})
    assert watched == [1, 2, 3]


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "lion", "paged_lion_8bit", "adafactor"])
def test_every_optimizer_resumes(optimizer: str, tmp_path: Path) -> None:
    training = {"optimizer": {"name": optimizer, "lr": 1e-3}}
    whole = run(tmp_path, "llama", "run", "cuda", training=training)
    folder = tmp_path / "runs" / "run"
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > 2:
            shutil.rmtree(path)
    shutil.rmtree(folder / "adapter")
    assert run(tmp_path, "llama", "run", "cuda", training=training) == pytest.approx(whole, rel=1e-3)
    assert (folder / "adapter" / WEIGHTS_NAME).is_file()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (9, 3, 64), (71, 1, 64), (8, 2, 128)])
def test_the_flash_kernel_gives_what_the_dense_mask_gives(layout: Any, heads: int, kv_heads: int, size: int) -> None:
    torch.manual_seed(0)
    num_tokens = sum(group.num_tokens for group in layout) + 9
    shapes = [(1, heads, num_tokens, size), *[(1, kv_heads, num_tokens, size)] * 2, (1, heads, num_tokens, size)]
    *inputs, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    for tensor in inputs:
        tensor.requires_grad_()
    assert takes(inputs[0], inputs[2])
    got = varlen_attention(*inputs, layout, None)
    mask = dense_mask(layout, num_tokens, torch.device("cuda"))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    got_grads = torch.autograd.grad(got, inputs, grad)
    for ours, theirs in zip(got_grads, torch.autograd.grad(want, exact, grad.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=4e-2, atol=4e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("size", [64, 128])
def test_rotation_and_norm_of_a_gpu_equal_their_definitions(size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 300, 7, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, 1, 300, size, device="cuda").bfloat16()
    assert takes_rotation(x, cos, sin)
    exact = x.detach().double().requires_grad_()
    halves = torch.cat((-exact[..., size // 2 :], exact[..., : size // 2]), -1)
    hidden = torch.randn(300, 7 * size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight, hidden_64 = torch.randn(7 * size, device="cuda").bfloat16(), hidden.detach().double().requires_grad_()
    normal = hidden_64 * torch.rsqrt(hidden_64.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    pairs = [
        (rotate(x, cos, sin), x, exact * cos.double() + halves * sin.double(), exact),
        (rms_norm(hidden, weight, 1e-5), hidden, normal, hidden_64),
    ]
    for got, ours, want, theirs in pairs:
        grad = torch.randn_like(got)
        got_grad = torch.autograd.grad(got, ours, grad)[0]
        want_grad = torch.autograd.grad(want, theirs, grad.double())[0]
        for left, right in ((got, want), (got_grad, want_grad)):
            assert (left.double() - right).norm() < 1e-2 * right.norm()


def test_fp32_rows_never_write_all_scores_out() -> None:
    """A row of 8,192 tokens: the scores of 8 heads are 2.1 GB, in each direction."""
    torch.manual_seed(0)
    shapes = [(1, heads, 8192, 64) for heads in (8, 2, 2)]
    inputs = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with packed_row((Group(64, (128,) * 60),)):
        segment_attention(torch.nn.Module(), *inputs, None)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9


def test_many_samples_give_their_prefix_an_exact_gradient() -> None:
    torch.manual_seed(0)
    layout = (Group(16, (1,) * 512),)
    inputs = [torch.randn(1, 2, 528, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad = torch.randn(1, 2, 528, 64, device="cuda", dtype=torch.bfloat16) + 0.3
    *_, got = torch.autograd.grad(varlen_attention(*inputs, layout, None), inputs, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = dense_mask(layout, 528, torch.device("cuda"))
    *_, want = torch.autograd.grad(F.scaled_dot_product_attention(*exact, attn_mask=mask), exact, grad.double())
    assert (got.double() - want)[:, :, :16].norm() < 5e-3 * want[:, :, :16].norm()


SETTINGS = [
    ("ddp", "llama", {"quantization": "none"}, {"packing": "isolated"}, {}),
    ("fsdp", "falcon", {"quantization": "nf4"}, {"packing": "none"}, {"gradient_checkpointing": True}),
    ("fsdp", "llama", {"quantization": "none"}, {"packing": "shared_prefix"}, {"gradient_checkpointing": True}),
    ("fsdp", "llama", {"quantization": "nf4"}, {"packing": "isolated"}, {}),
]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize(("strategy", "architecture", "model", "data", "training"), SETTINGS)
def test_fm01_fm23_processes_on_gpus_give_the_losses_of_one_on_a_cpu(
    processes: int,
    cpu_offload: bool,
    strategy: str,
    architecture: str,
    model: dict[str, Any],
    data: dict[str, Any],
    training: dict[str, Any],
    tmp_path: Path,
) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"{torch.cuda.device_count()} GPUs")
    if cpu_offload and strategy == "ddp":
        pytest.skip("only a sharded base is offloaded")
    want = run(tmp_path, architecture, "cpu", "cpu", model=dict(model))
    recipe = json.loads((tmp_path / "cpu.yaml").read_text())
    recipe |= {"name": "gpus", "distributed": {"strategy": strategy, "cpu_offload": cpu_offload}}
    recipe["data"] |= data
    recipe["training"] |= training
    torchrun(processes, "-m", "finetune", "run", str(write_recipe(tmp_path / "gpus.yaml", recipe)))
    rows = read_metrics(tmp_path / "runs" / "gpus" / "metrics.csv")
    tolerance = 1e-3 if model["quantization"] == "none" else 2e-2
    assert [float(row["loss"] or 0.0) for row in rows] == pytest.approx(want, rel=tolerance)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("processes", "cpu_offload"), [(1, True), (2, False)])
def test_loading_never_holds_the_whole_base_on_a_gpu(
    quantization: str, processes: int, cpu_offload: bool, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"{torch.cuda.device_count()} GPUs")
    model = write_large_model(tmp_path / "large")
    recipe = tiny_recipe(
        tmp_path,
        model,
        write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(8)),
        model={"name": str(model), "quantization": quantization},
        training={"max_steps": 1, "precision": "bf16-mixed"},
    )
    recipe["distributed"] = {"strategy": "fsdp", "cpu_offload": cpu_offload}
    results = tmp_path / "results.jsonl"
    torchrun(processes, str(WORKER), str(results), str(write_recipe(tmp_path / "r.yaml", recipe)))
    size = (model / "model.safetensors").stat().st_size / (1 if quantization == "none" else 3.5)
    for line in map(json.loads, results.read_text().splitlines()):
        assert line["gpu_peak"] < 0.75 * size


def torchrun(processes: int, *arguments: str) -> None:
    """In processes of their own: this one keeps a CUDA context and no process group."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # An environment may have its packages in PYTHONPATH alone.
    paths = [str(WORKER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *launch, *arguments], env=environment, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
