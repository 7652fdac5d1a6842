"""Whether a loaded model keeps the samples of a packed row apart: looked at, since what a class does may be new."""

from __future__ import annotations

from typing import Any

import torch

from finetune.errors import ModelError
from finetune.kernels.attention import NAME as SEGMENTS
from finetune.kernels.attention import packed_row
from finetune.kernels.layout import Group, RowLayout, position_ids
from finetune.models.attention import dense_masks
from finetune.models.heads import decoder_layers, decoder_of, first_blocks_alone, naming_attention

SAMPLES, LENGTH = 8, 4

# Of a hidden state's norm. What a product of another shape rounds differently is under 0.01 in bf16.
TOLERANCE = 0.03


def hidden_states(causal_lm: Any, ids: torch.Tensor, positions: torch.Tensor, layout: RowLayout | None) -> torch.Tensor:
    """What the decoder makes [B, T, D] of token ids [B, T]: of one row of several samples, or of padded rows (None)."""
    config, mask = causal_lm.config, None
    if layout is not None and config._attn_implementation != SEGMENTS:
        mask = dense_masks(config, layout, ids.shape[1], ids.device)
    decoder = decoder_of(causal_lm)
    hidden: torch.Tensor = decoder(
        input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return hidden


@torch.no_grad()
def check_isolation(causal_lm: Any, name: str) -> None:
    """Compare made-up samples in one packed row with the same side by side, by the first block of every kind.

    Raises:
        ModelError: if all but the row's first differ by more than rounding: something carries over, or counts on.
    """
    device = next(causal_lm.parameters()).device
    # From all of the vocabulary: neighbours in it, as reserved tokens, may be alike.
    last = causal_lm.config.get_text_config().vocab_size - 1
    ids = torch.linspace(0, last, SAMPLES * LENGTH + 2, device=device)[1:-1].long().view(SAMPLES, LENGTH)
    layout = (Group(0, (LENGTH,) * SAMPLES),)
    row_positions = position_ids(layout, ids.numel()).to(device)
    with first_blocks_alone(causal_lm, _num_blocks(causal_lm)), naming_attention(causal_lm):
        want = hidden_states(causal_lm, ids, row_positions.view(SAMPLES, LENGTH), None).float()
        with packed_row(layout):
            got = hidden_states(causal_lm, ids.view(1, -1), row_positions, layout).float().view_as(want)
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)
    # The smallest of the samples: rounding may send a token to other experts, but hardly one of each sample.
    if errors.amax(dim=1)[1:].min().item() > TOLERANCE:
        raise ModelError(
            f"model.name: {name} lets the samples of a packed row see each other, or does not count positions by "
            "sample, so its loss would be wrong; use data.packing: none"
        )


def _num_blocks(causal_lm: Any) -> int:
    """How many blocks from the first on hold one of every kind: blocks look up their own kind by their place."""
    kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None) or ()
    seen: dict[Any, int] = {}
    for index, block in enumerate(decoder_layers(causal_lm)):
        parts = frozenset((name, type(part)) for name, part in block.named_children())
        seen.setdefault((type(block), parts, kinds[index] if index < len(kinds) else None), index)
    return max(seen.values()) + 1
