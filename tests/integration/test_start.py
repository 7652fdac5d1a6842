"""What a run does before its first step, and what it no longer has to: no clock, but what it imported and said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import tiny_recipe, write_recipe

# Prints the modules that are there when training ends.
PROGRAM = """
import json, sys
from finetune.commands import run
record = run._record_training
def noted(*arguments):
    print(json.dumps(list(sys.modules)), flush=True)
    record(*arguments)
run._record_training = noted
from finetune.cli import main
sys.exit(main(sys.argv[1:]))
"""
# Each takes 0.2 s or more: torch's compiler, numpy's masked arrays, and what no step needs.
SLOW = ("torch._inductor.compile_fx", "numpy.ma", "datasets", "pandas", "pyarrow", "sklearn", "scipy", "wandb")


def test_a_start_imports_nothing_for_nothing_and_quantizes_once(folder: Path, tmp_path: Path) -> None:
    training = {"max_steps": 1, "precision": "bf16-mixed"}
    model = {"name": str(folder / "model"), "quantization": "nf4"}
    recipe = tiny_recipe(tmp_path, folder / "model", folder / "rows.jsonl", model=model, training=training)
    path = write_recipe(tmp_path / "r.yaml", recipe)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FINETUNE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PROGRAM, "run", str(path), "--fresh"]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        for _ in range(2)
    )
    assert "to nf4, once" in first.stderr and "to nf4, once" not in second.stderr
    modules = json.loads(second.stdout.splitlines()[0])
    assert "torch" in modules and not set(SLOW) & set(modules)
    assert "Failed to load" not in second.stderr  # advice of bitsandbytes
    losses = [next(line for line in done.stderr.splitlines() if "loss" in line) for done in (first, second)]
    assert losses[0].partition("  lr")[0] == losses[1].partition("  lr")[0]
