"""Tiny models of real architectures, a tiny tokenizer and tiny data: real files that the real code loads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "the red fox ran over a small green hill and saw seven old boats on the slow river while rain fell "
    "count add tell name give write three nine forty answer question number word list city tree house"
)
WORDS = TEXT.split()
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SWIGLU = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}


def _config(name: str, **values: Any) -> Any:
    return getattr(transformers, name)(vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=2, **values)


def _gemma3_images() -> Any:
    """Gemma 3 as published from 4B on: text and images; its encoder has more layers than its decoder."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config=CONFIGS["gemma3"](),
        vision_config=transformers.SiglipVisionConfig(**vision, image_size=8, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=317,
        eoi_token_index=318,
        image_token_index=319,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("LlamaConfig", **SWIGLU),
    "tied_llama": lambda: _config("LlamaConfig", **SWIGLU, tie_word_embeddings=True),
    # Heads as wide as the native kernels take them.
    "wide_llama": lambda: _config("LlamaConfig", **{**SWIGLU, "hidden_size": 64, "head_dim": 32}),
    "mistral": lambda: _config("MistralConfig", **SWIGLU, sliding_window=None),
    "qwen3": lambda: _config("Qwen3Config", **SWIGLU),
    "gemma3": lambda: _config("Gemma3TextConfig", **SWIGLU, sliding_window=64, query_pre_attn_scalar=8),
    # Scores are capped, which neither blocks nor torch's sdpa compute.
    "gemma2": lambda: _config("Gemma2Config", **SWIGLU, sliding_window=64, query_pre_attn_scalar=8),
    "gemma3_images": _gemma3_images,
    "falcon": lambda: _config("FalconConfig", **SIZES, multi_query=True, parallel_attn=True, alibi=False, bias=False),
    "gpt_neox": lambda: _config("GPTNeoXConfig", **SIZES, intermediate_size=64),
}


def write_tokenizer(folder: Path, *, template: str | None = CHATML) -> Any:
    """A byte-level BPE of 320 tokens whose pad token is its end-of-sequence token, as SmolLM2's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def write_model(folder: Path, architecture: str, *, template: str | None = CHATML, seed: int = 0) -> Path:
    """A random fp32 model and its tokenizer; the same bytes for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    write_tokenizer(folder, template=template)
    return folder


def sentence(rng: random.Random, shortest: int, longest: int) -> str:
    """Some words."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, longest)))


def alpaca_rows(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, str]]:
    """Rows of ragged length; half of them with an input."""
    rng = random.Random(seed)
    return [
        {
            "instruction": sentence(rng, 2, longest),
            "input": sentence(rng, 1, 4) if index % 2 else "",
            "output": sentence(rng, 1, longest),
        }
        for index in range(count)
    ]


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one turn under a common system prompt."""
    return [
        {
            "messages": [
                {"role": "system", "content": "count the words and tell the number of them in the river city"},
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in alpaca_rows(count, seed)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """JSON is YAML too."""
    path.write_text(json.dumps(recipe, indent=1))
    return path


def tiny_recipe(folder: Path, model: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """A recipe for fp32 on CPU; keyword arguments replace or extend its sections."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"name": str(model)},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"sources": [{"path": str(data)}], "max_seq_len": 128, "num_workers": 0},
        "training": {
            "max_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "32-true",
            "optimizer": {"lr": 1e-2},
        },
        "distributed": {"accelerator": "cpu"},
        "evaluation": {"metrics": [], "num_samples": 0, "before": False},
        "logging": {"every_steps": 1},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values} if isinstance(values, dict) else values
    return recipe
