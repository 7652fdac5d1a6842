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
        self._causal_lm = causal_lm
        self._filled: DynamicCache | None = None
        self.length = 0
        length = _common_length(prompts)
        if length >= MIN_SHARED and takes_segments(causal_lm.config, max_length):
            cache = empty_cache(causal_lm)
            if cache is not None and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers):
                self._fill(cache, prompts[0][:length])

    def _fill(self, cache: DynamicCache, prefix: list[int]) -> None:
        ids = torch.tensor([prefix], device=self._causal_lm.get_input_embeddings().weight.device)
        last = {"logits_to_keep": 1} if self._causal_lm._supports_logits_to_keep() else {}
        self._causal_lm(input_ids=ids, past_key_values=cache, use_cache=True, **last)
        self._filled, self.length = cache, len(prefix)

    def cache(self, batch_size: int) -> DynamicCache | None:
        """A new cache for a batch that begins with it; None if the model has a cache of a kind of its own."""
        if self._filled is None:
            return empty_cache(self._causal_lm)
        cache = copy.deepcopy(self._filled)
        cache.batch_repeat_interleave(batch_size)
        return cache


def _common_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens several prompts begin with; each keeps at least one of its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b or at == most))
