"""On CUDA: the same runs as on the CPU, and the same losses up to the device's rounding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finetune.cli import main
from finetune.kernels.layout import Group, dense_mask
from finetune.kernels.varlen import takes, varlen_attention
from finetune.models.adapters import WEIGHTS_NAME
from finetune.training.metrics import read_metrics
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


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_every_precision_trains(quantization: str, precision: str, tmp_path: Path) -> None:
    training = {"max_steps": 8, "precision": precision, "gradient_checkpointing": True}
    losses = run(tmp_path, "llama", "run", "cuda", model={"quantization": quantization}, training=training)
    assert losses[-1] < losses[0]


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
    assert takes(inputs[0])
    got = varlen_attention(*inputs, layout, None)
    mask = dense_mask(layout, num_tokens, torch.device("cuda"))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    got_grads = torch.autograd.grad(got, inputs, grad)
    for ours, theirs in zip(got_grads, torch.autograd.grad(want, exact, grad.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=4e-2, atol=4e-2 * float(theirs.abs().max()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_gpus_shard_the_base(tmp_path: Path) -> None:
    """In processes of their own: this one keeps a CUDA context and no process group."""
    import subprocess
    import sys

    write_model(tmp_path / "llama", "llama")
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(24))
    recipe = tiny_recipe(tmp_path, tmp_path / "llama", tmp_path / "rows.jsonl", name="fsdp", distributed={})
    recipe["distributed"] = {"strategy": "fsdp", "devices": 2}
    path = write_recipe(tmp_path / "fsdp.yaml", recipe)
    subprocess.run([sys.executable, "-m", "finetune", "run", str(path)], check=True, timeout=300)
