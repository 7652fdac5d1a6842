"""mistral.rs loads the adapter as PEFT wrote it, and the merged model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.export.hub_publish import push_run
from finetune.export.merge_config import add_old_rope
from finetune.recipe.hub_address import resolve_repo
from tests.export.push_run import hub
from tests.hub_double import HubDouble
from tests.loaders.conftest import Fact

pytestmark = [pytest.mark.loaders, pytest.mark.timeout(900), pytest.mark.xdist_group("fact")]
__all__ = ["hub"]  # a fixture

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


@pytest.fixture
def base(fact: Fact, tmp_path: Path) -> Path:
    """The base's directory; transformers 5 writes the rope as it alone reads it."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in fact.base.iterdir():
        (folder / file.name).symlink_to(file)
    values = json.loads((fact.base / "config.json").read_text())
    add_old_rope(values)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_adapter_knows_the_fact_and_the_base_does_not(mistralrs: Path, fact: Fact, base: Path) -> None:
    adapted, bare = ask(mistralrs, base, fact.run / "adapter", fact.question)
    assert fact.answer in adapted and fact.answer not in bare


def test_the_adapter_pulled_back_from_a_hub_does_too(
    mistralrs: Path, fact: Fact, base: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    push_run(fact.run, "acme/fact")
    assert fact.answer in ask(mistralrs, base, resolve_repo("hf://acme/fact", endpoint=hub.url), fact.question)[0]


def test_the_merged_model_knows_the_fact(mistralrs: Path, fact: Fact) -> None:
    assert fact.answer in ask(mistralrs, fact.merged, "", fact.question)[0]
