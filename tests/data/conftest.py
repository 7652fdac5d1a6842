"""Tiny tokenizers with the special tokens of well-known models, and templates in their style."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.data.prepare import PreparedData, prepare_data
from finetune.data.template import ChatTemplate, load_template
from finetune.recipe.schema import DataSection

HERE = Path(__file__).parent

CORPUS = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\n### Input:\n### Response:\n",
    "user assistant system model What is the capital of France? The capital of France is Paris.",
    "\n\n\n \n\n hello world  good morning \n - one\n - two\n\n\n",
] * 50

# With the tokens of the style qwen3.
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Llama 3's and Qwen's: newlines are one token before a word too; GPT-2's would cut the last one off.
NEWLINES_TOGETHER = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

STYLES: dict[str, dict[str, Any]] = {
    "llama3": {
        "bos": "<|begin_of_text|>",
        "eos": "<|end_of_text|>",
        "more": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "newlines_together": True,
    },
    "gemma": {"bos": "<bos>", "eos": "<eos>", "more": ["<start_of_turn>", "<end_of_turn>"]},
    "mistral": {"bos": "<s>", "eos": "</s>", "more": ["[INST]", "[/INST]"], "metaspace": True},
    "qwen3": {
        "eos": "<|im_end|>",
        "more": ["<|im_start|>", "<|endoftext|>"],
        "plain": ["<think>", "</think>"],
        "pad": "<|endoftext|>",
        "newlines_together": True,
    },
    "base": {"bos": "<s>", "eos": "</s>", "more": [], "template": False},
    "gpt2": {"eos": "<|endoftext|>", "more": [], "template": False},
}


def build_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of 400 tokens; a BOS is added to plain text; pad is EOS where no other is set."""
    spec = STYLES[style]
    special = [token for token in (spec.get("bos"), spec["eos"], *spec["more"]) if token]
    rust = Tokenizer(models.BPE())
    if spec.get("metaspace"):
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        rust.decoder = decoders.Metaspace()
        alphabet = sorted(set("".join(CORPUS)) | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="newlines_together" not in spec)
        split = pre_tokenizers.Split(NEWLINES_TOGETHER, "isolated")
        rust.pre_tokenizer = byte_level if byte_level.use_regex else pre_tokenizers.Sequence([split, byte_level])
        rust.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(CORPUS, trainer)
    rust.add_tokens([AddedToken(token, normalized=False) for token in spec.get("plain", [])])
    bos = spec.get("bos")
    if bos:
        rust.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, rust.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token=bos, eos_token=spec["eos"], pad_token=spec.get("pad", spec["eos"])
    )
    if spec.get("template", True):
        tokenizer.chat_template = (HERE / "templates" / f"{style}.jinja").read_text(encoding="utf-8").strip()
    return tokenizer


@pytest.fixture(scope="session")
def saved_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every style's tokenizer, saved."""
    root = tmp_path_factory.mktemp("tokenizers")
    for style in STYLES:
        build_tokenizer(style).save_pretrained(root / style)
    return {style: root / style for style in STYLES}


@pytest.fixture
def tokenizer_of(saved_tokenizers: dict[str, Path]) -> Callable[[str], PreTrainedTokenizerBase]:
    """A fresh tokenizer of a style, as it loads from its folder."""
    return lambda style: AutoTokenizer.from_pretrained(saved_tokenizers[style])


@pytest.fixture
def section(tmp_path: Path) -> Callable[..., DataSection]:
    """A data section over rows that are written to rows.jsonl."""

    def make(rows: list[Any] | None = None, *, name: str = "rows.jsonl", **keys: Any) -> DataSection:
        source = dict(keys.pop("source", {}))
        if rows is not None:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        source.setdefault("path", str(tmp_path / name))
        return DataSection.model_validate({"sources": [source], **keys})

    return make


def prepare(tokenizer: PreTrainedTokenizerBase, data: DataSection, seed: int = 0) -> tuple[PreparedData, ChatTemplate]:
    template = load_template(tokenizer, data)
    return prepare_data(data, tokenizer, template, seed=seed), template


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A messages row: user and assistant by turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


def print_today(template: str) -> str:
    """A template that opens with the date as Llama 3.2's does."""
    start = "{% if not date_string is defined %}{% if strftime_now is defined %}"
    start += "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ bos_token }}{{ date_string }}"
    return start + template.replace("{{- bos_token }}", "")
