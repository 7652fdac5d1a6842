"""The model without its weights: every module and shape, on the meta device.

What it answers (which layers an adapter reaches, how many parameters it trains, what a step keeps in memory) needs
the configuration alone, so it is known for a 70B model on a laptop.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from finetune.errors import ModelError, first_line
from finetune.models.adapters import attach_adapter, require_names
from finetune.models.attention import loadable_attention
from finetune.models.load import base_dtype, register_attention, use_plain_linears
from finetune.recipe.schema import LoraSection, ModelSection


def build_skeleton(
    config: Any, model: ModelSection, *, precision: str, attention_name: str = "sdpa", num_layers: int | None = None
) -> Any:
    """The base on the meta device, frozen and in training mode; with `num_layers`, only so many decoder layers.

    Raises:
        ModelError: if transformers has no causal language model for the configuration.
    """
    register_attention()
    use_plain_linears()
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if num_layers is not None:
        keep_layers(config, num_layers)
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                config,
                dtype=base_dtype(model, precision),
                attn_implementation=loadable_attention(config, attention_name),
                trust_remote_code=model.trust_remote_code,
            )
    except Exception as error:
        raise ModelError(
            f"model.name: no causal language model for {config.model_type}: {first_line(error)}"
        ) from error
    base.train()
    base.requires_grad_(False)
    base.config.use_cache = False
    return base


def adapt_skeleton(base: Any, adapter: LoraSection, tokenizer: Any) -> PeftModel:
    """`base` with the recipe's adapter, on the meta device too.

    Raises:
        ModelError: if a target is not in the model; the message lists what is.
    """
    plain = adapter.model_copy(update={"init": "default"})  # other initial values need weights; shapes are the same
    with torch.device("meta"):
        return attach_adapter(base, plain, tokenizer, seed=0)


def check_names(config: Any, model: ModelSection, adapter: LoraSection, *, precision: str) -> None:
    """Look for the modules that the adapter's section names, before any weight is loaded.

    Raises:
        ModelError: if one is not in the model; the message lists what is.
    """
    lists = (adapter.exclude_modules, adapter.modules_to_save, adapter.rank_pattern, adapter.alpha_pattern)
    if adapter.target_modules != "all-linear" or any(lists):
        require_names(build_skeleton(config, model, precision=precision), adapter)


def target_counts(adapted: PeftModel) -> dict[str, int]:
    """How many modules of each short name the adapter reaches."""
    names = [name.rpartition(".")[2] for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    return dict(Counter(names))


def keep_layers(config: Any, num_layers: int) -> None:
    """Shorten a configuration, and its lists of one entry a layer."""
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers


def is_quantized_linear(module: torch.nn.Module, name: str, head: Any) -> bool:
    """Whether bitsandbytes replaces the layer: every linear one but the output head, adapters apart."""
    return isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
