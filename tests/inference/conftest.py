"""A tiny tokenizer and Llama, a run directory made of them, and what a model looks like from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.data.template import load_template
from finetune.files import sha256_file
from finetune.models.adapters import attach_adapter, save_adapter, token_indices
from finetune.models.load import fit_vocabulary
from finetune.recipe.load import dump_recipe
from finetune.recipe.schema import Recipe

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """Bytes as tokens; as in many small chat models, pad and end of turn are the same token."""
    vocab = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rust = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def build_llama(**changes: Any) -> Any:
    """A random 2-layer Llama in fp32, in eval mode."""
    settings: dict[str, Any] = dict(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def llama() -> Any:
    return build_llama()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama and its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("base")
    build_llama().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_run(base_folder: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Builds a run's directory with an adapter in the folders named; returns it and the trained model."""

    def make(*places: str, name: str = "run", **changes: Any) -> tuple[Path, Any]:
        data = tmp_path / "train.jsonl"
        data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "model": {"name": str(base_folder), "attention": "segments"},
                "adapter": {"rank": 4},
                "data": {"sources": [{"path": str(data)}], "system": "Be brief."},
                "training": {"epochs": 1.0, "precision": "32-true"},
                "evaluation": {"max_new_tokens": 8},
            }
            | changes
        )
        run = tmp_path / name
        run.mkdir()
        (run / "recipe.yaml").write_text(dump_recipe(recipe))
        tokenizer, base = build_tokenizer(), build_llama()
        load_template(tokenizer, recipe.data)
        token_indices(recipe.adapter, tokenizer)
        fit_vocabulary(base, tokenizer, seed=recipe.training.seed)
        model = attach_adapter(base, recipe.adapter, tokenizer, seed=1)
        for number, place in enumerate(places):
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.2 + 0.1 * number)
                elif parameter.requires_grad and "lora_A" not in parameter_name:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            folder = run / place
            folder.mkdir(parents=True)
            save_adapter(model, folder)
            (folder / "recipe.yaml").write_text(dump_recipe(recipe))
            if place == "adapter":
                tokenizer.save_pretrained(folder)
            else:
                files = {
                    file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in folder.iterdir()
                }
                (folder / "manifest.json").write_text(json.dumps({"files": files}))
        return run, model.eval()

    return make
