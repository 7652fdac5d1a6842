"""Go's own template library fills the derived Ollama templates; the texts are those of the chat templates."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune.data.template import TEMPLATES_DIR, render
from finetune.export.ollama import derive_template
from tests.export.test_ollama import GEMMA, LLAMA3, QWEN3, SMOLLM2, TOKENS
from tests.tiny import CHATML

pytestmark = [pytest.mark.loaders, pytest.mark.timeout(300)]

TEMPLATES = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    **{path.stem: path.read_text().strip() for path in TEMPLATES_DIR.glob("*.jinja")},
}
QUESTION = "Übersetze."
WITH_INPUT = "Translate {{ this }} `text`.\n\n### Input:\nDer Fuchs.\n\n### Input:\nDie Gans."


def conversations(*, with_system: bool) -> list[list[dict[str, Any]]]:
    """Questions with an input and without one, first and later, short and long, with a system prompt and without."""
    questions = [
        QUESTION,
        WITH_INPUT,
        "### Input:\nOne.",
        "One.\n\n### Input:",
        "ß" * 20_000,
        "ß" * 10_000 + WITH_INPUT,
    ]
    found = []
    for first in questions:
        user = {"role": "user", "content": first}
        answer = {"role": "assistant", "content": "2\n\nTwo."}
        found += [[user], *([user, answer, {"role": "user", "content": other}] for other in (QUESTION, WITH_INPUT))]
    system = {"role": "system", "content": "Be brief.\nBe kind."}
    return found + [[system, *messages] for messages in found] if with_system else found


def test_go_fills_the_templates_as_jinja_does(go: Path) -> None:
    jobs, wanted, names = [], [], []
    for name, source in TEMPLATES.items():

        def show(messages: list[dict[str, Any]], ask: bool, source: str = source) -> str:
            return render(source, TOKENS, messages, add_generation_prompt=ask)

        template = derive_template(show)
        system = "" if template.system_with_input else template.system
        for messages in conversations(with_system="system" in template.before):
            jobs.append({"template": template.go_template(), "system": system, "messages": messages})
            wanted.append(show(messages, True))
            names.append(name)
    cache = go.parents[2] / "cache"  # of Go's own library, compiled
    settings = {**os.environ, "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOCACHE": str(cache)}
    done = subprocess.run(
        [go, "run", Path(__file__).parent / "template.go"],
        input=json.dumps(jobs),
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    texts = json.loads(done.stdout)
    assert len(texts) == len(wanted) > 150 and "alpaca" in names
    for name, job, text, want in zip(names, jobs, texts, wanted, strict=True):
        assert text == want, (name, job["messages"])
