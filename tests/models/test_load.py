"""What loading leaves as a run needs it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from finetune.models.load import fit_vocabulary


class Part:
    """An embedding of four rows on another device, as far as resizing looks at it."""

    def __init__(self) -> None:
        self.weight = SimpleNamespace(shape=(4, 8), device=torch.device("cuda", 1))

    def to(self, device: torch.device) -> None:
        self.weight.device = device


def test_new_rows_are_drawn_on_the_cpu_whatever_device_the_model_is_on() -> None:
    embedding, head, drawn = Part(), Part(), []

    def resize(rows: int) -> None:
        drawn.append((rows, embedding.weight.device.type, head.weight.device.type, torch.initial_seed()))

    base = SimpleNamespace(
        get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head, resize_token_embeddings=resize
    )
    before = torch.get_rng_state()
    fit_vocabulary(base, range(4), seed=7)
    assert drawn == []
    fit_vocabulary(base, range(6), seed=7)
    assert drawn == [(6, "cpu", "cpu", 7)]
    assert embedding.weight.device == head.weight.device == torch.device("cuda", 1)
    assert torch.equal(torch.get_rng_state(), before)
