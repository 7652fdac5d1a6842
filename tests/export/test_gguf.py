"""GGUF files: read back by transformers' own GGUF loader they compute the same, and the LoRA is the merge's change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from finetune.errors import FinetuneError, ModelError
from finetune.export import gguf_file
from finetune.export.gguf_architectures import ARCHITECTURES, find_architecture, rope_factors
from finetune.export.gguf_file import new_file
from finetune.export.gguf_lora import write_lora
from finetune.export.gguf_model import load_model_config, write_model
from finetune.export.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name, read_vocabulary
from finetune.models.gguf_source import load_gguf_tokenizer
from tests.tiny import CONFIGS, SIZES, SWIGLU
from tests.tiny import write_model as write_tiny

WRITTEN = ["llama", "tied_llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_images", "falcon", "new_falcon"]
IDS = torch.tensor([[3, 60, 200, 17, 300, 5, 44, 9]])
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every architecture that is written, in float32."""
    from transformers import FalconConfig, Qwen2Config

    ids = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    own = {
        "qwen2": lambda: Qwen2Config(**ids, **SWIGLU),
        "new_falcon": lambda: FalconConfig(**ids, **SIZES, new_decoder_architecture=True, num_kv_heads=2, bias=False),
    }
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        for name, config in own.items():
            patch.setitem(CONFIGS, name, config)
        return {name: write_tiny(folder / name, name) for name in WRITTEN}


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, in float32."""
    return {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def text_config(folder: Path) -> Any:
    return load_model_config(folder).get_text_config()


def logits(folder: Path, **arguments: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()
    with torch.no_grad():
        return model(IDS).logits


def write_adapter(folder: Path, model: Path, seed: int = 0, **settings: Any) -> Any:
    """An adapter with values in both matrices, saved by PEFT; returns the model that carries it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    )
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return adapted


# --- Models


# Of Falcon's new decoder, transformers' loader does not read the order of queries, keys and values.
@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "new_falcon"])
def test_transformers_reads_the_same_model_back(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    write_model(models[name], tmp_path / "model.gguf", "f32", "tiny")
    # Of these, transformers' loader does not read the head dimension, and takes the published models'.
    own = {} if name not in ("qwen3", "gemma3", "gemma3_images", "falcon") else {"config": text_config(models[name])}
    back = logits(tmp_path, gguf_file="model.gguf", **own)
    torch.testing.assert_close(back, logits(models[name]), rtol=1e-4, atol=1e-4)


def test_the_same_tokenizer_is_read_back(models: dict[str, Path], tmp_path: Path) -> None:
    write_model(models["llama"], tmp_path / "model.gguf", "f32", "tiny")
    back, own = AutoTokenizer.from_pretrained(models["llama"]), load_gguf_tokenizer(tmp_path / "model.gguf")
    text = "the fox counts 12 boats<|im_end|>\nnow"
    assert back(text).input_ids == own(text).input_ids
    assert back.chat_template == own.chat_template
    assert (back.bos_token_id, back.eos_token_id) == (own.bos_token_id, own.eos_token_id) == (1, 2)
    assert back.pad_token_id == own.pad_token_id == 2


@pytest.mark.parametrize(
    ("type_name", "matrix", "bound"),
    [("f16", "F16", 1e-3), ("bf16", "BF16", 8e-3), ("q8_0", "Q8_0", 1e-2), ("f32", "F32", 0.0)],
)
def test_matrices_have_the_type_and_norms_stay_f32(
    models: dict[str, Path], type_name: str, matrix: str, bound: float, tmp_path: Path
) -> None:
    write_model(models["llama"], tmp_path / "exact.gguf", "f32", "tiny")
    write_model(models["llama"], tmp_path / "model.gguf", type_name, "tiny")
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "model.gguf").tensors}
    assert {types[name] for name in types if not name.endswith("_norm.weight")} == {matrix}
    assert {types[name] for name in types if name.endswith("_norm.weight")} == {"F32"}
    exact, rounded = read(tmp_path / "exact.gguf"), read(tmp_path / "model.gguf")
    for name, values in exact.items():
        assert np.abs(rounded[name] - values).max() <= bound * np.abs(values).max()


