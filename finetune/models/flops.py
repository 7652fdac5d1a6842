"""The arithmetic that training an adapter needs: what a step's speed is measured against.

Counted are products of matrices, a multiply-add as two operations: the base forward and backward with respect to its
inputs, adapters and other trained weights also with respect to themselves, attention over the pairs of tokens that see
each other, the head at supervised positions. Left out is what an implementation adds: padding, recomputed activations,
logits that nobody asked for, masked pairs, casts, norms. Layers other than attention and linear ones count nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from finetune.kernels.layout import RowLayout, attention_blocks
from finetune.models.heads import decoder_of


@dataclass(frozen=True)
class TrainingWork:
    """Weights by how often training multiplies with them."""

    frozen: int  # of linear layers that every token passes
    trained: int  # of adapters and trained linear layers that every token passes
    head_frozen: int  # of the head, which only supervised positions need
    head_trained: int
    attention_width: int  # query heads x head size, summed over the layers


@dataclass(frozen=True)
class TokenCounts:
    """What a step's rows hold, padding left out."""

    tokens: int  # computed once each: a shared prefix counts once a row
    pairs: int  # (query, key) pairs that attend
    supervised: int

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.tokens + other.tokens, self.pairs + other.pairs, self.supervised + other.supervised)


def training_work(model: PeftModel) -> TrainingWork:
    """The weights of an adapted model, by use."""
    base: Any = model.get_base_model()
    head = set(base.get_output_embeddings().modules())
    counts = {(in_head, trained): 0 for in_head in (False, True) for trained in (False, True)}
    for name, module in (*decoder_of(base).named_modules(), *base.get_output_embeddings().named_modules()):
        # The copy that a trained module replaces is never called.
        if "original_module" not in name and (size := _linear_size(module)):
            counts[module in head, module.weight.requires_grad] += size
    text = base.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = text.num_hidden_layers * text.num_attention_heads * head_size
    return TrainingWork(counts[False, False], counts[False, True], counts[True, False], counts[True, True], width)


def needed_flops(work: TrainingWork, counts: TokenCounts) -> int:
    """Operations of forward and backward over rows that hold `counts`.

    4 a token for a frozen weight (forward, gradient of the input), 6 for a trained one; 12 a pair and unit of attention
    width: two products forward, four backward.
    """
    layers = (4 * work.frozen + 6 * work.trained) * counts.tokens
    head = (4 * work.head_frozen + 6 * work.head_trained) * counts.supervised
    return layers + head + 12 * work.attention_width * counts.pairs


def packed_counts(layout: RowLayout, supervised: int) -> TokenCounts:
    """The counts of a packed row."""
    tokens = sum(group.num_tokens for group in layout)
    pairs = 0
    for block in attention_blocks(layout, tokens):
        rows, columns = block.q_end - block.q_start, block.k_end - block.k_start
        pairs += rows * (rows + 1) // 2 if block.causal else rows * columns
    return TokenCounts(tokens, pairs, supervised)


def padded_counts(lengths: Iterable[int], supervised: int) -> TokenCounts:
    """The counts of samples that stand alone in their rows."""
    lengths = list(lengths)
    return TokenCounts(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), supervised)


def _linear_size(module: torch.nn.Module) -> int:
    """Weights of a linear layer, counted as before it was quantized; 0 for other modules."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features * module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer
        return int(module.weight.numel())  # type: ignore[operator]
    return 0
