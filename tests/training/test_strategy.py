"""What Lightning's strategies and launcher would do, and ours do not."""

from __future__ import annotations

import torch

from finetune.training.strategy import Placement, build_strategy


def test_the_first_adapter_is_drawn_on_the_cpu_whatever_trains_it() -> None:
    """As under DDP and FSDP, so that one seed gives one adapter: PEFT draws on the default device."""
    with build_strategy(Placement("cuda", 1, 1, "single")).tensor_init_context():
        assert torch.nn.Linear(2, 2).weight.device == torch.device("cpu")
