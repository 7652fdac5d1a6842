from __future__ import annotations

import torch
from transformers import Gemma3TextConfig
from transformers.cache_utils import DynamicLayer

from finetune.inference.cache import GrowingLayer, empty_cache
from tests.inference.conftest import build_llama


def test_a_growing_layer_returns_what_the_library_returns() -> None:
    torch.manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    for length in (50, *[1] * 100, 7):
        keys, values = torch.randn(2, 3, length, 8), torch.randn(2, 3, length, 8)
        for got, want in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(got, want)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_growing_does_not_copy_for_every_token() -> None:
    layer = GrowingLayer()
    layer.update(torch.zeros(1, 1, 100, 4), torch.zeros(1, 1, 100, 4))
    places = {layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))[0].data_ptr() for _ in range(60)}
    assert len(places) == 1


def test_only_full_attention_layers_are_replaced() -> None:
    class Model:
        config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])

        @staticmethod
        def get_input_embeddings() -> torch.nn.Embedding:
            return torch.nn.Embedding(1, 1)

        @staticmethod
        def _supports_default_dynamic_cache() -> bool:
            return True

    cache = empty_cache(Model())
    assert cache is not None
    assert [type(layer) is GrowingLayer for layer in cache.layers] == [False, True]
    assert all(type(layer) is GrowingLayer for layer in empty_cache(build_llama()).layers)  # type: ignore[union-attr]