def test_the_file_says_what_programs_need(models: dict[str, Path], tmp_path: Path) -> None:
    write_model(models["gemma3"], tmp_path / "model.gguf", "q8_0", "my-model")
    found = keys(tmp_path / "model.gguf")
    assert found["general.architecture"] == "gemma3" and found["general.name"] == "my-model"
    assert found["general.type"] == "model" and found["general.file_type"] == 7
    assert found["gemma3.attention.sliding_window"] == 64 and found["gemma3.attention.key_length"] == 8
    assert found["gemma3.rope.freq_base"] == 1e6 and found["gemma3.rope.freq_base_swa"] == 1e4
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert len(found["tokenizer.ggml.tokens"]) == 320 and found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert "<|im_start|>" in found["tokenizer.chat_template"]


def test_the_stop_tokens_are_those_of_the_generation_config(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9, 5]}))
    special = read_vocabulary(folder, 320).special.ids
    assert (special["eos"], special["eot"], special["eom"], special["bos"]) == (7, 2, 9, 1)


def test_rows_beyond_the_tokenizer_become_unused_tokens(models: dict[str, Path]) -> None:
    vocabulary = read_vocabulary(models["llama"], 323)
    assert vocabulary.tokens[320:] == ["[PAD320]", "[PAD321]", "[PAD322]"] and vocabulary.types[320:] == [5, 5, 5]
    with pytest.raises(ModelError, match="the tokenizer has 320 tokens, the embedding 300 rows"):
        read_vocabulary(models["llama"], 300)


def test_llama3_rope_factors_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**SWIGLU, rope_parameters=LLAMA3_ROPE, max_position_embeddings=4096)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    factors = rope_factors(config)
    assert factors is not None and factors[0] == 1.0 and factors[-1] == 8.0
    np.testing.assert_allclose(plain.numpy() / factors, scaled.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "gpt_neox"}, "model_type gpt_neox is not supported; supported are falcon, gemma3_text, llama"),
        ({"hidden_act": "relu"}, "cannot run this llama: hidden_act relu; serve the merged model"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type dynamic"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    models: dict[str, Path], changes: dict[str, Any], part: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(ModelError, match=part):
        write_model(folder, tmp_path / "model.gguf", "f16", "tiny")
    assert not (tmp_path / "model.gguf").exists()


def test_every_architecture_of_the_table_is_tested() -> None:
    types = {CONFIGS[name]().get_text_config().model_type for name in WRITTEN if name in CONFIGS} | {"qwen2"}
    assert types == set(ARCHITECTURES)


# --- Tokenizers


def test_splits_are_named_by_their_rules() -> None:
    model = {"type": "BPE", "ignore_merges": False}
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [digits, words]}
    assert pre_tokenizer_name({"model": model, "pre_tokenizer": words}) == "gpt-2"
    assert pre_tokenizer_name({"model": model, "pre_tokenizer": both}) == "smollm"
    for (steps, ignore_merges), name in PRE_TOKENIZERS.items():
        if steps[-1] == "ByteLevel":
            split = {"type": "Split", "pattern": {"Regex": steps[0]}, "behavior": "Isolated", "invert": False}
            parts = {"type": "Sequence", "pretokenizers": [split, {**words, "use_regex": False}]}
            given = {"model": {**model, "ignore_merges": ignore_merges}, "pre_tokenizer": parts}
            assert pre_tokenizer_name(given) == name
    with pytest.raises(ModelError, match=r"no name for this tokenizer's split \(Digits one by one\)"):
        pre_tokenizer_name({"model": model, "pre_tokenizer": digits})
    with pytest.raises(ModelError, match="Lowercase"):
        pre_tokenizer_name({"model": model, "pre_tokenizer": words, "normalizer": {"type": "Lowercase"}})


def test_a_sentencepiece_tokenizer_gets_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    merges = [("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "ab")]
    rust = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, len(pieces))
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_space_prefix) == ("llama", "default", True)
    assert vocabulary.types[:4] == [2, 3, 3, 6] and set(vocabulary.types[3:259]) == {6}
    by_piece = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert by_piece["ab"] > by_piece["▁a"] > by_piece["▁ab"] > by_piece["a"]


