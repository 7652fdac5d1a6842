"""Falcon's attention by blocks: transformers' Falcon calls sdpa or its own eager code, and asks no registry.

Its sdpa gets a dense mask even where the row is causal, and fewer key heads than query heads without saying so, for
which torch has no fused kernel on CUDA: scores of all heads in fp32 would be kept for every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# The rotation by its name, which `models.fused` looks for.
from transformers.models.falcon.modeling_falcon import FALCON_ATTENTION_CLASSES, FalconAttention, apply_rotary_pos_emb

from finetune.kernels.attention import NAME as SEGMENTS


class SegmentsFalconAttention(FalconAttention):
    """FalconAttention without ALiBi, by blocks while the configuration says so; to decode it says something else."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output [B, T, E] for hidden states [B, T, E], and attention's weights where transformers computed it."""
        if self.config._attn_implementation != SEGMENTS:
            shared = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            found: tuple[torch.Tensor, torch.Tensor | None] = super().forward(hidden_states, *args, **shared, **kwargs)
            return found
        # Every key head stands behind the query heads that share it, then its values: so in all of Falcon's layouts.
        batch_size, num_tokens, _ = hidden_states.shape
        # One split, not three slices: a slice's gradient is a tensor of zeros of the whole's size.
        fused = self.query_key_value(hidden_states).view(batch_size, num_tokens, self.num_kv_heads, -1, self.head_dim)
        parts = fused.split((fused.shape[3] - 2, 1, 1), dim=3)
        query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in parts)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        out, _ = ALL_ATTENTION_FUNCTIONS[SEGMENTS](self, query, key, value, attention_mask)
        return self.dense(out.flatten(2)), None


def register() -> None:
    """Let Falcon build it for `segments`."""
    FALCON_ATTENTION_CLASSES[SEGMENTS] = SegmentsFalconAttention
