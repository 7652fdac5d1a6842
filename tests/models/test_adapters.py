"""Targets are found before weights are loaded, and wrong names list what there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from finetune.errors import ModelError
from finetune.models.adapters import attach_adapter, build_config, linear_names, require_names
from finetune.models.heads import decoder_of
from finetune.recipe.schema import LoraSection
from tests.tiny import CONFIGS, SWIGLU

LINEAR = {
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "qwen3": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "falcon": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    "gpt_neox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
}


def on_meta(architecture: str) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    return model


@pytest.mark.parametrize("architecture", LINEAR)
def test_fm26_targets_are_found_on_the_meta_device(architecture: str) -> None:
    model = on_meta(architecture)
    assert linear_names(model) == LINEAR[architecture]
    config = build_config(model, LoraSection(target_modules=LINEAR[architecture][:1]), None)
    assert config.target_modules == {LINEAR[architecture][0]}


@pytest.mark.parametrize("kind", ["Phimoe", "Llama4Text"])
def test_all_linear_leaves_out_routers_that_choose_experts(kind: str) -> None:
    """They are linear layers by class, and give more than a product."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320, **SWIGLU, pad_token_id=2, num_local_experts=2, intermediate_size_mlp=64
    )
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model = attach_adapter(base, LoraSection(rank=4), None, seed=0)
    reached = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert reached >= {"q_proj", "o_proj"} and not reached & {"router", "lm_head"}
    assert decoder_of(base)(input_ids=torch.arange(8)[None]).last_hidden_state.shape == (1, 8, 32)


def mixture() -> Any:
    """Experts in every layer but the first, and one that all tokens pass."""
    sizes = {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    config = transformers.Dots1Config(vocab_size=320, **SWIGLU, **sizes, n_shared_experts=1, first_k_dense_replace=1)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def test_layers_that_peft_passes_by_for_experts_are_told(capsys: Any) -> None:
    attach_adapter(mixture(), LoraSection(rank=4), None, seed=0)
    said = " ".join(capsys.readouterr().err.split())
    assert "trains the experts of this model (down_proj, gate.weight, gate_up_proj)" in said
    assert "6 have no adapter, such as model.layers.0.mlp.gate_proj" in said
    attach_adapter(mixture(), LoraSection(rank=4, target_modules=["q_proj"]), None, seed=0)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"target_modules": ["gate_proj"]}, "targeting up_proj"),
        ({"init": "pissa"}, "no attribute 'weight'"),
    ],
)
def test_what_peft_refuses_is_the_users_to_change(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=rf"adapter: PEFT does not train dots1 so: .*{reason}"):
        attach_adapter(mixture(), LoraSection(rank=4, **section), None, seed=0)


def test_all_linear_leaves_out_what_mamba_passes_by() -> None:
    config = transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    assert linear_names(base) == ["dt_proj", "in_proj", "x_proj"]
    attach_adapter(base, LoraSection(rank=4), None, seed=0)


@pytest.mark.parametrize(("wrong", "meant"), [("query_key_values", "query_key_value"), ("dense_h_4h", "dense_h_to_4h")])
def test_fm26_a_wrong_target_names_the_near_one_and_all(wrong: str, meant: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_config(on_meta("falcon"), LoraSection(target_modules=[wrong]), None)
    message = str(caught.value)
    assert "adapter.target_modules" in message and f"did you mean {meant}?" in message
    assert all(name in message for name in LINEAR["falcon"])


@pytest.mark.parametrize(
    ("section", "part"),
    [
        (
            {"exclude_modules": ["down_prj"]},
            "adapter.exclude_modules: the model has no module down_prj; did you mean down",
        ),
        ({"rank_pattern": {"q_prj": 64}}, "adapter.rank_pattern: the model has no module q_prj; did you mean q_proj?"),
        ({"alpha_pattern": {"layers.9.v_proj": 9}}, "adapter.alpha_pattern: the model has no module layers.9.v_proj"),
        ({"alpha_pattern": {"(": 9}}, "adapter.alpha_pattern: ( is no regular expression"),
        (
            {"exclude_modules": ["layers.0"]},
            "adapter.exclude_modules: layers.0 is no layer but holds some, and would leave none of them out; "
            "name the layers: layers.0.self_attn.q_proj, ",
        ),
        (
            {"rank_pattern": {"v_proj": 8}, "target_modules": ["q_proj"]},
            "adapter.rank_pattern: v_proj matches no layer that has an adapter",
        ),
        (
            {"rank_pattern": {"v_proj": 8}, "exclude_modules": ["v_proj"]},
            "adapter.rank_pattern: v_proj matches no layer that has an adapter",
        ),
        ({"alpha_pattern": {"lm_head": 8}}, "adapter.alpha_pattern: lm_head matches no layer that has an adapter"),
    ],
)
def test_fm26_other_names_of_the_adapter_are_looked_for_too(section: dict[str, Any], part: str) -> None:
    with pytest.raises(ModelError) as caught:
        require_names(on_meta("llama"), LoraSection(**section))
    assert str(caught.value).startswith(part)
    fine = {
        "exclude_modules": ["down_proj"],
        "rank_pattern": {r"layers\.0\..*q_proj": 4},
        "alpha_pattern": {"v_proj": 2},
    }
    require_names(on_meta("llama"), LoraSection(**fine))
    require_names(on_meta("llama"), LoraSection(exclude_modules=["lm_head", "layers.0.self_attn.q_proj"]))
    require_names(on_meta("llama"), LoraSection(target_modules=["lm_head"], rank_pattern={"lm_head": 8}))
    require_names(mixture(), LoraSection(rank_pattern={"experts": 8}))


def test_tokens_and_a_whole_head_of_tied_weights_are_refused() -> None:
    section = LoraSection(modules_to_save=["lm_head"], trainable_tokens=["<a>"])
    require_names(on_meta("llama"), section)
    require_names(on_meta("tied_llama"), section.model_copy(update={"trainable_tokens": []}))
    with pytest.raises(ModelError, match=r"the model's lm_head is its embedding .* remove trainable_tokens"):
        require_names(on_meta("tied_llama"), section)


def test_fm26_llama_names_on_falcon_list_the_candidates() -> None:
    with pytest.raises(ModelError, match=r"no module q_proj.*query_key_value"):
        build_config(on_meta("falcon"), LoraSection(target_modules=["q_proj", "v_proj"]), None)


def test_an_image_encoder_is_left_alone() -> None:
    model = on_meta("gemma3_images")
    assert linear_names(model) == LINEAR["llama"]
    targets = build_config(model, LoraSection(), None).target_modules
    assert len(targets) == 14 and all(name.startswith("model.language_model.layers.") for name in targets)
    named = build_config(model, LoraSection(target_modules=["q_proj", "lm_head"]), None).target_modules
    layers = [f"model.language_model.layers.{number}.self_attn.q_proj" for number in range(2)]
    assert named == {*layers, "lm_head"}
    assert build_config(on_meta("gemma3"), LoraSection(), None).target_modules == "all-linear"
