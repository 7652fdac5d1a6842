"""A model read from disk layer by layer against the same one loaded whole: every log-probability is equal."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.commands.merge import load_merged, merged_section
from finetune.export import check_merge
from finetune.export.check_merge import CheckSample, forward_passes, head_log_probs, log_probs, measure_drift
from finetune.export.check_streamed import measure_adapter, measure_streamed, stream_adapter, stream_merged
from finetune.inference.mode import base_of, inference_mode
from finetune.models.adapters import attach_adapter, load_adapter
from finetune.models.load import fit_vocabulary, load_base
from finetune.models.streamed import NotStreamableError, StreamedModel
from finetune.recipe.schema import Recipe
from tests.export.test_merge import EMBEDDING, Case, add_own_head, build
from tests.tiny import CONFIGS

CPU = torch.device("cpu")
SAMPLES = [CheckSample(torch.arange(3 + n, 3 + 2 * n), torch.tensor([0, n // 2, n - 1])) for n in (9, 4, 17, 12)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches, which go through the layers together."""
    monkeypatch.setattr(check_merge, "MAX_BATCH_TOKENS", 20)
    assert len(list(check_merge._batches(SAMPLES))) == 3


def load_whole(case: Case) -> Any:
    """The adapter on its base as inference loads them."""
    recipe, merge = case.merge.recipe, case.merge
    base: Any = load_base(recipe.model, merge.source, precision=recipe.training.precision, attention_name="sdpa")
    fit_vocabulary(base, merge.tokenizer, seed=recipe.training.seed)
    model = attach_adapter(base, recipe.adapter, merge.tokenizer, seed=recipe.training.seed)
    load_adapter(model, merge.adapter)
    return model


def streamed_log_probs(streamed: StreamedModel, *, adapted: bool = True) -> list[torch.Tensor]:
    calls = forward_passes(streamed.causal_lm, SAMPLES, CPU)
    hidden = streamed.run(calls, [adapted] * len(calls))
    streamed.set_adapters(adapted)
    return list(head_log_probs(streamed.causal_lm, [rows for batch in hidden for rows in batch]))


