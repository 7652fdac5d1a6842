"""The GPU benchmark's logic, tried with a tiny shape on the CPU; and that its full shape is Falcon-7B's."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig

from tests.scripts import ROOT, load_script

SCRIPT = "benchmarks/gpu.py"


@pytest.mark.slow
def test_the_command_measures_every_variant(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / SCRIPT), "--tiny", "--steps", "1", "--rounds", "1", "--json", str(figures)]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=True)
    report = json.loads(figures.read_text())
    assert [row["variant"] for row in report["variants"]] == ["bf16", "nf4", "nf4+checkpointing"]
    for row in report["variants"]:
        assert row["failure"] is None and row["tokens_per_second"] > 0
        assert row["computed_ratio"] < 1  # the preamble is shared
    assert done.stdout.count(" min |") == 3
    assert list(tmp_path.iterdir()) == [figures]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_an_environment_that_is_there_is_used_and_nothing_installed(target: str) -> None:
    command = ["make", "--no-print-directory", "-n", target, "PYTHON_ENV=/env/bin/python"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert "/env/bin/python " in line and ".venv" not in line


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_packages_of_an_environment_without_its_own_python_are_found() -> None:
    """Such as those that a GPU machine mounts: they are in PYTHONPATH alone."""
    command = ["make", "--no-print-directory", "bench-gpu", "PYTHON_ENV=printenv PYTHONPATH;:"]
    for before, want in (("/packages", ".:/packages"), ("", ".")):
        environment = {**os.environ, "PYTHONPATH": before}
        for name in ("MAKEFLAGS", "MAKEOVERRIDES"):
            environment.pop(name, None)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == want


def test_the_shape_is_falcon_7b() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FalconConfig(**load_script(SCRIPT).FALCON_7B))
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_921_720_704


def test_lengths_are_like_alpacas() -> None:
    script = load_script(SCRIPT)
    rows = list(script.alpaca_like_rows(["word"], 2_000))
    answers = [len(row["completion"].split()) for row in rows]
    assert 35 <= statistics.median(answers) <= 50 and 50 <= statistics.fmean(answers) <= 75
    assert all(row["prompt"].startswith(script.PREAMBLE) for row in rows)
