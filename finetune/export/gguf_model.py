"""A merged model's directory becomes one GGUF file that llama.cpp loads: weights, keys, tokenizer, template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, get_tensor_name_map
from transformers import AutoConfig

from finetune.errors import ModelError
from finetune.export.gguf_architectures import Architecture, find_architecture, rope_factors, tensor_rows
from finetune.export.gguf_file import TYPES, GgufTensor, weight_type, write_gguf
from finetune.export.gguf_tokenizer import add_vocabulary, read_vocabulary
from finetune.export.merge_files import BaseFiles
from finetune.models.sources import ModelSource

_HEAD = "lm_head.weight"
# Buffers that older files carry and llama.cpp computes itself.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
_NOT_TEXT = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")


def write_model(folder: Path, path: Path, type_name: str, name: str) -> None:
    """Write the model of `folder` (transformers' format, safetensors) to `path` as GGUF of `type_name`.

    Memory stays at one tensor. `name` is what programs show. Of a model that reads images too: its text part.

    Raises:
        ModelError: the architecture or the tokenizer is not supported, or a file is missing.
        FinetuneError: the disk is too small, or a weight is not finite or too large for the type.
    """
    config = load_model_config(folder)
    architecture = find_architecture(config.get_text_config())
    tensors = list_tensors(folder, config, architecture, type_name)
    num_rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    vocabulary = read_vocabulary(folder, num_rows)
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[architecture.arch])
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(TYPES[type_name][1])
    architecture.add_keys(writer, config.get_text_config())
    add_vocabulary(writer, vocabulary)
    write_gguf(path, writer, tensors)


def load_model_config(folder: Path) -> Any:
    """The configuration of a model's directory.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{folder}: is not a model's directory: {error}") from error


def list_tensors(folder: Path, config: Any, architecture: Architecture, type_name: str) -> list[GgufTensor]:
    """Every tensor of the file, layer by layer; nothing is loaded yet.

    Raises:
        ModelError: a weight has no place in the architecture.
    """
    files = BaseFiles(ModelSource(str(folder), str(folder), None))
    text = config.get_text_config()
    found = []
    for name in sorted(files.tensors, key=_natural):
        own = text_name(name)
        if own is None or own.endswith(_BUFFERS) or (own == _HEAD and config.tie_word_embeddings):
            continue
        target = gguf_name(name, text, architecture)
        shape = files.tensors[name].shape

        def load(name: str = name, target: str = target) -> np.ndarray:
            return _transformed(files.read(name), name, target, text, architecture)

        found.append(GgufTensor(target, shape, weight_type(target, shape, type_name), load))
    factors = rope_factors(text) if architecture.add_rope_factors else None
    if factors is not None:
        found.append(GgufTensor("rope_freqs.weight", factors.shape, TYPES["f32"][0], lambda: factors))
    return found


def gguf_name(name: str, config: Any, architecture: Architecture) -> str:
    """llama.cpp's name of a weight.

    Raises:
        ModelError: it has none.
    """
    names = get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    own = text_name(name)
    found: str | None = None if own is None else names.get_name(own, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"GGUF: {name} has no place in llama.cpp's {MODEL_ARCH_NAMES[architecture.arch]}")
    return found


def text_name(name: str) -> str | None:
    """What the text model alone calls a weight of a model that reads images too; None for what is not of its text."""
    return None if _NOT_TEXT.search(name) else name.replace("language_model.", "", 1)


def _transformed(tensor: torch.Tensor, name: str, target: str, config: Any, architecture: Architecture) -> np.ndarray:
    values: np.ndarray = tensor.float().numpy()
    order = tensor_rows(architecture, name.rpartition(".")[0], config, values.shape[0])
    if order is not None:
        values = values[order]
    if architecture.norm_shift and target.endswith("norm.weight"):
        values = values + np.float32(architecture.norm_shift)
    return values


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
