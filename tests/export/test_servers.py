"""Golden bad adapters: each is refused with its reason and a remedy, and good ones get the command that serves them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, LlamaConfig

from finetune.errors import BadInputError, ModelError
from finetune.export.servers import (
    SERVERS,
    VLLM_RANKS,
    lint_tgi,
    lint_vllm,
    read_facts,
    require_clean,
    tgi_command,
    vllm_command,
    vllm_rank,
)
from tests.tiny import write_model

BOTH = ("vllm", "tgi")
LLAMA = LlamaConfig(num_hidden_layers=2)
GOOD = {"q_proj": 8, "v_proj": 8}


def write(folder: Path, ranks: dict[str, int] | None = None, extra: tuple[str, ...] = (), **settings: Any) -> Path:
    """An adapter of two layers with these ranks by layer, or by whole module name."""
    tensors = {}
    for layer, rank in (GOOD if ranks is None else ranks).items():
        places = [layer] if "." in layer else [f"model.layers.{n}.self_attn.{layer}" for n in range(2)]
        for place in places:
            tensors[f"base_model.model.{place}.lora_A.weight"] = torch.zeros(rank, 4)
            tensors[f"base_model.model.{place}.lora_B.weight"] = torch.zeros(4, rank)
    tensors |= {f"base_model.model.{name}": torch.zeros(2) for name in extra}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# (server, what is wrong, the finding)
BAD: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (BOTH, {"use_dora": True, "extra": ("model.layers.0.self_attn.q_proj.lora_magnitude_vector",)}, "a DoRA adapter"),
    (BOTH, {"modules_to_save": ["lm_head"], "extra": ("lm_head.weight",)}, "modules_to_save: lm_head trained whole"),
    (BOTH, {"trainable_token_indices": [5]}, "embeddings of single tokens"),
    (BOTH, {"bias": "all"}, "bias: all changes biases of the base"),
    (BOTH, {"lora_bias": True}, "its matrices have biases"),
    (BOTH, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 took its initial values off the base's weights"),
    (BOTH, {"init_lora_weights": "olora"}, "olora took its initial values off the base's weights"),
    (BOTH, {"peft_type": "IA3"}, "peft_type IA3 is not LORA"),
    (BOTH, {"ranks": GOOD | {"model.lm_head": 8}}, "adapts lm_head; train with adapter.exclude_modules: [lm_head]"),
    (BOTH, {"extra": ("model.embed_tokens.lora_embedding_A",)}, "it adapts embed_tokens"),
    (BOTH, {"extra": ("model.norm.weight",)}, "1 tensors that are no LoRA matrices (model.norm.weight)"),
    (BOTH, {"ranks": {}}, "hold no LoRA matrices"),
    (BOTH, {"ranks": {"c_attn": 8}}, "it adapts c_attn; known layers of llama are down_proj, gate_proj"),
    (BOTH, {"alpha_pattern": {"v_proj": 4}}, "scale 2 layers apart (model.layers.0.self_attn.v_proj)"),
    (BOTH, {"ranks": {"q_proj": 600}, "r": 600}, "rank 600 is above"),
    (("tgi",), {"ranks": {"q_proj": 256}, "r": 256}, "rank 256 is above 128, where TGI's kernels end"),
    (("tgi",), {"ranks": {"model.layers.1.self_attn.q_proj": 8}}, "adapted in 1 of 2 layers, and TGI then drops all"),
    (
        ("tgi",),
        {
            "ranks": {"model.layers.0.self_attn.q_proj": 8, "model.layers.1.self_attn.q_proj": 4},
            "rank_pattern": {"1.self_attn.q_proj": 4},
            "alpha_pattern": {"1.self_attn.q_proj": 8},
        },
        "q_proj has ranks 4, 8; give each kind of layer one rank",
    ),
]


@pytest.mark.parametrize(("servers", "settings", "part"), BAD, ids=[part[:30] for _, _, part in BAD])
def test_fm28_a_bad_adapter_is_refused_with_the_reason(
    servers: tuple[str, ...], settings: dict[str, Any], part: str, tmp_path: Path
) -> None:
    facts = read_facts(write(tmp_path, **settings), LLAMA)
    for server in BOTH:
        title, lint, _ = SERVERS[server]
        if server not in servers:
            require_clean(title, tmp_path, "runs/x", lint(facts))
            continue
        with pytest.raises(BadInputError, match=re.escape(part)) as caught:
            require_clean(title, tmp_path, "runs/my run", lint(facts))
        assert str(caught.value).endswith("serve the merged model instead: finetune merge 'runs/my run'")
        assert len(lint(facts)) == 1, "one mistake, one finding"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 8},
        {"ranks": {"q_proj": 3}, "r": 3},
        # Patterns that leave every layer's alpha / rank where it was.
        {"ranks": {"q_proj": 8, "v_proj": 4}, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 8}},
        {"extra": ("lm_head.base_layer.weight",)},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "odd rank", "patterns", "copied head", "gaussian"],
)
def test_a_good_adapter_is_taken(settings: dict[str, Any], tmp_path: Path) -> None:
    facts = read_facts(write(tmp_path, **settings), LLAMA)
    assert lint_vllm(facts) == lint_tgi(facts) == []


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_only_what_peft_has_converted_fits_the_published_base(init: str, tmp_path: Path) -> None:
    """What a server computes, base + scale B A, is the trained model after PEFT's conversion and another without."""
    base = write_model(tmp_path / "base", "llama")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    model.peft_config["default"].init_lora_weights = init
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.tensor([[1, 60, 200, 17, 300]])
    with torch.no_grad():
        want = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    for folder, fits in (("raw", False), ("converted", True)):
        served = AutoModelForCausalLM.from_pretrained(base).eval()
        settings = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        state = load_file(tmp_path / folder / "adapter_model.safetensors")
        for key in (key for key in state if "lora_A" in key):
            weight = served.get_parameter(key.removeprefix("base_model.model.").replace("lora_A.", ""))
            scale = settings["lora_alpha"] / settings["r"]
            weight.data += scale * state[key.replace("lora_A", "lora_B")] @ state[key]
        with torch.no_grad():
            assert torch.allclose(served(ids).logits, want, atol=1e-3) == fits
        facts = read_facts(tmp_path / folder, served.config)
        assert (lint_vllm(facts) == lint_tgi(facts) == []) == fits


