"""A causal language model as parts: the decoder and its layers, and the head that turns hidden states into logits.

Training computes logits at supervised positions only, so it calls the parts apart and must repeat what a
model does to its logits. `check_head` compares both ways on the loaded model, so an unknown model is
refused instead of trained on a wrong loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from finetune.errors import ModelError
from finetune.kernels.attention import NAME as SEGMENTS
from finetune.kernels.cross_entropy import chunked_cross_entropy


def decoder_of(causal_lm: Any) -> torch.nn.Module:
    """The module that maps input ids to hidden states [B, T, D].

    Raises:
        ModelError: if the model does not tell.
    """
    decoder = causal_lm.get_decoder()
    # ModernBERT calls its head the decoder; Llama 4's text model answers with itself.
    if decoder is causal_lm or isinstance(decoder, torch.nn.Linear):
        decoder = getattr(causal_lm, "model", None)
    if not isinstance(decoder, torch.nn.Module):
        raise ModelError(f"model.name: {type(causal_lm).__name__} does not tell its decoder from its head")
    return decoder


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The transformer blocks of a model: the longest list of modules in its decoder, not in an image encoder.

    Lists within a list are not looked at: a block may have more experts than the model has blocks.

    Raises:
        ModelError: if there is none.
    """
    decoder = decoder_of(model) if hasattr(model, "get_decoder") else model
    lists = list(_outermost_lists(decoder))
    if not lists:
        raise ModelError(f"model.name: {type(decoder).__name__} holds no list of transformer blocks")
    return max(lists, key=len)


def _outermost_lists(module: torch.nn.Module) -> Iterator[torch.nn.ModuleList]:
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def checkpoint_layers(causal_lm: Any, wanted: bool | int) -> None:
    """Recompute in the backward pass what the decoder layers computed: all (True) or the first `wanted` of them.

    Raises:
        ModelError: if there are not so many.
    """
    if wanted is False:
        return
    causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    layers = decoder_layers(causal_lm)
    if wanted is True:
        return
    if wanted > len(layers):
        raise ModelError(
            f"training.gradient_checkpointing: {wanted} layers, but the model has {len(layers)}; use true for all"
        )
    for layer in layers[wanted:]:
        for module in layer.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]


def head_logits(causal_lm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] of hidden states [..., D], with the model's own scale and soft cap."""
    logits: torch.Tensor = causal_lm.get_output_embeddings()(hidden)
    config = causal_lm.config.get_text_config()
    # Cohere multiplies, Granite divides; Gemma 2 and later caps.
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def plain_head_weight(causal_lm: Any) -> torch.Tensor | None:
    """The head's frozen weight [V, D] where logits are the product with it and nothing else."""
    head: torch.nn.Module = causal_lm.get_output_embeddings()
    config = causal_lm.config.get_text_config()
    changed = any(
        getattr(config, name, None) is not None for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    # The class itself: an adapter's layer, or a quantized one, is a Linear too.
    if changed or type(head) is not torch.nn.Linear:
        return None
    return head.weight if getattr(head, "bias", None) is None and not head.weight.requires_grad else None


def supervised_loss(
    causal_lm: Any, hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy (fp32 scalar) at `positions` [N] of hidden states [B, T, D] seen as [B * T, D].

    `targets` [N] are token ids. The head's trained parameters get their gradient too.
    """
    head: torch.nn.Module = causal_lm.get_output_embeddings()
    return chunked_cross_entropy(
        hidden.flatten(0, 1).index_select(0, positions),
        targets,
        lambda part: head_logits(causal_lm, part),
        [parameter for parameter in head.parameters() if parameter.requires_grad],
        head.weight.shape[0],  # type: ignore[arg-type,index]
        plain_head_weight(causal_lm),
    )


@contextmanager
def first_blocks_alone(causal_lm: Any, count: int = 1) -> Iterator[None]:
    """The model without its other blocks, which cost time and would show nothing new."""
    blocks = decoder_layers(causal_lm)
    others = list(blocks[count:])
    del blocks[count:]
    try:
        yield
    finally:
        blocks.extend(others)


@contextmanager
def naming_attention(causal_lm: Any) -> Iterator[None]:
    """Within this, what block attention refuses of a model is the user's to change.

    Raises:
        ModelError: in place of the kernel's error.
    """
    try:
        yield
    except NotImplementedError as error:
        attention, kind = causal_lm.config._attn_implementation, causal_lm.config.model_type
        if attention != SEGMENTS:
            raise
        raise ModelError(
            f"model.attention: {attention} cannot compute {kind}'s attention ({error}); use model.attention: eager"
        ) from error


@torch.no_grad()
def check_head(causal_lm: Any, name: str) -> None:
    """Compare decoder and head called apart with the model's own forward on a few tokens, by the first block alone.

    Raises:
        ModelError: if they differ: the model does something to its logits that `head_logits` does not know; or if
            the model was loaded with an attention that cannot compute its own.
    """
    device = next(causal_lm.parameters()).device
    ids = torch.arange(3, 11, device=device)[None] % causal_lm.config.get_text_config().vocab_size
    with first_blocks_alone(causal_lm), naming_attention(causal_lm):
        want = causal_lm(input_ids=ids, use_cache=False).logits
        got = head_logits(causal_lm, decoder_of(causal_lm)(input_ids=ids, use_cache=False).last_hidden_state)
    # Same operations in the same order: equal but for the rounding of a different product shape.
    scale = want.abs().max().clamp(min=1e-6)
    if ((got - want).abs().max() / scale).item() > 1e-2:
        raise ModelError(
            f"model.name: {name} changes its logits after the head in a way that is not known here, "
            "so its loss would be wrong; please report the model"
        )