# --- Adapters


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gemma3_images", "falcon", "new_falcon"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"o_proj|dense": 2}, "alpha_pattern": {"q_proj|query_key_value": 3.0}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_lora_is_what_merging_adds_to_the_weights(
    models: dict[str, Path], name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    if name == "gemma3_images":
        settings = settings | {"target_modules": r".*language_model\..*_proj"}
    adapted = write_adapter(tmp_path / "adapter", models[name], **settings)
    merged = tmp_path / "merged"
    shutil.copytree(models[name], merged)
    adapted.merge_and_unload().save_pretrained(merged)
    write_lora(tmp_path / "adapter", load_model_config(models[name]), tmp_path / "lora.gguf", "f32", "tiny")
    write_model(models[name], tmp_path / "base.gguf", "f32", "tiny")
    write_model(merged, tmp_path / "merged.gguf", "f32", "tiny")
    lora, base, target = (read(tmp_path / f"{part}.gguf") for part in ("lora", "base", "merged"))
    alpha = keys(tmp_path / "lora.gguf")["adapter.lora.alpha"]
    changed = set()
    for tensor in base:
        if f"{tensor}.lora_a" in lora:
            a, b = lora[f"{tensor}.lora_a"], lora[f"{tensor}.lora_b"]
            changed.add(tensor)
            np.testing.assert_allclose(
                base[tensor] + alpha / a.shape[0] * (b @ a), target[tensor], rtol=1e-4, atol=1e-5
            )
        else:
            np.testing.assert_array_equal(base[tensor], target[tensor])
    assert len(changed) * 2 == len(lora) > 0


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_dora": True}, "is a DoRA adapter, which a GGUF LoRA cannot hold; merge it"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save, or biases"),
        ({"trainable_token_indices": [5]}, "an adapter of embeddings"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa took its initial values off the base's weights"),
    ],
    ids=["dora", "modules_to_save", "tokens", "pissa"],
)
def test_fm28_an_adapter_that_is_more_than_a_lora_is_refused(
    models: dict[str, Path], settings: dict[str, Any], part: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", models["llama"], **settings)
    with pytest.raises(ModelError, match=part):
        write_lora(tmp_path / "adapter", load_model_config(models["llama"]), tmp_path / "x.gguf", "f32", "tiny")
    assert not (tmp_path / "x.gguf").exists()


def test_a_tied_head_is_refused_and_a_free_one_written(models: dict[str, Path], tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj", "lm_head"]}
    write_adapter(tmp_path / "free", models["llama"], **targets)
    write_lora(tmp_path / "free", load_model_config(models["llama"]), tmp_path / "free.gguf", "f32", "tiny")
    assert "output.weight.lora_a" in read(tmp_path / "free.gguf")
    write_adapter(tmp_path / "tied", models["tied_llama"], **targets)
    with pytest.raises(ModelError, match="shares with its embeddings"):
        write_lora(tmp_path / "tied", load_model_config(models["tied_llama"]), tmp_path / "x.gguf", "f32", "tiny")


def test_peft_reads_the_adapter_that_the_scale_was_taken_from(models: dict[str, Path], tmp_path: Path) -> None:
    from finetune.export.gguf_lora import read_pairs, read_settings

    write_adapter(
        tmp_path, models["llama"], use_rslora=True, rank_pattern={"down_proj": 9}, alpha_pattern={"up_proj": 5}
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["llama"]), tmp_path)
    for pair in read_pairs(tmp_path, read_settings(tmp_path)):
        assert pair.scale == pytest.approx(model.get_base_model().get_submodule(pair.module).scaling["default"])


# --- Files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("old")
    with pytest.raises(RuntimeError), new_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with new_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_seen_before_writing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(FinetuneError, match=r"takes 0\.1 GB and 0\.0 GB are free; free some space, give --out"):
        write_model(models["llama"], tmp_path / "new" / "model.gguf", "f16", "tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "part"), [(1e6, "too large for f16; write --type bf16"), (float("nan"), "not finite")]
)
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, value: float, part: str) -> None:
    tensor = gguf_file.GgufTensor(
        "x.weight", (1, 2), GGMLQuantizationType.F16, lambda: np.array([[1.0, value]], np.float32)
    )
    with pytest.raises(FinetuneError, match=part):
        gguf_file._encode(tensor)


def test_the_supported_list_is_in_the_error(models: dict[str, Path]) -> None:
    class Config:
        model_type = "mamba"

    with pytest.raises(ModelError, match=", ".join(sorted(ARCHITECTURES))):
        find_architecture(Config())
