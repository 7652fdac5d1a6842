"""llama.cpp loads every GGUF file that is written, and computes and tokenizes as transformers does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from finetune.cli import main
from finetune.export.gguf_lora import write_lora
from finetune.export.gguf_model import load_model_config, write_model
from finetune.export.hub_publish import push_run
from tests.conftest import REPOSITORY
from tests.export.push_run import TOKEN, hub
from tests.export.test_gguf import WRITTEN, models, write_adapter
from tests.hub_double import HubDouble
from tests.loaders.conftest import Ask, Fact

pytestmark = [pytest.mark.loaders, pytest.mark.timeout(900)]
__all__ = ["hub", "models"]  # fixtures

PROMPT = [1, 60, 200, 17, 300, 5, 44, 9]
COUNT = 12
together = pytest.mark.xdist_group("fact")  # one process trains the fact
TEXTS = (
    "Hello, world! It's 2024-11-22, I'VE  paid 1234567 €.\n\n\tdef f(x): return x**2  # ok\r\n",
    "  two spaces, Überraschung — naïve façade… 東京 👋🏽 नमस्ते",
    "a\n\n\nb 3.14159 'tis CamelCase snake_case <|not|> [tag]",
)


def continued(model: Any, ids: list[int], count: int, stops: tuple[int, ...] = (2,)) -> list[int]:
    """The greedy continuation by transformers, cut where the turn ends."""
    with torch.no_grad():
        out = (
            model.eval()
            .generate(
                torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=list(stops), pad_token_id=2
            )[0, len(ids) :]
            .tolist()
        )
    return out[: next((at for at, token in enumerate(out) if token in stops), None)]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_architecture_computes_the_same(
    models: dict[str, Path], llama_cpp: Ask, name: str, tmp_path: Path
) -> None:
    write_model(models[name], tmp_path / "model.gguf", "f32", "tiny")
    model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    answer = llama_cpp(tmp_path / "model.gguf", [{"ids": PROMPT, "count": COUNT}])
    assert answer == [{"ids": continued(model, PROMPT, COUNT)}]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "falcon", "new_falcon"])
def test_fm28_an_adapter_of_every_architecture_does(
    models: dict[str, Path], llama_cpp: Ask, name: str, tmp_path: Path
) -> None:
    settings = {"use_rslora": True, "rank_pattern": {"o_proj|dense": 2}}
    adapted = write_adapter(tmp_path / "adapter", models[name], seed=3, **settings)
    write_model(models[name], tmp_path / "base.gguf", "f32", "tiny")
    write_lora(tmp_path / "adapter", load_model_config(models[name]), tmp_path / "lora.gguf", "f32", "tiny")
    with adapted.disable_adapter():
        bare = continued(adapted, PROMPT, COUNT)
    want = continued(adapted, PROMPT, COUNT)
    assert want != bare
    job = [{"ids": PROMPT, "count": COUNT}]
    assert llama_cpp(tmp_path / "base.gguf", job, lora=tmp_path / "lora.gguf") == [{"ids": want}]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3"])
def test_real_tokenizers_cut_text_the_same(real_tokenizers: Path, llama_cpp: Ask, name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizers / name)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_model(tmp_path / "model", tmp_path / "model.gguf", "f16", name)
    texts = [*TEXTS, f"{tokenizer.eos_token}\nuser {tokenizer.eos_token}"]
    answers = llama_cpp(tmp_path / "model.gguf", [{"text": text} for text in texts])
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    want = [saved(text, add_special_tokens=False).input_ids for text in texts]
    assert [answer["ids"] for answer in answers] == want


@together
def test_the_base_does_not_know_the_fact_and_the_lora_does(llama_cpp: Ask, fact: Fact, tmp_path: Path) -> None:
    assert main(["export", str(fact.run), "--to", "gguf-lora", "--out", str(tmp_path / "lora.gguf")]) == 0
    assert fact.answer not in ask(fact, llama_cpp, fact.base_gguf)
    assert fact.answer in ask(fact, llama_cpp, fact.base_gguf, tmp_path / "lora.gguf")


@together
def test_the_adapter_pulled_back_from_a_hub_does_too(
    llama_cpp: Ask, fact: Fact, hub: HubDouble, tmp_path: Path
) -> None:
    push_run(fact.run, "acme/fact")
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "export", "hf://acme/fact", "--to", "gguf-lora"],
        env={**hub.environment(TOKEN, tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert fact.answer in ask(fact, llama_cpp, fact.base_gguf, tmp_path / "export" / "fact-lora-f32.gguf")


@together
@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
def test_the_merged_model_knows_the_fact(llama_cpp: Ask, fact: Fact, type_name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert main(["export", str(fact.run), "--to", "gguf", "--type", type_name, "--out", str(path)]) == 0
    assert fact.answer in ask(fact, llama_cpp, path)


def ask(fact: Fact, llama_cpp: Ask, model: Path, lora: Path | None = None) -> str:
    """The answer to the fact's question; the prompt is cut into tokens by llama.cpp itself."""
    tokenizer = AutoTokenizer.from_pretrained(fact.merged)
    ids = llama_cpp(model, [{"text": fact.prompt}])[0]["ids"]
    assert ids == tokenizer(fact.prompt, add_special_tokens=False).input_ids
    return str(tokenizer.decode(llama_cpp(model, [{"ids": ids, "count": 24}], lora)[0]["ids"]))
