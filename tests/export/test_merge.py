"""Merged weights against the adapter that they come from: what a forward pass gives, after reloading from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.falcon import modeling_falcon

from finetune.errors import BadInputError, FinetuneError, ModelError
from finetune.export import merge_files
from finetune.export.merge import Merge, choose_base, residual_weights
from finetune.export.merge_config import add_old_rope
from finetune.models.adapters import WEIGHTS_NAME, attach_adapter, load_adapter, save_adapter, token_indices
from finetune.models.attention import loadable_attention
from finetune.models.load import load_base
from finetune.models.sources import find_model
from finetune.recipe.schema import Recipe
from tests.tiny import CONFIGS, alpaca_rows, tiny_recipe, write_jsonl, write_model

EMBEDDING = {"falcon": "word_embeddings", "gpt_neox": "embed_in"}


@dataclass
class Case:
    """An adapter that changes a lot, on its base, and the merge of the two."""

    model: Any
    merge: Merge
    folder: Path

    def logits(self, *, adapted: bool = True) -> torch.Tensor:
        if adapted:
            return logits(self.model, self.ids)
        with self.model.disable_adapter():
            return logits(self.model, self.ids)

    @property
    def ids(self) -> torch.Tensor:
        """Every token once, the added ones too."""
        return torch.randperm(len(self.merge.tokenizer), generator=torch.Generator().manual_seed(3))[None]

    def write(self, **changes: Any) -> Any:
        """Merge, and load what stands on disk then."""
        out = self.folder / "out"
        out.mkdir()
        replace(self.merge, **changes).write(out)
        attention = loadable_attention(self.merge.config, "sdpa")
        loaded, report = AutoModelForCausalLM.from_pretrained(
            out, attn_implementation=attention, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        return loaded

    def check(self, **changes: Any) -> Any:
        """Merge, and compare with the adapter and the bare base."""
        merged = self.write(**changes)
        got, want = logits(merged, self.ids), self.logits()
        # New rows of an untied head carry transformers' noise of 3e-5 standard deviations.
        assert (got - want).abs().max() < 1e-4
        assert (got - self.logits(adapted=False)).abs().max() > 0.1
        return merged


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids).logits
    return out


def build(folder: Path, architecture: str = "llama", *, quantization: str = "none", **adapter: Any) -> Case:
    """A tiny model with an adapter of large random values."""
    write_model(folder / "base", architecture)
    data = write_jsonl(folder / "data.jsonl", alpaca_rows(4))
    values = tiny_recipe(folder, folder / "base", data, adapter=adapter)
    values["model"].update(quantization=quantization, compute_dtype="fp32")
    recipe = Recipe.model_validate(values)
    source = find_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = attach(recipe, source, tokenizer)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.03 if "magnitude" in name else 0.1)
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter")
    base = choose_base(recipe, "auto")
    return Case(model, Merge(recipe, source, folder / "adapter", tokenizer, (2,), base, "auto"), folder)


def add_own_head(base: Path) -> None:
    """Give a base that says that its embeddings are tied weights of the head's own."""
    path = base / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 0.5 + 0.01
    save_file(state, path, metadata={"format": "pt"})


def attach(recipe: Recipe, source: Any, tokenizer: Any) -> Any:
    """As a run does before it trains."""
    base: Any = load_base(recipe.model, source, precision="32-true", attention_name="sdpa")
    token_indices(recipe.adapter, tokenizer)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))
    return attach_adapter(base, recipe.adapter, tokenizer, seed=1)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_fm05_merged_is_the_adapter_and_not_the_base(tmp_path: Path, architecture: str) -> None:
    case = build(tmp_path, architecture)
    merged = case.check()
    assert merged.dtype == torch.float32


METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    # PEFT takes the first pattern that matches the end of a module's name.
    "rank patterns": {
        "rank_pattern": {"dense": 2, r"layers\.0\..*": 8, "q_proj": 2},
        "alpha_pattern": {r"1\..*(v_proj|dense_4h_to_h)": 3.0, "dense": 20.0, "q_proj": 20.0},
    },
    "rank patterns with rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 9, "dense": 9}},
    "trained tokens": {"trainable_tokens": [3, 7]},
}


@pytest.mark.parametrize("architecture", ["tied_llama", "llama", "falcon", "gpt_neox"])
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_update_is_merged(tmp_path: Path, architecture: str, method: str) -> None:
    case = build(tmp_path, architecture, **METHODS[method])
    case.check()


