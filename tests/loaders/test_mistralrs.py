"""mistral.rs loads the adapter as PEFT wrote it, and the merged model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.export.merge_config import add_old_rope
from tests.loaders.conftest import Fact

pytestmark = [pytest.mark.loaders, pytest.mark.timeout(900)]

SCRIPT = """
import json, sys
from mistralrs import ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which

model, adapter, question = sys.argv[1:]
if adapter:
    which = Which.Lora(model_id=model, adapters=[LoraAdapter("fact", adapter)], dtype=ModelDType.F32)
else:
    which = Which.Plain(model_id=model, dtype=ModelDType.F32)
runner = Runner(which)
answers = []
for name in (["fact", None] if adapter else [None]):
    request = ChatCompletionRequest(
        model="default", messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0.0, adapter=name
    )
    answers.append(runner.send_chat_completion_request(request).choices[0].message.content)
print("ANSWERS " + json.dumps(answers))
"""


def ask(program: Path, model: Path, adapter: Path | str, question: str) -> list[str]:
    """What mistral.rs answers: with the adapter and without, or the model alone."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, adapter, question],
        env={**os.environ, "PYTHONPATH": str(program), "RAYON_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr[-3000:]
    answers: list[str] = json.loads(lines[-1].removeprefix("ANSWERS "))
    return answers


def test_the_adapter_knows_the_fact_and_the_base_does_not(fact: Fact, mistralrs: Path, tmp_path: Path) -> None:
    # transformers 5 writes the rope as it alone reads it.
    for file in fact.base.iterdir():
        (tmp_path / file.name).symlink_to(file)
    values = json.loads((fact.base / "config.json").read_text())
    add_old_rope(values)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(values))
    adapted, bare = ask(mistralrs, tmp_path, fact.run / "adapter", fact.question)
    assert fact.answer in adapted and fact.answer not in bare


def test_the_merged_model_knows_the_fact(fact: Fact, mistralrs: Path) -> None:
    assert fact.answer in ask(mistralrs, fact.merged, "", fact.question)[0]
