"""Counting what a step asks of a GPU: what can be tried with torch's CPU build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.scripts import ROOT, load_script

SCRIPT = "benchmarks/cuda_stand_in/count.py"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_a_cpu_build_of_torch_is_refused() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(ROOT / SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "torch here is built for CPUs" in done.stderr


def test_weights_that_nobody_reads_have_the_shapes_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    count = load_script(SCRIPT)
    count.write_sparse_model(tmp_path, count.gpu.TINY)
    size = (tmp_path / "model.safetensors").stat()
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype == torch.bfloat16 and not any(
        parameter.any() for parameter in model.parameters() if parameter.ndim > 1
    )
    assert size.st_size > sum(2 * parameter.numel() for parameter in model.parameters())
    assert set(count.OVERRIDES) == set(count.gpu.VARIANTS)
