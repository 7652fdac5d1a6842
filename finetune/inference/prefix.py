"""What all prompts begin with, such as a system prompt or examples: its keys and values are computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from finetune.inference.cache import GrowingLayer, empty_cache
from finetune.models.attention import takes_segments

# Shorter beginnings, such as a template's first tokens, are not worth a forward pass of their own.
MIN_SHARED = 16


class SharedPrefix:
    """The first tokens of all prompts; of none where that would gain nothing or might not be exact.

    Prompts of a batch are padded after it, so only models whose attention asks positions, not columns, have one: no
    ALiBi, and no sliding window within `max_length`, the longest that a prompt and its completion become.
    """

    def __init__(self, causal_lm: Any, prompts: Sequence[list[int]], max_length: int) -> None:
        self._cache = empty_cache(causal_lm)
        length = _common_length(prompts)
        if self._cache is None or length < MIN_SHARED or not takes_segments(causal_lm.config, max_length):
            return
        if all(type(layer) in (DynamicLayer, GrowingLayer) for layer in self._cache.layers):
            ids = torch.tensor([prompts[0][:length]], device=causal_lm.get_input_embeddings().weight.device)
            last = {"logits_to_keep": 1} if causal_lm._supports_logits_to_keep() else {}
            causal_lm(input_ids=ids, past_key_values=self._cache, use_cache=True, **last)

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return 0 if self._cache is None else self._cache.get_seq_length()

    def cache(self, batch_size: int) -> DynamicCache | None:
        """A new cache for a batch that begins with it; None if the model has a cache of a kind of its own."""
        cache = copy.deepcopy(self._cache)
        if cache is not None and self.length:
            cache.batch_repeat_interleave(batch_size)
        return cache


def _common_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens several prompts begin with; each keeps at least one of its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b or at == most))