def test_weights_equal_what_peft_merges(tmp_path: Path) -> None:
    case = build(tmp_path, "llama", use_dora=True, use_rslora=True, rank_pattern={"q_proj": 7})
    merged = case.write()
    want = case.model.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, want[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initial_values_taken_off_the_base_are_put_back(tmp_path: Path, init: str) -> None:
    case = build(tmp_path, "llama", init=init)
    merged = case.write(residuals=residual_weights(case.merge, case.model).residuals)
    assert (logits(merged, case.ids) - case.logits()).abs().max() < 1e-4


def test_biases_of_the_base_stay(tmp_path: Path) -> None:
    case = build(tmp_path, "gpt_neox", use_dora=True)
    base = tmp_path / "base" / "model.safetensors"
    state = {name: tensor + 0.3 if name.endswith("bias") else tensor for name, tensor in load_file(base).items()}
    save_file(state, base, metadata={"format": "pt"})
    case.model = attach(case.merge.recipe, case.merge.source, case.merge.tokenizer)
    load_adapter(case.model, tmp_path / "adapter")
    case.check()


@pytest.mark.parametrize("architecture", ["tied_llama", "falcon"])
@pytest.mark.parametrize(
    "adapter",
    [
        {"modules_to_save": ["EMBEDDING", "lm_head"]},
        {"modules_to_save": ["EMBEDDING"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["EMBEDDING", "lm_head"]},
        {"target_modules": ["EMBEDDING", "lm_head"], "use_dora": True},
    ],
    ids=str,
)
def test_fm08_tied_embeddings_that_were_trained_apart_are_untied(
    tmp_path: Path, architecture: str, adapter: dict[str, Any]
) -> None:
    name = EMBEDDING.get(architecture, "embed_tokens")
    named = {
        key: [name if each == "EMBEDDING" else each for each in value] if isinstance(value, list) else value
        for key, value in adapter.items()
    }
    merged = build(tmp_path, architecture, **named).check()
    assert merged.config.tie_word_embeddings is False
    assert merged.get_input_embeddings().weight.data_ptr() != merged.get_output_embeddings().weight.data_ptr()


def test_fm08_tied_embeddings_that_come_out_equal_stay_tied(tmp_path: Path) -> None:
    case = build(tmp_path, "tied_llama", modules_to_save=["embed_tokens", "lm_head"])
    path = tmp_path / "adapter" / WEIGHTS_NAME
    state = load_file(path)
    state["base_model.model.lm_head.weight"] = state["base_model.model.model.embed_tokens.weight"].clone()
    save_file(state, path)
    load_adapter(case.model, tmp_path / "adapter")
    merged = case.check()
    assert merged.config.tie_word_embeddings is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_fm08_a_base_that_says_tied_and_is_not(tmp_path: Path) -> None:
    case = build(tmp_path, "tied_llama")
    add_own_head(tmp_path / "base")
    case.model = attach(case.merge.recipe, case.merge.source, case.merge.tokenizer)
    load_adapter(case.model, tmp_path / "adapter")
    assert case.check().config.tie_word_embeddings is False


@pytest.mark.parametrize("architecture", ["tied_llama", "llama", "falcon", "gpt_neox"])
def test_fm27_added_tokens_have_rows(tmp_path: Path, architecture: str) -> None:
    case = build(tmp_path, architecture, trainable_tokens=["<one>", "<two>", "<three>"])
    merged = case.check()
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == 323
    assert merged.config.tie_word_embeddings is (architecture in ("tied_llama", "falcon"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<three>") == 322


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("architecture", ["tied_llama", "gpt_neox"])
def test_fm06_dequantized_is_the_quantized_adapter(
    tmp_path: Path, architecture: str, quantization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = build(tmp_path, architecture, quantization=quantization)
    assert case.merge.base == "dequantized"
    merged = case.check()
    near = (logits(merged, case.ids) - case.logits()).abs().max()
    for name, value in replace(case.merge, base="original").rounded_weights("original"):
        merged.get_parameter(name).data.copy_(value)
    far = (logits(merged, case.ids) - case.logits()).abs().max()
    with capsys.disabled():
        print(f" [{quantization}: dequantized {near:.1e}, original {far:.1e}]", end="")
    assert far > 100 * near


def test_dora_on_a_quantized_base(tmp_path: Path) -> None:
    build(tmp_path, "llama", quantization="nf4", use_dora=True).check()


def test_every_quantized_layer_is_dequantized_and_not_the_adapted_alone(tmp_path: Path) -> None:
    case = build(tmp_path, quantization="nf4", target_modules=["q_proj"])
    plan = case.merge.plan
    assert sum(weight.is_touched for weight in plan.weights) == 2
    assert sum(weight.quantized for weight in plan.weights) == 14
    case.check()


def test_falcons_layers_are_known_as_quantized_before_a_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = build(tmp_path, "falcon", quantization="nf4").merge

    class FalconLinear(torch.nn.Linear):
        """As transformers has it, in a process that has loaded nothing."""

    monkeypatch.setattr(modeling_falcon, "FalconLinear", FalconLinear)
    assert sum(weight.quantized for weight in merge.plan.weights) == 8


def test_dequantized_needs_a_quantized_run(tmp_path: Path) -> None:
    recipe = build(tmp_path).merge.recipe
    assert choose_base(recipe, "auto") == "original"
    with pytest.raises(BadInputError, match=r"model\.quantization is none"):
        choose_base(recipe, "dequantized")


def _rename(state: dict[str, torch.Tensor]) -> None:
    name = next(iter(state))
    state[f"{name}.old"] = state.pop(name)


def _add(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.model.norm.weight"] = torch.zeros(2)


def _add_head(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def _reshape(state: dict[str, torch.Tensor]) -> None:
    name = next(iter(state))
    state[name] = state[name][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_rename, "1 tensors missing .* 1 unknown"),
        (_add, "1 unknown"),
        (_add_head, "1 of another shape"),
        (_reshape, "1 of another shape"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    case = build(tmp_path)
    path = tmp_path / "adapter" / WEIGHTS_NAME
    state = load_file(path)
    spoil(state)
    save_file(state, path)
    with pytest.raises(ModelError, match=message):
        _ = case.merge.plan


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path: Path) -> None:
    case = build(tmp_path)
    path = tmp_path / "adapter" / WEIGHTS_NAME
    save_file({name: tensor * 1e4 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(FinetuneError, match=r"_proj\.weight: merged values are not finite.*--dtype bf16"):
        case.write(dtype="fp16")


def test_a_base_in_shards_gives_a_model_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    base.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    monkeypatch.setattr(merge_files, "MAX_SHARD_BYTES", 60_000)
    monkeypatch.setattr(merge_files.write_shards, "__defaults__", (60_000,))
    case.check()
    assert 2 < len(list((tmp_path / "out").glob("model-*.safetensors"))) < 10
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == case.merge.plan.num_bytes


def test_a_base_in_the_old_format(tmp_path: Path) -> None:
    case = build(tmp_path, "tied_llama")
    path = tmp_path / "base" / "model.safetensors"
    state = load_file(path)
    path.unlink()
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, path.with_name("pytorch_model.bin"))
    merged = case.check()
    assert merged.config.tie_word_embeddings is True


def test_a_base_saved_without_its_prefix_and_with_old_buffers(tmp_path: Path) -> None:
    case = build(tmp_path, "tied_llama")
    path = tmp_path / "base" / "model.safetensors"
    state = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    save_file(state | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path, metadata={"format": "pt"})
    out = tmp_path / "plain"
    out.mkdir()
    case.merge.write(out)
    merged = AutoModelForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    assert (logits(merged, case.ids) - case.logits()).abs().max() < 1e-4
    assert set(load_file(out / "model.safetensors")) == set(load_file(path))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_values_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    case = build(tmp_path)
    merged = case.write(dtype=dtype)
    want = case.model.merge_and_unload().state_dict()
    target = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    off = [
        (tensor != want[name].to(target)).float().mean().item()
        for name, tensor in merged.to(target).state_dict().items()
    ]
    # Sums in another order may fall on the other side of a rounding border, rarely.
    assert max(off) < 0.01


def test_the_configuration_is_complete(tmp_path: Path) -> None:
    case = build(tmp_path, trainable_tokens=["<one>"])
    case.merge.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2], "top_k": 3}))
    case.write(stop_token_ids=(5, 2), dtype="bf16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10000.0
    assert (config["vocab_size"], config["eos_token_id"], config["dtype"]) == (321, 5, "bfloat16")
    assert config["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert "_name_or_path" not in config and "quantization_config" not in config
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.top_k) == ([5, 2, 7], 3)  # the base's own stop ids stay, last
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["chat_template"] == AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert saved["chat_template"] == case.merge.tokenizer.chat_template
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_model_that_reads_images_keeps_what_shows_them_to_it(tmp_path: Path) -> None:
    case = build(tmp_path, "gemma3_images")
    path = tmp_path / "base" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"text_config": {**values["text_config"], "dtype": "bfloat16"}}))
    files = ("preprocessor_config.json", "processor_config.json")
    for name in files:
        (tmp_path / "base" / name).write_text('{"size": 8}')
    case.check()
    assert all((tmp_path / "out" / name).read_text() == '{"size": 8}' for name in files)
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all("language_model" in name for name in changed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["torch_dtype"] == config["torch_dtype"] == "float32"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_old_names_of_rope_change_nothing(architecture: str) -> None:
    config = CONFIGS[architecture]().get_text_config()
    values = config.to_dict()
    add_old_rope(values)
    assert isinstance(values["rope_theta"], float)
    again = type(config).from_dict(values)
    assert again.rope_parameters == config.rope_parameters


def test_scaled_rope_has_its_old_name() -> None:
    values = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}}
    add_old_rope(values)
    assert values["rope_theta"] == 5e5
    assert values["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
