"""A base model that is a GGUF file: converted once into the cache, or described by its header alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.console import say
from finetune.errors import FinetuneError, ModelError
from finetune.files import cache_dir, locked, new_directory, sha256_file, write_failure
from finetune.models.progress import library_bars


def convert_gguf(path: Path, folder: Path) -> Path:
    """Make the converted copy unless it is there."""
    if not folder.is_dir():
        with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _write_converted(path, folder)
    return folder


def describe_gguf(path: Path, folder: Path) -> Path:
    """The converted copy where it is there, else one that lacks its weights, made unless it is there."""
    described = cache_dir() / "descriptions" / folder.name
    if folder.is_dir():
        return folder
    if not described.is_dir():
        with locked(described.with_suffix(".lock")):
            if not described.is_dir():
                _write_description(path, described)
    return described


@contextmanager
def _naming_gguf(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ModelError(f"model.name: {path} cannot be read as a GGUF model: {error}") from error


def _write_converted(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    say(f"converting {path.name} to safetensors, once (about 20 s for 135 M parameters)")
    with _naming_gguf(path), library_bars():
        tokenizer = load_gguf_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.bfloat16)
    # The loader marks the model as quantized, and save_pretrained refuses such a model; its weights are plain by now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16)
    try:
        with new_directory(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "source.json").write_text(
                json.dumps({"gguf": path.name, "sha256": sha256_file(path)}), encoding="utf-8"
            )
    # safetensors and tokenizers have errors of their own for a write that failed.
    except Exception as error:
        raise FinetuneError(
            f"{folder}: cannot be written: {write_failure(error)}. {path.name} is converted there, once; "
            "make room, or set FINETUNE_CACHE to another folder"
        ) from error


def _write_description(path: Path, folder: Path) -> None:
    """`_write_converted` without weights; `config.json` is the same, byte for byte."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    say(f"reading configuration and tokenizer of {path.name}, once")
    with _naming_gguf(path):
        tokenizer = load_gguf_tokenizer(path)
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # What save_pretrained adds to the configuration of a model that it saves.
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    with new_directory(folder) as temporary:
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, which cuts numbers and names its special tokens as the file says."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    reader = GGUFReader(path)
    _split_digits(tokenizer, reader)
    # transformers 5.17 takes the first token of a llama's texts for the last one too, and leaves the padding out.
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        field = reader.get_field(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))
    return tokenizer


def _split_digits(tokenizer: Any, reader: Any) -> None:
    """Cut numbers into digits where the file's tokenizer does: transformers reads every byte-level one as GPT-2's.

    Source: llama.cpp, src/llama-vocab.cpp, the pre-tokenizers that begin with `\\p{N}`.
    """
    from tokenizers import pre_tokenizers

    kind = reader.get_field("tokenizer.ggml.pre")
    if kind is None or kind.contents() not in ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"):
        return
    rust = tokenizer.backend_tokenizer
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