def require_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for got, want in zip(one, other, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def compare(case: Case) -> None:
    """Adapter, bare base and merged model, on both bases."""
    whole = load_whole(case)
    with inference_mode(whole):
        wanted = list(log_probs(base_of(whole), SAMPLES))
        with whole.disable_adapter():
            bare = list(log_probs(base_of(whole), SAMPLES))
    assert all((one - other).abs().max() > 0.01 for one, other in zip(wanted, bare, strict=True))
    streamed = stream_adapter(case.merge, attention_name="sdpa", device=CPU)
    with inference_mode(streamed.model):
        require_equal(streamed_log_probs(streamed), wanted)
        require_equal(streamed_log_probs(streamed, adapted=False), bare)
        together, drift = measure_adapter(streamed, SAMPLES)
    require_equal(together, wanted)
    assert drift == measure_drift(wanted, bare)
    compare_merged(case, wanted)


def compare_merged(case: Case, wanted: list[torch.Tensor]) -> None:
    out = case.folder / "out"
    out.mkdir()
    case.merge.write(out)
    section = merged_section(out, case.merge.recipe)
    merged = load_merged(out, case.merge.recipe, device=CPU, attention="sdpa")
    for base in ("dequantized", "original"):
        if base != case.merge.base:
            if case.merge.recipe.model.quantization == "none":
                continue
            for name, value in case.merge.rounded_weights(base):  # type: ignore[arg-type]
                merged.get_parameter(name).data.copy_(value)
        with inference_mode(merged):
            want = list(log_probs(merged, SAMPLES))
        streamed = stream_merged(case.merge, section, attention_name="sdpa", device=CPU, base=base)  # type: ignore[arg-type]
        with inference_mode(streamed.model):
            require_equal(streamed_log_probs(streamed), want)
            assert measure_streamed(wanted, streamed, SAMPLES) == measure_drift(wanted, want)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_family(tmp_path: Path, architecture: str, quantization: str) -> None:
    compare(build(tmp_path, architecture, quantization=quantization))


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
def test_every_dtype_and_quantization(tmp_path: Path, precision: str, quantization: str) -> None:
    case = build(tmp_path, "gpt_neox", quantization=quantization)
    values = case.merge.recipe.model_dump()
    values["training"]["precision"] = precision
    values["model"]["compute_dtype"] = "fp32" if precision == "32-true" else "bf16"
    case.merge = replace(case.merge, recipe=Recipe.model_validate(values))
    compare(case)


ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 9, "dense": 9}},
    "trained tokens": {"trainable_tokens": [3, 7]},
    "added tokens": {"trainable_tokens": ["<one>", "<two>"]},
    "modules to save": {"modules_to_save": ["EMBEDDING", "lm_head"]},
    "head to save": {"modules_to_save": ["lm_head"]},
    "adapted ends": {"target_modules": ["EMBEDDING", "lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("architecture", ["tied_llama", "llama", "falcon"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_every_kind_of_adapter(tmp_path: Path, architecture: str, method: str) -> None:
    name = EMBEDDING.get(architecture, "embed_tokens")
    adapter = {
        key: [name if each == "EMBEDDING" else each for each in value] if isinstance(value, list) else value
        for key, value in ADAPTERS[method].items()
    }
    compare(build(tmp_path, architecture, **adapter))


@pytest.mark.parametrize("method", ["added tokens", "modules to save"])
def test_on_a_quantized_base(tmp_path: Path, method: str) -> None:
    adapter = {
        key: ["embed_tokens" if each == "EMBEDDING" else each for each in value]
        for key, value in ADAPTERS[method].items()
    }
    compare(build(tmp_path, "tied_llama", quantization="nf4", **adapter))


@pytest.mark.usefixtures("same_dtypes")
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_trained_whole_on_a_bf16_base(tmp_path: Path, names: list[str]) -> None:
    case = build(tmp_path, "llama", modules_to_save=names)
    values = case.merge.recipe.model_dump()
    values["training"]["precision"] = "bf16-mixed"
    case.merge = replace(case.merge, recipe=Recipe.model_validate(values))
    compare(case)


def test_a_base_that_says_tied_and_is_not(tmp_path: Path) -> None:
    case = build(tmp_path, "tied_llama")
    add_own_head(tmp_path / "base")
    compare(case)


def test_one_layer_is_in_memory_and_is_read_once(tmp_path: Path) -> None:
    case = build(tmp_path, "llama")
    read: list[str] = []
    files, plain = case.merge.files, case.merge.files.read
    files.read = lambda name: read.append(name) or plain(name)  # type: ignore[method-assign, func-returns-value]
    streamed = stream_adapter(case.merge, attention_name="sdpa", device=CPU)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        named = base_of(streamed.model).named_parameters()
        most = max(most, sum(p.numel() for name, p in named if not p.is_meta and "lora_" not in name))

    for module in base_of(streamed.model).modules():
        module.register_forward_pre_hook(count)
    read.clear()
    with inference_mode(streamed.model):
        measure_adapter(streamed, SAMPLES)
    assert sorted(read) == sorted(files.tensors), "every tensor once, for the adapter and the base, and all batches"
    layer = sum(math.prod(info.shape) for name, info in files.tensors.items() if "layers.0." in name)
    assert most == max(layer, 320 * 32)


def test_what_has_to_be_loaded_whole_says_why(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    dora = build(tmp_path / "a", "llama", quantization="nf4", use_dora=True)
    with pytest.raises(NotStreamableError, match="DoRA"):
        stream_adapter(dora.merge, attention_name="sdpa", device=CPU)
    (tmp_path / "b").mkdir()
    missing = build(tmp_path / "b", "llama")
    path = tmp_path / "b" / "base" / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.up.weight"] = state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(NotStreamableError, match=r"up_proj\.weight is not stored as one tensor"):
        stream_adapter(missing.merge, attention_name="sdpa", device=CPU)


def test_an_error_of_one_batch_ends_all(tmp_path: Path) -> None:
    streamed = stream_adapter(build(tmp_path, "llama").merge, attention_name="sdpa", device=CPU)
    calls = forward_passes(streamed.causal_lm, SAMPLES, CPU)

    def fail() -> list[torch.Tensor]:
        raise KeyError("row")

    before = threading.active_count()
    with pytest.raises(KeyError, match="row"):
        streamed.run([*calls, fail])
    assert threading.active_count() == before
    assert len(streamed.run(calls)) == 3
