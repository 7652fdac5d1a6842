"""The base that all processes of a machine map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune.inference.dense import dense_weights
from finetune.models.load import load_base, load_config
from finetune.models.shared import quantized_source, shared_source
from finetune.models.sources import find_model
from finetune.recipe.schema import ModelSection
from tests.tiny import write_model


@pytest.mark.parametrize("rank", [0, 1])
def test_whichever_rank_comes_first_writes_all_of_the_base(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    model = ModelSection(name=str(write_model(tmp_path / "model.v1", "falcon")), quantization="nf4")
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        shared = shared_source(model, find_model(model), precision="bf16-mixed")
    finally:
        dist.destroy_process_group()
    assert load_config(model, shared).model_type == "falcon"
    base = load_base(model, shared, precision="bf16-mixed", attention_name="sdpa", shardable=True)
    assert base.get_input_embeddings().weight.shape[0] > 0


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_base_quantized_once_computes_the_same_bits(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    model = ModelSection(name=str(write_model(tmp_path / "model", "llama")), quantization=quantization)
    source = find_model(model)
    once = quantized_source(model, source, precision="bf16-mixed")
    assert quantized_source(model, source, precision="bf16-mixed") == once != source
    assert quantized_source(ModelSection(name=model.name), source, precision="bf16-mixed") is source
    ids = torch.arange(3, 20)[None]
    direct = load_base(model, source, precision="bf16-mixed", attention_name="sdpa")
    mapped = load_base(model, once, precision="bf16-mixed", attention_name="sdpa", shardable=True)
    assert torch.equal(direct(ids).logits, mapped(ids).logits)
    with dense_weights(direct) as size, dense_weights(mapped):
        assert size > 0 and torch.equal(direct(ids).logits, mapped(ids).logits)


def test_a_base_is_quantized_at_every_start_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    model = ModelSection(name=str(write_model(tmp_path / "model", "llama")), quantization="nf4")
    source = find_model(model)
    assert quantized_source(model, source, precision="bf16-mixed") is source
    assert "the base is quantized anew at every start" in capsys.readouterr().err
