"""What has to change on a model while it infers, each change undone exactly on leaving.

`inference_mode` is for any forward pass without training; `decoding` adds what a key-value cache needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig

from finetune.kernels.attention import NAME as SEGMENTS
from finetune.models.attention import loadable_attention
from finetune.models.whole_modules import cast_whole_modules

# Attention that cannot decode: `segments` takes no mask and no cache, flex compiles for every length.
_TRAINING_ATTENTION = (SEGMENTS, "flex_attention")


def base_of(model: Any) -> Any:
    """The causal language model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def inference_mode(model: torch.nn.Module) -> Iterator[None]:
    """Within this, no gradients, no dropout, no gradient checkpointing; the weights stay fit for training.

    4-bit layers stay in training mode, which for them means: do not repack. In eval mode on CPU bitsandbytes
    repacks their weights in place, after which they neither train nor shard; a product is no faster for it.
    """
    flags = [(module, module.training) for module in model.modules()]
    # vars, not getattr: a wrapper answers with its inner model's attributes.
    checkpointing = [module for module, _ in flags if vars(module).get("gradient_checkpointing") is True]
    whole: list[RemovableHandle] = []
    try:
        for module, _ in flags:
            module.training = isinstance(module, Linear4bit)
        for module in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        whole = cast_whole_modules(model)
        with torch.no_grad():
            yield
    finally:
        for handle in whole:
            handle.remove()
        for module, training in flags:
            module.training = training
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def decoding(model: torch.nn.Module) -> Iterator[None]:
    """`inference_mode` with a key-value cache: an attention that knows it, nothing compiled, no defaults."""
    with ExitStack() as stack:
        stack.enter_context(inference_mode(model))
        stack.enter_context(_decoding_attention(model))
        stack.enter_context(_own_generation_config(model))
        if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
            # Compiled for training's shapes; every new length would compile again.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # The last position of every prompt is a strided view, for which torch copies the head's weight once
        # per prompt: 2.5 s for 32 prompts and a vocabulary of 49k on two cores.
        hook = base_of(model).get_output_embeddings().register_forward_pre_hook(_contiguous_input)
        stack.callback(hook.remove)
        yield


def _contiguous_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


@contextmanager
def _decoding_attention(model: torch.nn.Module) -> Iterator[None]:
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if config is not None}
    switched = [
        (config, name)
        for config in configs.values()
        if (name := getattr(config, "_attn_implementation", None)) in _TRAINING_ATTENTION
    ]
    use_cache = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    base = base_of(model)
    decoding_name = loadable_attention(base.config, "sdpa", type(base))
    try:
        for config, _ in switched:
            config._attn_implementation = decoding_name
        for config, _ in use_cache:
            config.use_cache = True
        yield
    finally:
        for config, name in switched:
            config._attn_implementation = name
        for config, value in use_cache:
            config.use_cache = value


@contextmanager
def _own_generation_config(model: torch.nn.Module) -> Iterator[None]:
    """transformers fills what a generation config leaves open from the model's own: here an empty one."""
    owners = {id(owner): owner for owner in (model, base_of(model)) if "generation_config" in vars(owner)}
    found = [(owner, owner.generation_config) for owner in owners.values()]
    try:
        for owner, _ in found:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in found:
            owner.generation_config = config
