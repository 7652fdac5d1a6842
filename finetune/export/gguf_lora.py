"""An adapter in PEFT's format becomes a GGUF LoRA, which llama.cpp adds to the GGUF of the base model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys
from safetensors import SafetensorError, safe_open

from finetune.errors import ModelError
from finetune.export.gguf_architectures import Architecture, find_architecture, tensor_rows
from finetune.export.gguf_file import GgufTensor, weight_type, write_gguf
from finetune.export.gguf_model import gguf_name
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME, init_off_the_base

_REMEDY = "merge it (finetune merge RUN) and export the merged model (--to gguf)"


@dataclass(frozen=True)
class Pair:
    """The two matrices of one adapted module: the change of its weight is scale x B A."""

    module: str  # the module's name in the base model
    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scale: float


def write_lora(adapter: Path, config: Any, path: Path, type_name: str, name: str) -> None:
    """Write the adapter of a model with configuration `config` to `path`.

    llama.cpp scales every pair by one alpha for the file over the pair's own rank; what else an adapter's scale
    depends on (rsLoRA, rank and alpha patterns) is multiplied into B, so the product is the same.

    Raises:
        ModelError: the architecture is not supported, or the adapter holds what a GGUF LoRA cannot.
    """
    text = config.get_text_config()
    architecture = find_architecture(text)
    settings = read_settings(adapter)
    pairs = read_pairs(adapter, settings)
    if any(pair.module == "lm_head" for pair in pairs) and config.tie_word_embeddings:
        raise ModelError(f"{adapter}: changes lm_head, which this model shares with its embeddings; {_REMEDY}")
    alpha = float(settings["lora_alpha"])
    tensors = [tensor for pair in pairs for tensor in _pair_tensors(pair, alpha, text, architecture, type_name)]
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[architecture.arch])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    write_gguf(path, writer, tensors)


def read_settings(adapter: Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter.

    Raises:
        ModelError: there is none, it is no LoRA, or it fits a changed base only.
    """
    path = adapter / CONFIG_NAME
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as an adapter's configuration: {error}") from error
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type {settings.get('peft_type')} is not LORA; {_REMEDY}")
    if init := init_off_the_base(settings):
        raise ModelError(
            f"{path}: init_lora_weights {init} took its initial values off the base's weights, and the base's GGUF has "
            f"them still; {_REMEDY}"
        )
    return settings


def read_pairs(adapter: Path, settings: dict[str, Any]) -> list[Pair]:
    """The adapter's matrices, sorted by module.

    Raises:
        ModelError: it holds something else: DoRA, whole modules, embeddings, biases.
    """
    path = adapter / WEIGHTS_NAME
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if ".base_layer." in name:  # PEFT adds the unchanged weight of an adapted head
                    continue
                module, part = _split_name(name, path)
                found.setdefault(module, {})[part] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as an adapter: {error}") from error
    half = [module for module, parts in found.items() if len(parts) != 2]
    if half or not found:
        raise ModelError(f"{path}: is damaged: {half[0] if half else 'it'} has no pair of matrices")
    return [
        Pair(module, parts["A"], parts["B"], module_scale(settings, module, parts["A"].shape[0]))
        for module, parts in sorted(found.items())
    ]


def module_scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A with for this module of that rank.

    Source: peft, tuners/lora/layer.py (`update_layer`) and utils/other.py (`get_pattern_key`).
    """
    from peft.utils.other import get_pattern_key

    patterns = settings.get("alpha_pattern") or {}
    key = get_pattern_key(patterns.keys(), module)
    alpha = float(patterns.get(key, settings["lora_alpha"]))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _split_name(name: str, path: Path) -> tuple[str, str]:
    bare = name.removeprefix("base_model.model.")
    for part in ("A", "B"):
        if bare.endswith(f".lora_{part}.weight"):
            return bare.removesuffix(f".lora_{part}.weight"), part
    if "lora_magnitude_vector" in name:
        what = "a DoRA adapter"
    elif "lora_embedding" in name or "token_adapter" in name:
        what = "an adapter of embeddings"
    else:
        what = f"an adapter with {bare} (modules_to_save, or biases)"
    raise ModelError(f"{path}: is {what}, which a GGUF LoRA cannot hold; {_REMEDY}")


def _pair_tensors(
    pair: Pair, alpha: float, config: Any, architecture: Architecture, type_name: str
) -> list[GgufTensor]:
    target = gguf_name(f"{pair.module}.weight", config, architecture)
    rank = pair.a.shape[0]
    factor = pair.scale / (alpha / rank)

    def load_a() -> np.ndarray:
        values: np.ndarray = pair.a.float().numpy()
        return values

    def load_b() -> np.ndarray:
        values: np.ndarray = pair.b.float().numpy()
        order = tensor_rows(architecture, pair.module, config, values.shape[0])
        values = values if order is None else values[order]
        return values if factor == 1.0 else values * np.float32(factor)

    return [
        GgufTensor(f"{target}.{part}", tuple(shape), weight_type(target, shape, type_name), load)
        for part, shape, load in (("lora_a", pair.a.shape, load_a), ("lora_b", pair.b.shape, load_b))
    ]