@pytest.mark.parametrize("config", [FalconConfig(num_hidden_layers=2), GPT2Config(n_layer=2)], ids=["falcon", "gpt2"])
def test_models_without_adapters_are_named(config: Any, tmp_path: Path) -> None:
    facts = read_facts(write(tmp_path, {"transformer.h.0.self_attention.query_key_value": 8}), config)
    assert [finding.what for finding in lint_vllm(facts)] == [
        f"vLLM serves {config.model_type} models without adapters only"
    ]
    assert f"TGI serves {config.model_type} models without adapters" in lint_tgi(facts)[0].what


@pytest.mark.parametrize(("rank", "step"), [(1, 1), (4, 8), (8, 8), (9, 16), (200, 256), (300, 320), (512, 512)])
def test_the_rank_of_vllm_is_the_next_step(rank: int, step: int, tmp_path: Path) -> None:
    facts = read_facts(write(tmp_path, {"q_proj": rank}, r=rank), LLAMA)
    assert vllm_rank(facts) == step and step in VLLM_RANKS


def test_the_commands(tmp_path: Path) -> None:
    facts = read_facts(write(tmp_path, {"q_proj": 12}, r=12), LLAMA)
    assert vllm_command("org/base", None, "mine", tmp_path, facts) == (
        f"vllm serve org/base --enable-lora --lora-modules mine={tmp_path} --max-lora-rank 16"
    )
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert f" --tokenizer {tmp_path} " in vllm_command("org/base", None, "mine", tmp_path, facts)
    assert tgi_command("org/base", "abc", "mine", tmp_path, facts) == (
        f"text-generation-launcher --model-id org/base --revision abc --lora-adapters mine={tmp_path}"
    )


def test_a_damaged_adapter_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ModelError, match="cannot be read as an adapter"):
        read_facts(tmp_path, LLAMA)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        read_facts(tmp_path / "nowhere", LLAMA)
